"""The locally bidirectional scan against its loop in float64, and the loop against its sum."""

from __future__ import annotations

import warnings

import pytest
import torch
from scan_cases import OPTIONS, error, make_inputs
from torch import Tensor

from umamba.ops import cpu, reference
from umamba.ops.dispatch import BACKENDS, backend_name, find_backend, use_backend
from umamba.ops.layout import CHUNK
from umamba.ops.local_scan import local_scan, window_of
from umamba.ops.selective_scan import selective_scan

# (B, D, L, N, G) and the window: one token, below, at, above a window, several, groups
SIZES = [
    ((2, 3, 1, 2, 1), 4),
    ((1, 4, 3, 2, 2), 4),
    ((2, 3, 8, 4, 1), 8),
    ((1, 4, 37, 5, 2), 4),
    ((2, 6, 150, 3, 3), 16),
]


@pytest.fixture(params=[backend_name(backend) for backend in BACKENDS])
def backend(request: pytest.FixtureRequest):
    reason = find_backend(request.param).why_unavailable()
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def library() -> None:
    reason = cpu.why_unavailable()
    if reason is not None:
        pytest.skip(reason)


def make(shape: tuple[int, int, int, int, int], options: str, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    arguments = make_inputs(shape, OPTIONS[options], dtype)
    arguments.pop("initial_state", None)
    return arguments


def defined(window: int, **arguments: Tensor | bool) -> Tensor:
    """The definition's result."""
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    flags = (arguments["delta_softplus"], arguments["reverse"])
    tensors = [arguments.get(name) for name in names]
    return reference.local_scan(*tensors, *flags, window)  # type: ignore[arg-type]


def run(scan, arguments: dict[str, Tensor | bool], window: int) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """The output and the gradient of every tensor."""
    tensors = {k: v.clone().requires_grad_() for k, v in arguments.items() if torch.is_tensor(v)}
    out = scan(**{**arguments, **tensors}, window=window)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(tensors.values()), upstream)
    return {"out": out.detach(), **dict(zip(tensors, gradients, strict=True))}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("shape", "window"), SIZES, ids=str)
def test_outputs_and_gradients_equal_the_definition(
    shape: tuple[int, int, int, int, int], window: int, options: str
) -> None:
    arguments = make(shape, options)
    actual, expected = run(local_scan, arguments, window), run(defined, arguments, window)
    assert max(error(actual[name], expected[name]) for name in expected) < 1e-10


@pytest.mark.parametrize("window", [5, 8, 64], ids=lambda window: f"windows_of_{window}")
@pytest.mark.parametrize("options", ["bare", "all", "all_reverse"])
def test_every_backend_serves(backend: str, options: str, window: int) -> None:
    arguments = make((2, 20, 70, 16, 2), options, torch.float32)
    doubles = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
    actual, expected = run(local_scan, arguments, window), run(defined, doubles, window)
    assert max(error(actual[name], expected[name]) for name in expected) < 5e-6


def test_the_library_takes_windows_that_divide_a_chunk_in_one_pass(
    monkeypatch: pytest.MonkeyPatch, library: None
) -> None:
    passes, forward = [], cpu.forward

    def spy(*given: object):  # type: ignore[no-untyped-def]
        passes.append(given[-1])
        return forward(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu, "forward", spy)
    arguments = make((1, 20, 70, 4, 1), "all", torch.float32)
    for window in (2, 4, 8, 16, CHUNK):
        local_scan(**arguments, window=window)
    assert passes == [2, 4, 8, 16, CHUNK]
    local_scan(**arguments, window=12)
    local_scan(**make((1, 3, 9, 65, 1), "all", torch.float32), window=4)  # too many states for it
    assert len(passes) == 7


def test_a_backward_pass_on_another_backend_is_refused(library: None) -> None:
    arguments = make((1, 4, 40, 4, 1), "bare", torch.float32)
    out = local_scan(**{**arguments, "u": arguments["u"].requires_grad_()}, window=8)
    with use_backend("chunked"), pytest.raises(ValueError, match="windows of 8 tokens"):
        out.sum().backward()


def test_compiles_as_one_graph_of_any_shape_with_gradients() -> None:
    arguments = make((1, 6, 70, 4, 1), "bare", torch.float32)
    names = ("u", "delta", "A", "B", "C")
    inputs = [arguments[name].requires_grad_() for name in names]

    def scan(u: Tensor, *rest: Tensor) -> Tensor:
        return local_scan(u.sin(), *rest, delta_softplus=True).cos()

    expected = torch.autograd.grad(scan(*inputs).sum(), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        compiled = torch.compile(scan, backend="aot_eager", fullgraph=True, dynamic=True)
        actual = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    assert all(map(torch.equal, actual, expected))


def test_the_definition_is_a_sum_over_all_tokens_before_and_those_ahead_in_the_window() -> None:
    arguments = make((1, 2, 11, 3, 1), "bare")
    u, d, A, B, C = (arguments[name][0] for name in ("u", "delta", "A", "B", "C"))
    A, window = arguments["A"], 4
    expected = torch.zeros(2, 11, dtype=torch.float64)
    for t in range(11):
        for s in range(11):
            if s > t and s // window != t // window:
                continue
            between = d[:, t:s] if s > t else d[:, s + 1 : t + 1]
            weight = torch.exp(A * between.sum(-1, keepdim=True))  # (D, N)
            inflow = (d[:, s] * u[:, s])[:, None] * B[0, :, s]
            expected[:, t] += (weight * inflow * C[0, :, t]).sum(-1)
    torch.testing.assert_close(defined(window, **arguments)[0], expected, rtol=1e-12, atol=1e-13)


def test_windows_of_one_token_are_a_plain_scan() -> None:
    arguments = make((2, 5, 30, 4, 1), "all_reverse")
    torch.testing.assert_close(local_scan(**arguments, window=1), selective_scan(**arguments))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_a_token_is_seen_from_its_window_and_from_all_that_follow(
    backend: str, reverse: bool
) -> None:
    arguments = make((1, 3, 22, 2, 1), "all_reverse" if reverse else "all", torch.float32)
    changed = {**arguments, "u": arguments["u"].clone()}
    changed["u"][..., 7] += 1
    before, after = (local_scan(**inputs, window=4) for inputs in (arguments, changed))
    moved = (before != after).all(dim=1)[0].nonzero().flatten().tolist()
    # Walked from the end, the windows are 21..18, 17..14, 13..10, 9..6, ...
    assert moved == (list(range(10)) if reverse else list(range(4, 22)))


@pytest.mark.parametrize(
    ("length", "window"), [(1, 4), (128, 4), (129, 8), (256, 8), (257, 16), (4096, 16)]
)
def test_the_window_follows_the_length_as_in_the_official_kernel(length: int, window: int) -> None:
    assert window_of(length) == window
    arguments = make((1, 2, length, 2, 1), "bare")
    assert torch.equal(local_scan(**arguments), local_scan(**arguments, window=window))


def test_half_precision_is_rounded_only_at_input_and_output() -> None:
    arguments = make((2, 9, 70, 4, 1), "all", torch.bfloat16)
    doubles = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
    out, expected = local_scan(**arguments, window=8), local_scan(**doubles, window=8)
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 2**-8 * expected.abs().max()


def test_runs_on_the_meta_device_and_without_tokens() -> None:
    arguments = make((2, 6, 30, 4, 1), "all", torch.float32)
    meta = {k: v.to("meta") if torch.is_tensor(v) else v for k, v in arguments.items()}
    assert local_scan(**meta, window=4).shape == (2, 6, 30)
    assert local_scan(**make((2, 6, 0, 4, 1), "all"), window=4).shape == (2, 6, 0)


def test_a_window_needs_a_token() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        local_scan(**make((1, 2, 3, 2, 1), "bare"), window=0)
