"""MSVM-UNet: VMamba's encoder and a decoder of VSS blocks whose MLPs convolve at several scales.

    image - stem (1/4) - VSS stage 1 ----- skip ----- cat - MS-VSS - expand x 4 - seg
              down (1/8) - VSS stage 2 -- skip -- cat - MS-VSS - expand
                down (1/16) - VSS stage 3 - cat - MS-VSS - expand
                  down (1/32) - VSS stage 4 - expand

arXiv 2408.13735; equals gndlwch2w/msvm-unet@abb1a8e, model/ (no licence file), with
its QUIRKS. Maps are channels-last.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from umamba.blocks.conv import convolution
from umamba.blocks.mamba import uniform
from umamba.blocks.sampling import LargeKernelPatchExpand
from umamba.blocks.ss2d import MLP, SS2D, VSSBlock
from umamba.blocks.unet_decoder import go_up
from umamba.networks.base import GrayRepeatingNetwork, check_official, check_stages, stem_channels
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, renamed_rows, vss_block_rows
from umamba.networks.vmamba import SIZES, VMambaEncoder, drop_path_rates, encoder_arguments

QUIRKS = (
    "a single input channel is repeated to three, for which the stem is made",
    "the decoder's blocks keep d_state 1, expand 1 and mlp_ratio 4, whatever the encoder has",
    "one output, no deep supervision",
    "BatchNorm in the expanding layers: a single image of 32 x 32 cannot be trained on",
)
FINEST, DEEPER = (4, 4), (2, 2)  # strides of the first and of the other encoder stages
DROP_PATH_RATES = {"tiny_0230s": 0.2, "small_0229s": 0.3}  # of the official encoders


@register(
    "msvm_unet",
    paper="arXiv:2408.13735",
    reference="gndlwch2w/msvm-unet@abb1a8ed5cf6f211a9c7b375feb7a40db0775960",
    licence="no licence file",
    quirks=QUIRKS,
)
class MSVMUNet(GrayRepeatingNetwork):
    """2D U-Net of VSS blocks; image sizes divisible by 32, with the default stages."""

    spatial_dims = (2,)
    fixed_strides = ((1, 1), FINEST, DEEPER, DEEPER, DEEPER)
    pretrained_files = ("vssm1_tiny_0230s", "vssm1_small_0229s")

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (96, 96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 8, 2),
        depths_decoder: Sequence[int] = (2, 2, 2),
        d_state: int = 1,
        expand: float = 1,
        mlp_ratio: float = 4,
        drop_path_rate: float = 0.2,
        drop_path_rate_decoder: float = 0.2,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """Arguments as SwinUMambaD's; mlp_ratio: as VMambaEncoder's, of the encoder alone."""
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=1)
        self.check_strides(strides, [(1, 1), FINEST, *[DEEPER] * (len(strides) - 2)])
        check_stages(strides, features_per_stage=features_per_stage)
        check_stages(strides[1:], depths=depths)
        check_stages(strides[2:], depths_decoder=depths_decoder)
        self.encoder = VMambaEncoder(
            stem_channels(input_channels),
            features_per_stage=features_per_stage[1:],
            depths=depths,
            forward_type="v05_noz",
            d_state=d_state,
            expand=expand,
            conv_bias=False,
            mlp_ratio=mlp_ratio,
            patch_embed="v2",
            downsample="v3",
            drop_path_rate=drop_path_rate,
            mixer=mixer,
        )
        self.decoder = Decoder(
            num_classes,
            features_per_stage,
            depths_decoder,
            drop_path_rate=drop_path_rate_decoder,
            mixer=mixer,
            deep_supervision=deep_supervision,
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, H, W) -> logits; a list of them under deep supervision."""
        return self.decoder(self.encoder(self.stem_images(images)))

    def check_input(self, images: Tensor) -> None:
        super().check_input(images)
        n_values = images.shape[0] * math.prod(images.shape[2:]) // math.prod(self.divisor)
        if self.training and n_values == 1:
            raise ValueError(
                f"MSVMUNet does not train on a single image of {tuple(images.shape[2:])}: its "
                "BatchNorm needs more than one value per channel in the deepest stage; give a "
                "batch of two, a larger image, or strides of fewer stages"
            )

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap(KEY_ROWS)

    @classmethod
    def arguments_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return encoder_arguments(shapes, finest=shapes["decoder.last_upsample.norm.weight"][0])

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Of MSVMUNet's arguments; "encoder" holds those of a VSSM in place of the named one."""
        name = config.get("enc_name", "tiny_0230s")
        if name not in DROP_PATH_RATES:
            raise ValueError(f"enc_name is {name!r}; choose one of {', '.join(DROP_PATH_RATES)}")
        encoder = {"drop_path_rate": DROP_PATH_RATES[name], **SIZES[f"vssm1_{name}"]}
        given = config.get("encoder", {})
        check_official(
            given, patch_size=4, forward_type="v05_noz", ssm_dt_rank="auto", ssm_conv=3,
            ssm_conv_bias=False, downsample_version="v3", patchembed_version="v2",
        )  # fmt: skip
        encoder |= VMambaEncoder.official_arguments(given)
        widths = list(encoder["features_per_stage"])
        kept = ("depths", "d_state", "expand", "mlp_ratio", "drop_path_rate")
        return {
            "input_channels": config.get("in_channels", 3),
            "num_classes": config["num_classes"],
            "strides": [[1, 1], [*FINEST], *[[*DEEPER]] * (len(widths) - 1)],
            "features_per_stage": [widths[0], *widths],
            "depths_decoder": [2] * (len(widths) - 1),
            **{key: encoder[key] for key in kept},
        }


class Decoder(nn.Module):
    """Goes up stage by stage: expand, concatenate [expanded, skip], linear layer, MS-VSS blocks."""

    def __init__(
        self,
        num_classes: int,
        features_per_stage: Sequence[int],
        depths: Sequence[int],
        *,
        drop_path_rate: float,
        mixer: str,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.upsample = nn.ModuleList()
        self.joins = nn.ModuleList()
        self.stages = nn.ModuleList()
        full, finest, *_ = features_per_stage
        steps = pairwise(features_per_stage[:0:-1])  # deepest first
        rates = drop_path_rates(drop_path_rate, 0, depths)
        for (below, width), falling in zip(steps, rates, strict=True):
            self.upsample.append(LargeKernelPatchExpand(below, width))
            self.joins.append(nn.Linear(2 * width, width))
            self.stages.append(msvss_stage(width, falling, mixer))
        self.last_upsample = LargeKernelPatchExpand(finest, full, factor=4)
        self.seg_layers = nn.ModuleList([convolution(full, num_classes, [1, 1])])

    def forward(self, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """skips channels-last, finest first -> logits (B, num_classes, H, W)."""
        features = go_up(skips, self.upsample, self.joins, self.stages)[-1]
        logits = self.seg_layers[0](self.last_upsample(features).movedim(-1, 1))
        return [logits] if self.deep_supervision else logits


class MultiScaleMLP(MLP):
    """An MLP that adds depthwise convolutions of kernels 1, 3 and 5 to its hidden map."""

    kernel_sizes = (1, 3, 5)

    def __init__(self, width: int, ratio: float = 4) -> None:
        super().__init__(width, ratio)
        hidden = self.fc1.out_features
        self.kernels = nn.ParameterList(
            uniform((hidden, 1, size, size), size**2) for size in self.kernel_sizes
        )

    def forward(self, features: Tensor) -> Tensor:
        """features (B, H, W, C) -> the same shape."""
        hidden = functional.gelu(self.fc1(features)).movedim(-1, 1)
        reach = max(self.kernel_sizes) // 2
        # A sum of convolutions is one convolution with the sum of their kernels.
        margins = [reach - size // 2 for size in self.kernel_sizes]
        padded = [functional.pad(k, [m] * 4) for k, m in zip(self.kernels, margins, strict=True)]
        kernel = torch.stack(padded).sum(0)
        mixed = functional.conv2d(hidden, kernel, padding=reach, groups=hidden.shape[1])
        return self.fc2((hidden + mixed).movedim(1, -1))


def msvss_stage(width: int, drop_path: Sequence[float], mixer: str = "scan") -> nn.Sequential:
    """VSS blocks with multi-scale MLPs, one for each drop rate; maps are (B, H, W, width)."""
    build = functools.partial(SS2D, width, d_state=1, expand=1, conv_bias=False, gate="none")
    mlp = functools.partial(MultiScaleMLP, width)
    blocks = (VSSBlock(width, build, mixer=mixer, drop_path=r, mlp=mlp) for r in drop_path)
    return nn.Sequential(*blocks)


def pointwise_rows(official: str, own: str) -> list[Row]:
    """The rows of a linear layer that is a 1x1 convolution in the official network."""
    weight = {"adapt": lambda x: x.flatten(1), "restore": lambda x: x[..., None, None]}
    return [
        Row(f"{official}weight", f"{own}weight", **weight),
        Row(f"{official}bias", f"{own}bias"),
    ]


def expand_rows(official: str, own: str) -> list[Row]:
    """The rows of a LargeKernelPatchExpand."""
    names = {"expand.1": "batch_norm", "expand.3": "conv", "norm": "norm"}
    expand = pointwise_rows(f"{official}expand.0.", f"{own}expand.")
    return [*expand, *renamed_rows(official, own, names)]


def msvss_rows(official: str, own: str) -> list[Row]:
    """The rows of a VSS block with a multi-scale MLP."""
    kernels = Row(f"{official}mlp.multiscale_conv.dw_convs.{{k}}.weight", f"{own}mlp.kernels.{{k}}")
    return [*vss_block_rows(official, own), kernels]


DOWNSAMPLE = "encoder.downsamples.{i}."
# Official name, ours.
KEY_ROWS = (
    *renamed_rows("encoder.layer0.", "encoder.patch_embed.", {"0": "proj", "2": "norm"}),
    *renamed_rows("encoder.layer1.", "encoder.patch_embed.", {"0": "proj2", "2": "norm2"}),
    *renamed_rows(DOWNSAMPLE, DOWNSAMPLE, {"1": "conv", "3": "post_norm"}),
    *vss_block_rows("encoder.layers.{i}.blocks.{j}.", "encoder.stages.{i}.{j}."),
    *expand_rows("decoder.layers.{i}.up.", "decoder.upsample.{i}."),
    *pointwise_rows("decoder.layers.{i}.concat_layer.", "decoder.joins.{i}."),
    *msvss_rows("decoder.layers.{i}.vss_layer.blocks.{j}.", "decoder.stages.{i}.{j}."),
    *expand_rows("decoder.out_layers.0.", "decoder.last_upsample."),
    Row("decoder.out_layers.0.out.{p}", "decoder.seg_layers.0.{p}"),
)
