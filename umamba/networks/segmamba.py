"""SegMamba: a 3D encoder of tri-orientated Mamba layers and a residual convolutional decoder.

    image ----------------------------- skip 0 ------------------- cat - block - block - seg
      |  conv 7, stride 2                                           |
    stage 0 - gated conv - Mamba x 2 -- MLP - skip 1 ------ cat - block - up
      |  norm, conv 2, stride 2                              |
     ...                                                    ...
    stage 3 - gated conv - Mamba x 2 -- MLP - skip 4 -------- up

    skip and block: residual blocks of two convolutions. A Mamba layer adds to its input the sum of
    three scans: voxels in raster order, backwards, and slice by slice (the first voxel of every
    slice, then the second, ...), where a slice is one of n_slices equal parts of the sequence.

arXiv 2401.13560; equals ge-xing/SegMamba@cff3597, model_segmamba/segmamba.py, with its QUIRKS.
Added: other widths, strides and numbers of stages; sequences that the slices do not divide (the
official network fails there), filled up with zero tokens for the third scan; more than the one
output, for deep supervision.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from umamba.blocks.conv import ResidualBlock, convolution
from umamba.blocks.gating import GatedSpatialConv
from umamba.blocks.mixer import MixerLayer
from umamba.blocks.norm import InstanceNorm
from umamba.blocks.unet_decoder import unetr_decoder
from umamba.networks.base import SegmentationNetwork, check_official, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import (
    KeyMap,
    Row,
    mixer_rows,
    renamed_rows,
    unetr_block_rows,
    unetr_decoder_rows,
)

QUIRKS = (
    "instance norms have no scale and no offset, so that biases before them have no effect",
    "the gated convolution adds its branches, nothing is multiplied",
    "the numbers of slices are the stages' (64, 32, 16, 8), whatever the image's shape: a slice is "
    "a plane of the first axis only where that axis is 128 voxels long",
    "the skip of each stage is as wide as the next stage",
)
KERNEL = (3, 3, 3)
POINT = (1, 1, 1)
STEM_KERNEL = (7, 7, 7)


@register(
    "segmamba",
    paper="arXiv:2401.13560",
    reference="ge-xing/SegMamba@cff35970e0c542ad940b5701267f1ac888298b06",
    licence="no licence file",
    quirks=QUIRKS,
)
class SegMamba(SegmentationNetwork):
    """3D U-Net with tri-orientated Mamba layers in the encoder; any divisible image size."""

    spatial_dims = (3,)
    fixed_strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (48, 96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        n_slices: Sequence[int] = (64, 32, 16, 8),
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        n_outputs: int = 1,
        deep_supervision: bool = False,
    ) -> None:
        """strides and features_per_stage have one entry per resolution, finest first; depths
        (numbers of Mamba layers) and n_slices one for each but the finest, which has no Mamba.
        n_outputs: how many resolutions have logits for deep supervision, finest first."""
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=n_outputs)
        check_stages(strides, features_per_stage=features_per_stage)
        check_stages(strides[1:], depths=depths, n_slices=n_slices)
        if min(n_slices) < 1:
            raise ValueError(f"n_slices must be positive, got {list(n_slices)}")
        layer = functools.partial(
            MixerLayer, spatial_dims=3, mixer=mixer, residual=True, d_state=d_state, d_conv=d_conv,
            expand=expand,
        )  # fmt: skip
        self.encoder = Encoder(input_channels, strides, features_per_stage, depths, n_slices, layer)
        outputs: Any = {"n_outputs": n_outputs, "deep_supervision": deep_supervision}
        self.decoder = unetr_decoder(num_classes, features_per_stage, strides, **outputs)

    def check_input(self, images: Tensor) -> None:
        super().check_input(images)
        shape = tuple(images.shape[2:])
        if shape == self.divisor:
            raise ValueError(
                f"{type(self).__name__} reduces images of {shape} to one voxel, which instance "
                f"norms cannot normalize; the next larger valid shape is "
                f"{(*shape[:-1], 2 * shape[-1])}"
            )

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap(ROWS)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        check_official(config, norm_name="instance")
        widths = [*config.get("feat_size", (48, 96, 192, 384)), config.get("hidden_size", 768)]
        return {
            "input_channels": config.get("in_chans", 1),
            "num_classes": config.get("out_chans", 13),
            "features_per_stage": widths,
            "depths": config.get("depths", (2, 2, 2, 2)),
        }


class Encoder(nn.Module):
    """The stages, and the blocks that turn the image and each stage's features into skips."""

    def __init__(
        self,
        input_channels: int,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        depths: Sequence[int],
        n_slices: Sequence[int],
        layer: Callable[..., MixerLayer],
    ) -> None:
        """layer(d_model, orders=...) makes a Mamba layer."""
        super().__init__()
        block = functools.partial(ResidualBlock, kernel_size=KERNEL, affine=False)
        self.stages = nn.ModuleList()
        self.skips = nn.ModuleList([block(input_channels, features_per_stage[0])])
        below = input_channels
        for i, (width, skip_width) in enumerate(itertools.pairwise(features_per_stage)):
            if i == 0:
                down = nn.Sequential(convolution(below, width, STEM_KERNEL, strides[1]))
            else:
                step: Any = tuple(strides[i + 1])
                conv = nn.Conv3d(below, width, step, step)
                down = nn.Sequential(InstanceNorm(below, affine=False), conv)
            orders = ("raster", "raster_reversed", f"inter_slice_{n_slices[i]}")
            mixers = nn.Sequential(*(layer(width, orders=orders) for _ in range(depths[i])))
            self.stages.append(Stage(width, down, mixers))
            self.skips.append(block(width, skip_width))
            below = width

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, input_channels, *spatial) -> the skips of all resolutions, finest first."""
        features = images
        skips = [self.skips[0](images)]
        for stage, block in zip(self.stages, self.skips[1:], strict=True):
            features, projected = stage(features)
            skips.append(block(projected))
        return skips


class Stage(nn.Module):
    """Downsampling, gated convolution, Mamba layers; norm and MLP before the skip."""

    def __init__(self, width: int, down: nn.Module, mixers: nn.Module) -> None:
        super().__init__()
        self.down = down
        self.gate = GatedSpatialConv(width, 3)
        self.mixers = mixers
        # parity: mlps[i] of the official code, without a residual
        self.project = nn.Sequential(
            InstanceNorm(width, affine=False),
            convolution(width, 2 * width, POINT),
            nn.GELU(),
            convolution(2 * width, width, POINT),
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, C, *spatial) -> two of (B, width, *spatial / stride): next stage, skip."""
        features = self.mixers(self.gate(self.down(features)))
        return features, self.project(features)


# Official name, ours.
STAGE = "encoder.stages.{i}."
GATE = {"proj": "conv1", "proj2": "conv2", "proj3": "side", "proj4": "join"}
ROWS = (
    Row("vit.downsample_layers.{i}.{layer}.{p}", STAGE + "down.{layer}.{p}"),
    *renamed_rows("vit.gscs.{i}.", STAGE + "gate.", GATE),
    *mixer_rows(
        *("vit.stages.{i}.{j}.norm.", "vit.stages.{i}.{j}.mamba.", STAGE + "mixers.{j}."),
        n_directions=3,
    ),
    *renamed_rows("vit.mlps.{i}.", STAGE + "project.", {"fc1": "1", "fc2": "3"}),
    *(
        row
        for k in range(5)
        for row in unetr_block_rows(f"encoder{k + 1}.layer.", f"encoder.skips.{k}.")
    ),
    *unetr_decoder_rows("", 4),
    Row("out.conv.conv.{p}", "decoder.seg_layers.3.{p}"),
)
