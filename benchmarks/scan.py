"""The selective scan on a CPU: time, memory, error and repeatability, after its tests have passed.

    python benchmarks/scan.py [--shapes 1,64,16384 ...] [--repeats 20] [--json FILE]

Times are CPU time of the process on one thread, the shortest of the repeats, in ns per (b,d,l,n),
for 16 states, channel-last tensors and all options. Every figure of a row comes from one process,
the backends in turn; freed memory is kept, as in the commands, so that no call pays for new pages.
The table is printed only if `pytest tests/ops` passes.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umamba.cli.main import keep_freed_memory
from umamba.ops import cpu
from umamba.ops.dispatch import use_backend
from umamba.ops.local_scan import local_scan
from umamba.ops.selective_scan import selective_scan
from umamba.ops.self_check import make_inputs, scan_errors
from umamba.ops.walks import sequence_walk

N_STATES = 16
SHAPES = ((1, 64, 16384), (1, 384, 1024), (2, 768, 1024))
MEMORY_SHAPE = (1, 64, 65536)
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Runs the tests, then measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="B,D,L", help="default: three of the goals")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-memory-of", metavar="BACKEND", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_memory_of:
        print(peak_memory(args.peak_memory_of))
        return 0
    if not tests_pass():
        print("The tests of the operators fail: no figures.", file=sys.stderr)
        return 1
    shapes = [tuple(map(int, s.split(","))) for s in args.shapes] if args.shapes else list(SHAPES)
    backends = ["cpu", "chunked"]
    reason = cpu.why_unavailable()
    if reason is not None:
        print(f"without the C library ({reason})", file=sys.stderr)
        backends.remove("cpu")
    keep_freed_memory()
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "instruction_set": cpu.instruction_set(),
        "n_states": N_STATES,
        "rows": [measure(shape, backends, args.repeats) for shape in shapes],
        "local": [local_times(shape, backends, args.repeats) for shape in shapes],
        "backends": {name: properties(name) for name in backends},
    }
    print(table(facts))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


def tests_pass() -> bool:
    """Whether `pytest tests/ops` passes in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout.splitlines()[-1] if result.stdout else result.stderr, file=sys.stderr)
    return result.returncode == 0


def measure(shape: tuple[int, ...], backends: list[str], repeats: int) -> dict[str, Any]:
    """The times of one shape, in ns per (b,d,l,n), on one thread."""
    torch.set_num_threads(1)
    batch, channels, length = shape
    size = batch * channels * length * N_STATES
    inputs = make_inputs(batch, channels, length, N_STATES, dtype=torch.float32)
    row: dict[str, Any] = {"shape": list(shape)}
    for name in backends:
        count = repeats if name == "cpu" else max(2, repeats // 7)
        with use_backend(name):
            calls = backend_calls(inputs, torch.randn_like(inputs["u"]))
            seconds = {what: cpu_seconds(call, count) for what, call in calls.items()}
        row[name] = {what: second / size * 1e9 for what, second in seconds.items()}
    return row


def backend_calls(inputs: dict[str, Tensor], dout: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward of the scan, without initial state, and of the convolution."""
    u, delta, B, C, z, dout = (
        x.unsqueeze(1) for x in (*(inputs[name] for name in ("u", "delta", "B", "C", "z")), dout)
    )
    A, D, delta_bias, weight, bias = (
        inputs[name].unsqueeze(0) for name in ("A", "D", "delta_bias", "conv_weight", "conv_bias")
    )
    walk = sequence_walk(u.shape[-1])
    leading = (u, delta, A, B, C, D, z, delta_bias, True, None)
    scan = torch.ops.umamba
    _, _, states = scan.selective_scan_fwd(*leading, walk, False, True, 0)
    return {
        "forward": lambda: scan.selective_scan_fwd(*leading, walk, False, True, 0),
        "backward": lambda: scan.selective_scan_bwd(dout, None, *leading, states, walk, 0),
        "conv_forward": lambda: scan.causal_conv1d_silu(u, weight, bias, walk),
        "conv_backward": lambda: scan.causal_conv1d_silu_bwd(dout, u, weight, bias, walk),
    }


def local_times(shape: tuple[int, ...], backends: list[str], repeats: int) -> dict[str, Any]:
    """The times of forward, and of forward with backward, by the public functions, as in measure.

    Of the locally bidirectional scan in windows of 16 tokens on every backend; on the first also of
    a plain scan and of the sum of two, one in each direction.
    """
    torch.set_num_threads(1)
    batch, channels, length = shape
    size = batch * channels * length * N_STATES
    inputs = make_inputs(batch, channels, length, N_STATES, dtype=torch.float32)
    tensors: dict[str, Any] = {
        name: x.requires_grad_()
        for name, x in inputs.items()
        if name != "initial_state" and not name.startswith("conv")
    }
    upstream = torch.randn_like(inputs["u"]).detach()

    def plain(reverse: bool = False) -> Tensor:
        return selective_scan(**tensors, delta_softplus=True, reverse=reverse)

    def local() -> Tensor:
        return local_scan(**tensors, delta_softplus=True, window=16)

    ways: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "one plain": (backends[0], plain),
        "two plain": (backends[0], lambda: plain() + plain(reverse=True)),
        **{f"local, {name}": (name, local) for name in backends},
    }
    row: dict[str, Any] = {"shape": list(shape)}
    for what, (backend, scan) in ways.items():
        count = repeats if backend == "cpu" else max(2, repeats // 7)
        with use_backend(backend):
            both = functools.partial(with_backward, scan, list(tensors.values()), upstream)
            times = [
                cpu_seconds(call, count) / size * 1e9 for call in (torch.no_grad()(scan), both)
            ]
        row[what] = dict(zip(("forward", "both"), times, strict=True))
    return row


def with_backward(scan: Callable[[], Tensor], tensors: list[Tensor], upstream: Tensor) -> None:
    """Runs a scan and the gradients of all its tensors."""
    torch.autograd.grad(scan(), tensors, upstream)


def cpu_seconds(call: Callable[[], object], repeats: int) -> float:
    """The least CPU time of the process for one call, after a call that touches the memory."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times[1:])


def properties(name: str) -> dict[str, Any]:
    """Error, memory and repeatability of a backend."""
    errors = scan_errors(name, torch.device("cpu"), channels=64, length=1000)
    worst = max(errors, key=errors.__getitem__)
    command = [sys.executable, __file__, "--peak-memory-of", name]
    peak = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    one, again, two = (gradients(name, n_threads) for n_threads in (1, 1, 2))
    return {
        "worst_error": errors[worst],
        "worst_tensor": worst,
        "peak_in_state_tensors": float(peak),
        "identical_runs": all(map(torch.equal, one, again)),
        "identical_one_and_two_threads": all(map(torch.equal, one, two)),
    }


def gradients(name: str, n_threads: int) -> list[Tensor]:
    """The output and all gradients of one scan."""
    torch.set_num_threads(n_threads)
    inputs = make_inputs(2, 96, 1000, N_STATES, groups=2, dtype=torch.float32)
    tensors = {k: x.requires_grad_() for k, x in inputs.items() if not k.startswith("conv")}
    arguments: dict[str, Any] = tensors
    with use_backend(name):
        out = selective_scan(**arguments, delta_softplus=True)
        found = torch.autograd.grad(out.square().sum(), list(tensors.values()))
    return [out.detach(), *found]


def peak_memory(name: str) -> float:
    """Peak of forward and backward above the inputs, in (B, D, L, N) float32 tensors.

    Runs in a process of its own; Linux only (the peak is reset through /proc).
    """
    torch.set_num_threads(1)
    batch, channels, length = MEMORY_SHAPE
    small = make_inputs(1, 16, 128, N_STATES, dtype=torch.float32)
    inputs = make_inputs(batch, channels, length, N_STATES, dtype=torch.float32)

    def both(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
        tensors = {k: x.requires_grad_() for k, x in given.items() if not k.startswith("conv")}
        arguments: dict[str, Any] = tensors
        out = selective_scan(**arguments, delta_softplus=True)
        return out, *torch.autograd.grad([out], list(tensors.values()), [tensors["u"].detach()])

    with use_backend(name):
        both(small)
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        kept = both(inputs)
        peak = status("VmHWM") - before
    del kept
    return peak / (4 * batch * channels * length * N_STATES)


def status(field: str) -> int:
    """Bytes of one entry of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def table(facts: dict[str, Any]) -> str:
    """The figures as text."""
    columns = ("forward", "backward", "conv_forward", "conv_backward")
    lines = [f"{'B,D,L':<14} {'backend':<8}" + "".join(f"{c:>15}" for c in columns) + "   ns"]
    for row in facts["rows"]:
        names = [name for name in facts["backends"] if name in row]
        shape = ",".join(map(str, row["shape"]))
        for name in names:
            values = "".join(f"{row[name][column]:15.3f}" for column in columns)
            lines.append(f"{shape:<14} {name:<8}{values}")
        if len(names) == 2:
            fast, slow = (row[name] for name in names)
            both = [times["forward"] + times["backward"] for times in (slow, fast)]
            lines.append(
                f"{'':<14} chunked / library: forward {slow['forward'] / fast['forward']:.1f}, "
                f"forward and backward {both[0] / both[1]:.1f}; "
                f"conv / scan: {fast['conv_forward'] / fast['forward']:.2f} forward, "
                f"{fast['conv_backward'] / fast['backward']:.2f} backward"
            )
    for row in facts["local"]:
        lines.append(f"{','.join(map(str, row['shape'])):<14} locally bidirectional, by autograd:")
        for what, times in row.items():
            if what != "shape":
                ratio = [f"{times[k] / row['one plain'][k]:.2f}" for k in ("forward", "both")]
                lines.append(
                    f"{'':<14} {what:<15} forward {times['forward']:.3f} ns, with backward "
                    f"{times['both']:.3f} ns; {' and '.join(ratio)} times the plain scan"
                )
    for name, found in facts["backends"].items():
        lines.append(
            f"{name:<8} largest error {found['worst_error']:.1e} ({found['worst_tensor']}), "
            f"peak memory {found['peak_in_state_tensors']:.2f} state tensors, identical runs: "
            f"{found['identical_runs']}, one and two threads: "
            f"{found['identical_one_and_two_threads']}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
