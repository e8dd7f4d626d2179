"""Fits a plan to a given time: width, patch, iterations and schedule from measured steps."""

import dataclasses
import functools
import math
import pydoc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from umamba.networks.base import SHORT_TRAINING_LR
from umamba.planning.footprint import GIB
from umamba.planning.measure import StepCheck
from umamba.planning.plans import (
    Plans,
    check_plan,
    get_configuration,
    preprocessed_folder,
    read_json,
    replan,
)
from umamba.planning.sizes import (
    NOTHING_FITS,
    Candidate,
    fitting_sizes,
    sizes_of,
)

ENOUGH_ITERATIONS = 500  # what a short schedule needs before a wider network pays
FEW_ITERATIONS = 60  # a 2D batch is made smaller to get so many
WORTH_ITERATIONS = 0.7  # share of the narrower network's iterations that a wider one must get
LONG_ITERATIONS = 50_000  # from here on nnU-Net's own recipe (SGD, poly, full augmentation) is kept
FULL_AUGMENTATION_PASSES = 150  # over the training cases: from here on nnU-Net's full augmentation
LOADING = 1.1  # an iteration over a bare step: data loading, logging, checkpoints
MEASURING_SHARE = 0.05  # of the time, for measuring steps
STEPS_TO_MEASURE = 2  # one to warm up and one to time
MEASURED_SAMPLES = 8  # of a batch, at most
OVERHEAD_SECONDS = 18.0  # starting the loaders, the last checkpoint and the report
VALIDATION_MARGIN = 1.5  # over its estimate: training can wait for a slow machine, this cannot
MOST_FOR_VALIDATION = 0.5  # share of the time that validation may be given


@dataclass(frozen=True)
class Fit:
    """The chosen size, seconds of a training step and of a forward pass, and how many steps fit."""

    candidate: Candidate
    step_seconds: float
    forward_seconds: float
    n_iterations: int


def fit_to_time(
    plans: Plans,
    configuration: str,
    *,
    seconds: float,
    fold: int | str,
    device: str,
    memory_gb: float | None = None,
) -> Plans:
    """Returns plans whose training, validation and report take `seconds` on this machine.

    The configuration gets the largest width and patch whose steps fit often enough, two patches a
    batch, and a schedule that follows the clock; of a named recipe only the length changes.
    Raises ValueError when too little time is left.
    """
    started = time.monotonic()
    part = get_configuration(plans, configuration)
    memory = None if memory_gb is None else int(memory_gb * GIB)
    keeps_widths = "features_per_stage" in plans.get("umamba", {}).get("network_args", {})
    sizes = fitting_sizes(sizes_of(part, keeps_widths), part, memory, device)
    shapes = planned_shapes(plans, part["spacing"])
    n_validation = len(shapes) if fold == "all" else max(1, round(len(shapes) / 5))
    n_training = len(shapes) if fold == "all" else max(1, len(shapes) - n_validation)
    n_axes = len(part["patch_size"])
    is_named = part.get("recipe", {}).get("name") is not None
    network_class = pydoc.locate(part["architecture"]["network_class_name"])
    lr = getattr(network_class, "short_training_lr", SHORT_TRAINING_LR)
    recipe_for = functools.partial(
        budget_recipe, n_cases=n_training, initial_lr=lr, is_named=is_named
    )

    @functools.cache
    def measure(size: Candidate) -> StepCheck:
        return _measure(plans, configuration, size, device)

    def choose(share: float) -> tuple[Fit, float, float]:
        """The size for what is left beside validation, its seconds, and those of validation."""
        left = seconds - OVERHEAD_SECONDS - share
        found = fit(sizes, measure, max(left, 1.0), memory)
        size = found.candidate
        recipe = recipe_for(found.n_iterations, size.batch_size, train_seconds=left)
        needed = validation_seconds(
            shapes,
            n_validation,
            size.patch_size,
            found.forward_seconds / size.batch_size,
            1 + (2**n_axes if recipe.get("mirroring", True) else 0),
            n_together=2 if n_axes == 3 else 1,
        )
        return found, left, min(MOST_FOR_VALIDATION * seconds, VALIDATION_MARGIN * needed)

    # The first choice does not know how long validation takes: that depends on the choice.
    found, left, share = choose(choose(0.0)[-1])
    spent = time.monotonic() - started
    train_seconds = seconds - spent - OVERHEAD_SECONDS - share
    if train_seconds < seconds / 4:
        raise ValueError(
            f"of the {seconds:.0f} s that are left only {max(train_seconds, 0):.0f} s would go "
            f"into training, the rest into reading, measuring, validating {n_validation} cases and "
            "reporting: give more --minutes"
        )
    size = found.candidate
    n_iterations = max(1, int(train_seconds / found.step_seconds))
    return replan(
        plans,
        configuration,
        patch_size=size.patch_size,
        batch_size=size.batch_size,
        features_per_stage=size.features_per_stage,
        recipe=recipe_for(n_iterations, size.batch_size, train_seconds=train_seconds),
        reason=f"{_explain(found, max(left, 1.0))}; {train_seconds / 60:.1f} min of training, "
        f"{share / 60:.1f} min kept for validation",
    )


def days_of_training(plans: Plans, configuration: str, n_iterations: int, device: str) -> float:
    """Returns the days that `n_iterations` of the planned size would take on this machine.

    Measured is the narrowest network at the largest patch that this machine can hold, and scaled by
    the arithmetic.
    """
    part = get_configuration(plans, configuration)
    sizes = fitting_sizes(sizes_of(part), part, None, device)
    narrow = max(sizes, key=lambda size: (math.prod(size.patch_size), -size.cost))
    step = _measure(plans, configuration, narrow, device)
    return step.seconds / narrow.cost * n_iterations / 86400


def planned_shapes(plans: Mapping[str, Any], spacing: Sequence[float]) -> np.ndarray:
    """Returns the cases' shapes (cases, 3) at the planned spacing, in the planned axis order."""
    fingerprint = read_json(preprocessed_folder(plans["dataset_name"]) / "dataset_fingerprint.json")
    order = plans["transpose_forward"]
    shapes = np.array(fingerprint["shapes_after_crop"], float)[:, order]
    spacings = np.array(fingerprint["spacings"])[:, order]
    planned = slice(3 - len(spacing), None)  # a 2d configuration leaves the slices alone
    shapes[:, planned] = shapes[:, planned] * spacings[:, planned] / spacing
    return shapes


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
    is above `memory_bytes`, or for which memory runs out, is left out.  Where even so
    FEW_ITERATIONS do not fit, a batch of more than two samples is made smaller.
    """
    best: Fit | None = None
    measured: Fit | None = None
    spent = 0.0
    for patch in sorted({c.patch_size for c in sizes}, key=math.prod, reverse=True):
        here: Fit | None = None
        for size in sorted((c for c in sizes if c.patch_size == patch), key=lambda c: c.cost):
            if measured:
                times = size.cost / measured.candidate.cost
                step, forward = times * measured.step_seconds, times * measured.forward_seconds
            if not measured or spent + STEPS_TO_MEASURE * step <= MEASURING_SHARE * seconds:
                try:
                    check = measure(size)
                except MemoryError:
                    break
                spent += STEPS_TO_MEASURE * check.seconds
                step, forward = LOADING * check.seconds, check.forward_seconds
                measured = Fit(size, step, forward, 0)
                if memory_bytes is not None and check.peak_bytes > memory_bytes:
                    break
            fitted = Fit(size, step, forward, max(1, int((seconds - spent) / step)))
            if here:
                # A narrower network must buy many more iterations to be worth its width.
                wanted = min(ENOUGH_ITERATIONS, WORTH_ITERATIONS * here.n_iterations)
                if fitted.n_iterations < wanted:
                    break
            if best is None or here or fitted.n_iterations > best.n_iterations:
                best = here = fitted
        if best and best.n_iterations >= ENOUGH_ITERATIONS:
            break
    if best is None:
        raise ValueError(NOTHING_FITS)
    size = best.candidate
    batch = max(2, size.batch_size * best.n_iterations // FEW_ITERATIONS)
    if batch >= size.batch_size:
        return best
    share = batch / size.batch_size
    smaller = dataclasses.replace(size, batch_size=batch, cost=share * size.cost)
    step, forward = share * best.step_seconds, share * best.forward_seconds
    return Fit(smaller, step, forward, int(best.n_iterations / share))


def budget_recipe(
    n_iterations: int,
    batch_size: int,
    n_cases: int,
    train_seconds: float,
    initial_lr: float = SHORT_TRAINING_LR,
    is_named: bool = False,
) -> dict:
    """The recipe for `n_iterations` steps in `train_seconds`, as a plain dict for the plans.

    Short schedules get AdamW with warm-up and a cosine to zero, and light augmentation while the
    cases are seen few times; from LONG_ITERATIONS on, and for a named recipe (is_named), everything
    but the clock is nnU-Net's or the recipe's own.
    """
    is_long = n_iterations >= LONG_ITERATIONS
    n_epochs = max(5, min(n_iterations // 30, 1000 if is_long else 40))
    per_epoch = max(1, n_iterations // n_epochs)
    recipe: dict[str, object] = {
        "train_seconds": round(train_seconds, 1),
        "num_epochs": n_epochs,
        "num_iterations_per_epoch": per_epoch,
        "num_val_iterations_per_epoch": max(1, min(50, per_epoch // 10)),
    }
    if is_long or is_named:
        return recipe
    recipe |= {"optimizer": "adamw", "initial_lr": initial_lr, "weight_decay": 1e-2}
    recipe |= {"schedule": "cosine", "warmup": 0.05}
    if n_iterations * batch_size / max(1, n_cases) < FULL_AUGMENTATION_PASSES:
        # Mirrored patches are another task to learn: they cost a short schedule more than the
        # variety gives back.
        recipe |= {"augmentation": "light", "mirroring": False}
    return recipe


def validation_seconds(
    shapes: Sequence[Sequence[float]] | np.ndarray,
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
    total = 0.0
    for shape in shapes:
        n_tiles = n_together * math.ceil(_n_tiles(shape, patch_size) / n_together)
        total += n_tiles * forward_seconds * n_passes + 0.03 + 2e-7 * math.prod(shape)
    return n_cases * total / len(shapes)


def _n_tiles(shape: Sequence[float], patch_size: Sequence[int]) -> int:
    n_slices = math.prod(math.ceil(s) for s in shape[: len(shape) - len(patch_size)])
    pairs = zip(shape[-len(patch_size) :], patch_size, strict=True)
    return n_slices * math.prod(max(0, math.ceil((s - p) / (p / 2))) + 1 for s, p in pairs)


def _measure(plans: Plans, configuration: str, size: Candidate, device: str) -> StepCheck:
    """What a step of this size costs, from one of at most MEASURED_SAMPLES samples."""
    n_samples = min(size.batch_size, MEASURED_SAMPLES)
    changed = replan(
        plans,
        configuration,
        patch_size=size.patch_size,
        batch_size=n_samples,
        features_per_stage=size.features_per_stage,
    )
    check = check_plan(changed, configuration, device)
    times = size.batch_size / n_samples
    weights = 3 * 4 * check.parameters  # float32 values, gradients and momentum
    return dataclasses.replace(
        check,
        seconds=times * check.seconds,
        forward_seconds=times * check.forward_seconds,
        peak_bytes=check.peak_bytes + int((times - 1) * max(0, check.peak_bytes - weights)),
    )


def _explain(found: Fit, seconds: float) -> str:
    chosen = found.candidate
    text = (
        f"one step of batch {chosen.batch_size}, patch {'x'.join(map(str, chosen.patch_size))} and "
        f"{chosen.features_per_stage[0]} features takes {found.step_seconds:.2f} s here, so about "
        f"{found.n_iterations} iterations fit into {seconds:.0f} s of training"
    )
    if found.n_iterations < ENOUGH_ITERATIONS:
        text += (
            f"; that is fewer than the {ENOUGH_ITERATIONS} that a usable result tends to need: "
            "give more minutes if you can"
        )
    return text
