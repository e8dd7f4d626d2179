"""The scan of Mamba-2: chunks against the loop in float64, and the loop against Mamba-1's scan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umamba.ops.dispatch import use_backend
from umamba.ops.selective_scan import selective_scan
from umamba.ops.ssd import ssd_reference, ssd_scan

# name -> (B, L, H, P, G, N)
SHAPES = {
    "one_token": (2, 1, 2, 3, 1, 4),
    "below_a_chunk": (1, 7, 3, 2, 1, 5),
    "one_chunk": (2, 16, 4, 3, 2, 4),
    "above_a_chunk": (1, 17, 4, 3, 4, 1),
    "many_chunks": (2, 101, 6, 2, 3, 4),
}
CHUNK = 16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make(shape: str, *, skip: str = "none", initial: bool = False) -> dict[str, Tensor]:
    """Arguments in float64; skip "head" and "channel" are the two shapes of D."""
    batch, length, heads, channels, groups, states = SHAPES[shape]
    arguments = {
        "x": torch.randn(batch, length, heads, channels),
        "delta": torch.rand(batch, length, heads),
        "A": -torch.exp(torch.randn(heads)),
        "B": torch.randn(batch, length, groups, states),
        "C": torch.randn(batch, length, groups, states),
    }
    if skip != "none":
        arguments["D"] = torch.randn(heads) if skip == "head" else torch.randn(heads, channels)
    if initial:
        arguments["initial_state"] = torch.randn(batch, heads, channels, states)
    return {name: value.double() for name, value in arguments.items()}


def run(scan, arguments: dict[str, Tensor], **options: int) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """Both results, and the gradients of all arguments from both."""
    tensors = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    out, last = scan(**tensors, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in (out, last)]
    gradients = torch.autograd.grad([out, last], list(tensors.values()), upstream)
    named = {f"d{name}": g for name, g in zip(tensors, gradients, strict=True)}
    return {"out": out.detach(), "last_state": last.detach(), **named}


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of the same tensor."""
    return max(
        ((actual[name] - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name in expected
    )


@pytest.mark.parametrize("initial", [False, True], ids=["from_zero", "initial_state"])
@pytest.mark.parametrize("skip", ["none", "head", "channel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_give_the_outputs_and_gradients_of_the_loop(
    shape: str, skip: str, initial: bool
) -> None:
    arguments = make(shape, skip=skip, initial=initial)
    expected = run(ssd_reference, arguments)
    assert largest_error(run(ssd_scan, arguments, chunk_size=CHUNK), expected) < 1e-10


@pytest.mark.parametrize("chunk_size", [1, 5, 64, 1000])
def test_the_chunk_size_does_not_change_the_result(chunk_size: int) -> None:
    arguments = make("many_chunks", skip="head", initial=True)
    expected = run(ssd_scan, arguments, chunk_size=CHUNK)
    assert largest_error(run(ssd_scan, arguments, chunk_size=chunk_size), expected) < 1e-10


def test_the_loop_is_a_selective_scan_whose_channels_share_their_decay() -> None:
    arguments = make("many_chunks", skip="head", initial=True)
    batch, length, heads, channels, _, states = SHAPES["many_chunks"]

    def of_channels(values: Tensor) -> Tensor:  # (..., H) -> (..., HP)
        return values.repeat_interleave(channels, dim=-1)

    with use_backend("reference"):
        out, last = selective_scan(
            arguments["x"].flatten(2).transpose(1, 2),
            of_channels(arguments["delta"]).transpose(1, 2),
            of_channels(arguments["A"])[:, None].expand(-1, states),
            *(arguments[name].permute(0, 2, 3, 1) for name in ("B", "C")),
            of_channels(arguments["D"]),
            initial_state=arguments["initial_state"].flatten(1, 2),
            return_last_state=True,
        )
    actual, state = ssd_reference(**arguments)
    expected = out.transpose(1, 2).reshape(batch, length, heads, channels)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state.flatten(1, 2), last, rtol=1e-10, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    arguments = make("below_a_chunk", skip="channel", initial=True)
    tensors = tuple(value.requires_grad_() for value in arguments.values())
    assert torch.autograd.gradcheck(lambda *values: ssd_scan(*values, chunk_size=3), tensors)


def test_a_split_sequence_with_its_state_passed_equals_one_run() -> None:
    arguments = make("many_chunks", skip="head")
    whole, last = ssd_scan(**arguments, chunk_size=CHUNK)
    state, parts = None, []
    for part in (slice(0, 37), slice(37, 101)):
        cut = {k: v[:, part] if k in ("x", "delta", "B", "C") else v for k, v in arguments.items()}
        out, state = ssd_scan(**cut, initial_state=state, chunk_size=CHUNK)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-12)


def test_later_tokens_do_not_change_earlier_outputs() -> None:
    arguments = make("many_chunks")
    before, _ = ssd_scan(**arguments, chunk_size=CHUNK)
    for name in ("x", "delta", "B", "C"):
        arguments[name] = arguments[name].clone()
        arguments[name][:, 40:] += 1
    after, _ = ssd_scan(**arguments, chunk_size=CHUNK)
    assert torch.equal(before[:, :40], after[:, :40])
    assert (before[:, 40:] != after[:, 40:]).any(dim=-1).all()


def test_small_steps_keep_their_precision_behind_a_huge_one() -> None:
    arguments = make("many_chunks")
    arguments["delta"] *= 1e-2
    arguments["delta"][:, 2] = 1e5
    exact = run(ssd_reference, arguments)
    singles = {name: value.float() for name, value in arguments.items()}
    actual = run(ssd_scan, singles, chunk_size=CHUNK)
    assert all(torch.isfinite(value).all() for value in actual.values())
    small = slice(3, CHUNK)  # the rest of the chunk
    scale = exact["out"][:, small].abs().max()
    assert (actual["out"][:, small] - exact["out"][:, small]).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_rounded_only_at_input_and_output(dtype: torch.dtype) -> None:
    arguments = {name: value.to(dtype) for name, value in make("many_chunks").items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, last = ssd_scan(**arguments, chunk_size=CHUNK)
    doubles = {name: value.double() for name, value in arguments.items()}
    expected, expected_last = ssd_reference(**doubles)
    assert out.dtype == dtype
    assert last.dtype == torch.float32
    assert (out - expected).abs().max() < torch.finfo(dtype).eps * expected.abs().max()
    assert (last - expected_last).abs().max() < 1e-5 * expected_last.abs().max()


def test_no_tokens_leave_the_state_as_it_was() -> None:
    arguments = make("many_chunks", initial=True)
    for name in ("x", "delta", "B", "C"):
        arguments[name] = arguments[name][:, :0]
    for scan in (ssd_scan, ssd_reference):
        out, last = scan(**arguments)
        assert out.shape == (2, 0, 6, 2)
        assert torch.equal(last, arguments["initial_state"])


def test_runs_on_the_meta_device() -> None:
    arguments = {name: value.to("meta") for name, value in make("many_chunks").items()}
    out, last = ssd_scan(**arguments)
    assert out.is_meta
    assert out.shape == (2, 101, 6, 2)
    assert last.shape == (2, 6, 2, 4)


def test_arguments_that_do_not_fit_are_named() -> None:
    arguments = make("one_chunk")
    for name in ("delta", "A", "C"):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            ssd_scan(**{**arguments, name: arguments[name][..., :1]})
    with pytest.raises(ValueError, match="D has shape"):
        ssd_scan(**arguments, D=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="4 heads, not a multiple of the 3 groups"):
        ssd_scan(**{**arguments, "B": torch.zeros(2, 16, 3, 4)})
    with pytest.raises(ValueError, match="at least one token"):
        ssd_scan(**arguments, chunk_size=0)
