"""What is special about MambaClinix: parameter counts, which layer where, its one extra norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from umamba.blocks.gating import HGCNBlock
from umamba.blocks.mixer import ProjectedMixerLayer, count_parameters
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.mamba_clinix import layer_kinds

SIX_STAGES: dict[str, Any] = {
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 5],
    "strides": [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 3, [1, 2, 2]],
}
SMALL: dict[str, Any] = {
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
    "features_per_stage": [12, 24, 20],
}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("classes", "count"), [(14, 48_726_169), (2, 48_716_509)])
def test_parameter_counts_are_the_official_ones(classes: int, count: int) -> None:
    with torch.device("meta"):
        network = create_network("mamba_clinix", 1, classes, **SIX_STAGES)
    assert count_parameters(network) == count


@pytest.mark.parametrize(
    ("planned", "n_stages", "kinds"),
    [
        (2, 5, "HHHMM"),
        (2, 6, "HHHMMM"),
        ([2, 2, 2, 2, 2, 2, 2], 7, "HHHHMMM"),
        ([2, 1, 2, 2, 2], 5, "HMHMM"),
        ([2, 2, 2, 7, 7], 5, "HHHMM"),
    ],
)
def test_the_first_half_of_the_stages_gets_hgcn_and_the_deep_half_mamba(
    planned: list[int] | int, n_stages: int, kinds: str
) -> None:
    assert ["MH"[kind - 1] for kind in layer_kinds(planned, n_stages)] == list(kinds)


@pytest.mark.parametrize("planned", [3, 1, [2, 3, 2, 2, 2], [1, 1, 1, 2, 2]])
def test_counts_that_give_no_valid_network_are_refused(planned: list[int] | int) -> None:
    with pytest.raises(ValueError, match=r"2 for an HGCN block .* first 3 stages"):
        layer_kinds(planned, 5)


def test_orders_grow_and_paths_are_dropped_more_often_with_depth() -> None:
    with torch.device("meta"):
        network = create_network("mamba_clinix", 1, 2, **SIX_STAGES)
    layers = list(network.encoder.mixers)
    assert [type(layer) for layer in layers] == [HGCNBlock] * 3 + [ProjectedMixerLayer] * 3
    assert [len(layer.high_order.widths) for layer in layers[:3]] == [2, 3, 4]
    assert [layer.drop_path.rate for layer in layers[:3]] == pytest.approx([0, 0.1, 0.2])
    assert [layer.high_order.depthwise.kernel_size for layer in layers[:2]] == [(1, 3, 3), (3,) * 3]


def test_the_norm_stands_in_front_of_the_last_hgcn_block() -> None:
    network = create_network("mamba_clinix", 1, 2, **SMALL).eval()
    images = torch.randn(1, 1, 4, 8, 12)
    before = network.encoder(images)
    network.encoder.norm.bias.data += torch.randn(24)
    after = network.encoder(images)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]


def test_other_widths_work_and_indivisible_images_are_refused() -> None:
    network = create_network("mamba_clinix", 3, 4, **SMALL, deep_supervision=True)
    shapes = [tuple(logits.shape) for logits in network(torch.randn(1, 3, 4, 8, 12))]
    assert shapes == [(1, 4, 4, 8, 12), (1, 4, 4, 4, 6)]
    with pytest.raises(ValueError, match=r"next larger valid shape is \(4, 8, 12\)"):
        network(torch.randn(1, 3, 3, 8, 12))


def test_widths_that_the_high_order_convolution_cannot_halve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"order 3 needs a multiple of 4 .* multiple of 8"):
        create_network("mamba_clinix", 1, 2, **{**SMALL, "features_per_stage": [12, 20, 20]})


def test_images_of_two_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="MambaClinix is 3D"):
        create_network("mamba_clinix", 1, 2, strides=[[1, 1], [2, 2]], features_per_stage=[8, 16])


def test_initialization_is_kaiming_on_convolutions_and_leaves_the_others_alone() -> None:
    network = create_network("mamba_clinix", 1, 2, **{**SMALL, "features_per_stage": [32, 64, 64]})
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            assert module.bias is None or not module.bias.any()
    block = network.encoder.mixers[1]
    expected = (2 / (1 + 0.01**2) / (64 * 27)) ** 0.5
    assert abs(block.conv2.weight.std().item() / expected - 1) < 0.03
    assert (block.scale == 1e-6).all()
    layer = network.encoder.mixers[2]
    assert layer.proj.bias.abs().max() > 0
    assert layer.mixer.directions[0].conv_bias.abs().max() > 0


def test_the_controls_differ_by_the_mamba_layers_alone() -> None:
    with torch.device("meta"):
        scan, conv, none = (
            create_network("mamba_clinix" + suffix, 1, 3, **SIX_STAGES)
            for suffix in ("", "_convmix", "_noscan")
        )
    for own, control in zip(layers_of(scan), layers_of(conv), strict=True):
        assert abs(count_parameters(control) / count_parameters(own) - 1) < 0.02
    mixers = sum(map(count_parameters, layers_of(scan)))
    assert count_parameters(none) == count_parameters(scan) - mixers


def test_state_dicts_are_recognized_by_own_and_official_keys() -> None:
    with torch.device("meta"):
        own = create_network("mamba_clinix", 1, 2, **SIX_STAGES).state_dict()
    official = get_entry("mamba_clinix").cls.official_key_map().to_official(own)
    assert len(official) == len(own)
    assert recognize_network(own) == ["mamba_clinix"]
    assert recognize_network(official) == ["mamba_clinix"]


def layers_of(network: nn.Module) -> list[ProjectedMixerLayer]:
    return [module for module in network.modules() if isinstance(module, ProjectedMixerLayer)]
