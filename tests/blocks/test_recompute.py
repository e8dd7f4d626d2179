"""Mixers that are computed again in backward: the same gradients, and every scan run once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from umamba.blocks.lbmamba import AlternatingLayers
from umamba.blocks.mamba2 import Mamba2
from umamba.blocks.mixer import MixerLayer, PointwiseMixerLayer, ProjectedMixerLayer
from umamba.blocks.recompute import recompute_mixers
from umamba.blocks.ss2d import MLP, SS2D, VSSBlock
from umamba.networks import create_network
from umamba.ops.dispatch import choose

WIDTH = 8
FIRST, LAST = (2, WIDTH, 3, 4, 6), (2, 6, 4, WIDTH)
THREE = ("raster", "raster_reversed", "inter_slice_4")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Mamba": (lambda: MixerLayer(WIDTH, spatial_dims=3), FIRST),
    "three orders": (lambda: MixerLayer(WIDTH, spatial_dims=3, orders=THREE), FIRST),
    "channels": (lambda: MixerLayer(72, spatial_dims=3, tokens="channels", residual=True), FIRST),
    "projected": (lambda: ProjectedMixerLayer(WIDTH, 5, spatial_dims=3, skip="inside"), FIRST),
    "four views": (lambda: PointwiseMixerLayer(WIDTH, four_views=True, projects=True), FIRST),
    "SS2D": (lambda: VSSBlock(WIDTH, lambda: SS2D(WIDTH), mlp=lambda: MLP(WIDTH)), LAST),
    "cascade": (lambda: VSSBlock(WIDTH, lambda: SS2D(WIDTH, directions="cascade")), LAST),
    "LBMamba": (lambda: AlternatingLayers(WIDTH, spatial_dims=2), LAST),
    "Mamba-2": (lambda: VSSBlock(WIDTH, lambda: Mamba2(WIDTH, d_state=4, headdim=4)), LAST),
    "conv": (lambda: MixerLayer(WIDTH, spatial_dims=3, mixer="conv"), FIRST),
}


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Tells how many scans were run since it was asked before."""
    backend = choose(torch.device("cpu"), torch.float32, 16)
    forward, calls = backend.forward, [0]

    def counted(*arguments: object) -> object:
        calls[0] += 1
        return forward(*arguments)

    def since_then() -> int:
        n, calls[0] = calls[0], 0
        return n

    monkeypatch.setattr(backend, "forward", counted)
    return since_then


def step(network: nn.Module, image: Tensor) -> list[Tensor | None]:
    """The outputs and all gradients of a training step."""
    outputs = network(image)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(output.square().mean() for output in outputs).backward()
    return [*outputs, *(p.grad for p in network.parameters())]


def assert_equal(first: list[Tensor | None], second: list[Tensor | None]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """The same network twice, as it is and with recomputed mixers."""
    networks = []
    for recomputes in (False, True):
        torch.manual_seed(0)
        networks.append(build())
        recompute_mixers(networks[-1], recomputes)
    return networks[0], networks[1]


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_equal_to_the_bit_and_no_scan_runs_twice(kind, scans):
    build, shape = LAYERS[kind]
    plain, recomputed = pair(build)
    image = torch.randn(shape)
    results, calls = [], []
    for layer in (plain, recomputed):
        x = image.clone().requires_grad_()
        results.append([*step(layer, x), x.grad])
        calls.append(scans())
    assert_equal(*results)
    assert calls[0] == calls[1]


def umamba() -> nn.Module:
    arguments = {"strides": [[1] * 3, [2] * 3, [2] * 3], "features_per_stage": [4, 8, 8]}
    return create_network(
        "umamba_enc", 1, 2, deep_supervision=True, patch_size=[16, 8, 8], **arguments
    )


def test_a_network_with_deep_supervision_learns_the_same_to_the_bit():
    plain, recomputed = pair(umamba)
    image = torch.randn(2, 1, 16, 8, 8)
    first, second = step(plain, image), step(recomputed, image)
    assert isinstance(plain(image), list)
    assert_equal(first, second)


def test_nothing_changes_where_no_gradient_is_wanted(monkeypatch):
    plain, recomputed = pair(umamba)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint was made")

    monkeypatch.setattr("umamba.blocks.recompute.checkpoint", refuse)
    image = torch.randn(1, 1, 16, 8, 8)
    with torch.no_grad():
        assert_equal(plain.eval()(image), recomputed.eval()(image))


def test_autocast_is_the_same_in_backward():
    plain, recomputed = pair(umamba)
    image = torch.randn(1, 1, 16, 8, 8)
    results = []
    for network in (plain, recomputed):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(image)
        sum(output.float().square().mean() for output in outputs).backward()
        results.append([*outputs, *(p.grad for p in network.parameters())])
    assert_equal(*results)


def test_a_compiled_network_learns_the_same_from_less(scans):
    image = torch.randn(1, 1, 16, 8, 8)
    results, calls, kept = [], [], []
    for network in pair(umamba):
        saved: dict[int, Tensor] = {}  # by address; held, so that no address serves twice

        def remember(tensor: Tensor, saved: dict[int, Tensor] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        compiled = torch.compile(network, backend="aot_eager")
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            outputs = compiled(image)
        sum(output.square().mean() for output in outputs).backward()
        results.append([*outputs, *(p.grad for p in network.parameters())])
        calls.append(scans())
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.values()))
    assert_equal(*results)
    assert calls[0] == calls[1] > 0
    assert kept[1] < 0.9 * kept[0]
    assert_equal(results[0], step(pair(umamba)[0], image))
