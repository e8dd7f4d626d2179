"""VMamba: encoders of VSS blocks for 2D images in the published sizes, and their classifier.

    image - embed - stage 0 - down - stage 1 - down - stage 2 - down - stage 3
                       |                |                |                |
                      1/4              1/8              1/16             1/32 (- norm, mean, head)

    A stage is a sequence of VSS blocks. First generation (vssm_*): no MLP, patches of 4 x 4 pixels,
    patch merging. Second (vssm1_*): an MLP per block, no gate, one state per channel, and strided
    convolutions for the patches and between stages. Norm, mean and head are the classifier's.

arXiv 2401.10166; equals MzeroMiko/VMamba@2ed52ea, classification/models/vmamba.py (MIT). Maps are
channels-last inside, whatever the official layout: the function is the same. These are modules
without plans (`vmamba_tiny`, ...): segmentation networks are built on them. Not here: BatchNorm,
norms behind the branches (post_norm), gated MLPs, and the forward types xv* and m0.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from umamba.blocks.patch_unet import PatchEncoder
from umamba.blocks.sampling import ConvDownsample, ConvPatchEmbed, PatchEmbed, PatchMerging
from umamba.blocks.ss2d import MLP, SS2D, VSSBlock, initialize_linear, ss2d_options
from umamba.networks.base import check_official, check_stages
from umamba.networks.registry import register_module
from umamba.networks.state_dict import (
    KeyMap,
    Row,
    count_blocks,
    renamed_rows,
    vss_block_rows,
)

PATCH_EMBEDS = ("v1", "v2")
DOWNSAMPLES = ("v1", "v2", "v3")

_WIDTH_96 = {"features_per_stage": (96, 192, 384, 768)}
_WIDTH_128 = {"features_per_stage": (128, 256, 512, 1024)}
_SECOND = {
    "forward_type": "v05_noz",
    "d_state": 1,
    "conv_bias": False,
    "mlp_ratio": 4,
    "patch_embed": "v2",
    "downsample": "v3",
}
_SECOND_THIN = {**_SECOND, "expand": 1}

# The arguments of VMambaEncoder by the official name of the size, with the published file.
SIZES: dict[str, dict[str, Any]] = {
    # vssmtiny_dp01_ckpt_epoch_292, also called vmamba_tiny_e292
    "vssm_tiny": {**_WIDTH_96, "depths": (2, 2, 9, 2)},
    # vssmsmall_dp03_ckpt_epoch_238, also called vmamba_small_e238_ema
    "vssm_small": {**_WIDTH_96, "depths": (2, 2, 27, 2)},
    # vssmbase_dp06_ckpt_epoch_241
    "vssm_base": {**_WIDTH_128, "depths": (2, 2, 27, 2)},
    # vssm_tiny_0230_ckpt_epoch_262
    "vssm1_tiny_0230": {**_WIDTH_96, **_SECOND, "depths": (2, 2, 5, 2)},
    # vssm_small_0229_ckpt_epoch_222
    "vssm1_small_0229": {**_WIDTH_96, **_SECOND, "depths": (2, 2, 15, 2)},
    # vssm_base_0229_ckpt_epoch_237
    "vssm1_base_0229": {**_WIDTH_128, **_SECOND, "depths": (2, 2, 15, 2)},
    # vssm1_tiny_0230s_ckpt_epoch_264
    "vssm1_tiny_0230s": {**_WIDTH_96, **_SECOND_THIN, "depths": (2, 2, 8, 2)},
    # vssm1_small_0229s_ckpt_epoch_240
    "vssm1_small_0229s": {**_WIDTH_96, **_SECOND_THIN, "depths": (2, 2, 20, 2)},
    # vssm1_base_0229s_ckpt_epoch_225
    "vssm1_base_0229s": {**_WIDTH_128, **_SECOND_THIN, "depths": (2, 2, 20, 2)},
}


class VMambaEncoder(PatchEncoder):
    """Patch embedding and stages of VSS blocks, each stage at half the size of the one before."""

    def __init__(
        self,
        input_channels: int = 3,
        *,
        features_per_stage: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 9, 2),
        patch: int = 4,
        forward_type: str = "v0",
        d_state: int = 16,
        expand: float = 2,
        dt_rank: int | None = None,
        d_conv: int = 3,
        conv_bias: bool = True,
        mlp_ratio: float = 0,
        patch_embed: str = "v1",
        downsample: str = "v1",
        drop_path_rate: float = 0.0,
        mixer: str = "scan",
    ) -> None:
        """depths: VSS blocks per stage, finest first, as features_per_stage. patch: pixels per side
        of a patch. forward_type, patch_embed, downsample: VMamba's names of its variants.
        mlp_ratio: 0 for blocks without an MLP. drop_path_rate: of the last block, rising from 0 at
        the first. mixer: "scan", "none" or "conv"."""
        check_stages(features_per_stage, depths=depths)
        stage = functools.partial(
            vss_stage,
            ss2d={
                **ss2d_options(forward_type),
                "d_state": d_state,
                "expand": expand,
                "dt_rank": dt_rank,
                "d_conv": d_conv,
                "conv_bias": conv_bias,
            },
            mlp_ratio=mlp_ratio,
            mixer=mixer,
        )
        rates = drop_path_rates(0, drop_path_rate, depths)
        super().__init__(
            build_patch_embed(patch_embed, input_channels, features_per_stage[0], patch),
            map(stage, features_per_stage, rates),
            (
                build_downsample(downsample, above, width)
                for above, width in itertools.pairwise(features_per_stage)
            ),
        )
        self.features_per_stage = tuple(features_per_stage)
        initialize_linear(self)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Our arguments for those of VMamba's VSSM; what config leaves out is as in vssm_tiny."""
        if config.get("norm_layer", "ln").lower() not in ("ln", "ln2d"):
            raise ValueError(f"norm_layer is {config['norm_layer']!r}; choose 'ln' or 'ln2d'")
        names = {
            "in_chans": "input_channels",
            "depths": "depths",
            "patch_size": "patch",
            "forward_type": "forward_type",
            "ssm_d_state": "d_state",
            "ssm_ratio": "expand",
            "ssm_dt_rank": "dt_rank",
            "ssm_conv": "d_conv",
            "ssm_conv_bias": "conv_bias",
            "mlp_ratio": "mlp_ratio",
            "patchembed_version": "patch_embed",
            "downsample_version": "downsample",
            "drop_path_rate": "drop_path_rate",
        }
        check_official(
            config, ssm_act_layer="silu", mlp_act_layer="gelu", gmlp=False, patch_norm=True,
            post_norm=False, posembed=False,
        )  # fmt: skip
        own = {names[name]: value for name, value in config.items() if name in names}
        if own.get("dt_rank") == "auto":
            own["dt_rank"] = None
        n_stages = len(own.get("depths", (2, 2, 9, 2)))
        return {**own, "features_per_stage": official_widths(config.get("dims", 96), n_stages)}


for _size, _arguments in SIZES.items():
    register_module(
        f"vmamba_{_size.split('_', 1)[1]}",
        paper="arXiv:2401.10166",
        reference="MzeroMiko/VMamba@2ed52ead062a51a64521ed3871d52914bf532876",
        licence="MIT",
        arguments=_arguments,
    )(VMambaEncoder)


class VMambaClassifier(nn.Module):
    """The network of the ImageNet checkpoints: encoder, LayerNorm, mean over pixels, head."""

    def __init__(self, encoder: VMambaEncoder, num_classes: int = 1000) -> None:
        super().__init__()
        width = encoder.features_per_stage[-1]
        self.encoder = encoder
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)
        initialize_linear(self.head)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, input_channels, H, W) -> logits (B, num_classes)."""
        return self.head(self.norm(self.encoder(images)[-1]).mean(dim=(1, 2)))

    @staticmethod
    def official_key_map(out_norm: str = "layer") -> KeyMap:
        """Reads both spellings of the official names and writes the newer one. out_norm: SS2D's."""
        return KeyMap(
            [
                *encoder_rows("", "encoder.", out_norm=out_norm),
                Row("classifier.{layer}.{p}", "{layer}.{p}"),
                *encoder_rows("", "encoder.", old=True),
                Row("norm.{p}", "norm.{p}"),
                Row("head.{p}", "head.{p}"),
            ]
        )


def build_patch_embed(version: str, in_channels: int, width: int, patch: int) -> nn.Module:
    """VMamba's patch embedding "v1" (patches) or "v2" (two strided convolutions, to a quarter)."""
    if version not in PATCH_EMBEDS:
        raise ValueError(f"patch_embed is {version!r}; choose one of {', '.join(PATCH_EMBEDS)}")
    if version == "v1":
        return PatchEmbed(in_channels, width, patch)
    if patch != 4:
        raise ValueError(f"patch is {patch}; the patch embedding v2 has 4, v1 takes any")
    return ConvPatchEmbed(in_channels, width)


def build_downsample(version: str, width: int, out_width: int) -> nn.Module:
    """VMamba's downsampling "v1" (patch merging), "v2" or "v3" (convolution of kernel 2 or 3)."""
    if version not in DOWNSAMPLES:
        raise ValueError(f"downsample is {version!r}; choose one of {', '.join(DOWNSAMPLES)}")
    if version == "v1":
        return PatchMerging(width, out_width, pad_odd=True)
    return ConvDownsample(width, out_width, int(version[1:]))


def vss_stage(
    width: int, drop_path: Sequence[float], *, ss2d: Mapping[str, Any], mlp_ratio: float, mixer: str
) -> nn.Sequential:
    """One VSS block for each rate of drop_path. ss2d: arguments of SS2D."""
    build = functools.partial(SS2D, width, **ss2d)
    mlp = functools.partial(MLP, width, mlp_ratio) if mlp_ratio > 0 else None
    return nn.Sequential(
        *(VSSBlock(width, build, mixer=mixer, drop_path=rate, mlp=mlp) for rate in drop_path)
    )


def official_widths(dims: int | Sequence[int], n_stages: int) -> list[int]:
    """The widths of the stages for VMamba's argument `dims`: a single one doubles per stage."""
    return [dims * 2**i for i in range(n_stages)] if isinstance(dims, int) else list(dims)


def drop_path_rates(first: float, last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth per stage, going evenly from the first block's to the last's."""
    step = (last - first) / max(sum(depths) - 1, 1)
    rates = iter([first + step * i for i in range(sum(depths))])
    return [list(itertools.islice(rates, depth)) for depth in depths]


def encoder_rows(
    official: str, own: str, *, old: bool = False, out_norm: str = "layer"
) -> list[Row]:
    """The rows of a VMambaEncoder; both prefixes end in a dot or are empty.

    old: in the spelling of VMamba's first version. out_norm as in SS2D.
    """
    newer = {"0": "proj", "2": "norm", "5": "proj2", "7": "norm2"}
    embed = {"proj": "proj", "norm": "norm"} if old else newer
    downsample = {"reduction": "reduction", "norm": "norm", "1": "conv", "3": "post_norm"}
    block = (f"{official}layers.{{i}}.blocks.{{j}}.", f"{own}stages.{{i}}.{{j}}.")
    below = (f"{official}layers.{{i}}.downsample.", f"{own}downsamples.{{i}}.")
    return [
        *renamed_rows(f"{official}patch_embed.", f"{own}patch_embed.", embed),
        *vss_block_rows(*block, old=old, out_norm=out_norm),
        *renamed_rows(*below, downsample),
    ]


def encoder_arguments(shapes: Mapping[str, tuple[int, ...]], finest: int) -> dict[str, Any]:
    """The arguments that tell from the shapes of a U-shaped network around a VMambaEncoder.

    shapes: of a state dict, under our names. finest: the first of features_per_stage.
    """
    depths = count_blocks(shapes, "encoder.stages")
    decoder = count_blocks(shapes, "decoder.stages")
    widths = [shapes[f"encoder.stages.{i}.0.norm.weight"][0] for i in range(len(depths))]
    _, inner, d_state = shapes["encoder.stages.0.0.mixer.A_log"]
    expand = inner / widths[0]
    return {
        "features_per_stage": [finest, *widths],
        "depths": depths,
        "depths_decoder": [n for n in decoder if n],
        "d_state": d_state,
        "expand": int(expand) if expand.is_integer() else expand,
    }


def mirrored_stages(n_stages: int) -> KeyMap:
    """From the blocks of an encoder's stages to those of a decoder, which counts from the deepest.

    For `pretrained_maps`.
    """
    last = n_stages - 1
    return KeyMap(
        Row(f"encoder.stages.{i}.{{p...}}", f"decoder.stages.{last - i}.{{p...}}")
        for i in range(n_stages)
    )
