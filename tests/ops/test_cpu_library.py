"""What is particular to the C library: instruction sets, threads, memory, numbers at the edges."""

from __future__ import annotations

import os
import platform
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scan_cases import OPTIONS, make_inputs
from torch import Tensor

from umamba.ops import cpu, layout
from umamba.ops.sources import digest_sources
from umamba.ops.walks import sequence_walk

REASON = cpu.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

TAILS = (2, 42, 75, 13, 2)  # (B, D, L, N, G): nothing a multiple of anything
windows = pytest.mark.parametrize("window", [0, 8], ids=["plain", "windows"])
SETS = cpu.INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else ("base",)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    library = cpu._load()[0]
    assert library is not None
    if library.umamba_select(request.param.encode()) is None:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.umamba_select(str(cpu.instruction_set()).encode())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [TAILS, (1, 64, 130, 16, 1), (1, 20, 65, 64, 1), (1, 3, 1, 1, 1)])
@pytest.mark.parametrize("options", ["bare", "all", "all_reverse"])
@pytest.mark.parametrize("window", [0, 4, 16, layout.CHUNK])
def test_every_instruction_set_gives_the_gradients_of_float64(
    instruction_set, shape, options, window
):
    inputs = make_inputs(shape, OPTIONS[options], torch.float32) | {"window": window}
    found = forward_backward(inputs)
    expected = in_float64(inputs)
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert error < 5e-6, f"{name}: {error:.1e}"


def test_every_instruction_set_convolves_as_torch_does(instruction_set):
    for taps, reverse in ((4, False), (4, True), (1, False), (3, True), (8, False)):
        x, weight, bias, dout = normal(2, 21, 301), normal(21, taps), normal(21), normal(2, 21, 301)
        leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
        walked = leaves[0].flip(2) if reverse else leaves[0]
        padded = torch.nn.functional.pad(walked, (taps - 1, 0))
        expected = torch.nn.functional.conv1d(padded, leaves[1][:, None], leaves[2], groups=21)
        expected = torch.nn.functional.silu(expected.flip(2) if reverse else expected)
        wanted = torch.autograd.grad(expected, leaves, dout.double())
        out = conv_forward(x, weight, bias, reverse)
        found = conv_backward(dout, x, weight, bias, reverse)
        for a, b in zip((out, *found), (expected.detach(), *wanted), strict=True):
            assert a is not None and (a - b).abs().max() < 3e-6 * b.abs().max()


@pytest.mark.parametrize("shape", [TAILS, (1, 64, 700, 16, 1), (3, 130, 90, 8, 1)])
@windows
def test_results_are_bit_identical_for_any_number_of_threads(threads, shape, window):
    inputs = make_inputs(shape, OPTIONS["all"], torch.float32) | {"window": window}
    results = []
    for n_threads in (1, 2, 3, 7, 1):
        torch.set_num_threads(n_threads)
        x, weight = inputs["u"], normal(shape[1], 4)
        results.append(forward_backward(inputs))
        results[-1]["conv"] = conv_forward(x, weight, None, False)
        for name, value in zip("xw", conv_backward(x, x, weight, None, True), strict=False):
            results[-1]["conv_d" + name] = value
    assert all(torch.equal(r[k], results[0][k]) for r in results[1:] for k in r)


def test_python_threads_may_call_at_once(threads):
    torch.set_num_threads(2)
    inputs = make_inputs((1, 64, 500, 16, 1), OPTIONS["all"], torch.float32)
    expected = forward_backward(inputs)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(10):
            found = forward_backward(inputs)
            wrong.extend(name for name in expected if not torch.equal(found[name], expected[name]))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not wrong
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's list of threads")
def test_a_forked_child_computes_with_threads_of_its_own(threads):
    torch.set_num_threads(2)
    inputs = make_inputs((1, 64, 300, 16, 1), OPTIONS["bare"], torch.float32)
    expected = forward_only(inputs)  # the parent's pool exists now
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            forward_only(inputs)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    codes = []
    for _ in range(8):  # also in the middle of a job
        child = os.fork()
        if child == 0:
            same = torch.equal(forward_only(inputs), expected)
            os._exit(0 if same and len(os.listdir("/proc/self/task")) == 2 else 1)
        codes.append(wait_for(child, seconds=30))
    stop.set()
    busy.join()
    assert codes == [0] * 8


@windows
def test_any_strides_give_the_bits_of_contiguous_tensors(window):
    inputs = make_inputs(TAILS, OPTIONS["all"], torch.float32) | {"window": window}
    expected = forward_backward(inputs)
    for spread in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # channel-last
        lambda x: torch.stack([x, x.flip(-1)], dim=-1)[..., 0],  # every second element
        lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],  # odd rows, not aligned
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],  # a slice of channels
    ):
        strided = {
            name: spread(x) if name in ("u", "delta", "z", "B", "C") else x
            for name, x in inputs.items()
        }
        found = forward_backward(strided)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_results_lie_channel_last_and_token_major():
    found = forward_backward(make_inputs(TAILS, OPTIONS["all"], torch.float32))
    for name in ("out", "du", "ddelta", "dz"):
        assert found[name].transpose(1, 2).is_contiguous()
    for name in ("dB", "dC"):
        assert found[name].transpose(2, 3).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@windows
def test_half_precision_is_float32_rounded_at_the_border(instruction_set, dtype, window):
    inputs = make_inputs(TAILS, OPTIONS["all"], dtype) | {"window": window}
    inputs["u"][0, 0, :3] = torch.tensor([3e-7, -6e-5, 0.0])  # float16: subnormal
    wide = {k: v.float() if torch.is_tensor(v) else v for k, v in inputs.items()}
    found, expected = forward_backward(inputs), forward_backward(wide)
    for name in ("out", "du", "ddelta", "dz", "dB", "dC"):
        assert found[name].dtype == dtype
        assert torch.equal(found[name], expected[name].to(dtype)), name
    assert torch.equal(found["dA"], expected["dA"])


@windows
def test_every_element_of_a_result_is_written(monkeypatch, window):
    inputs = make_inputs(TAILS, OPTIONS["all"], torch.float32) | {"window": window}
    expected = forward_backward(inputs)
    empty = torch.empty

    def poisoned(*size: int, **options: object) -> Tensor:
        return empty(*size, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    found = forward_backward(inputs)
    found["conv"] = conv_forward(inputs["u"], normal(42, 4), None, False)
    for i, gradient in enumerate(
        conv_backward(inputs["u"], inputs["u"], normal(42, 4), normal(42), False)
    ):
        found[f"conv_gradient_{i}"] = gradient
    monkeypatch.undo()
    assert not [name for name, value in found.items() if value.isnan().any()]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@windows
def test_a_nan_is_never_hidden(instruction_set, window):
    for name in ("u", "delta", "z", "B", "A"):
        inputs = make_inputs((1, 20, 70, 4, 1), OPTIONS["all"], torch.float32) | {"window": window}
        inputs[name] = inputs[name].clone()
        inputs[name][(0,) * inputs[name].ndim] = float("nan")
        assert forward_only(inputs)[0, 0, 0].isnan(), name
    x = normal(1, 20, 70)
    x[0, 3, 5] = float("nan")
    assert conv_forward(x, normal(20, 4), None, False)[0, 3, 5:9].isnan().all()


def test_huge_arguments_stay_finite(instruction_set):
    for size in (1e2, 1e6, 1e12, 1e20):
        inputs = make_inputs((1, 20, 70, 4, 1), OPTIONS["bias_softplus"], torch.float32)
        inputs["z"] = inputs["u"] * size
        inputs["delta"] = inputs["delta"].abs() * -size
        assert forward_only(inputs).isfinite().all(), size
        inputs["delta"] = torch.full_like(inputs["delta"], min(size, 1e12))
        inputs["z"] = inputs["z"] / size
        assert forward_only(inputs).isfinite().all(), size


def test_slow_decays_are_not_biased(instruction_set):
    """The state of a constant input tends to 1 / (1 - a): it shows a bias of exp a thousandfold."""
    length, step = 6000, 1e-3
    generator = torch.Generator().manual_seed(0)
    delta = step * (0.5 + torch.rand(1, 4, length, generator=generator))
    ones = torch.ones(1, 1, 1, length)
    u = 1 / delta
    inputs = {"u": u, "delta": delta, "A": -torch.ones(4, 1), "B": ones, "C": ones}
    out = forward_only(inputs | {"delta_softplus": False, "reverse": False})
    h, a, b = torch.zeros(1, 4, dtype=torch.float64), torch.exp(-delta.double()), delta * u
    for t in range(length):
        h = a[..., t] * h + b[..., t]
    assert (out[..., -1] - h).abs().max() < 1e-5 * h.max()


def test_the_host_keeps_its_subnormal_numbers(threads):
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        forward_backward(make_inputs((2, 64, 100, 16, 1), OPTIONS["all"], torch.float32))
        assert torch.tensor(1e-38) * 0.01 != 0
        assert 5e-324 * 1.0 != 0


def test_empty_tensors_pass(threads):
    for batch, length in ((0, 5), (2, 0)):
        inputs = make_inputs((batch, 4, length, 3, 1), OPTIONS["all"], torch.float32)
        found = forward_backward(inputs)
        assert found["out"].shape == (batch, 4, length)
        assert torch.equal(found["last_state"], inputs["initial_state"])
        assert not found["dA"].any()


def test_python_and_c_agree_on_sizes():
    header = (cpu.LIBRARY.parent / "csrc" / "umamba.h").read_text()
    constants = dict(re.findall(r"^#define (\w+) (\d+)", header, re.MULTILINE))
    assert int(constants["CHUNK"]) == layout.CHUNK
    assert int(constants["CONV_SEGMENT"]) == cpu._CONV_SEGMENT


def test_a_missing_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "absent.so")
    assert "install a C compiler" in fresh_reason()
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    monkeypatch.setattr(cpu, "LIBRARY", broken)
    assert "broken.so cannot be loaded" in fresh_reason()


def test_an_unknown_instruction_set_is_explained(monkeypatch):
    monkeypatch.setenv("UMAMBA_CPU_ISA", "v9")
    assert "UMAMBA_CPU_ISA=v9" in fresh_reason()


def test_unsupported_tensors_are_explained():
    device = torch.device("cpu")
    assert cpu.supports(device, torch.float32, 16) is None
    assert "float64" in str(cpu.supports(device, torch.float64, 16))
    assert "65" in str(cpu.supports(device, torch.float32, 65))
    assert "meta" in str(cpu.supports(torch.device("meta"), torch.float32, 16))


def fresh_reason() -> str:
    """The reason that a new process would give."""
    return str(cpu._load.__wrapped__()[1])


def normal(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size)))


def forward_only(inputs: dict) -> Tensor:
    return run_forward(inputs, save_states=False)[0]


NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "initial_state")


def one_direction(inputs: dict) -> list:
    """The arguments of a plain scan as those of a walk's, one direction."""
    values = [inputs.get(name) for name in NAMES]
    of_direction = ("A", "D", "delta_bias")  # without a sample axis in front
    return [
        x.unsqueeze(0 if name in of_direction else 1) if torch.is_tensor(x) else x
        for name, x in zip(NAMES, values, strict=True)
    ]


def run_forward(inputs: dict, save_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    walk = sequence_walk(inputs["u"].shape[2], inputs["reverse"])
    rest = (walk, False, save_states, inputs.get("window", 0))
    out, last, states = cpu.forward(*one_direction(inputs), *rest)
    return out.squeeze(1), last.squeeze(1), states


def forward_backward(inputs: dict) -> dict[str, Tensor]:
    """Output, last state and the gradients, for fixed upstream gradients."""
    out, last, states = run_forward(inputs, save_states=True)
    walk = sequence_walk(inputs["u"].shape[2], inputs["reverse"])
    dout, dlast = (x.unsqueeze(1) for x in upstream(out, last))
    gradients = cpu.backward(
        dout, dlast, *one_direction(inputs), states, walk, inputs.get("window", 0)
    )
    order = [name for name in NAMES if name != "delta_softplus"]
    axis = {"A": 0, "D": 0, "delta_bias": 0}
    found = {
        f"d{name}": g.squeeze(axis.get(name, 1))
        for name, g in zip(order, gradients, strict=True)
        if g is not None
    }
    return {"out": out, "last_state": last, **found}


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    walk = sequence_walk(x.shape[2], reverse)
    each = None if bias is None else bias[None]
    return cpu.conv_forward(x.unsqueeze(1), weight[None], each, walk).squeeze(1)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    walk = sequence_walk(x.shape[2], reverse)
    each = None if bias is None else bias[None]
    leading = (dout.unsqueeze(1), x.unsqueeze(1), weight[None], each)
    dx, dweight, dbias = cpu.conv_backward(*leading, walk)
    return dx.squeeze(1), dweight[0], None if dbias is None else dbias[0]


def upstream(out: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    dout = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
    return dout, torch.randn(last.shape, generator=generator)


def in_float64(inputs: dict) -> dict[str, Tensor]:
    """The definition of the scan, a loop over tokens, with torch's autograd."""
    leaves = {
        k: v.double().detach().requires_grad_() for k, v in inputs.items() if torch.is_tensor(v)
    }
    u, delta, A = leaves["u"], leaves["delta"], leaves["A"]
    repeats = u.shape[1] // leaves["B"].shape[1]
    B, C = (leaves[name].repeat_interleave(repeats, dim=1).unbind(-1) for name in "BC")
    if "delta_bias" in leaves:
        delta = delta + leaves["delta_bias"][:, None]
    if inputs["delta_softplus"]:
        delta = torch.nn.functional.softplus(delta)
    h = leaves.get("initial_state", torch.zeros(*u.shape[:2], A.shape[1], dtype=torch.float64))
    tokens, steps = u.unbind(-1), delta.unbind(-1)
    y = list(tokens)
    order = list(range(len(y)))[:: -1 if inputs["reverse"] else 1]
    decays = [torch.exp(step[..., None] * A) for step in steps]
    inflows = [(d * x)[..., None] * b for d, x, b in zip(steps, tokens, B, strict=True)]
    for t in order:
        h = decays[t] * h + inflows[t]
        y[t] = (h * C[t]).sum(-1)
    size = inputs.get("window", 0)
    for start in range(0, len(y), size) if size else ():
        back = torch.zeros_like(h)
        for t in reversed(order[start : start + size]):
            y[t] = y[t] + (decays[t] * back * C[t]).sum(-1)
            back = decays[t] * back + inflows[t]
    out = torch.stack(y, -1)
    if "D" in leaves:
        out = out + leaves["D"][:, None] * u
    if "z" in leaves:
        out = out * torch.nn.functional.silu(leaves["z"])
    dout, dlast = upstream(out.detach().float(), h.detach().float())
    loss = (out * dout.double()).sum() + (h * dlast.double()).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "last_state": h.detach(), **named}


def wait_for(child: int, seconds: float) -> int | None:
    """The exit code of a child process; None (and its end) if it hangs."""
    waited = threading.Event()
    for _ in range(int(seconds * 20)):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        waited.wait(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def test_a_library_of_other_sources_is_not_called(monkeypatch, tmp_path):
    """The fields of a call may have changed since: it would answer with wrong numbers."""
    changed = tmp_path / "csrc"
    shutil.copytree(cpu.LIBRARY.with_name("csrc"), changed)
    assert digest_sources(changed) == digest_sources(cpu.LIBRARY.with_name("csrc"))
    with (changed / "umamba.h").open("a") as header:
        header.write("/* another field */\n")
    monkeypatch.setattr(cpu, "digest_sources", lambda folder: digest_sources(changed))
    library, reason, _ = cpu._load.__wrapped__()
    assert library is None
    assert "other sources" in str(reason) and "pip install" in str(reason)
