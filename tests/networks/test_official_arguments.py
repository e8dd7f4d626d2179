"""Official arguments of other values than the recorded cases have: built, keys, sizes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity.subjects import subject_of
from torch import Tensor, nn

from umamba.blocks.lbmamba import LBMamba
from umamba.blocks.ss2d import SS2D
from umamba.networks import get_entry

VSSM = {"in_chans": 3, "num_classes": 2, "dims": [8, 16], "depths": [1, 2]}
SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 12, "num_classes": 2}
SWIN |= {"depths": [2, 3, 1, 1], "num_heads": [1, 2, 3, 4]}
STAGES = {"features_per_stage": [32, 32, 64, 128, 256, 256, 256], "n_stages": 7}
UNET = {**STAGES, "input_channels": 3, "num_classes": 1, "kernel_sizes": 3}
UNET |= {"n_conv_per_stage": 2, "n_conv_per_stage_decoder": 2}
PLAN_2D = {**UNET, "dims": 2, "strides": [1, 2, 2, 2, [2, 1], 2, 2]}
PLAN_3D = {**UNET, "dims": 3, "strides": [1, [1, 2, 2], 2, 2, [2, 2, 1], 2, 2]}
FOUR = {"n_stages": 4, "features_per_stage": 32, "strides": [1, 2, 2, 2]}
ENCODER_D = {"vss_args": {"in_chans": 1, "dims": 8, "depths": [1, 1, 2]}}
DECODER_D = {"num_classes": 1, "features_per_stage": [8, 16, 32], "d_state": 4}
HYMAMBA = {"in_channel": 3, "n_classes": 1, "img_size": 32, "channels": [4, 5, 6, 7, 12]}
HYMAMBA |= {"depth": 1, "depths": [9, 1, 2, 3, 1], "exp_r": [2, 3, 2, 1, 2]}
MSVM = {"depths": [1, 1, 2], "dims": [8, 16, 32], "ssm_d_state": 2, "ssm_ratio": 2.0}

# The case's name of the network, its arguments, the image, official keys and shapes.
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "bot-2d-7": (
        *("umamba-bot", PLAN_2D, (1, 3, 128, 64)),
        {
            "encoder.stem.1.conv2.conv.weight": (32, 32, 3, 3),
            "encoder.stages.3.1.conv1.conv.weight": (128, 128, 3, 3),
            "decoder.stages.5.0.conv1.weight": (32, 32, 3, 3),
            "decoder.stages.3.1.conv1.norm.weight": (64,),
        },
    ),
    "enc-2d-4": (
        "umamba-enc",
        {**UNET, **FOUR, "dims": 2, "input_channels": 1, "input_size": [40, 24]},
        (1, 1, 40, 24),
        {"encoder.mamba_layers.3.norm.weight": (15,), "encoder.mamba_layers.1.mamba.D": (64,)},
    ),
    "enc-3d-7": (
        *("umamba-enc", {**PLAN_3D, "input_size": [64, 64, 32]}, (1, 3, 64, 64, 32)),
        {"encoder.mamba_layers.5.norm.weight": (16,), "encoder.mamba_layers.2.norm.bias": (64,)},
    ),
    "bot-v1-7": (
        *("umamba-bot-v1", PLAN_3D, (1, 3, 64, 64, 32)),
        {
            "encoder.stages.6.blocks.1.conv2.conv.bias": (256,),
            "encoder.stages.2.blocks.0.skip.1.conv.weight": (64, 32, 1, 1, 1),
            "decoder.transpconvs.5.weight": (32, 32, 1, 2, 2),
        },
    ),
    "clinix-4": (
        *("mambaclinix", {**UNET, **FOUR, "dims": 3, "n_conv_per_stage": [1, 2, 2, 2]}),
        *((1, 3, 16, 8, 24),),
        {
            "encoder.encoder_layers.0.skip_scale": (1,),
            "encoder.encoder_layers.1.hgConvs.proj_in.weight": (32, 16, 1, 1, 1),
            "encoder.encoder_layers.1.hgConvs.dwconv.weight": (28, 1, 3, 3, 3),
            "encoder.encoder_layers.2.proj.weight": (32, 32),
            "encoder.LayerNorm.gamma": (32,),
        },
    ),
    "clinix-7": (
        *("mambaclinix", PLAN_3D, (1, 3, 64, 64, 32)),
        {
            "encoder.encoder_layers.3.hgConvs.reconv.3.weight": (64, 32, 1, 1, 1),
            "encoder.encoder_layers.4.norm.weight": (256,),
            "encoder.LayerNorm.beta": (128,),
            "decoder.residual_blocks.5.conv1.conv.weight": (32, 32, 3, 3, 3),
        },
    ),
    "lightm-2d": (
        "lightmunet",
        {"spatial_dims": 2, "init_filters": 8, "in_channels": 3, "out_channels": 1}
        | {"blocks_down": [2, 1, 3], "blocks_up": [1, 2], "norm": ["group", {"num_groups": 4}]},
        (1, 3, 12, 20),
        {
            "down_layers.2.3.conv2.proj.weight": (32, 32),
            "down_layers.1.0.0.proj.weight": (16, 8),
            "up_layers.1.1.conv.0.conv.weight": (8, 1, 3, 3),
            "conv_final.2.1.conv.weight": (1, 8, 1, 1),
        },
    ),
    "nnmamba": (
        *("nnmamba-seg", {"channels": 24, "blocks": 4, "number_classes": 1}, (1, 1, 32, 16, 48)),
        {"layer3.3.conv2.weight": (192, 192, 3, 3, 3), "att1.layer1.weight": (1, 24)},
    ),
    "nnmamba-single": (
        *("nnmamba-seg-nnunet", {"in_ch": 3, "blocks": 2, "number_classes": 1, "do_ds": False}),
        *((1, 3, 16, 32, 16), {"ds3_cls_conv.weight": (1, 128, 1, 1, 1)}),
    ),
    "nnmamba-cls": (
        *("nnmamba-cls", {"in_ch": 3, "channels": 8, "blocks": 1}, (1, 3, 17, 20, 33)),
        {"mlp.0.weight": (8, 112), "mlp.3.weight": (1, 8), "mamba_layer_stem.mamba.A_log": (16, 8)},
    ),
    "segmamba": (
        "segmamba",
        {"in_chans": 1, "out_chans": 1, "depths": [1, 3, 0, 2], "hidden_size": 12}
        | {"feat_size": [48, 4, 6, 8]},
        (1, 1, 48, 16, 80),
        {"vit.stages.1.2.mamba.conv1d_s.bias": (8,), "encoder5.layer.conv1.conv.weight": (12,)},
    ),
    "hymamba": (
        *("hymamba", {**HYMAMBA, "kernels": [3, 5, 3, 1, 3]}, (1, 3, 32, 64, 16)),
        {
            "embeddings.layer2.0.conv1.weight": (5, 1, 5, 5, 5),
            "embeddings.layer4.2.conv2.weight": (7, 7, 1, 1, 1),
            "mae.blocks.0.mlp.fc1.weight": (24, 12),
        },
    ),
    "uvm-net": (
        *("uvm_net", {"n_channels": 1, "base": 8, "size": 3}, (1, 1, 37, 50)),
        {"inc.ub.model3.in_proj.weight": (36, 9), "up4.conv.double_conv.0.weight": (8, 16, 3, 3)},
    ),
    "vm-unet-gray-core": (
        *("vm_unet_core", {**VSSM, "in_chans": 1, "dims": 8, "depths_decoder": [2, 1]}),
        *(
            (1, 1, 8, 24),
            {"patch_embed.proj.weight": (8, 1, 4, 4), "final_conv.weight": (2, 2, 1, 1)},
        ),
    ),
    "mamba-unet-core": (
        *("mamba_unet_core", {**VSSM, "d_state": 4, "num_classes": 1}, (1, 3, 16, 8)),
        {"layers_up.1.blocks.0.self_attention.A_logs": (64, 4), "output.weight": (1, 8, 1, 1)},
    ),
    "mamba-unet-rgb": (
        *("mamba_unet", {"yaml": "vmamba_tiny.yaml", "num_classes": 1}, (1, 3, 32, 64)),
        {"mamba_unet.output.weight": (1, 96, 1, 1)},
    ),
    "msvm-unet-gray": (
        *("msvm_unet", {"in_channels": 3, "num_classes": 1, "encoder": MSVM}, (1, 1, 16, 32)),
        {
            "encoder.layers.2.blocks.1.op.x_proj_weight": (4, 6, 64),
            "decoder.layers.1.vss_layer.blocks.1.op.A_logs": (32, 1),
        },
    ),
    "msvm-unet-small": (
        *("msvm_unet", {"num_classes": 9, "enc_name": "small_0229s"}, (1, 3, 32, 32)),
        {"encoder.layers.2.blocks.19.mlp.fc2.weight": (384, 1536)},
    ),
    "swin-unet-core": (
        *("swin_unet_core", {**SWIN, "in_chans": 1, "mlp_ratio": 2.0}, (1, 1, 64, 64)),
        {
            "layers.1.blocks.2.mlp.fc1.weight": (48, 24),
            "layers.3.blocks.0.attn.relative_position_bias_table": (9, 4),
            "patch_embed.proj.weight": (12, 1, 4, 4),
        },
    ),
    "swin-umamba": (
        "swin_umamba",
        {"feat_size": [4, 8, 12, 16, 24], "hidden_size": 24, "out_chans": 1}
        | {"encoder": {"dims": [8, 12, 16, 24], "depths": [1, 1, 3, 1], "d_state": 2}},
        (1, 1, 32, 64),
        {"vssm_encoder.layers.2.blocks.2.self_attention.A_logs": (128, 2)},
    ),
    "swin-umamba-d": (
        *("swin_umamba_d", {**ENCODER_D, "decoder_args": DECODER_D}, (1, 1, 16, 32)),
        {
            "vssm_encoder.layers.0.blocks.0.self_attention.A_logs": (64, 16),
            "decoder.stages.0.blocks.1.self_attention.A_logs": (128, 4),
        },
    ),
    "vmamba-oncnorm": (
        *("vmamba_backbone", {**VSSM, "forward_type": "v05_oncnorm_noz", "norm_layer": "ln2d"}),
        *((1, 3, 24, 40), {"layers.0.blocks.0.op.out_norm.2.weight": (16, 1, 3, 3)}),
    ),
    "vmamba-defaults": (
        *("vmamba_backbone", {**VSSM, "in_chans": 1, "ssm_dt_rank": 3, "ssm_conv": 5}),
        *((1, 1, 16, 8),),
        {
            "layers.0.downsample.1.weight": (16, 8, 2, 2),
            "layers.1.blocks.1.mlp.fc1.weight": (64, 16),
            "layers.1.blocks.1.op.dt_projs_weight": (4, 32, 3),
            "layers.0.blocks.0.op.conv2d.weight": (16, 1, 5, 5),
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_arguments_give_the_official_keys_and_sizes(variant: str) -> None:
    name, config, shape, expected = VARIANTS[variant]
    subject = subject_of({"builder": name, "reference": "", "config": config})
    with torch.device("meta"):
        network = subject.build(config).eval()
        outputs = subject.run(network, torch.empty(shape))
    finest = outputs[0] if isinstance(outputs, list) else outputs
    assert finest.ndim == 2 or finest.shape[2:] == shape[2:]
    own = network.state_dict()
    official = subject.key_map.to_official(own)
    for key, wanted in expected.items():
        assert tuple(official[key].shape)[: len(wanted)] == wanted, key
    back, report = subject.key_map.to_own(official, {k: tuple(v.shape) for k, v in own.items()})
    assert back.keys() == own.keys() and not report.aliases and not report.ignored


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        ("msvm_unet", {"num_classes": 2, "encoder": {"forward_type": "v05"}}, "forward_type"),
        ("swin_unet_core", {**SWIN, "ape": True}, "ape"),
        ("swin_umamba", {"hidden_size": 12}, "hidden_size"),
        ("lightmunet", {"norm": ["INSTANCE", {}]}, "norm"),
        ("vm_unet_core", {**VSSM, "dims_decoder": [16, 16]}, "dims_decoder"),
        ("vmamba_backbone", {**VSSM, "gmlp": True}, "gmlp"),
    ],
)
def test_what_is_not_available_is_refused_by_name(
    name: str, config: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"official argument {named} is .* is available"):
        subject_of({"builder": name, "reference": "", "config": config}).build(config)


def mixer_case(repository: str, config: dict[str, Any], *keys: str) -> nn.Module:
    state = [[key, [1]] for key in keys]
    case = {"reference": f"{repository}@0", "config": config, "state_dict": state}
    return subject_of(case).build(config)


def test_other_arguments_of_mixers_are_honoured() -> None:
    start = {"d_model": 32, "dt_rank": "auto", "use_fast_path": False, "dt_min": 0.01}
    mamba = mixer_case("state-spaces/mamba", {**start, "conv_bias": False}, "A_log")
    assert (mamba.orders, mamba.directions[0].conv_bias) == (("raster",), None)
    keys = ("A_log", "A_b_log", "A_s_log")
    tri = mixer_case("ge-xing/SegMamba", {"d_model": 4, "bimamba_type": "v3"}, *keys)
    assert tri.orders == ("raster", "raster_reversed", "inter_slice_5")
    slow = mixer_case("ge-xing/SegMamba", {"d_model": 4, "use_fast_path": False}, *keys)
    assert slow.orders == ("raster",)
    first = {"d_model": 4, "bimamba_type": "v1"}
    assert mixer_case("FengheTan9/MambaMIM", first, *keys[:2]).orders == ("raster",)
    local = mixer_case("cvlab-stonybrook/LBMamba", {"d_model": 4, "window": 3}, "A_log")
    assert isinstance(local, LBMamba) and local.window == 3
    second = mixer_case(
        "state-spaces/mamba", {"d_model": 64, "ngroups": 2, "d_ssm": 128}, "dt_bias"
    )
    assert (second.headdim, second.norm.n_groups) == (64, 2)
    simple = {"d_model": 64, "ngroups": 2, "learnable_init_states": False}
    assert mixer_case("state-spaces/mamba", simple, "dt_bias").norm.n_groups == 1
    config = {"d_model": 4, "d_conv": 1, "dt_rank": 2, "forward_type": "v052d_onsoftmax_oact_no32"}
    case = {"builder": "vmamba_ss2d", "reference": "", "config": config}
    block = subject_of(case).build(config)
    assert isinstance(block, SS2D) and block.conv is None and block.out_gelu
    assert (block.out_norm.kind, block.dt_proj_weight.shape[-1]) == ("softmax", 2)


@pytest.mark.parametrize("name", ["vm_unet", "mamba_unet", "msvm_unet"])
def test_a_network_of_three_channels_takes_gray_images(name: str) -> None:
    small = {
        "features_per_stage": [4, 8, 12],
        "depths": [1, 1],
        "strides": [[1, 1], [4, 4], [2, 2]],
    }
    network = get_entry(name).cls(3, 2, **small, **decoder_depths(name)).eval()
    image: Tensor = torch.randn(1, 1, 8, 16)
    torch.testing.assert_close(network(image), network(image.repeat(1, 3, 1, 1)))


def decoder_depths(name: str) -> dict[str, Any]:
    return {"vm_unet": {"depths_decoder": [1, 1]}, "msvm_unet": {"depths_decoder": [1]}}.get(
        name, {}
    )


@pytest.mark.parametrize(("name", "count"), [("umamba-bot", 397 - 190), ("umamba-enc", 518 - 256)])
def test_the_published_3d_networks_have_as_many_keys_without_duplicates(
    name: str, count: int
) -> None:
    six = {"features_per_stage": [32, 64, 128, 256, 320, 320], "n_stages": 6}
    strides = [1, [1, 2, 2], 2, 2, 2, [1, 2, 2]]
    config = {**UNET, **six, "dims": 3, "strides": strides, "input_size": [40, 224, 192]}
    subject = subject_of({"builder": name, "reference": "", "config": config})
    with torch.device("meta"):
        network = subject.build({**config, "kernel_sizes": [[1, 3, 3], *[3] * 5]})
    assert len(subject.key_map.to_official(network.state_dict())) == count
