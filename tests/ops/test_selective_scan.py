"""The selective scan: every backend against the definition in float64, and what needs no oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from scan_cases import (
    OPTIONS,
    SHAPES,
    error,
    is_interpreted,
    make_inputs,
    run,
    skip_unless_usable,
)
from torch import Tensor

from umamba.ops.dispatch import BACKENDS, backend_name, use_backend
from umamba.ops.layout import CHUNK
from umamba.ops.selective_scan import selective_scan

NAMES = [backend_name(backend) for backend in BACKENDS]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest):
    """Every scan of the test runs on each backend in turn."""
    skip_unless_usable(request.param)
    with use_backend(request.param):
        yield request.param


@functools.cache
def defined(shape: str, options: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the definition gives in float64 for the inputs of that type."""
    arguments = make_inputs(SHAPES[shape], OPTIONS[options], dtype)
    doubles = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
    with use_backend("reference"):
        return run(doubles)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_the_definition(backend: str, shape: str, options: str):
    if is_interpreted(backend) and shape == "many_chunks":
        pytest.skip("a thousand tokens take the interpreter minutes; odd_states has three chunks")
    actual = run(make_inputs(SHAPES[shape], OPTIONS[options], torch.float32))
    expected = defined(shape, options, torch.float32)
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCE[torch.float32], errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("options", ["bare", "all", "all_reverse"])
def test_half_precision_is_rounded_only_at_input_and_output(
    backend: str, options: str, dtype: torch.dtype
):
    actual = run(make_inputs(SHAPES["above_a_chunk"], OPTIONS[options], dtype))
    expected = defined("above_a_chunk", options, dtype)
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert errors["last_state"] < TOLERANCE[torch.float32], "the state must stay in float32"
    assert {actual[n].dtype for n in ("out", "du", "ddelta", "dB", "dC")} == {dtype}


@pytest.mark.parametrize("shape", [(3, 200, 130, 16, 1), (1, 2, 700, 4, 2), (2, 64, 64, 64, 1)])
def test_many_and_few_channels_take_the_same_values(
    backend: str, shape: tuple[int, int, int, int, int]
):
    """The chunked backend cuts both into blocks or segments."""
    if is_interpreted(backend):
        pytest.skip("minutes in the interpreter; tests of its own cut its scans into segments")
    arguments = make_inputs(shape, dtype=torch.float32)
    with use_backend("reference"):
        expected = {k: v.double() for k, v in run(arguments).items()}
    actual = run(arguments)
    errors = {name: error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < TOLERANCE[torch.float32], errors


@pytest.mark.parametrize("name", ["reference", "chunked"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_equal_finite_differences(name: str, reverse: bool):
    arguments = make_inputs((2, 4, 5, 2, 2))
    tensors = {k: v.requires_grad_() for k, v in arguments.items() if torch.is_tensor(v)}

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, values, strict=True))
        return selective_scan(**named, delta_softplus=True, reverse=reverse, return_last_state=True)

    with use_backend(name):
        assert torch.autograd.gradcheck(scan, tuple(tensors.values()))


def test_later_tokens_do_not_change_earlier_outputs(backend: str):
    arguments = make_inputs((1, 6, 150, 16, 1), dtype=torch.float32)
    before = selective_scan(**arguments)
    for name in ("u", "delta", "B", "C", "z"):
        arguments[name] = arguments[name].clone()
        arguments[name][..., 100:] += 1
    after = selective_scan(**arguments)
    assert torch.equal(before[..., :100], after[..., :100])
    assert not torch.equal(before[..., 100:], after[..., 100:])


def test_with_fast_decay_the_state_forgets(backend: str):
    arguments = make_inputs((1, 6, 80, 8, 1), ("D",), torch.float32)
    arguments["delta"] = arguments["delta"] + 0.1
    arguments["A"] = torch.full_like(arguments["A"], -1e4)
    u, delta, B, C = (arguments[name] for name in ("u", "delta", "B", "C"))
    expected = delta * u * (B * C).sum(2) + arguments["D"][:, None] * u
    assert error(selective_scan(**arguments), expected.double()) < 1e-6


@pytest.mark.parametrize("reverse", [False, True])
def test_a_split_sequence_with_its_state_passed_equals_one_run(backend: str, reverse: bool):
    arguments = make_inputs((2, 6, 150, 16, 2), dtype=torch.float32) | {"reverse": reverse}
    whole, last = selective_scan(**arguments, return_last_state=True)
    parts = [slice(0, 77), slice(77, 150)]
    outs, state = {}, arguments["initial_state"]
    for part in reversed(parts) if reverse else parts:
        cut = {
            name: value[..., part] if name in ("u", "delta", "B", "C", "z") else value
            for name, value in arguments.items()
        }
        cut["initial_state"] = state
        outs[part.start], state = selective_scan(**cut, return_last_state=True)
    joined = torch.cat([outs[part.start] for part in parts], dim=-1)
    assert error(joined, whole.double()) < 1e-6
    assert error(state, last.double()) < 1e-6


def test_reverse_equals_flipping_all_tokens(backend: str):
    arguments = make_inputs((2, 6, 100, 16, 2), dtype=torch.float32)
    flipped = {
        name: value.flip(-1) if name in ("u", "delta", "B", "C", "z") else value
        for name, value in arguments.items()
    }
    expected, expected_last = selective_scan(**flipped, return_last_state=True)
    actual, last = selective_scan(**arguments | {"reverse": True}, return_last_state=True)
    assert error(actual.flip(-1), expected.double()) < 1e-6
    assert error(last, expected_last.double()) < 1e-6


def test_scan_is_linear_in_u(backend: str):
    options = ("D", "z", "delta_bias", "delta_softplus")
    arguments = make_inputs((1, 6, 100, 8, 1), options, torch.float32)
    other = torch.randn_like(arguments["u"])
    one = selective_scan(**arguments)
    two = selective_scan(**arguments | {"u": other})
    both = selective_scan(**arguments | {"u": 2 * arguments["u"] - 3 * other})
    assert error(both, (2 * one - 3 * two).double()) < 2e-6


def test_last_state_alone_has_gradients(backend: str):
    arguments = make_inputs((1, 4, 70, 3, 1), dtype=torch.float32)
    tensors = {k: v.requires_grad_() for k, v in arguments.items() if torch.is_tensor(v)}
    flags = {k: v for k, v in arguments.items() if not torch.is_tensor(v)}
    _, last = selective_scan(**tensors, **flags, return_last_state=True)
    names = ["u", "delta", "A", "B", "initial_state"]
    gradients = torch.autograd.grad(last.square().sum(), [tensors[name] for name in names])
    # h_last = decay * h_first + what the tokens bring, so its slope is the decay over all tokens.
    s = tensors["delta"] + tensors["delta_bias"][:, None]
    total = torch.nn.functional.softplus(s).sum(-1)[..., None]
    decay = torch.exp(total * tensors["A"])
    assert error(gradients[-1], (2 * last * decay).double().detach()) < 1e-5
    assert all(gradient.abs().max() > 0 for gradient in gradients[:-1])


def test_no_tokens_and_no_samples_are_allowed(backend: str):
    for shape in ((2, 4, 0, 3, 1), (0, 4, 5, 3, 1)):
        arguments = make_inputs(shape, dtype=torch.float32)
        results = run(arguments)
        assert results["out"].shape == arguments["u"].shape
        assert torch.equal(results["last_state"], arguments["initial_state"]) or not shape[0]
        assert results["dA"].abs().sum() == 0


def test_unwritten_memory_reaches_no_result(
    backend: str, nan_empty: None, monkeypatch: pytest.MonkeyPatch
):
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *size: object, **options: object) -> Tensor:
        tensor = new_empty(self, *size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", filled)
    for shape in (SHAPES["odd_states"], (1, 2, 70 if is_interpreted(backend) else 700, 4, 2)):
        results = run(make_inputs(shape, dtype=torch.float32))
        assert all(tensor.isfinite().all() for tensor in results.values())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of an interpreted sigmoid
def test_huge_steps_and_values_stay_finite(backend: str):
    arguments = make_inputs((1, 6, 200, 16, 1), dtype=torch.float32)
    arguments["delta"] = arguments["delta"] * 1e3
    arguments["u"] = arguments["u"].sign() * 1e4
    arguments["z"] = arguments["z"] * 1e4
    results = run(arguments)
    assert all(tensor.isfinite().all() for tensor in results.values())


def test_runs_repeat_to_the_bit_with_any_number_of_threads(backend: str, one_thread: None):
    shape = (2, 40, 70, 4, 2) if is_interpreted(backend) else (2, 160, 200, 16, 2)
    arguments = make_inputs(shape, dtype=torch.float32)
    first, again = run(arguments), run(arguments)
    torch.set_num_threads(2)
    threaded = run(arguments)
    different = {
        name
        for name in first
        if not torch.equal(first[name], again[name])
        or (backend == "cpu" and not torch.equal(first[name], threaded[name]))
    }
    assert not different


class TestReportedDefectsOfOtherScans:
    """Faults that users met elsewhere (specs of the scan, section on reported defects)."""

    def test_autocast_changes_nothing(self, backend: str):
        arguments = make_inputs((1, 8, 70, 16, 1), dtype=torch.float32)
        plain = run(arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = run(arguments)
        assert all(torch.equal(plain[name], cast[name]) for name in plain)

    def test_float16_with_large_steps_has_no_nan(self, backend: str):
        arguments = make_inputs((1, 8, 300, 16, 1), dtype=torch.float16)
        arguments["delta"] = arguments["delta"] * 100
        out = selective_scan(**arguments)
        with use_backend("reference"):
            doubles = {k: v.double() if torch.is_tensor(v) else v for k, v in arguments.items()}
            expected = selective_scan(**doubles)
        inside = expected.abs() < 6e4
        assert out[inside].isfinite().all()

    def test_mixed_types_are_promoted(self, backend: str):
        arguments = make_inputs((1, 8, 70, 4, 1), dtype=torch.float32)
        halves = {"u": torch.bfloat16, "B": torch.float16, "A": torch.bfloat16, "D": torch.float16}
        mixed = {k: v.to(halves[k]) if k in halves else v for k, v in arguments.items()}
        results = run(mixed)
        assert results["out"].dtype == torch.float32
        for name, dtype in halves.items():
            assert results[f"d{name}"].dtype == dtype
        rounded = {k: v.float() if torch.is_tensor(v) else v for k, v in mixed.items()}
        assert error(results["out"], selective_scan(**rounded).double()) < 1e-6

    @pytest.mark.parametrize("layout", ["channel_first", "token_first", "sliced", "expanded"])
    def test_any_strides_are_taken(self, backend: str, layout: str):
        arguments = make_inputs((3, 8, 70, 4, 2), dtype=torch.float32)

        def laid_out(x: Tensor) -> Tensor:
            if layout == "channel_first":
                return x.contiguous()
            if layout == "token_first":
                return x.movedim(-1, 0).contiguous().movedim(0, -1)
            if layout == "sliced":
                wider = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
                wider[..., 1::2] = x
                return wider[..., 1::2]
            return x[:1].expand(x.shape) if x.ndim > 2 else x

        strided = {k: laid_out(v) if torch.is_tensor(v) else v for k, v in arguments.items()}
        dense = {k: v.clone(memory_format=torch.contiguous_format) if torch.is_tensor(v) else v
                 for k, v in strided.items()}  # fmt: skip
        tensors = {k: v.detach().requires_grad_() for k, v in strided.items() if torch.is_tensor(v)}
        flags = {k: v for k, v in strided.items() if not torch.is_tensor(v)}
        out = selective_scan(**tensors, **flags)
        upstream = torch.randn(70, 3, 8).permute(1, 2, 0)
        actual = torch.autograd.grad(out, list(tensors.values()), upstream)
        tensors = {k: v.requires_grad_() for k, v in dense.items() if torch.is_tensor(v)}
        expected_out = selective_scan(**tensors, **flags)
        expected = torch.autograd.grad(expected_out, list(tensors.values()), upstream)
        assert error(out.detach(), expected_out.detach().double()) < 1e-6
        for one, two in zip(actual, expected, strict=True):
            assert error(one, two.double()) < 2e-6

    def test_more_than_65535_channels(self, backend: str):
        if is_interpreted(backend):
            pytest.skip("each of its programs is interpreted; they lie on a grid of one axis")
        arguments = make_inputs((1, 65_600, 2, 1, 1), dtype=torch.float32)
        few = {
            name: value[..., -8:, :] if name in ("u", "delta", "z", "initial_state") else value
            for name, value in arguments.items()
        }
        few |= {name: arguments[name][-8:] for name in ("A", "D", "delta_bias")}
        results = run(arguments)
        assert error(results["out"][:, -8:], selective_scan(**few).double()) < 1e-6
        assert results["dA"][-8:].abs().max() > 0

    def test_tokens_beyond_the_end_do_not_decay_the_state(self, backend: str):
        """With softplus a padded token has a step size of its own: softplus(bias), not zero."""
        arguments = make_inputs((1, 4, CHUNK + 3, 4, 1), dtype=torch.float32)
        arguments["delta_bias"] = arguments["delta_bias"] + 3
        padded = {
            name: torch.nn.functional.pad(value, (0, 2 * CHUNK - 3 - CHUNK), value=-1e4)
            if name == "delta"
            else torch.nn.functional.pad(value, (0, 2 * CHUNK - 3 - CHUNK))
            if name in ("u", "B", "C", "z")
            else value
            for name, value in arguments.items()
        }
        _, expected = selective_scan(**padded, return_last_state=True)
        _, actual = selective_scan(**arguments, return_last_state=True)
        assert error(actual, expected.double()) < 1e-6
