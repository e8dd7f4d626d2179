"""The C library along walks, against a loop in float64 over gathered tokens and their sum."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops import cpu
from umamba.ops.token_orders import token_order
from umamba.ops.walks import order_walk, sequence_walk, walk_positions

REASON = cpu.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

CROSS = ("raster", "transposed", "raster_reversed", "transposed_reversed")
CASES = {  # spatial shape, orders
    "uneven_lines": ((7, 9), CROSS),
    "short_lines": ((3, 40), CROSS),
    "lines_of_chunks": ((64, 3), CROSS),
    "three_levels": ((4, 3, 11), ("axes_102", "axes_210", "axes_021_reversed")),
    "slices": ((4, 3, 10), ("raster", "raster_reversed", "inter_slice_8")),
}
LONG = {
    order: ((47, 50), (order,)) for order in ("transposed", "transposed_reversed", "inter_slice_10")
}
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
SETS = cpu.INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else ("base",)
cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    library = cpu._load()[0]
    assert library is not None
    if library.umamba_select(request.param.encode()) is None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.umamba_select(str(cpu.instruction_set()).encode())


@cases
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("window", [0, 8], ids=["plain", "windows"])
def test_walks_give_the_gradients_of_gathered_tokens(instruction_set, case, shared, window):
    inputs, walks = make_inputs(case, shared)
    found = run(inputs, walks, shared, window)
    expected = in_float64(inputs, walks, shared, window)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < 5e-6, f"{name}: {error:.1e}"


@cases
@pytest.mark.parametrize("taps", [1, 4, 8])
def test_walks_convolve_as_gathered_tokens_do(instruction_set, case, taps):
    inputs, walks = make_inputs(case, shared=True)
    n_directions, channels = inputs["D"].shape
    x, dout = inputs["u"], inputs["delta"]
    weight, bias = normal(n_directions, channels, taps), normal(n_directions, channels)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    outs = []
    for k, (index, back) in enumerate(positions(walks)):
        padded = functional.pad(leaves[0][:, 0][..., index], (taps - 1, 0))
        value = functional.conv1d(padded, leaves[1][k][:, None], leaves[2][k], groups=channels)
        outs.append(functional.silu(value)[..., back])
    expected = torch.stack(outs, 1)
    wanted = torch.autograd.grad(expected, leaves, dout.double())
    flat = [number for walk in walks for number in walk]
    found = (
        cpu.conv_forward(x, weight, bias, flat),
        *cpu.conv_backward(dout, x, weight, bias, flat),
    )
    for a, b in zip(found, (expected.detach(), *wanted), strict=True):
        assert a is not None and (a - b).abs().max() < 3e-6 * b.abs().max()


@pytest.mark.parametrize("order", LONG)
@pytest.mark.parametrize("channels", [20, 96])
def test_walks_longer_than_the_scratch_give_the_bits_of_gathered_tokens(
    instruction_set, order, channels
):
    inputs, walks = make_inputs(order, shared=True, channels=channels)
    found = run(inputs, walks, True, 0)
    (index, back), tokens = next(positions(walks)), ("u", "delta", "B", "C", "z")
    gathered = {name: x[..., index] if name in tokens else x for name, x in inputs.items()}
    expected = run(gathered, [sequence_walk(len(index))], True, 0, index)
    for name, value in expected.items():
        in_place = value[..., back] if name.removeprefix("d") in (*tokens, "out") else value
        assert torch.equal(found[name], in_place), name


@cases
def test_results_are_bit_identical_for_any_number_of_threads(case):
    before = torch.get_num_threads()
    inputs, walks = make_inputs(case, shared=True)
    results = []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        results.append(run(inputs, walks, True, 0))
    torch.set_num_threads(before)
    assert all(torch.equal(r[name], results[0][name]) for r in results for name in r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sums_of_directions_are_rounded_once(instruction_set, dtype):
    inputs, walks = make_inputs("uneven_lines", shared=True)
    halved = ("u", "delta", "B", "C", "z")
    half = {name: x.to(dtype) if name in halved else x for name, x in inputs.items()}
    wide = {name: x.float() for name, x in half.items()}
    found, expected = run(half, walks, True, 0), run(wide, walks, True, 0)
    for name in ("out", "du", "ddelta", "dz", "dB", "dC"):
        assert torch.equal(found[name], expected[name].to(dtype)), name
    assert torch.equal(found["dA"], expected["dA"])


def test_any_strides_give_the_bits_of_contiguous_tensors():
    inputs, walks = make_inputs("uneven_lines", shared=True)
    expected = run(inputs, walks, True, 0)
    strided = {
        name: x.movedim(-1, 1).contiguous().movedim(1, -1) if x.ndim > 3 else x
        for name, x in inputs.items()
    }
    found = run(strided, walks, True, 0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def make_inputs(
    case: str, shared: bool, channels: int = 20
) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    """Random arguments for 2 samples of channels in 2 groups, 5 states, and the walks."""
    spatial, orders = (CASES | LONG)[case]
    walks = [order_walk(token_order(name), spatial) for name in orders]
    n_directions, length = len(walks), torch.Size(spatial).numel()
    tokens = (2, 1 if shared else n_directions, channels, length)
    inputs = {
        "u": normal(*tokens),
        "delta": normal(2, n_directions, channels, length),
        "A": -torch.exp(0.5 * normal(n_directions, channels, 5)),
        "B": normal(2, n_directions, 2, 5, length),
        "C": normal(2, n_directions, 2, 5, length).flip(-1),
        "D": normal(n_directions, channels),
        "z": normal(*tokens).flip(-1),
        "delta_bias": normal(n_directions, channels) - 1,
        "initial_state": normal(2, n_directions, channels, 5),
    }
    return inputs, walks


def normal(*size: int) -> Tensor:
    """Values that bfloat16 holds exactly."""
    values = torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))
    return values.bfloat16().float()


def upstream(out: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    return normal(*out.shape).flip(0).to(out.dtype), normal(*last.shape).flip(0)


def run(
    inputs: dict[str, Tensor],
    walks: list[tuple[int, ...]],
    merged: bool,
    window: int,
    index: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output, last state and the gradients, for fixed upstream gradients (of tokens `index`)."""
    flat = [number for walk in walks for number in walk]
    arguments = [inputs[name] for name in NAMES]
    arguments.insert(8, True)
    out, last, states = cpu.forward(*arguments, flat, merged, True, window)
    dout, dlast = upstream(out, last)
    dout = dout if index is None else dout[..., index]
    gradients = cpu.backward(dout, dlast, *arguments, states, flat, window)
    named = {f"d{name}": g for name, g in zip(NAMES, gradients, strict=True)}
    return {"out": out, "last_state": last, **named}


def in_float64(
    inputs: dict[str, Tensor], walks: list[tuple[int, ...]], merged: bool, window: int
) -> dict[str, Tensor]:
    """The same by torch's autograd: a loop over the tokens of each direction."""
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    outs, lasts = [], []
    for k, (index, back) in enumerate(positions(walks)):
        u, delta, B, C, z = (
            x[:, k if x.shape[1] > 1 else 0][..., index]
            for x in (leaves[name] for name in ("u", "delta", "B", "C", "z"))
        )
        d = functional.softplus(delta + leaves["delta_bias"][k][:, None])
        B, C = (x.repeat_interleave(u.shape[1] // x.shape[1], 1) for x in (B, C))
        decays = torch.exp(d.unsqueeze(2) * leaves["A"][k].unsqueeze(-1)).unbind(-1)
        inflows = ((d * u).unsqueeze(2) * B).unbind(-1)
        h, states = leaves["initial_state"][:, k], []
        for a, b in zip(decays, inflows, strict=True):
            h = a * h + b
            states.append(h)
        lasts.append(h)
        for start in range(0, len(states), window) if window else ():
            ahead = torch.zeros_like(h)
            for t in reversed(range(start, min(start + window, len(states)))):
                states[t] = states[t] + decays[t] * ahead
                ahead = decays[t] * ahead + inflows[t]
        y = (torch.stack(states, -1) * C).sum(2) + leaves["D"][k][:, None] * u
        outs.append((y * functional.silu(z))[..., back])
    out, last = torch.stack(outs, 1), torch.stack(lasts, 1)
    out = out.sum(1, keepdim=True) if merged else out
    dout, dlast = (x.double() for x in upstream(out.detach(), last.detach()))
    gradients = torch.autograd.grad([out, last], list(leaves.values()), [dout, dlast])
    named = {f"d{name}": g for name, g in zip(NAMES, gradients, strict=True)}
    return {"out": out.detach(), "last_state": last.detach(), **named}


def positions(walks: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The tokens of each walk, and the step at which each token is met."""
    for walk in walks:
        index = walk_positions(walk)
        yield index, torch.argsort(index)
