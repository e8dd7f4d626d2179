"""What is special about U-Mamba: parameter counts, block counts, channel tokens, initialization."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from umamba.blocks.mixer import MixerLayer, count_parameters
from umamba.networks import create_network
from umamba.networks.umamba import thin_blocks

SIX_STAGES_3D = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 5],
    "strides": [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 3, [1, 2, 2]],
}


def plan_2d(n_stages: int) -> dict[str, Any]:
    return {
        "features_per_stage": [min(32 * 2**s, 512) for s in range(n_stages)],
        "kernel_sizes": [[3, 3]] * n_stages,
        "strides": [[1, 1], *[[2, 2]] * (n_stages - 1)],
    }


@pytest.mark.parametrize(
    ("name", "channels", "classes", "plan", "patch", "count"),
    [
        ("umamba_bot", 1, 14, SIX_STAGES_3D, None, 41_945_158),
        ("umamba_enc", 1, 14, SIX_STAGES_3D, [40, 224, 192], 42_842_798),
        ("umamba_bot", 1, 14, plan_2d(7), None, 47_533_012),
        ("umamba_enc", 1, 14, plan_2d(7), [320, 320], 47_015_538),
        ("umamba_bot", 3, 3, plan_2d(8), None, 64_797_301),
        ("umamba_enc", 3, 3, plan_2d(8), [512, 512], 64_014_261),
        ("umamba_bot_v1", 1, 14, SIX_STAGES_3D, None, 57_832_166),
        ("umamba_enc_v1", 1, 14, SIX_STAGES_3D, None, 59_105_766),
        ("umamba_bot_v1", 1, 14, plan_2d(7), None, 63_344_180),
        ("umamba_enc_v1", 1, 14, plan_2d(7), None, 67_333_428),
        ("umamba_bot_v1", 3, 3, plan_2d(8), None, 86_150_037),
        ("umamba_enc_v1", 3, 3, plan_2d(8), None, 91_835_029),
    ],
)
def test_parameter_counts_are_the_official_ones(
    name: str,
    channels: int,
    classes: int,
    plan: dict[str, Any],
    patch: list[int] | None,
    count: int,
) -> None:
    arguments = plan if patch is None else {**plan, "patch_size": patch}
    with torch.device("meta"):
        network = create_network(name, channels, classes, **arguments)
    assert count_parameters(network) == count


@pytest.mark.parametrize(
    ("n_stages", "encoder", "decoder"),
    [
        (5, [2, 2, 2, 1, 1], [2, 2, 2, 1]),
        (6, [2, 2, 2, 1, 1, 1], [2, 2, 2, 1, 1]),
        (7, [2, 2, 2, 2, 1, 1, 1], [2, 2, 2, 2, 1, 1]),
    ],
)
def test_half_of_the_stages_get_one_block_and_the_plans_stay_as_they_are(
    n_stages: int, encoder: list[int], decoder: list[int]
) -> None:
    planned = [2] * n_stages, [2] * (n_stages - 1)
    assert thin_blocks(*planned, n_stages) == (encoder, decoder)
    assert planned == ([2] * n_stages, [2] * (n_stages - 1))


def test_wrong_block_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="n_conv_per_stage_decoder needs 2 numbers"):
        create_network("umamba_bot", 1, 2, **small(), n_conv_per_stage_decoder=[2, 2, 2])
    with pytest.raises(ValueError, match="kernel_sizes has 2 entries"):
        create_network("umamba_bot", 1, 2, **small(), kernel_sizes=[[3, 3], [3, 3]])


def test_channel_tokens_tie_the_network_to_the_planned_patch() -> None:
    network = create_network("umamba_enc", 1, 2, **small(), patch_size=[16, 16])
    assert [layer.tokens for layer in layers_of(network)] == ["voxels", "channels"]
    assert network(torch.zeros(1, 1, 16, 16)).shape == (1, 2, 16, 16)
    with pytest.raises(ValueError, match=r"planned patch \(16, 16\), got \(16, 24\)"):
        network(torch.zeros(1, 1, 16, 24))


def test_without_channel_tokens_any_divisible_size_is_taken() -> None:
    images = torch.zeros(1, 1, 16, 24)
    for name in ("umamba_enc", "umamba_enc_noscan"):
        patch = [32, 32] if name == "umamba_enc" else [16, 16]
        network = create_network(name, 1, 2, **small(), patch_size=patch)
        assert network(images).shape == (1, 2, 16, 24)


@pytest.mark.parametrize("n_stages", [4, 5])
def test_the_2d_encoder_has_a_layer_at_every_second_stage_from_the_deepest(n_stages: int) -> None:
    with torch.device("meta"):
        network = create_network("umamba_enc", 1, 2, **plan_2d(n_stages), patch_size=[64, 64])
    present = [isinstance(mixer, MixerLayer) for mixer in network.encoder.mixers]
    assert present == [(n_stages - 1 - s) % 2 == 0 for s in range(n_stages)]


def test_a_patch_of_other_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_size"):
        create_network("umamba_enc", 1, 2, **small(), patch_size=[8, 16, 16])


def test_the_last_2d_decoder_stage_does_not_see_the_full_resolution_skip() -> None:
    network = create_network("umamba_bot", 1, 2, **small()).eval()
    skips = network.encoder(torch.randn(1, 1, 16, 16))
    before = network.decoder(skips)
    changed = network.decoder([skips[0] + 1, *skips[1:]])
    assert torch.equal(before, changed)
    assert not torch.equal(before, network.decoder([skips[0], skips[1] + 1, *skips[2:]]))


@pytest.mark.parametrize("name", ["umamba_bot", "umamba_bot_v1", "umamba_enc_v1"])
def test_initialization_is_kaiming_on_convolutions_and_leaves_the_mixer_alone(name: str) -> None:
    torch.manual_seed(0)
    network = create_network(name, 1, 2, **small(features=[32, 48, 64]))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.bias is None or not module.bias.any()
    weight = network.encoder.stages[1][0].conv2.weight
    expected = (2 / (1 + 0.01**2) / (48 * 9)) ** 0.5
    assert abs(weight.std().item() / expected - 1) < 0.03
    for layer in layers_of(network):
        direction = layer.mixer.directions[0]
        assert direction.conv_bias.abs().max() > 0
        steps = nn.functional.softplus(direction.dt_proj_bias)
        assert 0.0009 < steps.min() < steps.max() < 0.101
        decay = direction.A_log.exp()
        torch.testing.assert_close(decay, torch.arange(1.0, 17).expand_as(decay))
    starts_at_zero = not network.encoder.stages[1][0].norm2.weight.any()
    assert starts_at_zero == (name == "umamba_enc_v1")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["umamba_bot", "umamba_enc", "umamba_bot_v1", "umamba_enc_v1"])
def test_the_convolution_control_has_as_many_parameters_as_the_network(
    name: str, dims: int
) -> None:
    plan = plan_2d(5) if dims == 2 else SIX_STAGES_3D
    if name == "umamba_enc":
        plan = {**plan, "patch_size": [96, 96] if dims == 2 else [40, 96, 96]}
    with torch.device("meta"):
        scan, conv, none = (
            create_network(name + suffix, 1, 3, **plan) for suffix in ("", "_convmix", "_noscan")
        )
    for own, control in zip(layers_of(scan), layers_of(conv), strict=True):
        assert own.tokens == control.tokens
        share = count_parameters(control) / count_parameters(own)
        assert abs(share - 1) < 0.02, share
    mixers = sum(map(count_parameters, layers_of(scan)))
    assert count_parameters(none) == count_parameters(scan) - mixers


def layers_of(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, MixerLayer)]


def small(features: list[int] | None = None) -> dict[str, Any]:
    return {
        "strides": [[1, 1], [2, 2], [2, 2]],
        "features_per_stage": features or [4, 8, 16],
    }
