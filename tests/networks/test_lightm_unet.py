"""What is special about LightM-UNet: parameter counts, free strides and widths, one head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from umamba.blocks.mixer import ProjectedMixerLayer, count_parameters
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.lightm_unet import LightMUNet

FLAT: dict[str, Any] = {
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 4]],
    "features_per_stage": [6, 9, 15],
    "n_groups": 3,
    "n_conv_per_stage": [2, 1, 3],
    "n_conv_per_stage_decoder": [1, 2],
}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"spatial_dims": 2}, 380_787),
        ({}, 381_813),
        ({"spatial_dims": 2, "init_filters": 16}, 1_342_915),
        ({"init_filters": 16}, 1_344_949),
        ({"spatial_dims": 2, "init_filters": 32}, 5_011_683),
        ({"init_filters": 32}, 5_015_733),
        ({"spatial_dims": 2, "init_filters": 32, "out_channels": 3}, 5_011_716),
        ({"init_filters": 32, "out_channels": 3}, 5_015_766),
    ],
)
def test_parameter_counts_are_the_official_ones(config: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(LightMUNet(**LightMUNet.official_arguments(config))) == count


def test_the_defaults_are_the_official_trainers_network() -> None:
    with torch.device("meta"):
        network = create_network("lightm_unet", 1, 2)
    assert count_parameters(network) == 5_015_733
    assert network.divisor == (8, 8, 8)


def test_other_strides_widths_and_depths_work() -> None:
    network = create_network("lightm_unet", 1, 2, **FLAT)
    shapes = [skip.shape[1:] for skip in network.encoder(torch.randn(1, 1, 2, 8, 16))]
    assert shapes == [(6, 2, 8, 16), (9, 2, 4, 8), (15, 1, 2, 2)]
    assert network(torch.randn(1, 1, 2, 8, 16)).shape == (1, 2, 2, 8, 16)
    with pytest.raises(ValueError, match=r"next larger valid shape is \(2, 8, 16\)"):
        network(torch.randn(1, 1, 1, 7, 9))


def test_the_strides_do_not_enter_the_weights() -> None:
    halvings = {**FLAT, "strides": [[1] * 3, [2] * 3, [2] * 3]}
    with torch.device("meta"):
        one, other = (create_network("lightm_unet", 1, 2, **plan) for plan in (FLAT, halvings))
    shapes = [{k: v.shape for k, v in n.state_dict().items()} for n in (one, other)]
    assert shapes[0] == shapes[1]


def test_skips_are_added_and_a_decoder_block_ends_with_norm_and_relu() -> None:
    network = create_network("lightm_unet", 1, 2, **FLAT).eval()
    skips = network.encoder(torch.randn(1, 1, 2, 8, 16))
    stage = network.decoder.stages[0]
    joined = network.decoder.upsample[0](skips[-1]) + skips[-2]
    result = stage(joined)
    assert result.shape == joined.shape
    assert result.min() == 0
    block = stage[0]
    summed = block.conv(block.norm1(joined).relu()) + block.skip_scale * joined
    torch.testing.assert_close(result, block.norm2(summed).relu())


def test_there_is_one_output_also_with_deep_supervision() -> None:
    network = create_network("lightm_unet", 1, 2, **FLAT).eval()
    images = torch.randn(1, 1, 2, 8, 16)
    single = network(images)
    network.decoder.deep_supervision = True
    listed = network(images)
    assert isinstance(listed, list)
    assert len(listed) == 1
    assert torch.equal(listed[0], single)
    assert network.deep_supervision_scales == ((1, 1, 1),)


def test_widths_that_the_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of n_groups, 8"):
        create_network("lightm_unet", 1, 2, **{**FLAT, "n_groups": 8})


def test_numbers_that_do_not_fit_the_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="features_per_stage has 2 entries"):
        create_network("lightm_unet", 1, 2, **{**FLAT, "features_per_stage": [6, 9]})
    with pytest.raises(ValueError, match="n_conv_per_stage_decoder needs 2 numbers"):
        create_network("lightm_unet", 1, 2, **{**FLAT, "n_conv_per_stage_decoder": [1, 1, 1]})


@pytest.mark.parametrize("dims", [2, 3])
def test_the_controls_differ_by_the_mixers_alone(dims: int) -> None:
    strides = [[1] * dims, *[[2] * dims] * 3]
    with torch.device("meta"):
        scan, conv, none = (
            create_network("lightm_unet" + suffix, 1, 2, strides=strides)
            for suffix in ("", "_convmix", "_noscan")
        )
    for own, control in zip(layers_of(scan), layers_of(conv), strict=True):
        assert abs(count_parameters(control.mixer) / count_parameters(own.mixer) - 1) < 0.02
    # The norm stays: it is the projection's as well. The scale goes with what it weighs against.
    mixers = sum(count_parameters(layer.mixer) + 1 for layer in layers_of(scan))
    assert count_parameters(none) == count_parameters(scan) - mixers


def test_state_dicts_are_recognized_by_own_and_official_keys() -> None:
    with torch.device("meta"):
        own = create_network("lightm_unet", 1, 2, **FLAT).state_dict()
    official = get_entry("lightm_unet").cls.official_key_map().to_official(own)
    assert len(official) == len(own)
    assert recognize_network(own) == ["lightm_unet"]
    assert recognize_network(official) == ["lightm_unet"]


def layers_of(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, ProjectedMixerLayer)]
