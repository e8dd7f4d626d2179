"""The two halves of U-Nets on patches, channels-last: an encoder of stages, Swin-UNet's decoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from umamba.blocks.conv import convolution
from umamba.blocks.sampling import PatchExpand
from umamba.blocks.unet_decoder import go_up


class PatchEncoder(nn.Module):
    """Patch embedding and stages, each stage at half the size of the one before."""

    def __init__(
        self,
        patch_embed: nn.Module,
        stages: Iterable[nn.Module],
        downsamples: Iterable[nn.Module],
    ) -> None:
        """stages keep the shape of their map; downsamples stand between them."""
        super().__init__()
        self.patch_embed = patch_embed
        self.stages = nn.ModuleList(stages)
        self.downsamples = nn.ModuleList(downsamples)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, input_channels, H, W) -> the stages' outputs (B, H', W', C), finest first."""
        return self.stage_maps(images)[1]

    def stage_maps(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs and the outputs of all stages (B, H', W', C), finest first."""
        inputs = [self.patch_embed(images)]
        outputs = [self.stages[0](inputs[0])]
        for downsample, stage in zip(self.downsamples, self.stages[1:], strict=True):
            inputs.append(downsample(outputs[-1]))
            outputs.append(stage(inputs[-1]))
        return inputs, outputs


class PatchDecoder(nn.Module):
    """Swin-UNet's: expand, concatenate [expanded, skip], linear layer, stage; last, expand by 4.

    The deepest map and the finest one pass a LayerNorm. One output, without bias: under deep
    supervision a list of it alone. stages: as PatchEncoder's, deepest first, without the deepest.
    """

    def __init__(
        self,
        num_classes: int,
        features_per_stage: Sequence[int],
        stages: Iterable[nn.Module],
        *,
        deep_supervision: bool = False,
    ) -> None:
        """features_per_stage: widths at the full size, then of the encoder's stages."""
        super().__init__()
        self.deep_supervision = deep_supervision
        full, *widths = features_per_stage
        pairs = list(pairwise(widths[::-1]))
        self.norm = nn.LayerNorm(widths[-1])
        self.expands = nn.ModuleList(PatchExpand(below, width) for below, width in pairs)
        # parity: the official lists count the deepest map, which has neither, as their first.
        self.joins = nn.ModuleList(
            [nn.Identity(), *(nn.Linear(2 * width, width) for _, width in pairs)]
        )
        self.stages = nn.ModuleList([nn.Identity(), *stages])
        self.norm_up = nn.LayerNorm(widths[0])
        self.final_up = PatchExpand(widths[0], full, factor=4)
        self.seg_layers = nn.ModuleList([convolution(full, num_classes, [1, 1], bias=False)])

    def forward(self, features: Tensor, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """features (B, H, W, C) of the deepest stage; skips finest first -> logits."""
        maps = [*skips, self.norm(features)]
        features = go_up(maps, self.expands, self.joins[1:], self.stages[1:])[-1]
        features = self.final_up(self.norm_up(features))
        logits = self.seg_layers[0](features.movedim(-1, 1))
        return [logits] if self.deep_supervision else logits
