"""HyMamba, the network of MambaMIM: a MedNeXt encoder, Mamba on its deepest map, UNETR's decoder.

    image - stem, widen - refine - skip ----------------------------- cat - block - block - seg
               pool - blocks, widen - refine - skip ---------- cat - block - up
                         ...                                 ...
                            pool - blocks - + positions - Mamba layers - up

    blocks: MedNeXt's; widen: a convolution to the width of the next stage; refine, block: residual
    blocks of two convolutions; Mamba layer: norm, Mamba, +, norm, MLP, +

arXiv 2408.08070; equals FengheTan9/MambaMIM@471c2f6, models/network/hymamba.py (Apache-2.0): the
network that is fine-tuned, without the pre-training, with its QUIRKS; `n_outputs` adds the logits
of coarser maps for deep supervision.
Different: the official position table is made for one cubic patch, and other shapes with as many
tokens get it in a wrong geometry (`position_grid` repeats that); here it follows the image's shape.
Other widths, strides and numbers of stages work.
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

from umamba.blocks.conv import ResidualBlock, convolution
from umamba.blocks.mamba import Direction, Mamba
from umamba.blocks.norm import ChannelNorm, lay_out_as
from umamba.blocks.ss2d import MLP, VSSBlock
from umamba.blocks.unet_decoder import unetr_decoder
from umamba.networks.base import SegmentationNetwork, check_stages
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, mamba_rows, renamed_rows, unetr_decoder_rows
from umamba.ops.dispatch import in_float32

QUIRKS = (
    "Mamba scans in one direction, the official parameters of the other one are left out",
    "the path to the deeper stages does not pass through `refine`, only the skips do",
    "the decoder's blocks have neither biases nor scales in their norms, all others have both",
    "the linear layers of the Mamba layers, those of Mamba too, start xavier-uniform with zero "
    "biases, so that Mamba's step sizes start at softplus(0) = 0.69",
    "one output, no deep supervision",
)
KERNEL, POINT = (3, 3, 3), (1, 1, 1)
NORM = functools.partial(ChannelNorm, eps=1e-6)
LONGEST_WAVE = 10000  # of the position table, in voxels of the deepest map, over 2 pi
N_STAGES = 5  # of the official network, which its state dict's names count


@register(
    "hymamba",
    paper="arXiv:2408.08070",
    reference="FengheTan9/MambaMIM@471c2f6d49eff5cf9cfce1330dc5124204130de5",
    licence="Apache-2.0",
    quirks=QUIRKS,
)
class HyMamba(SegmentationNetwork):
    """3D U-Net of MedNeXt blocks with Mamba layers at the bottleneck; any divisible image size."""

    spatial_dims = (3,)
    fixed_strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (32, 64, 128, 192, 384),
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        n_blocks_per_stage: Sequence[int] = (0, 2, 2, 2, 1),
        expansion_per_stage: Sequence[int] = (2, 2, 4, 4, 4),
        n_mamba_layers: int = 4,
        position_grid: Sequence[int] | None = None,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        mixer: str = "scan",
        n_outputs: int = 1,
        deep_supervision: bool = False,
    ) -> None:
        """Per-stage sequences are finest first; kernel_sizes (3 everywhere by default), numbers and
        expansions are those of the MedNeXt blocks.

        position_grid: the shape of the deepest map for which the position table is made, then read
        in flat order as the official code does; by default the shape is the image's own. n_outputs:
        how many resolutions have logits for deep supervision, finest first. mixer: "scan", "none"
        or "conv".
        """
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=n_outputs)
        kernel_sizes = kernel_sizes or [KERNEL] * len(strides)
        check_stages(
            strides,
            features_per_stage=features_per_stage,
            kernel_sizes=kernel_sizes,
            n_blocks_per_stage=n_blocks_per_stage,
            expansion_per_stage=expansion_per_stage,
        )
        self.position_grid = None if position_grid is None else tuple(position_grid)
        sizes = zip(features_per_stage, kernel_sizes, expansion_per_stage, strict=True)
        blocks = [
            [MedNeXtBlock(*size) for _ in range(n_blocks)]
            for size, n_blocks in zip(sizes, n_blocks_per_stage, strict=True)
        ]
        self.encoder = Encoder(input_channels, strides, features_per_stage, blocks)
        first, *widths = features_per_stage
        deepest = widths[-1]
        mamba = functools.partial(Mamba, deepest, d_state=d_state, d_conv=d_conv, expand=expand)
        mlp = functools.partial(MLP, deepest, 2)
        self.bottleneck = nn.ModuleList(
            VSSBlock(deepest, mamba, spatial_dims=3, mixer=mixer, mlp=mlp)
            for _ in range(n_mamba_layers)
        )
        decoder = unetr_decoder(
            num_classes,
            [*widths, deepest],
            strides,
            last_blocks=1,
            n_outputs=n_outputs,
            deep_supervision=deep_supervision,
        )
        last = ResidualBlock(widths[0], first, KERNEL, norm=NORM, shortcut_bias=True)
        decoder.stages[-1] = nn.Sequential(*decoder.stages[-1].children(), last)
        decoder.seg_layers[-1] = convolution(first, num_classes, POINT)
        self.decoder = decoder
        initialize_mamba_layers(self.bottleneck)

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, *spatial) -> logits; a list of them under deep supervision."""
        self.check_input(images)
        *skips, deepest = self.encoder(images)
        return self.decoder([*skips, self.mix(deepest)])

    @in_float32
    def mix(self, features: Tensor) -> Tensor:
        """Adds the position table and runs the Mamba layers, outside autocast."""
        tokens = features.movedim(1, -1)  # (B, *grid, C)
        table = position_table(self.position_grid or tokens.shape[1:-1], tokens)
        tokens = tokens + table.reshape(tokens.shape[1:])
        for layer in self.bottleneck:
            tokens = layer(tokens)
        return lay_out_as(features, tokens)

    def check_input(self, images: Tensor) -> None:
        super().check_input(images)
        if self.position_grid is None:
            return
        shape = tuple(images.shape[2:])
        n_tokens = math.prod(size // d for size, d in zip(shape, self.divisor, strict=True))
        if n_tokens != math.prod(self.position_grid):
            valid = tuple(n * d for n, d in zip(self.position_grid, self.divisor, strict=True))
            raise ValueError(
                f"this HyMamba has a position table for {math.prod(self.position_grid)} tokens, "
                f"as an image of {valid} has, got {shape} with {n_tokens}; build it without "
                "position_grid for other shapes"
            )

    @classmethod
    def official_key_map(cls) -> KeyMap:
        return KeyMap(ROWS, ignored=IGNORED)

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {
            "input_channels": config.get("in_channel", 1),
            "num_classes": config.get("n_classes", 14),
            "position_grid": [config.get("img_size", 96) // 2 ** (N_STAGES - 1)] * 3,
        }
        names = {
            "channels": "features_per_stage",
            "exp_r": "expansion_per_stage",
            "depth": "n_mamba_layers",
        }
        arguments |= {own: config[name] for name, own in names.items() if name in config}
        if "depths" in config:  # its first entry is not read
            arguments["n_blocks_per_stage"] = [0, *config["depths"][1:]]
        if "kernels" in config:
            arguments["kernel_sizes"] = [[kernel] * 3 for kernel in config["kernels"]]
        return arguments


class Encoder(nn.Module):
    """Stem, then stages of MedNeXt blocks with max-pooling by the stride in front of each.

    A stage ends with a convolution to the width of the next one; the deepest has none.
    """

    def __init__(
        self,
        input_channels: int,
        strides: Sequence[Sequence[int]],
        features_per_stage: Sequence[int],
        blocks: Sequence[Sequence[nn.Module]],
    ) -> None:
        super().__init__()
        self.strides = tuple(map(tuple, strides))
        self.stem = convolution(input_channels, features_per_stage[0], KERNEL)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in blocks)
        self.widen = nn.ModuleList()
        self.refine = nn.ModuleList()
        for width, wider in pairwise(features_per_stage):
            self.widen.append(convolution(width, wider, KERNEL))
            self.refine.append(ResidualBlock(wider, wider, KERNEL, norm=NORM))

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (B, input_channels, *spatial) -> the skips, finest first, and the deepest map."""
        features = self.stages[0](self.stem(images))
        skips = []
        for widen, refine, stage, stride in zip(
            self.widen, self.refine, self.stages[1:], self.strides[1:], strict=True
        ):
            features = widen(features)
            skips.append(refine(features))
            features = stage(functional.max_pool3d(features, stride, stride))
        return [*skips, features]


class MedNeXtBlock(nn.Module):
    """A depthwise convolution, norm, and an MLP over the channels, added to the input."""

    def __init__(self, n_channels: int, kernel_size: Sequence[int], expansion: int) -> None:
        super().__init__()
        self.conv1 = convolution(n_channels, n_channels, kernel_size, groups=n_channels)
        self.norm = NORM(n_channels)
        self.conv2 = convolution(n_channels, expansion * n_channels, POINT)
        self.conv3 = convolution(expansion * n_channels, n_channels, POINT)

    def forward(self, features: Tensor) -> Tensor:
        """features (B, C, *spatial) -> the same shape."""
        mixed = self.conv2(self.norm(self.conv1(features)))
        return features + self.conv3(functional.gelu(mixed))


def position_table(grid: Sequence[int], like: Tensor) -> Tensor:
    """Sines and cosines of the voxel's index along each axis, (*grid, C) for (..., C) tokens.

    The channels are, for q = C // 2 / axes waves from 1 to 1 / LONGEST_WAVE: q sines and q cosines
    along the first axis, the same along the next; what is left over is 0.
    """
    n_waves = like.shape[-1] // (2 * len(grid))
    waves = torch.arange(n_waves, dtype=like.dtype, device=like.device) / max(n_waves, 1)
    frequencies = LONGEST_WAVE**-waves
    lines = (torch.arange(size, dtype=like.dtype, device=like.device) for size in grid)
    angles = [index[..., None] * frequencies for index in torch.meshgrid(*lines, indexing="ij")]
    table = torch.cat([wave for a in angles for wave in (a.sin(), a.cos())], dim=-1)
    return functional.pad(table, (0, like.shape[-1] - table.shape[-1]))


def initialize_mamba_layers(layers: nn.Module) -> None:
    """Xavier-uniform weights and zero biases in all linear layers.

    parity: Mamba's projection of dt is one of them, so that its own start of the bias is lost.
    """
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Direction):
            nn.init.xavier_uniform_(module.x_proj_weight)
            nn.init.xavier_uniform_(module.dt_proj_weight)
            nn.init.zeros_(module.dt_proj_bias)


def residual_rows(official: str, own: str) -> list[Row]:
    """The rows of a residual block with biases and affine norms; both prefixes end in a dot."""
    names = {"conv3": "shortcut.conv", "norm3": "shortcut.norm", "{layer}": "{layer}"}
    return renamed_rows(official, own, names)


ROWS = (
    Row("embeddings.stem.{p}", "encoder.stem.{p}"),
    *(
        row
        for i in range(1, N_STAGES)
        for row in (
            Row(f"embeddings.layer{i + 1}.{{rest...}}", f"encoder.stages.{i}.{{rest...}}"),
            Row(f"embeddings.expend{i}.{{p}}", f"encoder.widen.{i - 1}.{{p}}"),
            *residual_rows(f"embeddings.encoder{i}.", f"encoder.refine.{i - 1}."),
        )
    ),
    Row("mae.blocks.{j}.norm1.{p}", "bottleneck.{j}.norm.{p}"),
    *mamba_rows("mae.blocks.{j}.mamba.", "bottleneck.{j}.mixer."),
    Row("mae.blocks.{j}.norm2.{p}", "bottleneck.{j}.norm2.{p}"),
    Row("mae.blocks.{j}.mlp.{layer}.{p}", "bottleneck.{j}.mlp.{layer}.{p}"),
    *residual_rows("decoder.decoder1.", f"decoder.stages.{N_STAGES - 2}.1."),
    *unetr_decoder_rows("decoder.", N_STAGES - 1),
    Row("decoder.out.conv.{p}", f"decoder.seg_layers.{N_STAGES - 2}.{{p}}"),
)

# What the official network computes itself, and the parameters of a direction that it never scans.
IGNORED = (
    "mae.pos_embed",
    *(
        f"mae.blocks.{{j}}.mamba.{name}"
        for name in ("A_b_log", "D_b", "conv1d_b.{p}", "x_proj_b.weight", "dt_proj_b.{p}")
    ),
)
