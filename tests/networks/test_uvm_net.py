"""What is special about UVM-Net: counts, sizes, the softmax over the batch, the added image."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from umamba.blocks.mamba import Mamba
from umamba.blocks.mixer import ConvMixer, count_parameters
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.uvm_net import UVMBlock, UVMNet

TRANSPOSED = {"features_per_stage": [64, 128, 256, 512, 1024], "upsample": "transposed"}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("arguments", "count"), [({}, 1_003_940_200), (TRANSPOSED, 1_017_714_856)])
def test_parameter_counts_are_the_official_ones(arguments: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        network = create_network("uvm_net", 3, 3, **arguments)
    blocks = [module for module in network.modules() if isinstance(module, UVMBlock)]
    assert count_parameters(network) == count
    assert sum(count_parameters(block.mixer_across) for block in blocks) == 947_773_440
    if not arguments:
        assert sum(count_parameters(block.mixer_attention) for block in blocks) == 11_197_196


def test_official_arguments_have_the_official_defaults() -> None:
    arguments = UVMNet.official_arguments({"n_channels": 3})
    assert arguments.pop("num_classes") == arguments.pop("input_channels") == 3
    assert arguments == {
        "features_per_stage": [64, 128, 256, 512, 512],
        "inner_size": [64, 64],
        "upsample": "bilinear",
    }
    transposed = UVMNet.official_arguments({"n_channels": 3, "bilinear": False})
    assert {key: transposed[key] for key in TRANSPOSED} == TRANSPOSED


@pytest.mark.parametrize("upsample", ["bilinear", "transposed"])
def test_odd_sizes_are_taken_and_too_small_ones_refused(upsample: str) -> None:
    network = create_network("uvm_net", 3, 3, **small(upsample=upsample)).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 17, 37)).shape == (1, 3, 17, 37)
        assert network(torch.randn(1, 3, 16, 16)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"at least \(16, 16\), got \(15, 40\).* \(16, 40\)"):
        network(torch.zeros(1, 3, 15, 40))


def test_other_strides_widths_inner_sizes_and_numbers_of_stages_are_taken() -> None:
    arguments = {
        "strides": [[1, 1], [2, 1], [3, 2]],
        "features_per_stage": [5, 6, 9],
        "inner_size": [3, 4],
        "input_residual": False,
    }
    for upsample in ("bilinear", "transposed"):
        network = create_network("uvm_net", 2, 4, **arguments, upsample=upsample)
        assert network.smallest == (6, 2)
        assert network(torch.randn(2, 2, 13, 11)).shape == (2, 4, 13, 11)
        shapes = [tuple(x.shape[1:]) for x in network.encoder(torch.randn(2, 2, 13, 11))]
        assert shapes == [(5, 13, 11), (6, 6, 11), (9, 2, 5)]


def test_the_image_is_added_where_the_channels_allow_it() -> None:
    for channels in (1, 3):
        network = create_network("uvm_net", channels, 3, **small()).eval()
        head = network.decoder.seg_layers[0]
        torch.nn.init.zeros_(head.weight)
        images = torch.randn(2, channels, 16, 20)
        with torch.no_grad():
            expected = images + head.bias.view(1, 3, 1, 1)
            torch.testing.assert_close(network(images), expected)
    with pytest.raises(ValueError, match=r"its 2 input channels to the 3 outputs.*false"):
        create_network("uvm_net", 2, 3, **small())


def test_the_only_output_comes_in_a_list_under_deep_supervision() -> None:
    network = create_network("uvm_net", 3, 3, **small(deep_supervision=True)).eval()
    images = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        listed = network(images)
        network.decoder.deep_supervision = False
        single = network(images)
    assert isinstance(listed, list)
    assert len(listed) == 1
    assert torch.equal(listed[0], single)
    assert network.deep_supervision_scales == ((1, 1),)


def test_the_softmax_over_the_batch_does_nothing_to_a_single_image_and_couples_two() -> None:
    block = UVMBlock(4, (3, 5)).eval()
    without = UVMBlock(4, (3, 5), attention="none").eval()
    own = without.state_dict().keys()
    without.load_state_dict({k: v for k, v in block.state_dict().items() if k in own})
    two = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(block(two[:1]), without(two[:1]))
        together = block(two)[:1]
        changed = block(torch.cat([two[:1], -two[1:]]))[:1]
    assert not torch.allclose(together, block(two[:1]), atol=1e-4)
    assert not torch.allclose(together, changed, atol=1e-6)


@pytest.mark.parametrize("attention", ["channels", "none"])
def test_other_attentions_treat_the_images_of_a_batch_apart(attention: str) -> None:
    block = UVMBlock(4, (3, 5), attention=attention).eval()
    two = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(block(two)[:1], block(two[:1]))
    assert (block.mixer_attention is None) == (attention == "none")


def test_a_token_is_a_run_of_pixels_of_one_channel() -> None:
    block = UVMBlock(4, (2, 6), mixer="scan").eval()
    seen: list[torch.Tensor] = []
    block.norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    features = torch.arange(48.0).view(1, 4, 2, 6)
    with torch.no_grad():
        block.mix(features)
    assert seen[0].shape == (1, 12, 4)
    assert seen[0][0, 4].tolist() == [16, 17, 18, 19]  # of the second channel, pixels 4 to 7


def test_without_mixers_the_block_is_its_convolutions() -> None:
    block = UVMBlock(4, (3, 5), mixer="none")
    x = torch.randn(2, 4, 3, 5)
    torch.testing.assert_close(block(x), block.smooth(x + block.conv2(block.conv1(x).relu())))
    assert count_parameters(block) == sum(
        count_parameters(layer) for layer in (block.conv1, block.conv2, block.smooth)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "heads"}, "attention is 'heads'; choose one of 'batch', 'channels', 'none'"),
        ({"upsample": "nearest"}, "upsample is 'nearest'; choose one of 'bilinear', 'transposed'"),
        ({"strides": [[1, 1]] * 4}, "features_per_stage has 5 entries, needs 4"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_network("uvm_net", 3, 3, **small(**change))


def test_the_convolution_control_has_as_many_parameters_as_the_network() -> None:
    with torch.device("meta"):
        scan, conv = (create_network("uvm_net" + suffix, 3, 3) for suffix in ("", "_convmix"))
    scans = [m for m in scan.modules() if isinstance(m, Mamba)]
    convs = [m for m in conv.modules() if isinstance(m, ConvMixer)]
    assert len(scans) == len(convs) == 3 * 9
    share = sum(map(count_parameters, convs)) / sum(map(count_parameters, scans))
    assert abs(share - 1) < 0.02


@pytest.mark.parametrize("arguments", [{}, TRANSPOSED], ids=["bilinear", "transposed"])
def test_state_dicts_are_recognized_by_own_and_official_keys(arguments: dict[str, Any]) -> None:
    with torch.device("meta"):
        own = create_network("uvm_net", 3, 3, **arguments).state_dict()
    official = get_entry("uvm_net").cls.official_key_map().to_official(own)
    assert len(official) == len(own)
    assert recognize_network(own) == ["uvm_net"]
    assert recognize_network(official) == ["uvm_net"]


def small(**change: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"features_per_stage": [4, 6, 8, 8, 8], "inner_size": [5, 4]}
    return {**arguments, **change}
