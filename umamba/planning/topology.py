"""Divisors of a network, rounding of patches to them, and nnU-Net's stages for a patch."""

from collections.abc import Sequence

import numpy as np

Strides = tuple[tuple[int, ...], ...]

MIN_EDGE = 4
"""Shortest edge of the deepest feature map, nnU-Net's `UNet_featuremap_min_edge_length`."""


def network_divisor(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns per axis the number that a patch must be divisible by: the product of `strides`."""
    if not strides or len({len(stride) for stride in strides}) != 1:
        raise ValueError(f"strides must be one entry per stage with the same axes, got {strides}")
    return tuple(int(np.prod(axis)) for axis in zip(*strides, strict=True))


def round_patch(patch_size: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """Returns the smallest patch that holds `patch_size` and is divisible by `divisor`."""
    return tuple(
        max(-(-int(size) // step), 1) * int(step)
        for size, step in zip(patch_size, divisor, strict=True)
    )


def strides_for_axes(fixed_strides: Sequence[Sequence[int]], spatial_dims: int) -> Strides:
    """Returns `fixed_strides` for 2 or 3 axes; a 2D network takes the last axes of a 3D entry."""
    given = len(fixed_strides[0])
    if given < spatial_dims:
        raise ValueError(f"strides of {given} axes cannot serve a network of {spatial_dims} axes")
    return tuple(tuple(int(s) for s in stride[given - spatial_dims :]) for stride in fixed_strides)


def stages_for_patch(
    spacing: Sequence[float], patch_size: Sequence[int]
) -> tuple[Strides, Strides, tuple[int, ...]]:
    """Returns strides, kernel sizes and the padded patch that nnU-Net chooses for a patch.

    Args:
        spacing: mm per voxel of the training images, in the order of `patch_size`.
        patch_size: voxels per axis before rounding.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import (
        get_pool_and_conv_props,
    )

    _, strides, kernel_sizes, patch, _ = get_pool_and_conv_props(
        list(spacing), [int(size) for size in patch_size], MIN_EDGE, 999999
    )
    return (
        tuple(tuple(int(s) for s in stride) for stride in strides),
        tuple(tuple(int(k) for k in kernel) for kernel in kernel_sizes),
        tuple(int(size) for size in patch),
    )


def fit_stages(values: Sequence[int], n_stages: int, grow: bool, maximum: int) -> list[int]:
    """Returns `values` cut or extended to `n_stages`; widths double up to `maximum`, counts repeat.

    Args:
        grow: True for features (the next stage is twice as wide), False for numbers of blocks.
    """
    fitted = [int(value) for value in values[:n_stages]]
    while len(fitted) < n_stages:
        fitted.append(min(2 * fitted[-1], max(maximum, fitted[-1])) if grow else fitted[-1])
    return fitted
