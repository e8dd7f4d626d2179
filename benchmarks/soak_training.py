"""Kills a training at random moments until it is through, and compares it with one in one piece.

    python benchmarks/soak_training.py --work FOLDER [--kills N] [--epochs N] [--workers N]
    [--json FILE]

A synthetic dataset, a small U-Mamba, on the CPU, `umamba train` with a seed.  The training that is
killed (SIGKILL to the command alone: its loading processes have to end by themselves) is started
again by the same command.  Exits 1 unless progress, curves, optimizer and weights agree bit for
bit and no process is left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

TIMES = ("elapsed_s", "epoch_s")


def prepare(work: Path, n_epochs: int) -> None:
    """The dataset, planned and preprocessed, with a short schedule in the plans."""
    from umamba.data.synthetic import make_demo_dataset
    from umamba.planning.plans import load_plans, replan, save_plans

    make_demo_dataset(work / "Dataset900_Demo", n_train=6, n_test=0)
    umamba(work, "straight", "plan", "Dataset900_Demo", "-c", "3d_fullres", "--memory", "2").wait()
    (file,) = work.glob("straight/preprocessed/*/umamba_bot.json")
    recipe = {"seed": 0, "num_epochs": n_epochs, "num_iterations_per_epoch": 4}
    recipe |= {"num_val_iterations_per_epoch": 1}
    small = {"patch_size": [16, 32, 32], "batch_size": 2, "features_per_stage": [4, 8, 8]}
    save_plans(replan(load_plans(file), "3d_fullres", recipe=recipe, **small), file)


def umamba(work: Path, name: str, command: str, dataset: str, *options: str) -> subprocess.Popen:
    """A command on a workspace of that name; in a session of its own."""
    words = [sys.executable, "-m", "umamba.cli.main", command, str(work / dataset), *options]
    words += ["--workspace", str(work / name)]
    with open(work / f"{name}.log", "a") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def train(work: Path, name: str) -> subprocess.Popen:
    return umamba(work, name, "train", "Dataset900_Demo", "3d_fullres", "0", "-device", "cpu")


def outcome(work: Path, name: str) -> dict:
    """All that a training leaves but for times."""
    (fold,) = work.glob(f"{name}/results/*/*/fold_0")
    lines = [json.loads(line) for line in (fold / "progress.jsonl").read_text().splitlines()]
    content = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    curves = {k: repr(v) for k, v in content["logging"].items() if "timestamps" not in k}
    progress = [repr({k: v for k, v in line.items() if k not in TIMES}) for line in lines]
    return {
        "progress": progress,
        "curves": curves,
        "weights": {k: v.numpy().tobytes() for k, v in content["network_weights"].items()},
        "optimizer": {
            (k, name): value.numpy().tobytes()
            for k, state in content["optimizer_state"]["state"].items()
            for name, value in state.items()
        },
    }


def left_behind(session: int) -> list[int]:
    """Processes of that session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=110)
    parser.add_argument("--workers", default="2", help="loading processes")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    work = args.work.absolute()
    os.environ |= {"nnUNet_n_proc_DA": args.workers, "PYTHONUNBUFFERED": "1"}
    prepare(work, args.epochs)
    subprocess.run(["cp", "-r", work / "straight", work / "killed"], check=True)
    started = time.monotonic()
    if train(work, "straight").wait() != 0:
        raise SystemExit(f"the training in one piece failed: {work / 'straight.log'}")
    seconds = time.monotonic() - started
    chance, moments, orphans = random.Random(0), [], 0
    while len(moments) < args.kills:
        process = train(work, "killed")
        moment = chance.uniform(0, 0.9 * seconds)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            moments.append(round(moment, 1))
            time.sleep(10)
            orphans += len(left_behind(process.pid))
        else:
            if process.returncode != 0:
                raise SystemExit(f"a resumed training failed: {work / 'killed.log'}")
            if len(moments) < args.kills:  # it came through: from the start again
                check(work)
                (fold,) = work.glob("killed/results/*/*/fold_0")
                subprocess.run(["rm", "-r", fold], check=True)
    if train(work, "killed").wait() != 0:
        raise SystemExit(f"a resumed training failed: {work / 'killed.log'}")
    check(work)
    figures = {"kills": len(moments), "moments_s": moments, "seconds_in_one_piece": seconds}
    print(f"{len(moments)} kills: equal to one piece bit for bit, {orphans} processes left behind")
    if args.json:
        args.json.write_text(json.dumps(figures | {"orphans": orphans}, indent=1) + "\n")
    return int(orphans > 0)


def check(work: Path) -> None:
    """Ends this process where the two trainings differ."""
    one, other = (outcome(work, name) for name in ("straight", "killed"))
    if different := [key for key in one if one[key] != other[key]]:
        raise SystemExit(f"the killed training differs in {', '.join(different)}")


if __name__ == "__main__":
    sys.exit(main())
