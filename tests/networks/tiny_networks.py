"""Builds every registered network at tiny widths, for the tests of what all of them keep.

Shapes are no powers of two; strides differ from axis to axis where a network allows it.
"""

from __future__ import annotations

import math
from typing import Any

from umamba.networks import create_network, get_entry
from umamba.networks.base import SegmentationNetwork

STRIDES = {2: [[1, 1], [2, 1], [2, 2]], 3: [[1, 1, 1], [1, 2, 2], [2, 2, 1]]}
KERNELS = {2: [[3, 3], [3, 3], [3, 1]], 3: [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}
SHAPES = {2: (20, 14), 3: (6, 20, 10)}
CHANNELS, CLASSES, BATCH = 2, 3, 2
# Arguments in place of, or beside, those of every network. A dropped path would get no gradient.
NNMAMBA = {"n_blocks_per_stage": 2, "features_per_stage": [6, 80, 8]}  # gates of 5 hidden units
ARGUMENTS: dict[str, dict[str, Any]] = {
    "hymamba": {
        "n_blocks_per_stage": [1, 1, 2],
        "expansion_per_stage": [2, 1, 2],
        "n_mamba_layers": 2,
        "n_outputs": 2,
    },
    "lightm_unet": {"n_groups": 2},
    "mamba_clinix": {"features_per_stage": [8, 16, 24], "drop_path": 0},
    "nnmamba": NNMAMBA,
    "nnmamba_single": NNMAMBA,
    "segmamba": {"depths": [2, 1], "n_slices": [4, 8], "n_outputs": 2},
    "uvm_net": {"inner_size": [4, 5], "input_residual": False},
    "vm_unet": {"depths_decoder": [1] * 4},  # its decoder has blocks at the deepest stage, too
}

# Networks that take only their own strides, or fewer or more stages of the kind.
OWN_STRIDES = ("mamba_unet", "msvm_unet", "swin_umamba", "swin_umamba_d", "vm_unet")


def build(name: str, dims: int, **arguments: Any) -> SegmentationNetwork:
    return create_network(name, CHANNELS, CLASSES, **{**tiny_arguments(name, dims), **arguments})


def tiny_arguments(name: str, dims: int) -> dict[str, Any]:
    strides = strides_of(name, dims)
    n_stages = len(strides)
    arguments: dict[str, Any] = {
        "strides": strides,
        "features_per_stage": [6, 8, 40, 10, 12][:n_stages],
        "kernel_sizes": KERNELS[dims],
        "n_conv_per_stage": [2] * n_stages,
        "n_conv_per_stage_decoder": [2] * (n_stages - 1),
        "depths": [1] * (n_stages - 1),
        "depths_decoder": [1] * (n_stages - 2),
        "drop_path_rate": 0.0,
        "drop_path_rate_decoder": 0.0,
        "patch_size": list(shape_of(name, dims)),
        **ARGUMENTS.get(network_of(name), {}),
    }
    return {key: value for key, value in arguments.items() if key in get_entry(name).keywords}


def network_of(name: str) -> str:
    """The name itself, or of which network it is the control."""
    return get_entry(name).control_of or name


def strides_of(name: str, dims: int) -> list[list[int]]:
    fixed = get_entry(name).fixed_strides
    if fixed is None or network_of(name) not in OWN_STRIDES:
        return STRIDES[dims]
    return [list(stride[-dims:]) for stride in fixed]


def shape_of(name: str, dims: int) -> tuple[int, ...]:
    """Divisible by the strides: once and twice the divisor for networks of their own strides."""
    if network_of(name) not in OWN_STRIDES:
        return SHAPES[dims]
    divisor = [math.prod(axis) for axis in zip(*strides_of(name, dims), strict=True)]
    return tuple(d * (2 if axis == dims - 1 else 1) for axis, d in enumerate(divisor))
