"""VM-UNet: VMamba's encoder and a decoder of the same blocks, joined by sums, in 2D.

    size   encoder                            decoder
    1      image                              expand by 4 - seg
    1/4    embed - stage                      stage
    1/8    merge - stage - - - - skip - - -   stage - add - expand
    1/16   merge - stage - - - - skip - - -   stage - add - expand
    1/32   merge - stage - - - - skip - - -   stage - add - expand

    A skip is the input of its stage; the decoder's deepest stage takes the encoder's output.

arXiv 2402.02491; equals JCruan519/VM-UNet@43c495b, models/vmunet (Apache-2.0), with its QUIRKS.
Different: the published numbers of blocks are the defaults (the official defaults, 2-2-9-2 and
2-9-2-2, were never trained); a single class gives a logit, and a probability only with `sigmoid`;
image sizes that 32 does not divide are refused (the official network fails inside, or returns
another size); all VSS blocks compute in at least float32.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from umamba.blocks.conv import convolution
from umamba.blocks.sampling import PatchExpand
from umamba.blocks.ss2d import initialize_linear
from umamba.networks.base import GrayRepeatingNetwork, check_official, check_stages, stem_channels
from umamba.networks.registry import register
from umamba.networks.state_dict import KeyMap, Row, vss_block_rows
from umamba.networks.vmamba import (
    VMambaEncoder,
    drop_path_rates,
    encoder_arguments,
    encoder_rows,
    mirrored_stages,
    official_widths,
    vss_stage,
)

QUIRKS = (
    "the embedding, the input of stage 0, is no skip",
    "skips are the inputs of their stages, added before the expansion, not concatenated",
    "there is no norm behind the encoder and none in front of the head",
    "images of one channel are repeated to three, for which the stem was trained",
    "one output, no deep supervision",
)


@register(
    "vm_unet",
    paper="arXiv:2402.02491",
    reference="JCruan519/VM-UNet@43c495bfd0cb2bd58fd0147687c60c9c624c4840",
    licence="Apache-2.0",
    quirks=QUIRKS,
)
class VMUNet(GrayRepeatingNetwork):
    """2D U-Net of VSS blocks only; image sizes divisible by 32, with the default stages."""

    spatial_dims = (2,)
    fixed_strides = ((1, 1), (4, 4), (2, 2), (2, 2), (2, 2))
    short_training_lr = 1e-3  # at 3e-3 it does not begin to learn before the rate has come down
    pretrained_files = ("vssm_small", "vssm_tiny")

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        strides: Sequence[Sequence[int]] = fixed_strides,
        features_per_stage: Sequence[int] = (24, 96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 2, 2),
        depths_decoder: Sequence[int] = (2, 2, 2, 1),
        d_state: int = 16,
        expand: float = 2,
        drop_path_rate: float = 0.2,
        sigmoid: bool = False,
        mixer: str = "scan",
        deep_supervision: bool = False,
    ) -> None:
        """strides, features_per_stage: finest first; the first stage is the decoder's last map, at
        the full size, the second's stride is the side of a patch, the others' strides are 2.
        depths, depths_decoder: VSS blocks per stage, in the encoder finest first, in the decoder
        deepest first. sigmoid: returns probabilities, as the official network does for one class.
        mixer: "scan", "none" or "conv"."""
        super().__init__(input_channels, num_classes, strides=strides, n_outputs=1)
        patch = strides[min(1, len(strides) - 1)][0]
        self.check_strides(strides, [(1, 1), (patch, patch), *[(2, 2)] * (len(strides) - 2)])
        check_stages(strides, features_per_stage=features_per_stage)
        check_stages(strides[1:], depths=depths, depths_decoder=depths_decoder)
        self.encoder = VMambaEncoder(
            stem_channels(input_channels),
            features_per_stage=features_per_stage[1:],
            depths=depths,
            patch=patch,
            d_state=d_state,
            expand=expand,
            drop_path_rate=drop_path_rate,
            mixer=mixer,
        )
        ss2d = {"d_state": d_state, "expand": expand}
        self.decoder = Decoder(
            num_classes,
            features_per_stage,
            drop_path_rates(drop_path_rate, 0, depths_decoder),
            stage=functools.partial(vss_stage, ss2d=ss2d, mlp_ratio=0, mixer=mixer),
            patch=patch,
            sigmoid=sigmoid,
            deep_supervision=deep_supervision,
        )

    def forward(self, images: Tensor) -> Tensor | list[Tensor]:
        """images (B, input_channels, H, W) -> logits; a list of them under deep supervision."""
        inputs, outputs = self.encoder.stage_maps(self.stem_images(images))
        return self.decoder(outputs[-1], inputs[1:])

    def pretrained_maps(self) -> list[KeyMap]:
        # parity: load_from also copies the encoder's stages into the decoder's of the same width.
        return [*super().pretrained_maps(), mirrored_stages(len(self.encoder.stages))]

    @classmethod
    def official_key_map(cls, prefix: str = "vmunet.") -> KeyMap:
        """prefix: of the official names; empty for the module inside the official network."""
        return KeyMap(
            [
                *encoder_rows(prefix, "encoder.", old=True),
                *vss_block_rows(
                    f"{prefix}layers_up.{{i}}.blocks.{{j}}.", "decoder.stages.{i}.{j}.", old=True
                ),
                Row(f"{prefix}layers_up.{{i}}.upsample.{{p...}}", "decoder.upsample.{i}.{p...}"),
                Row(f"{prefix}final_up.{{p...}}", "decoder.final_up.{p...}"),
                Row(f"{prefix}final_conv.{{p}}", "decoder.seg_layers.0.{p}"),
            ]
        )

    @classmethod
    def arguments_of(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return encoder_arguments(shapes, finest=shapes["decoder.final_up.norm.weight"][0])

    @classmethod
    def official_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Of VMUNet's arguments, or of those of the VSSM inside it, which has no sigmoid."""
        depths = list(config.get("depths", (2, 2, 9, 2)))
        widths = official_widths(config.get("dims", 96), len(depths))
        check_official(config, dims_decoder=widths[::-1])
        patch = config.get("patch_size", 4)
        channels = config.get("in_chans", config.get("input_channels", 3))
        inner = "in_chans" in config
        return {
            "input_channels": channels,
            "num_classes": config["num_classes"],
            "strides": [[1, 1], [patch, patch], *[[2, 2]] * (len(widths) - 1)],
            "features_per_stage": [widths[0] // patch, *widths],
            "depths": depths,
            "depths_decoder": list(config.get("depths_decoder", (2, 9, 2, 2))),
            "d_state": config.get("d_state", 16),
            "drop_path_rate": config.get("drop_path_rate", 0.2),
            "sigmoid": config["num_classes"] == 1 and not inner,
        }


class Decoder(nn.Module):
    """Goes up stage by stage: add the skip, expand, VSS blocks; at the end, expand by a patch.

    drop_path: rates of stochastic depth per stage, deepest first. stage(width, rates) builds the
    blocks of a stage.
    """

    def __init__(
        self,
        num_classes: int,
        features_per_stage: Sequence[int],
        drop_path: Sequence[Sequence[float]],
        *,
        stage: Callable[[int, Sequence[float]], nn.Module],
        patch: int,
        sigmoid: bool,
        deep_supervision: bool,
    ) -> None:
        super().__init__()
        self.sigmoid = sigmoid
        self.deep_supervision = deep_supervision
        finest, *widths = features_per_stage
        deepest_first = widths[::-1]
        self.stages = nn.ModuleList(map(stage, deepest_first, drop_path))
        # The deepest stage has the size of its input.
        self.upsample = nn.ModuleList([nn.Identity()])
        for below, width in itertools.pairwise(deepest_first):
            self.upsample.append(PatchExpand(below, width))
        self.final_up = PatchExpand(widths[0], finest, patch)
        initialize_linear(self)
        self.seg_layers = nn.ModuleList([convolution(finest, num_classes, [1, 1])])

    def forward(self, features: Tensor, skips: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """features (B, H, W, C) of the deepest stage; skips finest first -> logits."""
        features = self.stages[0](features)
        layers = zip(self.upsample[1:], self.stages[1:], skips[::-1], strict=True)
        for upsample, stage, skip in layers:
            features = stage(upsample(features + skip))
        logits = self.seg_layers[0](self.final_up(features).movedim(-1, 1))
        if self.sigmoid:
            logits = logits.sigmoid()
        return [logits] if self.deep_supervision else logits
