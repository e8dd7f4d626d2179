"""The contract that every registered network keeps, at tiny widths."""

from __future__ import annotations

import inspect
import json
import pydoc
from typing import Any

import pytest
import torch
from tiny_networks import (
    BATCH,
    CHANNELS,
    CLASSES,
    build,
    network_of,
    shape_of,
    strides_of,
    tiny_arguments,
)
from torch import Tensor, nn

from umamba.blocks.mamba import Mamba
from umamba.blocks.mixer import ConvMixer
from umamba.blocks.ss2d import SS2D
from umamba.networks import create_network, get_entry, list_networks
from umamba.networks.precision import autocast

# Biases in front of a norm over voxels, which have no effect: their gradients are round-off.
NORMALIZED_BIASES = (
    *("conv1.bias", "conv2.bias", "stem.conv.bias", "side.bias", "join.bias", ".expand.bias"),
)

# Parameters that official networks have and do not use.
WITHOUT_EFFECT = {"mamba_clinix": ("skip_scale",)}

CASES = [
    pytest.param(name, dims, id=f"{name}-{dims}d")
    for name in list_networks()
    for dims in get_entry(name).spatial_dims
]


@pytest.fixture(autouse=True)
def _seeded(one_thread: None) -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_logits_have_the_images_shape_and_deep_supervision_follows_the_strides(
    name: str, dims: int
) -> None:
    network = build(name, dims, deep_supervision=True).eval()
    images = torch.randn(BATCH, CHANNELS, *shape_of(name, dims))
    with torch.no_grad():
        outputs = network(images)
        network.decoder.deep_supervision = False
        single = network(images)
    strides, scales = strides_of(name, dims), network.deep_supervision_scales
    heads = {key.split(".")[2] for key in network.state_dict() if ".seg_layers." in key}
    assert isinstance(outputs, list)
    assert len(outputs) == len(scales) == len(heads)
    assert len(outputs) in (1, len(strides) - 1)
    full = shape = shape_of(name, dims)
    for output, scale, stride in zip(outputs, scales, strides, strict=False):
        shape = tuple(size // s for size, s in zip(shape, stride, strict=True))
        assert output.shape == (BATCH, CLASSES, *shape)
        assert shape == tuple(size * s for size, s in zip(full, scale, strict=True))
    torch.testing.assert_close(single, outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_arguments_survive_json_and_build_the_same_network(name: str, dims: int) -> None:
    entry = get_entry(name)
    arguments = {**tiny_arguments(name, dims), **entry.arguments}
    again = json.loads(json.dumps(arguments))
    assert again == arguments
    located: Any = pydoc.locate(entry.class_path)
    assert located is entry.cls
    rebuilt = located(input_channels=CHANNELS, num_classes=CLASSES, **again)
    assert rebuilt.state_dict().keys() == build(name, dims).state_dict().keys()


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_each_parameter_is_registered_once_and_gets_a_gradient(name: str, dims: int) -> None:
    network = build(name, dims, deep_supervision=True)
    state = network.state_dict()
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert len(state) == len(list(network.named_parameters())) + len(list(network.named_buffers()))
    disturb(network)
    outputs = network(torch.randn(BATCH, CHANNELS, *shape_of(name, dims)))
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        if key.endswith(WITHOUT_EFFECT.get(network_of(name), ())):
            assert parameter.grad.abs().max() == 0, key
        elif not key.endswith(NORMALIZED_BIASES):
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_evaluation_is_repeatable(name: str, dims: int) -> None:
    network = build(name, dims).eval()
    images = torch.randn(BATCH, CHANNELS, *shape_of(name, dims))
    with torch.no_grad():
        assert torch.equal(network(images), network(images))


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_nnunet_finds_what_it_needs(name: str, dims: int) -> None:
    network = build(name, dims)
    assert not hasattr(network, "initialize")
    assert isinstance(network.decoder.deep_supervision, bool)
    heads = [key for key in network.state_dict() if ".seg_layers." in key]
    assert heads
    assert all(key.startswith("decoder.seg_layers.") for key in heads)
    assert not any(isinstance(m, nn.Dropout) for m in network.modules())


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_the_encoder_that_a_recipe_freezes_is_a_part_without_the_decoder(
    name: str, dims: int
) -> None:
    network = build(name, dims)
    frozen = {id(parameter) for parameter in network.encoder_parameters()}
    assert frozen
    assert frozen.isdisjoint(map(id, network.decoder.parameters()))
    assert frozen <= set(map(id, network.parameters()))


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_an_unknown_argument_is_a_type_error(name: str, dims: int) -> None:
    kinds = {p.kind for p in inspect.signature(get_entry(name).cls).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds
    with pytest.raises(TypeError, match="n_stages"):
        build(name, dims, n_stages=3)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_an_indivisible_image_is_refused_with_the_next_valid_shape(name: str, dims: int) -> None:
    network = build(name, dims)
    shape = shape_of(name, dims)
    too_odd = (shape[0] - 1, *shape[1:])
    if max(network.divisor) == 1:
        assert network(torch.zeros(1, CHANNELS, *too_odd)).shape == (1, CLASSES, *too_odd)
        return
    with pytest.raises(ValueError, match="divisible") as error:
        network(torch.zeros(1, CHANNELS, *too_odd))
    assert str(shape) in str(error.value)
    assert str(network.divisor) in str(error.value)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_wrong_channels_and_wrong_dimensions_are_refused(name: str, dims: int) -> None:
    network = build(name, dims)
    for shape in ((1, CHANNELS + 1, *shape_of(name, dims)), (CHANNELS, *shape_of(name, dims))):
        with pytest.raises(ValueError, match="2 channels"):
            network(torch.zeros(shape))
    with pytest.raises(ValueError, match="strides"):
        build(name, dims, strides=[[1] * dims, [2]])
    if get_entry(name).fixed_strides is not None:
        strides = [[2] * dims, *strides_of(name, dims)[1:]]
        with pytest.raises(ValueError, match=r"first of .* strides must be 1, got \[2"):
            build(name, dims, strides=strides)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_networks_build_and_run_on_the_meta_device(name: str, dims: int) -> None:
    with torch.device("meta"):
        network = build(name, dims, deep_supervision=True)
        outputs = network(torch.empty(BATCH, CHANNELS, *shape_of(name, dims)))
    assert all(value.is_meta for value in network.state_dict().values())
    assert outputs[0].shape == (BATCH, CLASSES, *shape_of(name, dims))
    assert outputs[0].is_meta


@pytest.mark.parametrize(("channels", "classes"), [(1, 1), (3, 7), (4, 2)])
@pytest.mark.parametrize("name", list_networks(controls=False))
def test_any_numbers_of_channels_and_classes_are_taken(
    name: str, channels: int, classes: int
) -> None:
    dims = max(get_entry(name).spatial_dims)
    shape = shape_of(name, dims)
    with torch.device("meta"):
        network = create_network(name, channels, classes, **tiny_arguments(name, dims))
        logits = network(torch.empty(BATCH, channels, *shape))
    assert logits.shape == (BATCH, classes, *shape)


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_mixers_stay_in_float32_under_autocast(name: str, dims: int) -> None:
    network = build(name, dims).eval()
    seen: list[torch.dtype] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.dtype)

    mixers = [m for m in network.modules() if isinstance(m, Mamba | SS2D | ConvMixer)]
    for mixer in mixers:
        mixer.register_forward_hook(watch)
    images = torch.randn(BATCH, CHANNELS, *shape_of(name, dims))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
    assert torch.isfinite(logits.float()).all()
    assert seen == [torch.float32] * len(mixers)
    assert bool(mixers) == (get_entry(name).arguments.get("mixer") != "none")


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_logits_under_bfloat16_are_near_those_of_float32(name: str, dims: int) -> None:
    network = build(name, dims).eval()
    images = torch.randn(BATCH, CHANNELS, *shape_of(name, dims))
    with torch.inference_mode():
        single = network(images)
        with autocast(torch.device("cpu"), asked="bfloat16"):
            half = network(images)
    assert torch.isfinite(half).all()
    # untrained networks of tiny width magnify every rounding, also that of the images
    assert 0 < (half - single).norm() < 0.3 * single.norm()


@pytest.mark.parametrize(("name", "dims"), CASES)
def test_float64_stays_float64(name: str, dims: int) -> None:
    network = build(name, dims).double().eval()
    images = torch.randn(BATCH, CHANNELS, *shape_of(name, dims))
    with torch.no_grad():
        exact = network(images.double())
        assert exact.dtype == torch.float64
        single = network.float()(images)
    torch.testing.assert_close(single.double(), exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", list_networks(controls=False))
def test_each_network_names_its_origin(name: str) -> None:
    entry = get_entry(name)
    assert entry.paper
    assert entry.licence
    assert "@" in entry.reference
    assert inspect.getdoc(inspect.getmodule(entry.cls))


def disturb(network: nn.Module) -> None:
    """Moves all parameters off special starts (zeros that would hide others' gradients)."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
