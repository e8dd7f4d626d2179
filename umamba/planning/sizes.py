"""The sizes that a plan could take: narrower networks, smaller patches, and which of them fit."""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from umamba.planning.footprint import machine_memory
from umamba.planning.plans import count_plan, network_builder
from umamba.planning.topology import network_divisor

HEAD_FEATURES = 24  # least width of the full-size map behind patches: with 8 VM-UNet hardly learns
SMALLEST_EDGE = 16  # voxels below which no axis of a patch is shrunk
NOTHING_FITS = (
    "not even the smallest size of this network fits into the memory: give --memory more "
    "gigabytes, or choose the configuration 3d_lowres or 2d"
)


@dataclass(frozen=True)
class Candidate:
    """One size that the plan could take; `cost` is relative to the planned size (1.0)."""

    features_per_stage: tuple[int, ...]
    patch_size: tuple[int, ...]
    batch_size: int
    cost: float


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
    if len(patch_size) == 2:
        batch = max(2, min(batch_size, 2**17 // math.prod(patch_size)))
    else:
        batch = min(2, batch_size)
    widths = [[min(f, _width(f * x)) for f in features_per_stage] for x in (0.5, 0.25)]
    first = 0  # stage that counts for the work
    if len(strides) > 1 and max(strides[1]) > 2:
        # A network on patches: its first width is that of the full-size map in front of the head.
        first = 1
        for narrower in widths:
            narrower[0] = min(features_per_stage[0], max(HEAD_FEATURES, narrower[0]))
    planned = _work(features_per_stage[first:], patch_size, batch_size)
    found = [
        Candidate(features, patch, batch, _work(features[first:], patch, batch) / planned)
        for patch in _patches(patch_size, network_divisor(strides))
        for features in dict.fromkeys(map(tuple, (features_per_stage, *widths)))
    ]
    return sorted(found, key=lambda c: (math.prod(c.patch_size), c.cost))


def sizes_of(part: Mapping[str, Any], keeps_widths: bool = False) -> list[Candidate]:
    """The candidates of a configuration, without widths that its network does not take.

    keeps_widths: only the planned ones, as with pretrained weights, which have them.
    """
    arguments = part["architecture"]["arch_kwargs"]
    facts = part["planning"]
    keeps_widths = keeps_widths or bool(part.get("recipe", {}).get("pretrained"))

    @functools.cache
    def is_taken(features: tuple[int, ...]) -> bool:
        if keeps_widths and list(features) != arguments["features_per_stage"]:
            return False
        channels, classes = facts["input_channels"], facts["num_classes"]
        build = network_builder(_with_widths(part, features), channels, classes)
        try:
            with torch.device("meta"):
                build()
        except ValueError:
            return False
        return True

    features, strides = arguments["features_per_stage"], arguments["strides"]
    found = candidates(features, part["patch_size"], part["batch_size"], strides)
    return [size for size in found if is_taken(size.features_per_stage)]


def fitting_sizes(
    sizes: Sequence[Candidate], part: Mapping[str, Any], memory_bytes: int | None, device: str
) -> list[Candidate]:
    """Those of the sizes whose step can be tried: it is counted to fit into the memory.

    memory_bytes: what a step may take, at most what this machine has. Raises ValueError if no size
    fits. Where the plan itself fits, nothing is counted.
    """
    there, _ = machine_memory()
    memory = min(there, memory_bytes or there)
    if part["planning"]["training_bytes"] <= memory:
        return list(sizes)
    ends = (part["planning"]["input_channels"], part["planning"]["num_classes"])
    fitting = []
    for size in sizes:
        changed = _with_widths(part, size.features_per_stage)
        changed["patch_size"] = list(size.patch_size)
        if "patch_size" in changed["architecture"]["arch_kwargs"]:
            changed["architecture"]["arch_kwargs"]["patch_size"] = list(size.patch_size)
        footprint = count_plan(changed, *ends, device.startswith("cuda"))
        if footprint.training_bytes(size.batch_size) <= memory:
            fitting.append(size)
    if not fitting:
        raise ValueError(NOTHING_FITS)
    return fitting


def _with_widths(part: Mapping[str, Any], features: Sequence[int]) -> dict[str, Any]:
    arguments = {**part["architecture"]["arch_kwargs"], "features_per_stage": list(features)}
    return {**part, "architecture": {**part["architecture"], "arch_kwargs": arguments}}


def _patches(patch_size: Sequence[int], divisor: Sequence[int]) -> list[tuple[int, ...]]:
    """The patch, then ever smaller ones: the longest axis (in divisors) shrinks first."""
    patch = list(patch_size)
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
