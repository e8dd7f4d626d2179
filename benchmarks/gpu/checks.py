"""Whether the scan is right on this GPU: our own checks against float64, then the GPU tests.

    python -m benchmarks.gpu.checks [--json FILE] [--device cpu --tiny]

The tests are those of tests/ops marked `gpu`, then those marked `triton`, which take the GPU where
there is one; where pytest is missing, the own checks stand alone. Exit code 1 if anything fails, or
if the GPU tests did not run on Triton though there is a GPU; tests that do not finish do not fail.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.common import ROOT, Results, parse
from umamba.ops.dispatch import find_backend, use_backend
from umamba.ops.selective_scan import selective_scan
from umamba.ops.self_check import TOLERANCE, make_inputs, scan_errors

SIZES = ((20, 150), (64, 1000), (34, 1025))  # channels, tokens
# Marks of tests -> the part of the time left that they may take.
TESTS = {"gpu": 0.7, "triton and not gpu": 1.0}
WORKERS = 6  # pytest processes: compiling kernels takes most of the time
LONG = (2, 96, 70_000)  # batch, channels, tokens: several segments of any design


def main() -> int:
    """Runs all checks; 1 if one fails."""
    args = parse(__doc__ or "")
    results = Results("Checks", args, columns())
    reason = find_backend(args.backend).why_unavailable()
    if reason is not None:
        results.note(f"The backend {args.backend} cannot be used: {reason}.")
        return 1
    for channels, length in SIZES[:1] if args.tiny else SIZES:
        name = f"error against float64, {channels} channels, {length} tokens"
        check = functools.partial(check_errors, args.backend, args.device, channels, length)
        results.add({"check": name}, check)
    size = (1, 8, 100) if args.tiny else LONG
    repeat = functools.partial(check_repeats, args.backend, args.device, size)
    results.add({"check": f"two runs equal to the bit, {size}"}, repeat)
    for marks, part in TESTS.items():
        seconds = part * (results.ends - time.monotonic())
        tests = functools.partial(run_tests, marks, args.device, seconds)
        results.add({"check": f"pytest tests/ops -m '{marks}'"}, tests)
    return int(any(row.get("passed", False) is False for row in results.rows))


def check_errors(backend: str, device: torch.device, channels: int, length: int) -> dict[str, Any]:
    """The largest error of outputs and gradients, and whether all are within the tolerance."""
    errors = scan_errors(backend, device, channels=channels, length=length)
    worst = max(errors, key=errors.__getitem__)
    passed = errors[worst] < TOLERANCE
    return {"passed": passed, "found": f"{errors[worst]:.1e} ({worst})", "errors": errors}


def check_repeats(backend: str, device: torch.device, size: tuple[int, ...]) -> dict[str, Any]:
    """Whether output and gradients of two runs are the same bits."""
    batch, channels, length = size
    inputs = make_inputs(batch, channels, length, 16, groups=2, dtype=torch.float32)
    tensors: dict[str, Any] = {
        name: x.to(device).requires_grad_()
        for name, x in inputs.items()
        if not name.startswith("conv")
    }

    def run() -> list[torch.Tensor]:
        out = selective_scan(**tensors, delta_softplus=True)
        return [out, *torch.autograd.grad(out.square().sum(), list(tensors.values()))]

    with use_backend(backend):
        pairs = zip(("output", *tensors), run(), run(), strict=True)
        different = [name for name, one, two in pairs if not torch.equal(one, two)]
    return {"passed": not different, "found": ", ".join(different) or "equal"}


def run_tests(marks: str, device: torch.device, seconds: float) -> dict[str, Any]:
    """The tests in a process of their own: how many passed, failed, were skipped, and why."""
    if device.type != "cuda":
        return {"passed": True, "found": "not run: there is no GPU"}
    if importlib.util.find_spec("pytest") is None:
        return {"passed": True, "found": "not run: pytest is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        # Another torch, Triton or pytest than ours may warn, which would be an error there.
        options = ["-m", marks, "-q", "-W", "default", "-o", "addopts=", "-p", "no:cacheprovider"]
        if importlib.util.find_spec("xdist") is not None:
            options += ["-n", str(WORKERS)]
        command = [sys.executable, "-m", "pytest", "tests/ops", *options, f"--junitxml={report}"]
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False,
                timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"passed": None, "found": f"not finished after {seconds:.0f} s"}
        lines = (done.stdout or done.stderr).splitlines() or ["no output"]
        print("\n".join(lines[-25:]) if done.returncode else lines[-1], flush=True)
        if not report.is_file():
            return {"passed": False, "found": lines[-1][:200]}
        return read_report(report, needs_triton=marks == "gpu")


def read_report(report: Path, *, needs_triton: bool) -> dict[str, Any]:
    """What a JUnit report says.

    needs_triton: failed, too, where no test ran or one was skipped for want of Triton.
    """
    cases = list(xml.etree.ElementTree.parse(report).getroot().iter("testcase"))
    failed, skipped = [], []
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        reason = case.find("skipped")
        if reason is not None:
            skipped.append(reason.get("message") or "")
    without_triton = needs_triton and any("triton" in reason.lower() for reason in skipped)
    counts = f"{len(cases) - len(failed) - len(skipped)} passed, {len(failed)} failed, "
    counts += f"{len(skipped)} skipped"
    if len(cases) == len(skipped):
        counts += ": nothing ran"
    if without_triton:
        counts += ": Triton was skipped"
    passed = not failed and not without_triton
    passed = passed and (len(cases) > len(skipped) or not needs_triton)
    return {"passed": passed, "found": counts, "failed": failed, "skipped": sorted(set(skipped))}


def columns() -> dict[str, Callable[[dict[str, Any]], str]]:
    """Heading -> what a row shows there."""
    return {
        "check": lambda row: row["check"],
        "passed": lambda row: {True: "yes", False: "NO", None: "not finished"}[row["passed"]],
        "found": lambda row: row["found"],
    }


if __name__ == "__main__":
    sys.exit(main())
