"""Networks under torch.compile and torch.export: one graph, and the same numbers as without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._functorch.config
from tiny_networks import CHANNELS, build, shape_of
from torch import Tensor, nn

from umamba.blocks.mamba import Mamba
from umamba.networks import create_module, get_entry, list_networks
from umamba.networks.precision import compile_backward_without_autocast

# The convolution in place of the scan, over voxels and over rows and columns.
CONTROLS = ("umamba_bot_convmix", "vm_unet_convmix")
# A scan along one order, along three, and VMamba's four.
TRAINED = ("umamba_bot", "segmamba", "vm_unet")
MODULES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "nnmamba_classifier": ({"num_classes": 3, "features_per_stage": (4, 8, 8, 8)}, (18, 16, 20)),
    "nnmamba_landmark": (
        {"num_classes": 3, "features_per_stage": (4, 8, 8), "strides": [[1] * 3, *[[2] * 3] * 2]},
        (8, 4, 12),
    ),
    "swin_unet": (
        {
            "num_classes": 3,
            "features_per_stage": (8, 16),
            "depths": (2, 1),
            "n_heads": (2, 2),
            "window_sizes": (2, 2),
        },
        (16, 32),
    ),
    "unet_small": ({"num_classes": 3, "features_per_stage": (4, 4, 8, 8, 8)}, (16, 32)),
    "vmamba_tiny_0230s": ({"features_per_stage": (8, 16), "depths": (1, 1)}, (32, 24)),
}

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")


@pytest.fixture(autouse=True)
def _without_graphs_of_other_tests(one_thread: None) -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", [*list_networks(controls=False), *CONTROLS])
def test_a_network_is_one_graph_with_nothing_read_back_from_the_device(name: str) -> None:
    dims = max(get_entry(name).spatial_dims)
    network = build(name, dims, deep_supervision=True)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    images = torch.randn(1, CHANNELS, *shape_of(name, dims))
    agree(compiled(images), network(images))


@pytest.mark.parametrize("name", MODULES)
def test_a_module_without_plans_is_one_graph(name: str) -> None:
    arguments, shape = MODULES[name]
    module = create_module(name, input_channels=CHANNELS, **arguments).eval()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    images = torch.randn(2, CHANNELS, *shape)
    with torch.no_grad():
        agree(compiled(images), module(images))


@pytest.mark.parametrize("name", TRAINED)
def test_a_compiled_network_trains_and_predicts_as_without(name: str) -> None:
    dims = max(get_entry(name).spatial_dims)
    network = build(name, dims, deep_supervision=True)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    images = torch.randn(2, CHANNELS, *shape_of(name, dims))
    agree(gradients(compiled, network, images), gradients(network, network, images))
    # as nnU-Net does before it validates
    compiled._orig_mod.decoder.deep_supervision = False
    compiled.eval()
    with torch.inference_mode():
        logits = compiled(images)
        assert isinstance(logits, Tensor)
        agree(logits, network(images))


def test_a_compiled_network_trains_under_autocast_with_float32_mixers_in_backward_too() -> None:
    network = build("umamba_bot", 3, deep_supervision=True)
    images = torch.randn(2, CHANNELS, *shape_of("umamba_bot", 3))

    def under_autocast(run: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16)(run)

    expected = gradients(under_autocast(network), network, images)
    with torch._functorch.config.patch(backward_pass_autocast="same_as_forward"):
        compile_backward_without_autocast()
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        agree(gradients(under_autocast(compiled), network, images), expected)


def test_other_batches_and_patches_share_a_graph_of_any_shape() -> None:
    network = build("umamba_bot", 3)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for shape in ((2, 6, 20, 10), (3, 10, 24, 14), (4, 14, 28, 6)):
        images = torch.randn(shape[0], CHANNELS, *shape[1:])
        agree(gradients(compiled, network, images), gradients(network, network, images))
    assert n_graphs() == 2  # for the first shape, for any other


def test_orders_that_fill_up_their_slices_have_one_more_graph_than_lengths_that_fit() -> None:
    mixer = Mamba(4, orders=("raster", "raster_reversed", "inter_slice_3"))
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    for spatial in ((4, 5), (5, 7), (7, 8), (6, 9), (9, 8)):
        features = torch.randn(2, *spatial, 4)
        agree(gradients(compiled, mixer, features), gradients(mixer, mixer, features))
    assert n_graphs() == 3  # for the first shape, for lengths to be filled up, for those that fit


@pytest.mark.parametrize("name", [*TRAINED, "nnmamba", "uvm_net"])
def test_a_network_is_exported_for_batches_of_any_size(name: str) -> None:
    dims = max(get_entry(name).spatial_dims)
    network = build(name, dims).eval()
    images = torch.randn(3, CHANNELS, *shape_of(name, dims))
    batch = {0: torch.export.Dim("batch", min=1, max=4)}
    with torch.no_grad():
        program = torch.export.export(network, (images[:2],), dynamic_shapes=(batch,), strict=False)
        for some in (images, images[:1]):
            agree(program.module()(some), network(some))


def gradients(run: Callable[[Tensor], Any], network: nn.Module, images: Tensor) -> list[Tensor]:
    """The parameters' gradients of a function of all logits."""
    torch.manual_seed(1)
    outputs = run(images)
    network.zero_grad()
    sum((output.float() ** 2).mean() for output in listed(outputs)).backward()
    return [x.grad.clone() for x in network.parameters() if x.grad is not None]


def n_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def agree(actual: Any, expected: Any) -> None:
    """To 1e-5 of the largest value of all."""
    largest = max(float(x.detach().abs().max()) for x in listed(expected))
    for one, two in zip(listed(actual), listed(expected), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 * largest)


def listed(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
