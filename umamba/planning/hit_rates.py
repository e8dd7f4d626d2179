"""How often a training patch holds each class: measured on preprocessed cases, or guessed."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umamba.preprocessing.class_locations import corner_bounds, count_locations, jittered_bounds

OVERSAMPLED = 0.33  # nnU-Net's share of patches with forced foreground
READ_CASES = 40  # spread over the dataset; as many again that have a class few cases have
READ_PER_CLASS = 12
N_RANDOM, N_FORCED = 256, 24  # patches per case, and per case and class
MOST_VOXELS = 2000  # of a class of a case


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
    asked which classes they have, and at most about `READ_CASES` and `READ_PER_CLASS` per class
    are read.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    data = nnUNetDatasetBlosc2(str(folder))
    patch = np.array([1] * (3 - len(patch_size)) + list(patch_size))
    files = {name: folder / f"{name}.pkl" for name in data.identifiers}
    counts = {name: count_locations(file) for name, file in files.items() if file.is_file()}
    owners = [[name for name in counts if counts[name].get(key)] for key in classes]
    chosen = set(_spread(list(counts), READ_CASES))
    for names in owners:
        chosen.update(_spread(names, READ_PER_CLASS))
    generator = np.random.default_rng(0)
    rows = []
    for name in sorted(chosen):
        image, _, _, properties = data.load_case(name)
        located = properties["class_locations"]
        voxels = [_thinned(located[key], generator) for key in classes]
        # With an ignore label nnU-Net draws around annotated voxels where it forces nothing.
        annotated = [v for k, v in located.items() if isinstance(k, tuple) and k[0] == -1]
        anywhere = _thinned(annotated[0], generator) if annotated else None
        rows.append(draw_patches(voxels, image.shape[1:], patch, generator, anywhere))
    return _mean_rates(rows, np.array([len(names) for names in owners]), len(counts))


def draw_patches(
    voxels: Sequence[np.ndarray],
    shape: Sequence[int],
    patch: np.ndarray,
    generator: np.random.Generator,
    anywhere: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the shares of patches of one case that hold each class: random, centered, jittered.

    voxels: (n, 3) of each of C classes, n may be 0. random: (C,); centered and jittered: (C, C),
    forced on the first class, 0 where the case has none of it. anywhere: (n, 3) voxels that
    patches without forced foreground are drawn around, in place of anywhere in the image.
    """
    lowest, highest = corner_bounds(shape, patch, (0, 0, 0))
    if anywhere is None:
        corners = generator.integers(lowest, highest + 1, (N_RANDOM, 3))
    else:
        corners = np.maximum(lowest, generator.choice(anywhere, N_RANDOM) - patch // 2)
    random = _hits(corners, voxels, patch)
    centered, jittered = (np.zeros((len(voxels), len(voxels))) for _ in range(2))
    for index, own in enumerate(voxels):
        if len(own):
            middle = generator.choice(own, N_FORCED)
            corners = np.maximum(lowest, middle - patch // 2)
            centered[index] = _hits(corners, voxels, patch)
            low, high = jittered_bounds(middle, shape, patch, patch, (0, 0, 0))
            jittered[index] = _hits(generator.integers(low, high + 1), voxels, patch)
    return random, centered, jittered


def _hits(corners: np.ndarray, voxels: Sequence[np.ndarray], patch: np.ndarray) -> np.ndarray:
    """(C,) the share of patches at `corners` (n, 3) that hold a voxel of each class."""
    shares = np.zeros(len(voxels))
    corners = corners.astype(np.int32)
    for index, own in enumerate(each.astype(np.int32) for each in voxels):
        inside = np.ones((len(corners), len(own)), bool)
        for axis, extent in enumerate(patch):
            offset = own[None, :, axis] - corners[:, axis, None]
            inside &= offset.view(np.uint32) < int(extent)  # what is negative is large there
        shares[index] = inside.any(axis=1).mean()
    return shares


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
