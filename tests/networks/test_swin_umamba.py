"""What is special about Swin-UMamba and -D: counts, sizes, widths, initialization, controls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from umamba.blocks.mixer import count_parameters
from umamba.blocks.ss2d import DropPath, VSSBlock
from umamba.networks import create_network, get_entry, recognize_network

NAMES = ("swin_umamba", "swin_umamba_d")
# Not doubling from stage to stage, unlike the official widths.
SMALL: dict[str, Any] = {"features_per_stage": [4, 6, 10, 16, 20], "depths": [1, 2, 1, 1]}


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("name", "channels", "count", "n_official"),
    [
        ("swin_umamba", 2, 59_885_684, 257),
        ("swin_umamba", 1, 59_882_852, 257),
        ("swin_umamba_d", 2, 27_492_308, 312),
        ("swin_umamba_d", 1, 27_490_772, 312),
        ("swin_umamba_d", 3, 27_493_844, 312),
    ],
)
def test_parameter_counts_are_the_official_ones(
    name: str, channels: int, count: int, n_official: int
) -> None:
    with torch.device("meta"):
        network = create_network(name, channels, 5)
    assert count_parameters(network) == count
    assert len(network.state_dict()) == n_official


@pytest.mark.parametrize("name", NAMES)
def test_freezing_leaves_the_patch_embedding_free_as_the_official_trainers_do(name: str) -> None:
    network = create_network(name, 1, 2, **{**SMALL, "features_per_stage": [4, 4, 8, 8, 8]})
    frozen = {id(parameter) for parameter in network.encoder_parameters()}
    free = [key for key, value in network.encoder.named_parameters() if id(value) not in frozen]
    assert {key.split(".")[0] for key in free} == {"patch_embed"}
    assert len(free) == 4


@pytest.mark.parametrize(
    ("name", "scales"),
    [("swin_umamba", [1, 1 / 2, 1 / 4, 1 / 8]), ("swin_umamba_d", [1, 1 / 4, 1 / 8, 1 / 16])],
)
def test_deep_supervision_has_the_published_scales_at_any_width_and_size(
    name: str, scales: list[float]
) -> None:
    network = create_network(name, 3, 2, **SMALL, deep_supervision=True).eval()
    assert network.deep_supervision_scales == tuple((scale, scale) for scale in scales)
    with torch.no_grad():
        outputs = network(torch.randn(1, 3, 96, 32))
    assert [tuple(o.shape) for o in outputs] == [
        (1, 2, int(96 * scale), int(32 * scale)) for scale in scales
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_skip_reaches_the_logits(name: str) -> None:
    network = create_network(name, 1, 2, **SMALL).eval()
    seen: list[Tensor] = []
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    with torch.no_grad():
        logits = network(torch.randn(1, 1, 64, 32))
        assert len(seen) == (6 if name == "swin_umamba" else 4)
        maps = list(seen)
        for i, features in enumerate(maps):
            changed = [*maps[:i], features + torch.randn_like(features), *maps[i + 1 :]]
            assert not torch.allclose(network.decoder(changed), logits), i


@pytest.mark.parametrize("name", NAMES)
def test_other_strides_and_wrong_depths_are_refused(name: str) -> None:
    fixed = [list(stride) for stride in get_entry(name).fixed_strides or ()]
    create_network(name, 1, 2, **SMALL, strides=fixed)
    with pytest.raises(ValueError, match=r"has strides like \[\[1, 1\], .*got .*\[2, 4\]\]"):
        create_network(name, 1, 2, **SMALL, strides=[*fixed[:-1], [2, 4]])
    with pytest.raises(ValueError, match="depths has 3 entries"):
        create_network(name, 1, 2, **{**SMALL, "depths": [1, 1, 1]})
    with pytest.raises(ValueError, match="features_per_stage has 4 entries"):
        create_network(name, 1, 2, **{**SMALL, "features_per_stage": [4, 8, 16, 32]})


@pytest.mark.parametrize(
    ("name", "strides", "shapes"),
    [
        ("swin_umamba", [[1, 1], [2, 2], [4, 4]], [(8, 24), (4, 12)]),
        ("swin_umamba", [[1, 1], [4, 4]], [(8, 24)]),
        ("swin_umamba_d", [[1, 1], [4, 4], [2, 2]], [(8, 24), (2, 6)]),
        ("swin_umamba_d", [[1, 1], [4, 4]], [(8, 24)]),
    ],
)
def test_there_may_be_other_numbers_of_stages(
    name: str, strides: list[list[int]], shapes: list[tuple[int, int]]
) -> None:
    n_stages = len(strides)
    arguments: dict[str, Any] = {"features_per_stage": [4, 6, 8][:n_stages]}
    arguments["depths"] = [1, 2][: n_stages - 1]
    if name == "swin_umamba_d":
        arguments["depths_decoder"] = [1][: n_stages - 2]
    network = create_network(name, 1, 2, strides=strides, **arguments, deep_supervision=True)
    with torch.no_grad():
        outputs = network(torch.randn(1, 1, 8, 24))
    assert [tuple(output.shape[2:]) for output in outputs] == shapes


def test_the_decoders_depths_may_differ() -> None:
    network = create_network("swin_umamba_d", 1, 2, **SMALL, depths_decoder=[1, 2, 3])
    assert [len(stage) for stage in network.decoder.stages] == [1, 2, 3]
    with pytest.raises(ValueError, match="depths_decoder has 2 entries"):
        create_network("swin_umamba_d", 1, 2, **SMALL, depths_decoder=[1, 2])


def test_stochastic_depth_rises_in_the_encoder_and_falls_in_the_decoder() -> None:
    with torch.device("meta"):
        network = create_network("swin_umamba_d", 1, 2, drop_path_rate_decoder=0.1)
    for part, expected in (
        (network.encoder, torch.linspace(0, 0.2, 15)),
        (network.decoder, torch.linspace(0.1, 0, 6)),
    ):
        rates = [module.rate for module in part.modules() if isinstance(module, DropPath)]
        torch.testing.assert_close(torch.tensor(rates), expected)


def test_initialization_is_the_official_one() -> None:
    widths = {"features_per_stage": [32, 48, 64, 80, 96], "depths": [1, 1, 1, 1]}
    conv, vss = (create_network(name, 2, 3, **widths) for name in NAMES)
    for network in (conv, vss):
        for layer in network.encoder.modules():
            if isinstance(layer, nn.Linear):
                assert abs(layer.weight.std().item() / 0.02 - 1) < 0.1
    join = vss.decoder.joins[0]
    assert join.weight.abs().max() <= join.in_features**-0.5
    assert join.weight.std() > 0.5 * join.in_features**-0.5
    depthwise = vss.encoder.stages[3][0].mixer.conv
    assert abs(depthwise.weight.std().item() / (2 / 1.0001 / 9) ** 0.5 - 1) < 0.1
    biases = {
        network: [
            bool(layer.bias.any())
            for layer in network.modules()
            if isinstance(layer, nn.Conv2d) and layer.bias is not None
        ]
        for network in (conv, vss)
    }
    assert all(biases[conv])
    assert not any(biases[vss])


@pytest.mark.parametrize("name", NAMES)
def test_controls_replace_the_scans_alone(name: str) -> None:
    with torch.device("meta"):
        scan, conv, none = (
            create_network(name + suffix, 1, 3) for suffix in ("", "_convmix", "_noscan")
        )
    for own, control in zip(blocks_of(scan), blocks_of(conv), strict=True):
        assert abs(count_parameters(control) / count_parameters(own) - 1) < 0.02
    in_blocks = sum(map(count_parameters, blocks_of(scan)))
    assert len(blocks_of(scan)) == (15 if name == "swin_umamba" else 21)
    assert count_parameters(none) == count_parameters(scan) - in_blocks


@pytest.mark.parametrize("name", NAMES)
def test_state_dicts_are_recognized_by_own_and_official_keys(name: str) -> None:
    with torch.device("meta"):
        own = create_network(name, 1, 2, **SMALL).state_dict()
    official = get_entry(name).cls.official_key_map().to_official(own)
    assert recognize_network(own) == [name]
    assert recognize_network(official) == [name]


def blocks_of(network: nn.Module) -> list[VSSBlock]:
    return [module for module in network.modules() if isinstance(module, VSSBlock)]
