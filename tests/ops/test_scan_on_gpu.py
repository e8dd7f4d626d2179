"""The scan and the convolution on a GPU, on Triton: against the definition in float64, and bits.

The suite for the CPU tries the kernels' every branch in Triton's interpreter; here the compiled
kernels run, on sizes at which races, segments and wide offsets would show.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from scan_cases import OPTIONS, SHAPES, error, make_inputs, run
from torch import Tensor

from umamba.ops.dispatch import find_backend, use_backend
from umamba.ops.selective_scan import scan_walks, selective_scan
from umamba.ops.self_check import TOLERANCE, scan_errors
from umamba.ops.token_orders import token_order
from umamba.ops.walks import order_walk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

DEVICE = torch.device("cuda")
HALF_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
ORDERS = ("raster", "raster_reversed", "transposed", "inter_slice_5", "axes_201_reversed")
SPATIAL = (15, 22, 26)  # 8580 tokens: several segments, a last chunk that is not full


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    """Every scan runs on Triton. With a GPU its absence is a failure, not a reason to skip."""
    reason = find_backend("triton").why_unavailable()
    assert reason is None, reason
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_the_definition(shape: str, options: str):
    expected = definition(shape, options, torch.float32)
    actual = on_gpu(shape, options, torch.float32)
    errors = {name: error(actual[name].cpu(), expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("dtype", HALF_TOLERANCE, ids=["bf16", "fp16"])
def test_half_precision_is_rounded_only_at_input_and_output(dtype: torch.dtype):
    expected = definition("many_chunks", "all", dtype)
    actual = on_gpu("many_chunks", "all", dtype)
    errors = {name: error(actual[name].cpu(), expected[name]) for name in expected}
    assert max(errors.values()) < HALF_TOLERANCE[dtype], errors
    assert errors["last_state"] < TOLERANCE, "the state must stay in float32"


def test_convolution_and_locally_bidirectional_scan_equal_the_definition():
    errors = scan_errors("triton", DEVICE, channels=34, length=1000)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
def test_directions_of_many_tokens_equal_the_chunked_scan_in_float64(merged: bool):
    arguments = direction_inputs(len(ORDERS), 40, SPATIAL)
    doubles = [x.detach().double().requires_grad_() for x in arguments]
    actual = walked(arguments, merged)
    with use_backend("chunked"):
        expected = walked(doubles, merged)
    errors = [error(one, two) for one, two in zip(actual, expected, strict=True)]
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_runs_repeat_to_the_bit(merged: bool, dtype: torch.dtype):
    arguments = direction_inputs(len(ORDERS), 200, SPATIAL, dtype)
    first = walked(arguments, merged)
    for _ in range(5):
        assert all(map(torch.equal, first, walked(arguments, merged)))


def test_a_long_sequence_equals_the_chunked_scan_in_float64():
    arguments = direction_inputs(1, 24, (300_007,))
    doubles = [x.detach().double().requires_grad_() for x in arguments]
    actual = walked(arguments, True, ("raster",))
    with use_backend("chunked"):
        expected = walked(doubles, True, ("raster",))
    errors = [error(one, two) for one, two in zip(actual, expected, strict=True)]
    assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
def test_more_than_2_to_the_31_elements_are_addressed(reverse: bool):
    channels, length, few = 512, 2**22 + 70, 500
    if torch.cuda.mem_get_info()[0] < 2**35:
        pytest.skip("less than 32 GiB of the GPU are free")
    u = torch.randn(1, length, channels, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    delta = torch.rand(1, 1, length, device=DEVICE).bfloat16().expand(1, channels, length)
    B, C = (torch.randn(1, 1, 2, length, device=DEVICE).bfloat16() for _ in range(2))
    A = -torch.rand(channels, 2, device=DEVICE) - 1
    # The walk begins at one end and comes to the other last: after few tokens nothing is left of
    # what lies further back, so that the end alone gives the same.
    part = slice(0, few) if reverse else slice(length - few, length)
    kept = slice(0, few // 2) if reverse else slice(few // 2, few)
    with torch.no_grad():
        whole = selective_scan(u, delta, A, B, C, reverse=reverse)[..., part]
        ends = [x[..., part].float() for x in (u, delta)], [x[..., part].float() for x in (B, C)]
        expected = selective_scan(*ends[0], A, *ends[1], reverse=reverse)
    assert error(whole[..., kept].float(), expected[..., kept].double()) < 2e-2


@functools.cache
def definition(shape: str, options: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the definition gives in float64 on the CPU for the inputs of that type."""
    arguments = make_inputs(SHAPES[shape], OPTIONS[options], dtype)
    doubles = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
    with use_backend("reference"):
        return run(doubles)


def on_gpu(shape: str, options: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the GPU gives for the same inputs."""
    arguments = make_inputs(SHAPES[shape], OPTIONS[options], dtype)
    return run({k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in arguments.items()})


def direction_inputs(
    n_directions: int, channels: int, spatial: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """u, delta, A, B, C, D, z, delta_bias of scan_walks for two samples, u and z shared."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    length = torch.Size(spatial).numel()

    def normal(*size: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(kind)

    def tokens(n: int) -> Tensor:
        return normal(n, 2, length, channels, kind=dtype).permute(1, 0, 3, 2)

    def matrix() -> Tensor:
        return normal(n_directions, 2, length, 16, kind=dtype).permute(1, 0, 3, 2).unsqueeze(2)

    decay = -torch.exp(0.5 * normal(n_directions, channels, 16))
    skip, bias = (normal(n_directions, channels) for _ in range(2))
    leading = [tokens(1), tokens(n_directions), decay, matrix(), matrix()]
    return [x.requires_grad_() for x in (*leading, skip, tokens(1), bias - 2)]


def walked(arguments: list[Tensor], merged: bool, orders: tuple[str, ...] = ORDERS) -> list[Tensor]:
    """The output of the scans along the orders, and the gradients of all arguments."""
    spatial = SPATIAL if len(orders) > 1 else arguments[0].shape[-1:]
    walks = [n for order in orders for n in order_walk(token_order(order), tuple(spatial))]
    out, _ = scan_walks(*arguments, True, None, walks, merged=merged)
    upstream = torch.cos(torch.arange(out.numel(), device=DEVICE)).reshape(out.shape).to(out)
    return [out.detach(), *torch.autograd.grad(out, arguments, upstream)]
