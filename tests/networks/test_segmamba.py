"""What is special about SegMamba: defaults, slices, and what the official code does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from umamba.blocks.mixer import MixerLayer, count_parameters
from umamba.networks import create_network, get_entry, recognize_network


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("channels", "classes", "count"),
    [(4, 4, 67_416_196), (1, 2, 67_362_674), (1, 14, 67_363_262), (1, 16, 67_363_360)],
)
def test_the_defaults_have_the_official_parameter_counts(
    channels: int, classes: int, count: int
) -> None:
    with torch.device("meta"):
        assert count_parameters(create_network("segmamba", channels, classes)) == count


def test_official_arguments_have_the_official_defaults() -> None:
    cls = get_entry("segmamba").cls
    with torch.device("meta"):
        own = cls(**cls.official_arguments({}))
        named = cls(**cls.official_arguments({"feat_size": [48, 8, 8, 8], "hidden_size": 8}))
        default = create_network("segmamba", 1, 13)
    assert (own.input_channels, own.num_classes) == (1, 13)
    shapes = {key: value.shape for key, value in own.state_dict().items()}
    assert shapes == {key: value.shape for key, value in default.state_dict().items()}
    assert named.decoder.upsample[0].conv.weight.shape == (8, 8, 2, 2, 2)


def test_by_default_there_is_one_output_also_with_deep_supervision() -> None:
    network = create_network("segmamba", 1, 3, **small()).eval()
    images = torch.randn(1, 1, 16, 16, 32)
    with torch.no_grad():
        single = network(images)
        network.decoder.deep_supervision = True
        listed = network(images)
    assert isinstance(listed, list)
    assert len(listed) == 1
    assert torch.equal(listed[0], single)
    assert single.shape == (1, 3, 16, 16, 32)
    assert network.deep_supervision_scales == ((1, 1, 1),)


def test_other_strides_widths_and_numbers_of_stages_are_taken() -> None:
    network = create_network(
        "segmamba", 2, 4, strides=[[1, 1, 1], [1, 2, 3], [2, 1, 2]], features_per_stage=[5, 6, 9],
        depths=[1, 3], n_slices=[7, 5], n_outputs=2, deep_supervision=True,
    )  # fmt: skip
    assert network.divisor == (2, 2, 6)
    assert [len(stage.mixers) for stage in network.encoder.stages] == [1, 3]
    shapes = [tuple(x.shape[2:]) for x in network.encoder(torch.randn(1, 2, 4, 6, 12))]
    assert shapes == [(4, 6, 12), (4, 3, 4), (2, 3, 2)]
    outputs = network(torch.randn(1, 2, 4, 6, 12))
    assert [tuple(x.shape) for x in outputs] == [(1, 4, 4, 6, 12), (1, 4, 4, 3, 4)]
    assert network.deep_supervision_scales == ((1, 1, 1), (1, 1 / 2, 1 / 3))


def test_a_patch_that_the_official_slices_do_not_divide_is_taken() -> None:
    network = create_network("segmamba", 1, 2, **small(n_slices=[64, 32, 16, 8])).eval()
    with torch.no_grad():
        logits = network(torch.randn(1, 1, 16, 48, 16))  # 3 tokens and 8 slices at the last stage
    assert torch.isfinite(logits).all()


def test_the_slices_decide_on_the_third_scan() -> None:
    networks = [create_network("segmamba", 1, 2, **small(n_slices=[n] * 4)) for n in (1, 4)]
    networks[1].load_state_dict(networks[0].state_dict())
    layers = [network.encoder.stages[0].mixers[0].eval() for network in networks]
    features = torch.randn(1, 4, 2, 4, 3)
    with torch.no_grad():
        assert not torch.allclose(layers[0](features), layers[1](features))
        for layer in layers:
            layer.mixer.directions[2].D.zero_()
            layer.mixer.directions[2].x_proj_weight.zero_()
        assert torch.allclose(layers[0](features), layers[1](features))


def test_a_map_of_one_voxel_is_refused_with_the_next_valid_shape() -> None:
    network = create_network("segmamba", 1, 2, **small())
    with pytest.raises(ValueError, match=r"one voxel.*valid shape is \(16, 16, 32\)"):
        network(torch.zeros(2, 1, 16, 16, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strides": [[1, 1, 1]] * 4}, "features_per_stage has 5 entries, needs 4"),
        ({"n_slices": [4, 4, 4]}, "n_slices has 3 entries, needs 4"),
        ({"depths": [1]}, "depths has 1 entries, needs 4"),
        ({"n_slices": [4, 4, 0, 4]}, "n_slices must be positive"),
        ({"n_outputs": 5}, "n_outputs is 5; choose 1 to 4"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_network("segmamba", 1, 2, **small(**change))


def test_the_convolution_control_has_as_many_parameters_as_the_network() -> None:
    with torch.device("meta"):
        scan, conv, none = (
            create_network("segmamba" + suffix, 1, 3) for suffix in ("", "_convmix", "_noscan")
        )
    scans, convs = (
        [m for m in network.modules() if isinstance(m, MixerLayer)] for network in (scan, conv)
    )
    assert len(scans) == len(convs) == 8
    for own, control in zip(scans, convs, strict=True):
        assert abs(count_parameters(control) / count_parameters(own) - 1) < 0.02
    mixers = sum(map(count_parameters, scans))
    assert count_parameters(none) == count_parameters(scan) - mixers


def test_state_dicts_are_recognized_by_own_and_official_keys() -> None:
    with torch.device("meta"):
        own = create_network("segmamba", 1, 2).state_dict()
    official = get_entry("segmamba").cls.official_key_map().to_official(own)
    assert len(official) == len(own)
    assert recognize_network(own) == ["segmamba"]
    assert recognize_network(official) == ["segmamba"]


def small(**change: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "features_per_stage": [4, 4, 4, 4, 4],
        "depths": [1, 1, 1, 1],
        "n_slices": [4, 4, 2, 2],
    }
    return {**arguments, **change}
