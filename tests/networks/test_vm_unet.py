"""What is special about VM-UNet: summed skips, gray images, probabilities, its strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from umamba.blocks.mixer import count_parameters
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.vm_unet import VMUNet

SMALL: dict[str, Any] = {
    "features_per_stage": [4, 8, 12, 16, 20],
    "depths": [1, 1, 1, 1],
    "depths_decoder": [1, 1, 1, 1],
    "d_state": 4,
}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("classes", "count"), [(1, 27_427_561), (9, 27_427_761)])
def test_parameter_counts_are_the_official_ones(classes: int, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(create_network("vm_unet", 3, classes)) == count
        assert count_parameters(create_network("vm_unet", 1, classes)) == count


def test_fewer_stages_and_other_patches_take_the_sizes_that_their_strides_say() -> None:
    network = create_network(
        "vm_unet",
        2,
        3,
        strides=[[1, 1], [2, 2], [2, 2], [2, 2]],
        features_per_stage=[5, 6, 14, 8],
        depths=[1, 1, 1],
        depths_decoder=[1, 1, 1],
    )
    assert network.divisor == (8, 8)
    assert network(torch.zeros(1, 2, 8, 24)).shape == (1, 3, 8, 24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": [[1, 1], [4, 2], [2, 2], [2, 2], [2, 2]]}, "VMUNet has strides like"),
        ({"strides": [[1, 1]]}, "VMUNet has strides like"),
        ({"features_per_stage": [4, 8, 16]}, "features_per_stage has 3 entries"),
        ({"depths": [1, 1, 1]}, "depths has 3 entries"),
        ({"depths_decoder": [1, 1, 1]}, "depths_decoder has 3 entries"),
    ],
)
def test_what_does_not_fit_the_stages_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_network("vm_unet", 1, 2, **{**SMALL, **arguments})


def test_gray_images_are_repeated_to_three_channels() -> None:
    color = create_network("vm_unet", 3, 2, **SMALL).eval()
    gray = create_network("vm_unet", 1, 2, **SMALL).eval()
    gray.load_state_dict(color.state_dict())
    images = torch.randn(1, 1, 32, 64)
    expected = color(images.repeat(1, 3, 1, 1))
    torch.testing.assert_close(color(images), expected)
    torch.testing.assert_close(gray(images), expected)
    with pytest.raises(ValueError, match="1 channels"):
        gray(images.repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="2 channels"):
        create_network("vm_unet", 2, 2, **SMALL)(images)


def test_the_embedding_is_no_skip_and_the_other_stage_inputs_are() -> None:
    network = create_network("vm_unet", 3, 2, **SMALL).eval()
    inputs, outputs = network.encoder.stage_maps(torch.randn(1, 3, 64, 32))
    assert [x.shape[-1] for x in inputs] == [8, 12, 16, 20]
    before = network.decoder(outputs[-1], inputs[1:])
    for i in range(3):
        skips = list(inputs[1:])
        skips[i] = torch.randn_like(skips[i])
        assert not torch.allclose(network.decoder(outputs[-1], skips), before)


def test_a_single_class_gives_a_logit_and_a_probability_only_when_asked() -> None:
    logits = create_network("vm_unet", 3, 1, **SMALL).eval()
    arguments = {**SMALL, "sigmoid": True}
    probabilities = create_network("vm_unet", 3, 1, **arguments).eval()
    probabilities.load_state_dict(logits.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(probabilities(images), logits(images).sigmoid())


def test_official_arguments_tell_the_network_from_the_module_inside_it() -> None:
    outer = VMUNet.official_arguments({"input_channels": 3, "num_classes": 1})
    assert (outer["sigmoid"], outer["depths"]) == (True, [2, 2, 9, 2])
    inner = VMUNet.official_arguments({"in_chans": 2, "num_classes": 1, "dims": [16, 32]})
    assert (inner["sigmoid"], inner["input_channels"]) == (False, 2)
    assert inner["features_per_stage"] == [4, 16, 32]


def test_stochastic_depth_falls_from_the_deepest_decoder_block() -> None:
    network = create_network("vm_unet", 3, 2, **{**SMALL, "drop_path_rate": 0.3})
    for part, expected in (
        (network.encoder, [0, 0.1, 0.2, 0.3]),
        (network.decoder, [0.3, 0.2, 0.1, 0]),
    ):
        rates = [block.drop_path.rate for stage in part.stages for block in stage]
        assert rates == pytest.approx(expected)


def test_checkpoints_are_recognized_by_own_and_official_names() -> None:
    with torch.device("meta"):
        own = create_network("vm_unet", 3, 2, **SMALL).state_dict()
    official = get_entry("vm_unet").cls.official_key_map().to_official(own)
    assert all(key.startswith("vmunet.") for key in official)
    assert recognize_network(own) == ["vm_unet"]
    assert recognize_network(official) == ["vm_unet"]


def test_all_linear_layers_start_narrow() -> None:
    widths = [8, 32, 40, 48, 56]
    network = create_network("vm_unet", 3, 2, **{**SMALL, "features_per_stage": widths})
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear):
            assert abs(layer.weight.std().item() / 0.02 - 1) < 0.1, name
