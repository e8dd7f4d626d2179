"""Trains every registered network and its control without a scan on one machine for equal times.

    python benchmarks/networks.py DATASET --work FOLDER [--rows NAME ...] [--minutes M]
                                  [--threads N] [--matched] [--json FILE]

DATASET is an nnU-Net raw folder. Each row is one `umamba run --minutes M` in a process of its own,
fold 0, in the configuration 3d_fullres, or 2d for networks that have no 3D form. Finished rows are
kept in FOLDER/rows and skipped when the command is given again, so it may be stopped at any time
and several may run side by side with other rows. A row whose run fails keeps the error and is tried
again. With `--matched` each row NAME is, instead, NAME's network without its scan, trained with the
plan and for as many iterations as the finished row NAME: what the Mamba layers do at equal
iterations, not at equal time. CPU seconds are those of the process tree, peak memory that of
the training process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from hippocampus import dice_of, timed

from umamba.networks import get_entry, list_networks


def default_rows() -> list[str]:
    """Every network, each followed by its `_noscan` control where it has one."""
    names = list_networks()
    rows = []
    for name in list_networks(controls=False):
        rows += [each for each in (name, f"{name}_noscan") if each in names]
    return rows


def run_row(network: str, dataset: Path, work: Path, minutes: float, threads: int) -> dict:
    """One `umamba run` and what came of it; `error` instead of figures where it failed."""
    configuration = configuration_of(network)
    name = plans_name(network, minutes, threads)
    row = {"network": network, "configuration": configuration, "minutes": minutes}
    command = [sys.executable, "-m", "umamba.cli.main", "run", str(dataset), "--network", network]
    command += ["-c", configuration, "--minutes", f"{minutes:g}", "--workspace", str(work)]
    command += ["--plans-name", name, "-t", str(threads), "--restart"]
    return row | outcome(command, work, name, configuration) | {"threads": threads}


def run_matched(network: str, dataset: Path, work: Path, minutes: float, threads: int) -> dict:
    """`umamba train` of a finished row's plan and iterations with `mixer="none"`."""
    configuration, name = configuration_of(network), plans_name(network, minutes, threads)
    (file,) = (work / "preprocessed").glob(f"*/{name}.json")
    (fold,) = (work / "results").glob(f"*/UMambaTrainer__{name}__{configuration}/fold_0")
    iterations = json.loads((fold / "training.json").read_text())["iterations"]
    plans = json.loads(file.read_text())
    part = plans["configurations"][configuration]
    part["architecture"]["arch_kwargs"]["mixer"] = "none"
    del part["recipe"]["train_seconds"]
    part["recipe"]["num_iterations_per_epoch"] = round(iterations / part["recipe"]["num_epochs"])
    plans["plans_name"] = f"{name}_matched"
    file.with_name(f"{name}_matched.json").write_text(json.dumps(plans, indent=1))
    row = {"network": f"{network}_noscan", "configuration": configuration, "minutes": minutes}
    command = [sys.executable, "-m", "umamba.cli.main", "train", str(dataset), configuration, "0"]
    command += ["-p", f"{name}_matched", "--workspace", str(work), "-t", str(threads), "--restart"]
    found = outcome(command, work, f"{name}_matched", configuration)
    return row | {"matched_to": network} | found | {"threads": threads}


def configuration_of(network: str) -> str:
    """3d_fullres, or 2d for a network without a 3D form."""
    return "3d_fullres" if 3 in get_entry(network).spatial_dims else "2d"


def plans_name(network: str, minutes: float, threads: int) -> str:
    """Of a row's plans."""
    return f"{network}_{minutes:g}min_{threads}t".replace(".", "p")


def outcome(command: list[str], work: Path, name: str, configuration: str) -> dict:
    """Runs a command; its cost, size and Dice, or `error`."""
    try:
        figures = timed(command, {})
    except subprocess.CalledProcessError as error:
        return {"error": f"exit code {error.returncode}"}
    (fold,) = (work / "results").glob(f"*/UMambaTrainer__{name}__{configuration}/fold_0")
    training = json.loads((fold / "training.json").read_text())
    plan = json.loads((fold.parent / "plans.json").read_text())["configurations"][configuration]
    chosen = {key: plan[key] for key in ("patch_size", "batch_size")}
    chosen["features_per_stage"] = plan["architecture"]["arch_kwargs"].get("features_per_stage")
    cost = {key: training[key] for key in ("parameters", "iterations", "peak_gib")}
    return figures | cost | chosen | dice_of(fold)


def table(rows: list[dict]) -> str:
    """Markdown: network, configuration, parameters, iterations, Dice, CPU seconds, peak memory."""
    lines = ["| network | configuration | minutes | parameters | iterations | Dice | CPU-s | GiB |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        minutes = f"{row['minutes']:g}"
        given = f"plan of {row['matched_to']}" if "matched_to" in row else minutes
        head = f"| `{row['network']}` | {row['configuration']} | {given} | "
        if "error" in row:
            lines.append(head + f"failed: {row['error']} | | | | |")
            continue
        dice = row["validation"]
        shown = f"{dice['mean']:.3f} ({', '.join(f'{v:.3f}' for v in dice['per_class'].values())})"
        lines.append(
            head + f"{row['parameters'] / 1e6:.2f} M | {row['iterations']} | {shown} | "
            f"{row['cpu_seconds']:.0f} | {row['peak_gib']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs what is not finished yet; prints the table of all rows and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=list_networks(), default=default_rows())
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--matched", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dataset, work = args.dataset.resolve(), args.work.resolve()
    folder = work / "rows"
    folder.mkdir(parents=True, exist_ok=True)
    run, suffix = (run_matched, "_matched") if args.matched else (run_row, "")
    for network in args.rows:
        file = folder / f"{plans_name(network, args.minutes, args.threads)}{suffix}.json"
        if file.is_file() and "error" not in json.loads(file.read_text()):
            continue
        row = run(network, dataset, work, args.minutes, args.threads)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(row, indent=1) + "\n")
        os.replace(temporary, file)
        print(json.dumps(row), flush=True)
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    rows.sort(key=lambda row: (row["minutes"], row["network"], "matched_to" in row))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
