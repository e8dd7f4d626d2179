"""What is special about HyMamba: counts, the position table, the starts, left-out parameters."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from umamba.blocks.mamba import Mamba
from umamba.blocks.mixer import ConvMixer, count_parameters
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.hymamba import HyMamba, position_table

CASE = Path(__file__).parents[1] / "parity" / "hymamba-small.json.gz"

# In the official state dict of the defaults: a frozen table and four directions without use.
TABLE, WITHOUT_USE = 82_944, 316_416


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("classes", "official"), [(14, 41_841_134), (2, 41_840_738)])
def test_the_defaults_have_the_official_parameter_counts(classes: int, official: int) -> None:
    with torch.device("meta"):
        network = create_network("hymamba", 1, classes)
    assert count_parameters(network) == official - TABLE - WITHOUT_USE
    assert count_parameters(network.encoder) == 16_100_608
    assert count_parameters(network.bottleneck) == 6_624_768 - TABLE - WITHOUT_USE
    if classes == 14:
        assert count_parameters(network.decoder) == 19_115_758


def test_official_arguments_have_the_official_defaults() -> None:
    arguments = HyMamba.official_arguments({})
    assert arguments == {"input_channels": 1, "num_classes": 14, "position_grid": [6, 6, 6]}
    given = HyMamba.official_arguments({"depths": [9, 1, 2, 3, 4], "kernels": [3, 5, 3, 3, 3]})
    assert given["n_blocks_per_stage"] == [0, 1, 2, 3, 4]
    assert given["kernel_sizes"][1] == [5, 5, 5]


def test_the_position_table_is_the_one_of_the_official_state_dict() -> None:
    with gzip.open(CASE, "rt") as stream:
        case = json.load(stream)
    expected = case["constant_samples"]["mae.pos_embed"]
    assert dict(case["state_dict"])["mae.pos_embed"] == [1, 27, 24]
    table = position_table((3, 3, 3), torch.empty(1, 24)).flatten()
    torch.testing.assert_close(table[expected["positions"]], torch.tensor(expected["values"]))


def test_the_position_table_follows_each_axis_of_the_grid() -> None:
    table = position_table((2, 3, 5), torch.empty(1, 15, dtype=torch.float64))
    assert table.shape == (2, 3, 5, 15)
    at = table[1, 2, 4]  # two waves: 1 and 1 / 100
    expected = [
        wave(index * frequency)
        for index in (1, 2, 4)
        for wave in (math.sin, math.cos)
        for frequency in (1, 0.01)
    ]
    torch.testing.assert_close(at, torch.tensor([*expected, 0, 0, 0], dtype=torch.float64))


def test_the_table_is_made_for_the_images_shape_unless_a_grid_is_given() -> None:
    images = torch.randn(1, 1, 16, 32, 64)
    networks = [
        create_network("hymamba", 1, 2, **small(position_grid=grid)).eval()
        for grid in (None, [1, 2, 4], [2, 2, 2])
    ]
    for network in networks[1:]:
        network.load_state_dict(networks[0].state_dict())
    with torch.no_grad():
        own, same, flat = (network(images) for network in networks)
    assert torch.equal(own, same)
    assert not torch.allclose(own, flat)
    with pytest.raises(ValueError, match=r"8 tokens, as an image of \(32, 32, 32\).* with 4"):
        networks[2](images[..., :32])
    assert networks[0](images[..., :32]).shape == (1, 2, 16, 32, 32)


def test_the_deepest_map_depends_on_the_table() -> None:
    network = create_network("hymamba", 1, 2, **small()).eval()
    features = torch.zeros(1, 12, 2, 2, 2)
    with torch.no_grad():
        mixed = network.mix(features)
    assert mixed.flatten(2).std(dim=2).min() > 0


def test_linear_layers_start_xavier_uniform_and_all_step_sizes_alike() -> None:
    network = create_network("hymamba", 1, 2, **small(features_per_stage=[4, 4, 4, 4, 96]))
    linear = [m for m in network.bottleneck.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 2 * 4  # in_proj, out_proj and the MLP's two
    directions = [m.directions[0] for m in network.modules() if isinstance(m, Mamba)]
    weights = [layer.weight for layer in linear]
    weights += [w for d in directions for w in (d.x_proj_weight, d.dt_proj_weight)]
    for weight in weights:
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.97 * bound < weight.abs().max() <= bound
    assert not any(layer.bias.any() for layer in linear if layer.bias is not None)
    for direction in directions:
        assert not direction.dt_proj_bias.any()
        assert direction.conv_bias.any()
        torch.testing.assert_close(direction.A_log.exp()[3], torch.arange(1.0, 17))


def test_by_default_there_is_one_output_also_with_deep_supervision() -> None:
    network = create_network("hymamba", 1, 3, **small()).eval()
    images = torch.randn(1, 1, 16, 32, 16)
    with torch.no_grad():
        single = network(images)
        network.decoder.deep_supervision = True
        listed = network(images)
    assert isinstance(listed, list)
    assert len(listed) == 1
    assert torch.equal(listed[0], single)
    assert network.deep_supervision_scales == ((1, 1, 1),)


def test_other_strides_widths_and_numbers_of_stages_are_taken() -> None:
    network = create_network(
        "hymamba", 2, 4, strides=[[1, 1, 1], [1, 2, 3], [2, 1, 2]], features_per_stage=[5, 6, 9],
        n_blocks_per_stage=[1, 0, 2], expansion_per_stage=[1, 1, 3], n_mamba_layers=1,
        kernel_sizes=[[1, 3, 3], [3, 3, 3], [1, 1, 5]], n_outputs=2, deep_supervision=True,
    )  # fmt: skip
    assert network.divisor == (2, 2, 6)
    shapes = [tuple(x.shape[1:]) for x in network.encoder(torch.randn(1, 2, 4, 6, 12))]
    assert shapes == [(6, 4, 6, 12), (9, 4, 3, 4), (9, 2, 3, 2)]
    outputs = network(torch.randn(1, 2, 4, 6, 12))
    assert [tuple(x.shape) for x in outputs] == [(1, 4, 4, 6, 12), (1, 4, 4, 3, 4)]
    assert network.deep_supervision_scales == ((1, 1, 1), (1, 1 / 2, 1 / 3))


def test_a_mednext_block_is_its_equation() -> None:
    network = create_network("hymamba", 1, 2, **small())
    block = network.encoder.stages[1][0]
    x = torch.randn(2, 6, 4, 4, 4)
    norm = functional.layer_norm(block.conv1(x).movedim(1, -1), (6,), eps=1e-6)
    expected = x + block.conv3(functional.gelu(block.conv2(norm.movedim(-1, 1))))
    torch.testing.assert_close(block(x), expected)
    assert block.conv1.groups == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_blocks_per_stage": [1, 1]}, "n_blocks_per_stage has 2 entries, needs 5"),
        ({"n_outputs": 5}, "n_outputs is 5; choose 1 to 4"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_network("hymamba", 1, 2, **small(**change))


def test_the_convolution_control_has_as_many_parameters_as_the_network() -> None:
    with torch.device("meta"):
        scan, conv, none = (
            create_network("hymamba" + suffix, 1, 3) for suffix in ("", "_convmix", "_noscan")
        )
    scans = [m for m in scan.modules() if isinstance(m, Mamba)]
    convs = [m for m in conv.modules() if isinstance(m, ConvMixer)]
    assert len(scans) == len(convs) == 4
    assert convs[0].conv_weight.shape[2:] == (3, 3, 3)
    mixers = sum(map(count_parameters, scans))
    assert abs(sum(map(count_parameters, convs)) / mixers - 1) < 0.02
    norms = 4 * 2 * 384
    assert count_parameters(none) == count_parameters(scan) - mixers - norms


def test_state_dicts_are_recognized_by_own_and_official_keys() -> None:
    with gzip.open(CASE, "rt") as stream:
        official = [key for key, _ in json.load(stream)["state_dict"]]
    with torch.device("meta"):
        own = create_network("hymamba", 2, 5).state_dict()
    assert recognize_network(own) == ["hymamba"]
    assert recognize_network(official) == ["hymamba"]
    key_map = get_entry("hymamba").cls.official_key_map()
    ignored = [key for key in official if key_map.ignores(key)]
    assert len(ignored) == 1 + 2 * 7  # the table; per layer the direction without use
    assert all("_b" in key or key == "mae.pos_embed" for key in ignored)


def small(**change: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"features_per_stage": [4, 6, 6, 6, 12], "n_mamba_layers": 2}
    return {**arguments, **change}
