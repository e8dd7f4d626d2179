"""Fits a plan to a given time: width, patch, iterations and schedule from measured steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from umamba.planning.footprint import StepCheck
from umamba.planning.topology import network_divisor

ENOUGH_ITERATIONS = 500
"""Iterations that a short schedule needs before a wider network pays: below, narrower wins."""

WORTH_ITERATIONS = 0.7
"""A wider network is taken while it gets this share of the narrower one's iterations."""

LONG_ITERATIONS = 50_000
"""From here on nnU-Net's own recipe (SGD, poly, full augmentation) is kept."""

FULL_AUGMENTATION_PASSES = 150
"""Passes over the training cases from which nnU-Net's full augmentation is used."""

LOADING = 1.1
"""Time of an iteration in training over that of a bare step: data loading, logging, checkpoints."""

SMALLEST_EDGE = 16
"""Voxels below which no axis of a patch is shrunk."""

MEASURING_SHARE = 0.05
"""Share of the time that measuring steps may take."""

STEPS_TO_MEASURE = 2
"""One to warm up and one to time."""


@dataclass(frozen=True)
class Candidate:
    """One size that the plan could take; `cost` is relative to the planned size (1.0)."""

    features_per_stage: tuple[int, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    cost: float


@dataclass(frozen=True)
class Fit:
    """The chosen size, seconds of a training step and of a forward pass, and how many steps fit."""

    candidate: Candidate
    step_seconds: float
    forward_seconds: float
    n_iterations: int
    reasons: tuple[str, ...]


def candidates(
    features_per_stage: Sequence[int],
    patch_size: Sequence[int],
    batch_size: int,
    strides: Sequence[Sequence[int]],
) -> list[Candidate]:
    """Sizes from the smallest cost to the planned one: narrower networks, then smaller patches.

    The batch is the smallest that nnU-Net plans with (2) in 3D; in 2D as many patches as hold
    2^17 pixels, at least 2 and at most the planned batch.
    """
    voxels = math.prod(patch_size)
    if len(patch_size) == 2:
        batch = max(2, min(batch_size, 2**17 // voxels))
    else:
        batch = min(2, batch_size)
    planned = _work(features_per_stage, patch_size, batch_size)
    found: dict[tuple, Candidate] = {}
    for patch in _patches(patch_size, network_divisor(strides)):
        for share in (1.0, 0.5, 0.25):
            features = tuple(_width(f * share) for f in features_per_stage)
            cost = _work(features, patch, batch) / planned
            found[(features, patch)] = Candidate(features, patch, batch, cost)
    return sorted(found.values(), key=lambda c: (math.prod(c.patch_size), c.cost))


def fit(
    sizes: Sequence[Candidate],
    measure: Callable[[Candidate], StepCheck],
    seconds: float,
    memory_bytes: int | None = None,
) -> Fit:
    """The largest of `sizes` whose steps fit often enough into `seconds` of training.

    At the planned patch the widest network that gets ENOUGH_ITERATIONS; a smaller patch only where
    even the narrowest does not.  The narrowest is measured, and wider ones as long as measuring
    takes a small share of the time; beyond that their arithmetic tells.  A size whose measured peak
    is above `memory_bytes` is left out.
    """
    stopwatch = _Stopwatch(measure, MEASURING_SHARE * seconds)
    best: Fit | None = None
    for patch in sorted({c.patch_size for c in sizes}, key=math.prod, reverse=True):
        narrow_first = sorted((c for c in sizes if c.patch_size == patch), key=lambda c: c.cost)
        for candidate in narrow_first:
            step_seconds, forward_seconds, peak = stopwatch.step(candidate)
            if memory_bytes is not None and peak > memory_bytes:
                break
            n_iterations = max(1, int((seconds - stopwatch.spent) / step_seconds))
            here = best is not None and best.candidate.patch_size == patch
            if here and best is not None:
                # A narrower network must buy many more iterations to be worth its width.
                wanted = min(ENOUGH_ITERATIONS, WORTH_ITERATIONS * best.n_iterations)
                if n_iterations < wanted:
                    break
            if best is None or here or n_iterations > best.n_iterations:
                best = Fit(candidate, step_seconds, forward_seconds, n_iterations, ())
        if best is not None and best.n_iterations >= ENOUGH_ITERATIONS:
            break
    if best is None:
        raise ValueError(
            "not even the smallest size of this network fits into the memory: give --memory more "
            "gigabytes, or choose the configuration 3d_lowres or 2d"
        )
    return replace(best, reasons=_reasons(best, seconds))


class _Stopwatch:
    """Iteration times: measured while there is time for it, else scaled from the last measured."""

    def __init__(self, measure: Callable[[Candidate], StepCheck], allowance: float) -> None:
        self.measure = measure
        self.allowance = allowance
        self.spent = 0.0
        self._last: tuple[Candidate, float, float] | None = None

    def step(self, candidate: Candidate) -> tuple[float, float, int]:
        """Seconds of an iteration in training, of a forward pass of its batch, and the peak bytes.

        The peak is 0 where the times were scaled.
        """
        if self._last is not None:
            measured, seconds, forward = self._last
            times = candidate.cost / measured.cost
            if self.spent + STEPS_TO_MEASURE * seconds * times > self.allowance:
                return seconds * times, forward * times, 0
        check = self.measure(candidate)
        self.spent += STEPS_TO_MEASURE * check.seconds
        self._last = (candidate, LOADING * check.seconds, check.forward_seconds)
        return LOADING * check.seconds, check.forward_seconds, check.peak_bytes


def budget_recipe(n_iterations: int, batch_size: int, n_cases: int, train_seconds: float) -> dict:
    """The recipe for `n_iterations` steps in `train_seconds`, as a plain dict for the plans.

    Short schedules get AdamW with warm-up and a cosine to zero, and light augmentation while the
    cases are seen few times; from LONG_ITERATIONS on everything but the clock is nnU-Net's own.
    """
    n_epochs = max(5, min(n_iterations // 30, 40 if n_iterations < LONG_ITERATIONS else 1000))
    per_epoch = max(1, n_iterations // n_epochs)
    recipe: dict[str, object] = {
        "train_seconds": round(train_seconds, 1),
        "num_epochs": n_epochs,
        "num_iterations_per_epoch": per_epoch,
        "num_val_iterations_per_epoch": max(1, min(50, per_epoch // 10)),
    }
    if n_iterations < LONG_ITERATIONS:
        passes = n_iterations * batch_size / max(1, n_cases)
        recipe |= {
            "optimizer": "adamw",
            "initial_lr": 3e-3,
            "weight_decay": 1e-2,
            "schedule": "cosine",
            "warmup": 0.05,
        }
        if passes < FULL_AUGMENTATION_PASSES:
            # Mirrored patches are another task to learn: they cost a short schedule more than the
            # variety gives back.
            recipe |= {"augmentation": "light", "mirroring": False}
    return recipe


def validation_seconds(
    shapes: Sequence[Sequence[float]],
    n_cases: int,
    patch_size: Sequence[int],
    forward_seconds: float,
    n_passes: int = 1,
    n_together: int = 1,
) -> float:
    """Seconds that predicting `n_cases` of such shapes takes, tile by tile at half-patch steps.

    Args:
        shapes: voxels per axis of the training cases at the planned spacing; their mean counts.
        forward_seconds: of one tile.
        n_passes: forward passes per tile: 1, and more with mirroring.
        n_together: tiles that share a pass; a case's last pass takes as long if there are fewer.
    """
    passes = [math.ceil(_n_tiles(shape, patch_size) / n_together) for shape in shapes]
    tiles = [n_together * n for n in passes]
    mean_tiles = sum(tiles) / max(1, len(tiles))
    voxels = sum(math.prod(shape) for shape in shapes) / max(1, len(shapes))
    return n_cases * (mean_tiles * forward_seconds * n_passes + 0.03 + 2e-7 * voxels)


def _n_tiles(shape: Sequence[float], patch_size: Sequence[int]) -> int:
    if len(shape) > len(patch_size):
        slices = math.prod(math.ceil(s) for s in shape[: len(shape) - len(patch_size)])
        return slices * _n_tiles(shape[-len(patch_size) :], patch_size)
    steps = (
        1 if s <= p else math.ceil((s - p) / (p / 2)) + 1
        for s, p in zip(shape, patch_size, strict=True)
    )
    return math.prod(steps)


def _patches(patch_size: Sequence[int], divisor: Sequence[int]) -> list[tuple[int, ...]]:
    """The patch, then ever smaller ones: the longest axis (in divisors) shrinks first."""
    patch = [int(size) for size in patch_size]
    found = [tuple(patch)]
    smallest = [max(2 * d, SMALLEST_EDGE) for d in divisor]
    while len(found) < 4:
        target = math.prod(patch) * 0.6
        while math.prod(patch) > target:
            axes = [a for a in range(len(patch)) if patch[a] - divisor[a] >= smallest[a]]
            if not axes:
                return found
            axis = max(axes, key=lambda a: patch[a] / divisor[a])
            patch[axis] -= divisor[axis]
        found.append(tuple(patch))
    return found


def _width(features: float) -> int:
    # Convolution libraries work in blocks of 16 channels: 24 take more than twice the time of 16.
    return 8 if features < 12 else round(features / 16) * 16


def _work(features: Sequence[int], patch: Sequence[int], batch: int) -> float:
    # Each stage has about the same number of voxels x channels^2 per halving in 2D and less in 3D;
    # the finest stage dominates, and its share that does not shrink with the width is memory-bound.
    return batch * math.prod(patch) * features[0] * (features[0] + 8)


def _reasons(best: Fit, seconds: float) -> tuple[str, ...]:
    chosen = best.candidate
    text = (
        f"one step of batch {chosen.batch_size}, patch {'x'.join(map(str, chosen.patch_size))} and "
        f"{chosen.features_per_stage[0]} features takes {best.step_seconds:.2f} s here, so about "
        f"{best.n_iterations} iterations fit into {seconds:.0f} s of training"
    )
    reasons = [text]
    if best.n_iterations < ENOUGH_ITERATIONS:
        reasons.append(
            f"that is fewer than the {ENOUGH_ITERATIONS} that a usable result tends to need: "
            "give more minutes if you can"
        )
    return tuple(reasons)
