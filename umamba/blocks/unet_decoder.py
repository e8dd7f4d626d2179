"""The ways up in a U-Net: skips of all stages to deep-supervised logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from umamba.blocks.conv import Shortcut, convolution, residual_stage
from umamba.blocks.sampling import TransposedUpsample


class UNetDecoder(nn.Module):
    """Goes up stage by stage: upsample, concatenate [upsampled, skip], residual blocks.

    `upsample(in_channels, out_channels, stride)` builds the layer that goes up. With
    `joins_full_resolution=False` the last stage does not see the skip of the full resolution.
    `affine` as in ResidualBlock.
    `deep_supervision` may be switched at any time (nnU-Net's trainer does). `n_outputs`: only the
    finest so many stages have a layer in seg_layers; by default all.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        features_per_stage: Sequence[int],
        strides: Sequence[Sequence[int]],
        kernel_sizes: Sequence[Sequence[int]],
        n_conv_per_stage: Sequence[int],
        upsample: Callable[[int, int, Sequence[int]], nn.Module],
        shortcut: Shortcut,
        joins_full_resolution: bool = True,
        affine: bool = True,
        n_outputs: int | None = None,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.joins_full_resolution = joins_full_resolution
        self.upsample = nn.ModuleList()
        self.stages = nn.ModuleList()
        self.seg_layers = nn.ModuleList()
        n_stages = len(features_per_stage)
        if n_outputs is not None and not 1 <= n_outputs < n_stages:
            raise ValueError(f"n_outputs is {n_outputs}; choose 1 to {n_stages - 1}")
        self.first_output = 0 if n_outputs is None else n_stages - 1 - n_outputs
        for i, n_blocks in enumerate(n_conv_per_stage):
            stage = n_stages - 2 - i
            below, width = features_per_stage[stage + 1], features_per_stage[stage]
            kernel = kernel_sizes[stage]
            joined = 2 * width if stage > 0 or joins_full_resolution else width
            self.upsample.append(upsample(below, width, strides[stage + 1]))
            self.stages.append(residual_stage(joined, width, kernel, 1, n_blocks, shortcut, affine))
            has_output = i >= self.first_output
            self.seg_layers.append(
                convolution(width, num_classes, [1] * len(kernel)) if has_output else nn.Identity()
            )

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """skips finest first -> logits of the full resolution, or a list of them, finest first."""
        features = skips[-1]
        logits = []
        last = len(self.stages) - 1
        for i, (upsample, stage) in enumerate(zip(self.upsample, self.stages, strict=True)):
            features = upsample(features)
            if i < last or self.joins_full_resolution:
                features = torch.cat([features, skips[-2 - i]], dim=1)
            features = stage(features)
            if i == last or (self.deep_supervision and i >= self.first_output):
                logits.append(self.seg_layers[i](features))
        return logits[::-1] if self.deep_supervision else logits[0]


def unetr_decoder(
    num_classes: int,
    features_per_stage: Sequence[int],
    strides: Sequence[Sequence[int]],
    *,
    last_blocks: int = 2,
    n_outputs: int,
    deep_supervision: bool,
) -> UNetDecoder:
    """MONAI's UNETR decoder: blocks of kernel 3, without biases and without scales in their norms.

    last_blocks: residual blocks of the full resolution; the other stages have one each.
    """
    return UNetDecoder(
        num_classes,
        features_per_stage=features_per_stage,
        strides=strides,
        kernel_sizes=[[3] * len(strides[0])] * len(strides),
        n_conv_per_stage=[1] * (len(strides) - 2) + [last_blocks],
        upsample=functools.partial(TransposedUpsample, bias=False),
        shortcut="pool",
        affine=False,
        n_outputs=n_outputs,
        deep_supervision=deep_supervision,
    )


def go_up(
    maps: Sequence[Tensor],
    expands: Iterable[nn.Module],
    joins: Iterable[nn.Module],
    stages: Iterable[nn.Module],
) -> list[Tensor]:
    """Stage by stage: expand, concatenate [expanded, skip], linear layer, blocks.

    maps: channels-last, finest first. Returns the deepest of them, then each stage's.
    """
    *skips, deepest = maps
    found = [deepest]
    for expand, join, stage, skip in zip(expands, joins, stages, reversed(skips), strict=True):
        found.append(stage(join(torch.cat([expand(found[-1]), skip], dim=-1))))
    return found
