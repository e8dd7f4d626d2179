"""What is special about Mamba-UNet: its skips, the mirrored decoder, gray images, its strides."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from umamba.blocks.mixer import count_parameters
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.mamba_unet import MambaUNet

SMALL: dict[str, Any] = {
    "features_per_stage": [4, 8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "d_state": 4,
}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("classes", "count"), [(4, 19_121_664), (2, 19_121_472)])
def test_parameter_counts_are_the_official_ones(classes: int, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(create_network("mamba_unet", 3, classes)) == count
        assert count_parameters(create_network("mamba_unet", 1, classes)) == count


def test_other_stages_widths_and_states_take_the_sizes_that_their_strides_say() -> None:
    network = create_network(
        "mamba_unet",
        2,
        3,
        strides=[[1, 1], [4, 4], [2, 2]],
        features_per_stage=[5, 6, 14],
        depths=[1, 2],
        d_state=2,
    )
    assert network.divisor == (8, 8)
    assert network(torch.zeros(1, 2, 8, 24)).shape == (1, 3, 8, 24)
    assert network.encoder.stages[0][0].mixer.A_log.shape == (4, 12, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": [[1, 1], [4, 2], [2, 2], [2, 2], [2, 2]]}, "MambaUNet has strides like"),
        ({"strides": [[1, 1], [2, 2], [2, 2], [2, 2], [2, 2]]}, "MambaUNet has strides like"),
        ({"features_per_stage": [4, 8, 16]}, "features_per_stage has 3 entries"),
        ({"depths": [1, 1, 1]}, "depths has 3 entries"),
    ],
)
def test_what_does_not_fit_the_stages_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_network("mamba_unet", 1, 2, **{**SMALL, **arguments})


def test_gray_images_are_repeated_to_three_channels() -> None:
    color = create_network("mamba_unet", 3, 2, **SMALL).eval()
    gray = create_network("mamba_unet", 1, 2, **SMALL).eval()
    gray.load_state_dict(color.state_dict())
    images = torch.randn(1, 1, 32, 64)
    torch.testing.assert_close(gray(images), color(images.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="1 channels"):
        gray(images.repeat(1, 3, 1, 1))


def test_skips_are_the_inputs_of_all_stages_but_the_deepest() -> None:
    network = create_network("mamba_unet", 3, 2, **SMALL).eval()
    images = torch.randn(1, 3, 64, 32)
    inputs, outputs = network.encoder.stage_maps(images)
    before = network.decoder(outputs[-1], inputs[:-1])
    torch.testing.assert_close(network(images), before)
    for i in range(3):
        skips = list(inputs[:-1])
        skips[i] = torch.randn_like(skips[i])
        assert not torch.allclose(network.decoder(outputs[-1], skips), before)


def test_the_decoder_mirrors_depths_and_stochastic_depth() -> None:
    arguments = {**SMALL, "depths": [2, 1, 1, 2], "drop_path_rate": 0.5}
    network = create_network("mamba_unet", 3, 2, **arguments)
    encoder, decoder = (
        [[block.drop_path.rate for block in stage] for stage in stages]
        for stages in (network.encoder.stages, network.decoder.stages[1:])
    )
    assert list(itertools.chain(*encoder)) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert decoder == encoder[-2::-1]


def test_official_arguments_tell_the_network_from_the_module_inside_it() -> None:
    outer = MambaUNet.official_arguments({"yaml": "vmamba_tiny.yaml", "num_classes": 4})
    assert (outer["input_channels"], outer["depths"]) == (3, [2, 2, 2, 2])
    inner = MambaUNet.official_arguments({"in_chans": 2, "num_classes": 4, "dims": [16, 32]})
    assert (inner["input_channels"], inner["features_per_stage"]) == (2, [16, 16, 32])


@pytest.mark.parametrize("n_stages", [2, 4])
def test_checkpoints_are_recognized_and_keys_go_both_ways(n_stages: int) -> None:
    arguments = {**SMALL, "strides": [[1, 1], [4, 4], *[[2, 2]] * (n_stages - 1)]}
    arguments["features_per_stage"] = SMALL["features_per_stage"][: n_stages + 1]
    own = create_network("mamba_unet", 3, 2, **{**arguments, "depths": [1] * n_stages}).state_dict()
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    for prefix in ("mamba_unet.", ""):
        key_map = MambaUNet.official_key_map(prefix)
        official = key_map.to_official(own)
        assert {f"{prefix}layers_up.0.expand.weight", f"{prefix}output.weight"} <= official.keys()
        back, _ = key_map.to_own(official, shapes)
        assert all(torch.equal(back[key], own[key]) for key in own)
    official = get_entry("mamba_unet").cls.official_key_map().to_official(own)
    assert recognize_network(own) == ["mamba_unet"]
    assert recognize_network(official) == ["mamba_unet"]


def test_all_linear_layers_start_narrow() -> None:
    widths = [40, 40, 40, 48, 56]
    network = create_network("mamba_unet", 3, 2, **{**SMALL, "features_per_stage": widths})
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            assert abs(layer.weight.std().item() / 0.02 - 1) < 0.1, name
