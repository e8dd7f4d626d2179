"""The two halves of U-Nets on patches, channels-last: an encoder of stages, Swin-UNet's decoder."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


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
