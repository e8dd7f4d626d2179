"""The sentences that tell why a configuration was planned as it was."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from umamba.planning.footprint import GIB, machine_memory


def by(sizes: Sequence[int]) -> str:
    """`40x56x40`."""
    return "x".join(map(str, sizes))


def search_reasons(
    planner: str, stock: Mapping[str, Any], memory_gb: float, memory_from: str
) -> list[str]:
    """What memory was planned for, and what nnU-Net's planner would give its own network."""
    return [
        f"Planned for {memory_gb:g} GB: {memory_from}.",
        f"nnU-Net's search ({planner}) gave patch {by(stock['patch_size'])} and batch "
        f"{stock['batch_size']} at {memory_gb:g} GB.",
    ]


def adapted_reasons(
    name: str, arguments: Mapping[str, Any], planned: Mapping[str, Any]
) -> list[str]:
    """Which arguments make a network that is published for something else segment."""
    adapted = {key: value for key, value in arguments.items() if planned.get(key) == value}
    if not adapted:
        return []
    values = ", ".join(f"{key} {json.dumps(value)}" for key, value in adapted.items())
    return [f"{name} as published is not for segmentation; we adapt it: {values}."]


def step_reason(name: str, plan: Mapping[str, Any], need: int, memory_gb: float) -> str:
    """What a training step of the planned patch and batch needs."""
    return (
        f"A training step of {name} at patch {by(plan['patch_size'])} and batch "
        f"{plan['batch_size']} needs about {need / GIB:.1f} GB of {memory_gb:g} GB."
    )


def change_reason(
    stock: Mapping[str, Any], plan: Mapping[str, Any], need: int, memory_gb: float
) -> str | None:
    """Why patch and batch are not nnU-Net's, or do not fit; None where both are as they were."""
    if need > memory_gb * GIB:
        return "This is more than there is, and the patch cannot shrink any further."
    before, after = ([list(p["patch_size"]), p["batch_size"]] for p in (stock, plan))
    if before == after:
        return None
    return "Patch and batch were changed so that network and memory agree."


def upstream_reasons(name: str, need: int, is_stock: bool) -> list[str]:
    """Whose plan it is, and what to give where its step needs more than this machine has."""
    reasons = ["Patch, batch and network are nnU-Net's own plan."] if is_stock else []
    there, what = machine_memory()
    if need > there:
        reasons.append(
            f"This is more than {what}: train {name} on a larger machine, or plan it for this one "
            f"with --memory {0.9 * there / GIB:.0f}."
        )
    return reasons
