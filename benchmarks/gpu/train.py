"""Trains U-Mamba Bot and its control without a scan on a GPU, each for half of the time given.

    python -m benchmarks.gpu.train [--data FOLDER] [--seconds S] [--json FILE]

FOLDER is an nnU-Net raw dataset, as Medical Segmentation Decathlon Task04 (Hippocampus); without it
the synthetic data of `umamba demo` are made. Each row is one `umamba run --minutes M`, so that
planning, preprocessing, training, validation and report are all in the time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.common import ROOT, Results, parse
from benchmarks.hippocampus import dice_of

NETWORKS = ("umamba_bot", "umamba_bot_noscan")
NEEDED = ("nnunetv2", "SimpleITK", "nibabel")
SPARE_SECONDS = 10  # of each run: starting it, and what it may take longer than asked
LEAST_SECONDS = 60 + SPARE_SECONDS  # `umamba run` takes no shorter budget


def main() -> int:
    """Trains both, or says why not; 1 where a training failed."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, metavar="FOLDER", help="an nnU-Net raw dataset")

    args = parse(__doc__ or "", extra)
    results = Results("Training on a dataset", args, columns())
    reason = why_skipped()
    if reason is not None:
        results.note(reason)
        return 0
    with tempfile.TemporaryDirectory(prefix="umamba_gpu_") as folder:
        work = Path(folder)
        dataset = args.data.resolve() if args.data else make_data(work)
        left = results.ends - time.monotonic()
        n_runs = max(0, min(len(NETWORKS), int(left // LEAST_SECONDS)))
        if not n_runs:
            results.note(
                f"Nothing is trained: {max(left, 0):.0f} s are left; a run needs {LEAST_SECONDS}."
            )
            return 0
        minutes = (left / n_runs - SPARE_SECONDS) / 60
        for network in NETWORKS[:n_runs]:
            head = {"network": network, "data": dataset.name}
            kind = args.device.type
            results.add(head, functools.partial(train, network, dataset, work, minutes, kind))
    if n_runs < len(NETWORKS):
        results.note("The control is not trained: time was left for one run only.")
    return int(any("error" in row for row in results.rows))


def why_skipped() -> str | None:
    """None where a network can be trained here, else a sentence."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"Nothing is trained: {', '.join(missing)} missing here." if missing else None


def make_data(work: Path) -> Path:
    """The synthetic dataset."""
    from umamba.data.synthetic import make_demo_dataset

    return make_demo_dataset(work / "Dataset900_Demo")


def train(network: str, dataset: Path, work: Path, minutes: float, device: str) -> dict[str, Any]:
    """One `umamba run` and what came of it."""
    command = run_command(network, dataset, work, minutes, device)
    started = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no output"]
        raise RuntimeError(f"exit code {result.returncode}, {lines[-1]}")
    took = time.monotonic() - started
    (fold,) = (work / "work" / "results").glob(f"*/UMambaTrainer__{network}__*/fold_0")
    training = json.loads((fold / "training.json").read_text())
    kept = ("parameters", "iterations", "trained_seconds", "peak_gib")
    cost = {key: training[key] for key in kept}
    return {"minutes": minutes, "seconds": took} | cost | dice_of(fold)


def run_command(network: str, dataset: Path, work: Path, minutes: float, device: str) -> list[str]:
    """The command that trains a network for so many minutes."""
    command = [sys.executable, "-m", "umamba.cli.main", "run", str(dataset), "--network", network]
    command += ["--minutes", f"{minutes:.2f}", "--plans-name", network, "-device", device]
    command += ["-np", str(min(8, os.cpu_count() or 1))]
    return [*command, "--workspace", str(work / "work"), "--restart"]


def columns() -> dict[str, Callable[[dict[str, Any]], str]]:
    """Heading -> what a row shows there."""
    return {
        "network": lambda row: row["network"],
        "data": lambda row: row["data"],
        "minutes": lambda row: f"{row['minutes']:.1f}",
        "parameters": lambda row: f"{row['parameters'] / 1e6:.2f} M",
        "iterations": lambda row: str(row["iterations"]),
        "trained, s": lambda row: f"{row['trained_seconds']:.0f}",
        "Dice": lambda row: f"{row['validation']['mean']:.3f}",
        "host GiB": lambda row: f"{row['peak_gib']:.2f}",
    }


if __name__ == "__main__":
    sys.exit(main())
