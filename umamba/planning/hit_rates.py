"""How often a training patch holds each class: measured on preprocessed cases, or guessed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umamba.preprocessing.class_locations import corner_bounds, count_locations, jittered_bounds

OVERSAMPLED = 0.33  # nnU-Net's share of patches with forced foreground
READ_CASES = 40  # spread over the dataset; further ones until so many have each class:
READ_PER_CLASS = 12
N_RANDOM, N_FORCED = 256, 24  # patches per case, and per case and class
MOST_VOXELS = 2000  # of a class of a case
FIRST_VOXELS = 64  # of these


@dataclass(frozen=True)
class HitRates:
    """Shares of patches that hold each of C classes.

    n_cases: (C,) cases that have the class, of `n_total`. random: (C,) share of patches anywhere
    in a case that has the class. centered, jittered: (C,) share of forced patches in such a case,
    where nnU-Net chooses among its classes and the voxel is in the middle, or anywhere. balanced:
    (C, C) share of jittered patches forced on the first class that hold the second.
    """

    n_cases: np.ndarray
    n_total: int
    random: np.ndarray
    centered: np.ndarray
    jittered: np.ndarray
    balanced: np.ndarray

    def per_patch(
        self, sampling: str | None, batch_size: int, weights: Sequence[float] | None = None
    ) -> np.ndarray:
        """Returns (C,) the share of all training patches that hold each class.

        sampling: that of the recipe; None: no patch is forced. weights: the recipe's class_weights.
        """
        has_class = self.n_cases / self.n_total
        anywhere = has_class * self.random
        if sampling is None:
            return anywhere
        if sampling == "balanced":
            chosen = np.ones(len(anywhere)) if weights is None else np.asarray(weights)
            chosen = chosen * (self.n_cases > 0)
            forced = chosen @ self.balanced / max(chosen.sum(), 1e-12)
        else:
            forced = has_class * (self.centered if sampling == "stock" else self.jittered)
        share = n_forced(batch_size) / batch_size
        return share * forced + (1 - share) * anywhere


def n_forced(batch_size: int) -> int:
    """Returns how many patches of a batch nnU-Net forces to hold foreground."""
    return batch_size - round(batch_size * (1 - OVERSAMPLED))


def measure_hit_rates(
    folder: Path, patch_size: Sequence[int], classes: Sequence[Hashable]
) -> HitRates:
    """Draws patches in cases of a preprocessed folder and counts what they hold.

    patch_size: voxels, 2 or 3 axes. classes: the keys of nnU-Net's class_locations. All cases are
    asked which classes they have; `READ_CASES` are read, and more where of a class they hold fewer
    than `READ_PER_CLASS`.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    data = nnUNetDatasetBlosc2(str(folder))
    patch = np.array([1] * (3 - len(patch_size)) + list(patch_size))
    files = {name: folder / f"{name}.pkl" for name in data.identifiers}
    counts = {name: count_locations(file) for name, file in files.items() if file.is_file()}
    owners = [[name for name in counts if counts[name].get(key)] for key in classes]
    chosen = set(_spread(list(counts), READ_CASES))
    for names in owners:
        further = [name for name in names if name not in chosen]
        n_chosen = len(names) - len(further)
        chosen.update(_spread(further, max(0, READ_PER_CLASS - n_chosen)))
    generator = np.random.default_rng(0)
    rows = []
    for name in sorted(chosen):
        image, _, _, properties = data.load_case(name)
        located = properties["class_locations"]
        voxels = [_thinned(located.get(key, ()), generator) for key in classes]
        # With an ignore label nnU-Net draws around annotated voxels where it forces nothing.
        annotated = [v for k, v in located.items() if isinstance(k, tuple) and k[0] == -1]
        anywhere = _thinned(annotated[0] if annotated else (), generator)
        rows.append(draw_patches(voxels, image.shape[1:], patch, generator, anywhere))
    return _mean_rates(rows, np.array([len(names) for names in owners]), len(counts))


def draw_patches(
    voxels: Sequence[np.ndarray],
    shape: Sequence[int],
    patch: np.ndarray,
    generator: np.random.Generator,
    anywhere: np.ndarray | Sequence = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the shares of patches of one case that hold each class: random, centered, jittered.

    voxels: (n, 3) of each of C classes, n may be 0. random: (C,); centered and jittered: (C, C),
    forced on the first class, 0 where the case has none of it. anywhere: (n, 3) voxels that
    patches without forced foreground are drawn around; where n is 0, they lie anywhere.
    """
    lowest, highest = corner_bounds(shape, patch, (0, 0, 0))
    if not len(anywhere):
        corners = [generator.integers(lowest, highest + 1, (N_RANDOM, 3))]
    else:
        corners = [np.maximum(lowest, generator.choice(anywhere, N_RANDOM) - patch // 2)]
    present = [index for index, own in enumerate(voxels) if len(own)]
    for index in present:
        middle = generator.choice(voxels[index], N_FORCED)
        low, high = jittered_bounds(middle, shape, patch, patch, (0, 0, 0))
        corners += [np.maximum(lowest, middle - patch // 2), generator.integers(low, high + 1)]
    held = _held(np.concatenate(corners), voxels, patch)
    forced = np.zeros((2, len(voxels), len(voxels)))
    by_class = held[N_RANDOM:].reshape(len(present), 2, N_FORCED, len(voxels)).mean(2)
    forced[:, present] = by_class.swapaxes(0, 1)
    return held[:N_RANDOM].mean(0), forced[0], forced[1]


def _held(corners: np.ndarray, voxels: Sequence[np.ndarray], patch: np.ndarray) -> np.ndarray:
    """(n, C) bool: which of the patches at `corners` (n, 3) hold a voxel of each class."""
    held = np.zeros((len(corners), len(voxels)), bool)
    corners = corners.astype(np.int32)
    for index, own in enumerate(voxels):
        if not len(own):
            continue
        own = own.astype(np.int32)
        near = (corners <= own.max(0)) & (corners + patch > own.min(0))
        unknown = np.flatnonzero(near.all(1))
        # Most patches that hold a class hold some of its first voxels: they lie in random order.
        for part in (own[:FIRST_VOXELS], own[FIRST_VOXELS:]):
            inside = np.ones((len(unknown), len(part)), bool)
            for axis, extent in enumerate(patch):
                offset = part[None, :, axis] - corners[unknown, None, axis]
                inside &= offset.view(np.uint32) < int(extent)  # unsigned: below 0 is much
            found = inside.any(axis=1)
            held[unknown[found], index] = True
            unknown = unknown[~found]
    return held


def _mean_rates(
    rows: Sequence[tuple[np.ndarray, ...]], n_cases: np.ndarray, n_total: int
) -> HitRates:
    """The mean of each rate over the cases that were read and have the class."""
    random, centered, jittered = (np.stack(part) for part in zip(*rows, strict=True))
    has = np.diagonal(centered, axis1=1, axis2=2) > 0  # (cases, C)
    n_read = np.maximum(has.sum(0), 1)
    n_classes = np.maximum(has.sum(1), 1)[:, None]
    return HitRates(
        n_cases=n_cases,
        n_total=n_total,
        random=(random * has).sum(0) / n_read,
        centered=(centered.sum(1) / n_classes * has).sum(0) / n_read,
        jittered=(jittered.sum(1) / n_classes * has).sum(0) / n_read,
        balanced=jittered.sum(0) / n_read[:, None],
    )


def guess_hit_rates(
    facts: Sequence[Mapping[str, Any]],
    shape: Sequence[int],
    patch_size: Sequence[int],
    voxels_per_voxel: float,
    n_total: int,
) -> HitRates:
    """Guesses from the audit, before anything is preprocessed.

    Every class is its median number of cubes of its median volume, each anywhere in an image of
    `shape`, independent of all others. facts: the audit's, per class. voxels_per_voxel: of the
    plan's spacing, per voxel of the files.
    """
    patch = np.array([1] * (3 - len(patch_size)) + list(patch_size))
    random = []
    for fact in facts:
        parts = fact["components"]
        side = max(1, round((parts["median_voxels"] * voxels_per_voxel) ** (1 / 3)))
        chances = [_overlaps(*sizes, side) for sizes in zip(shape, patch, strict=True)]
        one = np.einsum("i,j,k->ijk", *chances)
        random.append(float(np.mean(1 - (1 - one) ** max(parts["per_case_median"], 1))))
    hit = np.array(random)
    n_cases = np.array([fact["n_cases"] for fact in facts])
    present = n_cases / n_total
    forced = 1 / max(present.sum(), 1.0)
    centered = forced + (1 - forced) * hit
    balanced = np.where(np.eye(len(hit), dtype=bool), 1.0, present * hit)
    return HitRates(n_cases, n_total, hit, centered, centered, balanced)


def _overlaps(extent: int, patch: int, side: int) -> np.ndarray:
    """The chance, per position of a patch on an axis, that it overlaps an object anywhere there."""
    n_positions = max(extent - patch, 0) + 1
    corners = np.unique(np.linspace(0, n_positions - 1, 64).astype(int))[:, None]
    objects = np.arange(max(extent - side, 0) + 1)
    return np.mean((objects < corners + patch) & (corners < objects + side), axis=1)


def _spread(names: Sequence[str], n: int) -> list[str]:
    """At most `n` of the names, evenly over all."""
    indices = np.linspace(0, len(names) - 1, min(n, len(names))).astype(int)
    return [names[index] for index in indices]


def _thinned(located: Any, generator: np.random.Generator) -> np.ndarray:
    """(n, 3) at most MOST_VOXELS of the voxels that nnU-Net lists with a channel in front."""
    if len(located) == 0:
        return np.zeros((0, 3), int)
    voxels = np.asarray(located)[:, 1:]
    if len(voxels) <= MOST_VOXELS:
        return voxels
    return generator.choice(voxels, MOST_VOXELS, replace=False)
