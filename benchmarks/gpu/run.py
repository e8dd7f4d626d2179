"""Runs all parts of the GPU benchmark within a given time, and writes their figures.

    benchmarks/gpu/run.sh [--seconds 540] [--official SOURCES] [--data FOLDER] [--output FOLDER]

Every part is a process of its own with a share of the time that is left; what one does not use goes
to those after it, and one that hangs is ended. Exit code 2 without a GPU, 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import official
from benchmarks.gpu.common import ROOT, device_facts, tidy
from benchmarks.gpu.train import why_skipped

# Part -> its share of the time. Each prints its table before the next begins.
SHARES = {"checks": 34, "scan": 26, "layers": 14, "steps": 22, "train": 32}
GRACE = 20  # seconds that a part may take beyond its share, for its start and its last row
LAST = 8  # seconds kept for writing the results
WAIT = 45  # seconds at most for mamba-ssm, after the parts that do not need it


def main() -> int:
    """Runs the parts in turn."""
    args = parse()
    started = time.monotonic()
    ends = started + args.seconds - LAST
    args.output = args.output.resolve()  # the parts run elsewhere
    args.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="umamba_gpu_") as folder:
        work = Path(folder)
        builds: list[subprocess.Popen[bytes]] = []
        note = "mamba-ssm is not built without a GPU"
        if args.device == "cuda":
            builds, note = official.start_builds(args.official, work / "extensions")
        facts: dict[str, Any] = device_facts(torch.device(args.device))
        tidy(torch.device(args.device))
        print(f"{facts['device']}, torch {facts['torch']}, Triton {facts['triton']}", flush=True)
        if note:
            print(note, flush=True)
        codes: dict[str, int | str] = {}
        try:
            for part, later in in_order(args.parts, builds):
                seconds = share(part, later, ends - time.monotonic())
                codes[part] = run_part(part, args, work, seconds)
        finally:
            for process in builds:
                end(process)
            keep_logs(work / "extensions", args.output)
        name = f"gpu_{facts['device']}".replace(" ", "_").lower()
        name += f"_{datetime.now(UTC):%Y%m%d_%H%M}"
        took = time.monotonic() - started
        write(args.output / name, facts | {"seconds": round(took)}, codes, work)
    return 0 if codes.get("checks") == 0 else 1


def parse() -> Any:
    """The options; exit code 2 in one sentence where there is no GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--seconds", type=float, default=540, help="for everything (540)")
    add("--official", type=Path, metavar="SOURCES", help="archives of mamba-ssm, causal-conv1d")
    add("--data", type=Path, metavar="FOLDER", help="an nnU-Net raw dataset to train on")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results", help="of the results")
    add("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="small sizes: to try the code out")
    add("--backend", help="of our scan (triton; on a CPU chunked)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device here (torch.cuda.is_available() is False)\n")
    if "train" in args.parts and (reason := why_skipped()) is not None:
        print(reason)
        args.parts.remove("train")
    return args


def in_order(
    parts: list[str], builds: list[subprocess.Popen[bytes]]
) -> Iterator[tuple[str, list[str]]]:
    """Each part and those after it; "steps" goes first while what is compared is being built."""
    waiting = [part for part in SHARES if part in parts]
    while waiting:
        part = waiting[0]
        building = any(process.poll() is None for process in builds)
        if part in ("scan", "layers") and building:
            if "steps" in waiting:
                part = "steps"
            else:
                official.wait(builds, WAIT)
        waiting.remove(part)
        yield part, waiting


def share(part: str, later: list[str], left: float) -> float:
    """Seconds for a part, of those left for it and those after it."""
    total = SHARES[part] + sum(SHARES[name] for name in later)
    return max(5.0, (left - GRACE) * SHARES[part] / total)


def run_part(part: str, args: Any, work: Path, seconds: float) -> int | str:
    """The exit code of a part, or what happened to it."""
    command = [sys.executable, "-m", f"benchmarks.gpu.{part}", "--device", args.device]
    command += ["--seconds", f"{seconds:.0f}", "--json", str(work / f"{part}.json")]
    command += ["--tiny"] if args.tiny else []
    command += ["--backend", args.backend] if args.backend else []
    if part in ("scan", "layers"):
        command += ["--extensions", str(work / "extensions")]
    if part == "train" and args.data is not None:
        command += ["--data", str(args.data.resolve())]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        code: int | str = process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        code = f"ended after {seconds + GRACE:.0f} s"
        print(f"\n{part}: {code}", flush=True)
    finally:
        end(process)
    if code not in (0, 1) and not isinstance(code, str):
        code = f"exit code {code}"
        print(f"\n{part}: {code}", flush=True)
    return code


def keep_logs(extensions: Path, output: Path) -> None:
    """Keeps the compiler's output of builds that failed."""
    for failed in extensions.glob("*.failed"):
        log = failed.with_suffix(".log")
        shutil.copy(log, output / log.name)
        print(f"\n{failed.stem}: {failed.read_text().strip()} (see {log.name})", flush=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it started, where they still run."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def write(name: Path, facts: dict[str, Any], codes: dict[str, int | str], work: Path) -> None:
    """The figures of all parts as name.json, and their tables as name.md."""
    from benchmarks.gpu.tables import markdown

    parts = {}
    for part in codes:
        file = work / f"{part}.json"
        parts[part] = {"code": codes[part]}
        if file.is_file():
            parts[part] |= json.loads(file.read_text())
    found = {"facts": facts, "parts": parts}
    name.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    name.with_suffix(".md").write_text(markdown(found))
    print(f"\nwritten: {name}.json and {name}.md after {facts['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
