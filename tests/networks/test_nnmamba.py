"""What is special about nnMamba: its variants, other widths and depths, gates, heads, classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from umamba.blocks.mixer import count_parameters
from umamba.networks import create_network, get_entry, recognize_network
from umamba.networks.nnmamba import (
    ChannelGate,
    NnMamba,
    NnMambaClassifier,
    NnMambaEarly,
    NnMambaLandmark,
    NnMambaSingle,
    NnMambaSL,
)

ANISOTROPIC = {
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 3, 2]],
    "features_per_stage": [5, 6, 8, 10],
    "n_blocks_per_stage": 2,
}
SHAPE = (4, 24, 16)
VARIANTS = (NnMamba, NnMambaSingle, NnMambaSL, NnMambaEarly, NnMambaLandmark)


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("cls", "channels", "classes", "count"),
    [
        (NnMamba, 1, 6, 15_944_958),
        (NnMamba, 1, 16, 15_959_598),
        (NnMamba, 4, 4, 15_945_270),
        (NnMambaSingle, 1, 6, 15_859_408),
        (NnMambaSingle, 1, 16, 15_876_318),
        (NnMambaSingle, 4, 4, 15_859_266),
        (NnMambaSL, 1, 6, 15_858_046),
        (NnMambaSL, 1, 16, 15_872_686),
        (NnMambaSL, 4, 4, 15_858_358),
        (NnMambaLandmark, 1, 6, 15_191_312),
        (NnMambaLandmark, 1, 16, 15_205_952),
        (NnMambaLandmark, 4, 4, 15_191_624),
        (NnMambaEarly, 1, 6, 15_769_104),
        (NnMambaEarly, 1, 16, 15_783_744),
        (NnMambaEarly, 4, 4, 15_769_416),
        (NnMambaClassifier, 1, 1, 12_876_321),
    ],
)
def test_parameter_counts_are_the_official_ones(
    cls: Any, channels: int, classes: int, count: int
) -> None:
    with torch.device("meta"):
        assert count_parameters(cls(channels, classes)) == count


@pytest.mark.parametrize("mixer", ["scan", "none", "conv"])
@pytest.mark.parametrize("cls", VARIANTS)
def test_other_widths_depths_and_anisotropic_strides_work(cls: Any, mixer: str) -> None:
    network = cls(2, 3, **ANISOTROPIC, mixer=mixer)
    logits = network(torch.randn(1, 2, *SHAPE))
    assert logits.shape == (1, 3, *SHAPE)
    assert logits.min() == 0
    logits.square().mean().backward()
    idle = {key for key, p in network.named_parameters() if p.grad is None}
    assert all(key.startswith(("decoder.seg_layers.", "encoder.mixers.")) for key in idle)
    assert any(key.startswith("encoder.mixers.") for key in idle) == (
        cls is NnMambaSL and mixer != "none"
    )


def test_only_the_head_of_the_full_resolution_ends_in_relu() -> None:
    network = NnMambaSingle(2, 3, **ANISOTROPIC, deep_supervision=True)
    finest, *coarser = network(torch.randn(2, 2, *SHAPE))
    assert finest.min() == 0
    assert [tuple(each.shape[2:]) for each in coarser] == [(4, 12, 8), (2, 6, 4)]
    assert all(each.min() < 0 < each.max() for each in coarser)


def test_the_published_network_has_one_output_with_deep_supervision_too() -> None:
    network = NnMamba(2, 3, **ANISOTROPIC, deep_supervision=True).eval()
    images = torch.randn(1, 2, *SHAPE)
    outputs = network(images)
    network.decoder.deep_supervision = False
    assert len(outputs) == 1
    assert torch.equal(outputs[0], network(images))


def test_the_skip_behind_a_mixer_is_taken_before_it_but_for_the_deepest() -> None:
    early = NnMambaEarly(2, 3, **ANISOTROPIC).eval()
    images = torch.randn(1, 2, *SHAPE)
    stem, middle, deepest = early.encoder(images)
    mixed = early.encoder.mixers[1](early.encoder.stages[1](stem))
    torch.testing.assert_close(middle, early.encoder.stages[1](stem))
    torch.testing.assert_close(deepest, early.encoder.mixers[2](early.encoder.stages[2](mixed)))
    landmark = NnMambaLandmark(2, 3, **ANISOTROPIC).eval()
    stem, middle, deepest = landmark.encoder(images)
    mixed = landmark.encoder.mixers[0](stem)
    assert not torch.allclose(mixed, stem)
    torch.testing.assert_close(middle, landmark.encoder.stages[1](mixed))
    torch.testing.assert_close(deepest, landmark.encoder.stages[2](middle))


def test_without_a_mixer_the_network_is_the_official_one_without_mamba() -> None:
    official = NnMambaSL(2, 3, **ANISOTROPIC).eval()
    control = create_network("nnmamba_noscan", 2, 3, **ANISOTROPIC).eval()
    weights = {k: v for k, v in official.state_dict().items() if "encoder.mixers" not in k}
    control.load_state_dict(weights)
    images = torch.randn(1, 2, *SHAPE)
    assert torch.equal(control(images), official(images))


@pytest.mark.parametrize("name", ["nnmamba", "nnmamba_single"])
def test_the_convolution_control_has_as_many_parameters(name: str) -> None:
    with torch.device("meta"):
        scan, conv = create_network(name, 1, 3), create_network(f"{name}_convmix", 1, 3)
    for stage in (1, 2, 3):
        sizes = [count_parameters(net.encoder.stages[stage].mixer_layer) for net in (scan, conv)]
        assert abs(sizes[1] / sizes[0] - 1) < 0.02
    assert count_parameters(scan) != count_parameters(conv)


def test_a_gate_weighs_the_channels_by_their_means() -> None:
    gate = ChannelGate(4)  # narrower than the official 16
    nn.init.ones_(gate.fc1.weight)
    nn.init.zeros_(gate.fc1.bias)
    features = torch.rand(2, 4, 2, 3, 2)
    hidden = features.mean((2, 3, 4)).sum(1)
    weights = torch.sigmoid(hidden[:, None] * gate.fc2.weight[:, 0] + gate.fc2.bias)
    torch.testing.assert_close(gate(features), features * weights.reshape(2, 4, 1, 1, 1))


@pytest.mark.parametrize("mixer", ["scan", "none", "conv"])
@pytest.mark.parametrize("shape", [(9, 14, 20), (16, 16, 16)])
def test_the_classifier_takes_any_shape(shape: tuple[int, ...], mixer: str) -> None:
    arguments: dict[str, Any] = {"features_per_stage": [4, 6, 8], "n_blocks_per_stage": 1}
    network = NnMambaClassifier(2, 5, **arguments, mixer=mixer)
    images = torch.randn(3, 2, *shape)
    network(images).square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    network.eval()
    logits = network(images)
    assert logits.shape == (3, 5)
    torch.testing.assert_close(logits[1:2], network(images[1:2]))
    with pytest.raises(ValueError, match="2 channels"):
        network(images[:, :1])


def test_official_arguments_are_translated() -> None:
    config = {"in_ch": 4, "channels": 16, "blocks": 2, "number_classes": 5}
    expected = {"input_channels": 4, "num_classes": 5, "n_blocks_per_stage": 2}
    segmentation = {**expected, "features_per_stage": [16, 16, 32, 64, 128]}
    assert NnMamba.official_arguments(config) == segmentation
    assert NnMambaLandmark.official_arguments(config) == segmentation
    assert NnMambaSingle.official_arguments(config)["deep_supervision"] is True
    assert not NnMambaSingle.official_arguments({**config, "do_ds": False})["deep_supervision"]
    classifier = {**expected, "features_per_stage": [16, 32, 64, 128]}
    assert NnMambaClassifier.official_arguments(config) == classifier


@pytest.mark.parametrize("name", ["nnmamba", "nnmamba_single"])
def test_the_variants_are_told_apart_by_official_and_own_keys(name: str) -> None:
    entry = get_entry(name)
    with torch.device("meta"):
        own = create_network(name, 1, 2).state_dict()
    official = entry.cls.official_key_map().to_official(own)
    assert recognize_network(own) == recognize_network(official) == [name]
    assert recognize_network([*official, "layer1.2.mamba_layer.nin.weight"]) == [name]


@pytest.mark.parametrize("cls", [NnMambaSL, NnMambaEarly, NnMambaLandmark, NnMambaClassifier])
def test_unregistered_variants_are_not_taken_for_registered_ones(cls: Any) -> None:
    with torch.device("meta"):
        own = cls(1, 2).state_dict()
    assert recognize_network(cls.official_key_map().to_official(own)) == []


def test_sizes_and_arguments_that_do_not_fit_are_refused() -> None:
    with torch.device("meta"):
        network = NnMamba(1, 2)
        with pytest.raises(ValueError, match=r"next larger valid shape is \(48, 32, 32\)"):
            network(torch.empty(1, 1, 40, 32, 32))
        with pytest.raises(ValueError, match="divisible"):
            network(torch.empty(1, 1, 31, 47, 15))  # the official code returns 32x48x16 logits
    with pytest.raises(ValueError, match="three strides"):
        NnMamba(1, 2, strides=[[1, 1, 1], [2, 2, 2]], features_per_stage=[4, 4])
    with pytest.raises(ValueError, match="features_per_stage has 4 entries"):
        NnMamba(1, 2, features_per_stage=[32, 64, 128, 256])
    with pytest.raises(ValueError, match="n_blocks_per_stage is 1, needs 2"):
        NnMamba(1, 2, n_blocks_per_stage=1)
    with pytest.raises(ValueError, match="'scan', 'none', 'conv'"):
        NnMambaLandmark(1, 2, mixer="attention")
