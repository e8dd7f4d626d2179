"""What goes through the network together, mirrored passes, and the weights of a tile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

# Legend: B tiles, C input channels, K classes or regions; a tile is (C, *patch_size).

Network = Callable[[torch.Tensor], torch.Tensor]


def window_weight(patch_size: Sequence[int], use_gaussian: bool = True) -> torch.Tensor:
    """Weights (z, y, x) of a tile, one plane of them for a 2-D network."""
    patch = tuple(patch_size)
    weight = importance_map(patch) if use_gaussian else torch.ones(patch)
    return weight if len(patch) == 3 else weight[None]


def nnunet_weight(
    patch_size: Sequence[int], use_gaussian: bool, device: torch.device
) -> torch.Tensor:
    """nnU-Net's own weights of a tile (z, y, x), in half precision."""
    patch = tuple(patch_size)
    weight = torch.ones(patch, dtype=torch.half, device=device)
    if use_gaussian:
        weight = compute_gaussian(patch, 1.0 / 8, 10, device=device)
    return weight if len(patch) == 3 else weight[None]


def tiles_per_batch(patch_size: Sequence[int], training_batch: int, device: torch.device) -> int:
    """How many tiles, mirrored copies counted, go through the network together on this device."""
    if device.type != "cpu":
        # the batch of the training fits with gradients, so it fits without
        return max(1, training_batch)
    # measured: eight 56x40 tiles together take a third less time each, 256x256 tiles gain nothing
    # and two 32x40x40 tiles a third less; at 40x56x40 the gain is small, at 48x64x48 a loss
    n_voxels = math.prod(patch_size)
    pair = 2 if len(patch_size) == 3 and n_voxels <= 2**17 else 1
    return min(8, max(pair, 2**15 // n_voxels))


def predict_mirrored(
    network: Network, tiles: torch.Tensor, mirror_axes: Sequence[int] | None, max_batch: int = 1
) -> torch.Tensor:
    """Mean logits (B, K, *patch) in float32 over all combinations of mirrored axes."""
    axes = sorted(a + 2 for a in mirror_axes or ())
    combinations = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    per_pass = max(1, max_batch // len(tiles))
    total: torch.Tensor | None = None
    for first in range(0, len(combinations), per_pass):
        chunk = combinations[first : first + per_pass]
        copies = [torch.flip(tiles, c) if c else tiles for c in chunk]
        output = network(torch.cat(copies) if len(copies) > 1 else copies[0]).float()
        for flipped, c in zip(output.chunk(len(chunk)), chunk, strict=True):
            part = torch.flip(flipped, c) if c else flipped
            total = part if total is None else total.add_(part)
    assert total is not None
    return total if len(combinations) == 1 else total.div_(len(combinations))


@lru_cache(maxsize=4)
def importance_map(patch_size: tuple[int, ...]) -> torch.Tensor:
    """nnU-Net's Gaussian (sigma = patch / 8) with peak 1, in float32.

    nnU-Net's own map is float16: its corners are subnormal, and logits there lose their digits.
    The smallest weights must not be lifted: the unsure edge of a tile would enter the sum.
    """
    weight = compute_gaussian(
        patch_size, sigma_scale=1.0 / 8, dtype=torch.float64, device=torch.device("cpu")
    )
    return weight.float()
