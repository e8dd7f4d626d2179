"""Which network or block of ours a parity case is about, and how it is built from the case."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from umamba.blocks.lbmamba import AlternatingLayers, LBMamba
from umamba.blocks.mamba import Mamba
from umamba.blocks.mamba2 import Mamba2
from umamba.blocks.sampling import LargeKernelPatchExpand, PatchMerging
from umamba.blocks.ss2d import SS2D, VSSBlock, ss2d_options
from umamba.networks import get_entry, recognize_network
from umamba.networks.mamba_unet import MambaUNet
from umamba.networks.msvm_unet import expand_rows, msvss_rows, msvss_stage, pointwise_rows
from umamba.networks.nnmamba import (
    NnMamba,
    NnMambaClassifier,
    NnMambaEarly,
    NnMambaLandmark,
    NnMambaSingle,
    NnMambaSL,
)
from umamba.networks.partners import SwinUNet, UNetSmall
from umamba.networks.state_dict import (
    KeyMap,
    Row,
    mamba_rows,
    ss2d_rows,
    vss_block_rows,
)
from umamba.networks.uvm_net import UVMBlock, block_rows
from umamba.networks.vm_unet import VMUNet
from umamba.networks.vmamba import VMambaClassifier, VMambaEncoder

# Repositories whose cases of one mixer (those with a d_model) are Mamba-1, of 1 to 3 directions.
MAMBA_1 = ("state-spaces/mamba@", "FengheTan9/MambaMIM@", "ge-xing/SegMamba@")

# Arguments of official mixers that say how they start or on what they run, not what they compute.
WITHOUT_EFFECT = {
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "conv_init", "A_init_range"),
    *("use_fast_path", "use_mem_eff_path", "layer_idx", "device", "dtype", "lbm"),
    *("initialize", "dropout", "process_group", "sequence_parallel"),
}

# The networks that cases call by other names than the registry, or that are not in it.
NETWORKS: dict[str, Any] = {
    "lightmunet": "lightm_unet",
    "mambaclinix": "mamba_clinix",
    "nnmamba-cls": NnMambaClassifier,
    "nnmamba-land": NnMambaLandmark,
    "nnmamba-seg": NnMamba,
    "nnmamba-seg-early": NnMambaEarly,
    "nnmamba-seg-nnunet": NnMambaSingle,
    "nnmamba-segsl": NnMambaSL,
    "ssl_unet": UNetSmall,
    "swin_unet": SwinUNet,
}


# What VMamba's VSSM has where VMambaEncoder, by default vssm_tiny, has something else.
VSSM_DEFAULTS = {"forward_type": "v2", "mlp_ratio": 4.0, "downsample_version": "v2"}


class NotRegisteredError(LookupError):
    """No network of ours answers to this case yet."""


@dataclass
class Subject:
    """What a case tests: how to build it from the official arguments, its key map, how it runs."""

    build: Callable[[dict[str, Any]], nn.Module]
    key_map: KeyMap
    run: Callable[[Any, Tensor], Tensor | list[Tensor]] = lambda network, images: network(images)


def subject_of(case: Mapping[str, Any]) -> Subject:
    """The network or block of ours that a case is about."""
    config = case.get("config") or {}
    keys = {key for key, _ in case.get("state_dict", ())}
    repository = case["reference"].removeprefix("math of ")
    if "dt_bias" in keys:
        return mamba_2(case)
    if repository.startswith(MAMBA_1) and "d_model" in config:
        return mamba_1(case)
    if repository.startswith("cvlab-stonybrook/LBMamba@") and "A_log" in keys:
        rows = KeyMap(mamba_rows("", ""))
        return Subject(lambda c: LBMamba(**mixer_arguments(c)), rows)
    if repository.startswith("cvlab-stonybrook/LBMamba@"):
        rows = KeyMap(alternating_rows("", ""))
        return Subject(lambda c: AlternatingLayers(**c), rows, first_mixer_and_last_layer)
    if set(config) == {"c", "w", "h"}:
        return uvm_block(config)
    if case.get("builder") in BLOCKS:
        return BLOCKS[case["builder"]](config)
    names = [case[key] for key in ("network", "builder") if key in case]
    if not names and "state_dict" in case:
        fitting = recognize_network(keys)
        names = [name for name in fitting if get_entry(name).reference == case["reference"]]
    wanted = (names or [case["reference"]])[0]
    found = NETWORKS.get(wanted, wanted)
    try:
        network = get_entry(found).cls if isinstance(found, str) else found
    except ValueError:
        raise NotRegisteredError(f"{wanted} is not registered") from None
    return Subject(lambda c: network(**network.official_arguments(c)), network.official_key_map())


def mamba_1(case: Mapping[str, Any]) -> Subject:
    """Mamba-1 with the directions that the case's keys show, where the official code scans them."""
    keys = {key for key, _ in case["state_dict"]}
    config = dict(case["config"])
    merge = "mean" if config.pop("if_divide_out", False) else "sum"
    orders = ["raster", "raster_reversed", f"inter_slice_{config.pop('nslices', 5)}"]
    n_directions = 1 + ("A_b_log" in keys) + ("A_s_log" in keys)
    # "v1" of MambaMIM's copy, and the slow path of SegMamba's, save all directions and scan one.
    scans_one = config.pop("bimamba_type", "v2") not in ("v2", "v3")
    scans_one |= n_directions == 3 and not config.get("use_fast_path", True)
    n_scanned = 1 if scans_one else n_directions
    every, scanned = (mamba_rows("", "", n) for n in (n_directions, n_scanned))
    ignored = {row.official for row in every} - {row.official for row in scanned}
    arguments = {"orders": orders[:n_scanned], "merge": merge}
    return Subject(
        lambda _: Mamba(**mixer_arguments(config), **arguments), KeyMap(scanned, ignored=ignored)
    )


def mixer_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """An official mixer's arguments for ours: those that change what it computes."""
    own = {name: value for name, value in config.items() if name not in WITHOUT_EFFECT}
    if own.get("dt_rank") == "auto":
        own["dt_rank"] = None
    return own


def mamba_2(case: Mapping[str, Any]) -> Subject:
    """Mamba2, or Mamba2Simple, where the case names it or has its initial states."""
    named = "".join(case.get(key, "") for key in ("builder", "network", "reference"))
    simple = "simple" in named.lower() or "learnable_init_states" in case["config"]
    arguments = {**mixer_arguments(case["config"]), "grouped_norm": not simple}
    return Subject(lambda _: Mamba2(**arguments), KeyMap(mamba2_rows("", "")))


def mamba2_rows(official: str, own: str) -> list[Row]:
    """The rows of a Mamba-2 mixer; both prefixes end in a dot or are empty."""
    same = ("dt_bias", "A_log", "D", "init_states", "in_proj.{p}", "norm.weight", "out_proj.{p}")
    rows = [Row(official + name, own + name) for name in same]
    return [*rows, Row(f"{official}conv1d.{{p}}", f"{own}conv_{{p}}")]


def alternating_rows(official: str, own: str) -> list[Row]:
    """The rows of AlternatingLayers; both prefixes end in a dot or are empty."""
    norm = "layers.{i}.norm.weight"
    mamba = "layers.{i}.mixer."
    return [Row(official + norm, own + norm), *mamba_rows(official + mamba, own + mamba)]


def first_mixer_and_last_layer(layers: AlternatingLayers, tokens: Tensor) -> list[Tensor]:
    """The outputs of an LBMamba case."""
    first = layers.layers[0]
    return [first.mixer(first.norm(tokens)), layers(tokens)]


def uvm_block(config: Mapping[str, Any]) -> Subject:
    return Subject(lambda c: UVMBlock(c["c"], (c["w"], c["h"])), KeyMap(block_rows("", "")))


def ss2d_v0(config: Mapping[str, Any]) -> Subject:
    return Subject(lambda c: SS2D(**mixer_arguments(c)), KeyMap(ss2d_rows("", "")))


def vmamba_ss2d(config: Mapping[str, Any]) -> Subject:
    options = ss2d_options(config.get("forward_type", "v2"))

    def build(c: dict[str, Any]) -> nn.Module:
        own = mixer_arguments(c)
        first = own.pop("channel_first", False)
        own["expand"] = own.pop("ssm_ratio", 2)
        own.pop("forward_type", None)
        block = SS2D(**own, **options)
        return channels_first(block) if first else block

    return Subject(build, KeyMap(ss2d_rows("", "", options["out_norm"])))


def vss_block_v0(config: Mapping[str, Any]) -> Subject:
    def build(c: dict[str, Any]) -> nn.Module:
        width = c["hidden_dim"]
        norm = functools.partial(nn.LayerNorm, eps=c.get("norm_eps", 1e-6))
        mixer = functools.partial(SS2D, width, d_state=c.get("d_state", 16))
        return VSSBlock(width, mixer, norm=norm)

    return Subject(build, KeyMap(vss_block_rows("", "", old=True)))


def patch_merging_v0(config: Mapping[str, Any]) -> Subject:
    return Subject(lambda c: PatchMerging(c["dim"]), KeyMap([Row("{key...}", "{key...}")]))


def vmamba_backbone(config: Mapping[str, Any]) -> Subject:
    def build(c: dict[str, Any]) -> nn.Module:
        encoder = VMambaEncoder(**VMambaEncoder.official_arguments(c))
        return VMambaClassifier(encoder, c.get("num_classes", 1000))

    given = {**VSSM_DEFAULTS, **config}
    out_norm = ss2d_options(given["forward_type"])["out_norm"]
    key_map = VMambaClassifier.official_key_map(out_norm)
    return Subject(lambda c: build({**VSSM_DEFAULTS, **c}), key_map)


def core_of(network: Any) -> Callable[[Mapping[str, Any]], Subject]:
    """The module inside an official network, whose keys have no prefix."""
    key_map = network.official_key_map(prefix="")

    def build(c: dict[str, Any]) -> nn.Module:
        core = network(**network.official_arguments({"in_chans": 3, **c}))
        if core.input_channels == 1:  # the wrapper is what repeats gray images
            embed = core.encoder.patch_embed
            width, patch = embed.proj.out_channels, embed.proj.kernel_size
            embed.proj = nn.Conv2d(1, width, patch, patch)
        return core

    return lambda _: Subject(build, key_map)


def msvm_msvss(config: Mapping[str, Any]) -> Subject:
    def build(c: dict[str, Any]) -> nn.Module:
        return channels_first(msvss_stage(c["dim"], [c["drop_path"]] * c["depth"]))

    return Subject(build, KeyMap(msvss_rows("blocks.{j}.", "{j}.")))


def msvm_lkpe(config: Mapping[str, Any]) -> Subject:
    def build(c: dict[str, Any]) -> nn.Module:
        return channels_first(LargeKernelPatchExpand(c["dim"], c["dim"] // 2))

    return Subject(build, KeyMap(expand_rows("", "")))


def msvm_flkpe(config: Mapping[str, Any]) -> Subject:
    def build(c: dict[str, Any]) -> nn.Module:
        expand = LargeKernelPatchExpand(c["dim"], c["dim"], 4)
        return channels_first(nn.Sequential(expand, nn.Linear(c["dim"], c["num_classes"])))

    return Subject(build, KeyMap([*expand_rows("", "0."), *pointwise_rows("out.", "1.")]))


def channels_first(block: nn.Module) -> nn.Module:
    """The block, which is channels-last, with input and output as (B, C, H, W)."""
    block.register_forward_pre_hook(lambda module, inputs: inputs[0].movedim(1, -1))
    block.register_forward_hook(lambda module, inputs, output: output.movedim(-1, 1))
    return block


# What a case's `builder` makes, where that is no registered network: a block or a part.
BLOCKS: dict[str, Callable[[Mapping[str, Any]], Subject]] = {
    "mamba_unet_core": core_of(MambaUNet),
    "swin_unet_core": core_of(SwinUNet),
    "vm_unet_core": core_of(VMUNet),
    **{
        block.__name__: block
        for block in (
            ss2d_v0,
            vmamba_ss2d,
            vss_block_v0,
            patch_merging_v0,
            vmamba_backbone,
            msvm_msvss,
            msvm_lkpe,
            msvm_flkpe,
        )
    },
}
