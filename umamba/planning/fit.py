"""Fits the plans of one configuration to minutes on this machine, by measured training steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from umamba.planning import budget
from umamba.planning.footprint import StepCheck, measure_step
from umamba.planning.plans import (
    Plans,
    get_configuration,
    network_builder,
    preprocessed_folder,
    read_json,
    replan,
)

OVERHEAD_SECONDS = 18.0
"""Starting the loaders, the last checkpoint and the report."""

VALIDATION_MARGIN = 1.5
"""Time kept for validation over its estimate: training can wait for a slow machine, this cannot."""

MOST_FOR_VALIDATION = 0.3
"""Share of the time that validation may be given."""


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
    batch, and a schedule that follows the clock.  Raises ValueError when too little time is left.
    """
    started = time.monotonic()
    part = get_configuration(plans, configuration)
    shapes = planned_shapes(plans, part["spacing"])
    n_validation = len(shapes) if fold == "all" else max(1, round(len(shapes) / 5))
    measured: dict[budget.Candidate, StepCheck] = {}

    def measure(candidate: budget.Candidate) -> StepCheck:
        if candidate not in measured:
            measured[candidate] = measure_candidate(plans, configuration, candidate, device)
        return measured[candidate]

    def choose(share: float) -> tuple[budget.Fit, float]:
        memory = None if memory_gb is None else int(memory_gb * 2**30)
        time_left = seconds - OVERHEAD_SECONDS - share
        found = budget.fit(_sizes(part), measure, max(time_left, 1.0), memory)
        size = found.candidate
        forward = found.forward_seconds / size.batch_size
        together = 2 if len(size.patch_size) == 3 else 1
        recipe = budget.budget_recipe(
            found.n_iterations, size.batch_size, len(shapes) - n_validation, time_left
        )
        mirrored = 2 ** len(size.patch_size) if recipe.get("mirroring", True) else 0
        needed = budget.validation_seconds(
            shapes, n_validation, size.patch_size, forward, 1 + mirrored, together
        )
        return found, min(MOST_FOR_VALIDATION * seconds, VALIDATION_MARGIN * needed)

    # The first choice does not know how long validation takes: that depends on the choice.
    _, share = choose(0.0)
    found, share = choose(share)
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
    n_training = max(1, len(shapes) - n_validation)
    recipe = budget.budget_recipe(n_iterations, size.batch_size, n_training, train_seconds)
    plan = f"{train_seconds / 60:.1f} min of training, {share / 60:.1f} min kept for validation"
    return replan(
        plans,
        configuration,
        patch_size=size.patch_size,
        batch_size=size.batch_size,
        features_per_stage=size.features_per_stage,
        recipe=recipe,
        reason="; ".join([*found.reasons, plan]),
    )


def days_of_training(plans: Plans, configuration: str, n_iterations: int, device: str) -> float:
    """Returns the days that `n_iterations` of the planned size would take on this machine.

    Measured is the narrowest network at the planned patch, and scaled by the arithmetic.
    """
    part = get_configuration(plans, configuration)
    same_patch = [c for c in _sizes(part) if list(c.patch_size) == list(part["patch_size"])]
    narrow = min(same_patch, key=lambda candidate: candidate.cost)
    step = measure_candidate(plans, configuration, narrow, device)
    return step.seconds / narrow.cost * n_iterations / 86400


def measure_candidate(
    plans: Plans, configuration: str, candidate: budget.Candidate, device: str
) -> StepCheck:
    """Returns what a training step of the configuration costs at another size."""
    changed = replan(
        plans,
        configuration,
        patch_size=candidate.patch_size,
        features_per_stage=candidate.features_per_stage,
    )
    part = get_configuration(changed, configuration)
    facts = part["planning"]
    build = network_builder(part, facts["input_channels"], facts["num_classes"])
    return measure_step(
        build,
        facts["input_channels"],
        part["patch_size"],
        candidate.batch_size,
        n_steps=budget.STEPS_TO_MEASURE - 1,
        device=device,
    )


def planned_shapes(plans: Mapping[str, Any], spacing: Sequence[float]) -> list[tuple[float, ...]]:
    """Returns the cases' shapes at the planned spacing, in the planned axis order (voxels)."""
    file = preprocessed_folder(plans["dataset_name"]) / "dataset_fingerprint.json"
    fingerprint = read_json(file)
    order = plans["transpose_forward"]
    shapes: list[tuple[float, ...]] = []
    pairs = zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True)
    for shape, own in pairs:
        shape, own = [shape[i] for i in order], [own[i] for i in order]
        first = len(shape) - len(spacing)  # a 2d configuration leaves the slices alone
        scaled = [s * a / b for s, a, b in zip(shape[first:], own[first:], spacing, strict=True)]
        shapes.append((*shape[:first], *scaled))
    return shapes


def _sizes(part: Mapping[str, Any]) -> list[budget.Candidate]:
    arguments = part["architecture"]["arch_kwargs"]
    return budget.candidates(
        arguments["features_per_stage"],
        part["patch_size"],
        part["batch_size"],
        arguments["strides"],
    )
