"""Kills preprocessing, training and prediction at random moments, and compares what they end with.

    python benchmarks/soak.py [--kills 20] [--seed 0] [--parts preprocess train predict]
                              [--work FOLDER] [--json FILE]

Each command runs once in one piece. Then it is started, killed (SIGKILL, to the command alone: its
children have to end by themselves) at a random moment of its work and started again until it is
through; a command that got through before all kills were spent starts anew. A table of kills,
orphans (processes left 10 s after a kill), half-written files (hidden files at the end) and
differences is printed; the exit code is 1 unless the last three are zero everywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK
import torch

TIMES = ("elapsed_s", "epoch_s")
N_EPOCHS = 110  # checkpoints are saved at epochs 50 and 100, and every two minutes
DATASET = "Dataset900_Demo"
ORPHAN_SECONDS = 10.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each part (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument(
        "--cases", type=int, default=8, help="to train with (at least 5), and to predict"
    )
    parser.add_argument("--work", type=Path, help="keep everything in this folder")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        prepare(work, args.cases, N_EPOCHS if "train" in args.parts else 5)
        moments = random.Random(args.seed)
        rows = {part: soak(work, part, args.kills, moments) for part in args.parts}
    print("| part | kills | runs to the end | orphans | half-written files | differences |")
    print("|---|---|---|---|---|---|")
    for part, row in rows.items():
        print(f"| {part} | {' | '.join(str(row[key]) for key in row if key != 'straight_s')} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = ("orphans", "half_written", "differences")
    return int(any(row[key] for row in rows.values() for key in bad))


def prepare(work: Path, n_cases: int, n_epochs: int) -> None:
    """The dataset, and a workspace that is planned and preprocessed, its schedule short."""
    from umamba.data.synthetic import make_demo_dataset
    from umamba.planning.plans import load_plans, replan, save_plans

    make_demo_dataset(work / DATASET, n_train=n_cases, n_test=n_cases)
    run_to_end(work, command(work, "preprocess", work / "planned"))
    (file,) = (work / "planned").glob("preprocessed/*/umamba_bot.json")
    recipe = {"seed": 0, "num_epochs": n_epochs, "num_iterations_per_epoch": 4}
    recipe |= {"num_val_iterations_per_epoch": 1}
    small = {"patch_size": [16, 32, 32], "batch_size": 2, "features_per_stage": [4, 8, 8]}
    save_plans(replan(load_plans(file), "3d_fullres", recipe=recipe, **small), file)


def soak(work: Path, part: str, n_kills: int, moments: random.Random) -> dict[str, Any]:
    """Kills, runs, orphans, half-written files and differences of one part."""
    straight, killed = work / f"{part}_straight", work / f"{part}_killed"
    begin(work, part, straight)
    began, started = time.time(), time.monotonic()
    run_to_end(work, command(work, part, straight))
    lasted = time.monotonic() - started
    times = [p.stat().st_mtime for p in straight.rglob("*") if p.is_file()]
    first = max(0.0, min((t for t in times if t > began), default=began) - began)
    expected = PARTS[part](straight)
    row = dict.fromkeys(("kills", "runs", "orphans", "half_written", "differences"), 0)
    while row["kills"] < n_kills:
        shutil.rmtree(killed, ignore_errors=True)
        begin(work, part, killed)
        ended_in = 0.0
        while True:
            process, started = start(work, command(work, part, killed)), time.monotonic()
            try:
                if row["kills"] == n_kills:
                    process.wait()
                else:
                    process.wait(moments.uniform(min(0.8 * first, lasted / 2), lasted))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                ended_in += time.monotonic() - started
                row["kills"] += 1
                row["orphans"] += count_orphans(process.pid)
                continue
            if process.returncode:
                raise SystemExit((work / "log.txt").read_text()[-2000:])
            break
        # On a machine that is less busy than at first, moments of the first run would be too late.
        lasted = min(lasted, ended_in + time.monotonic() - started)
        row["runs"] += 1
        row["half_written"] += sum(p.name.startswith(".") for p in killed.rglob("*"))
        row["differences"] += differences(expected, PARTS[part](killed))
        print(f"{part}: {row}", flush=True)
    return row | {"straight_s": round(lasted, 1)}


def begin(work: Path, part: str, folder: Path) -> None:
    """What a part starts from: nothing, a planned workspace, or a trained one."""
    folder.mkdir(parents=True)
    if part == "train":
        shutil.copytree(work / "planned", folder, dirs_exist_ok=True, symlinks=True)
    elif part == "predict" and not any((work / "planned").glob("results/*/*/*/*_final.pth")):
        run_to_end(work, command(work, "train", work / "planned"))


def command(work: Path, part: str, folder: Path) -> list[str]:
    if part == "predict":
        (model,) = (work / "planned").glob("results/*/*")
        words = ["predict", "-m", model, "-i", work / DATASET / "imagesTs", "-o", folder]
        words += ["--continue", "--npz", "-device", "cpu", "--disable_tta"]
    elif part == "train":
        words = [
            "train",
            work / DATASET,
            "3d_fullres",
            "0",
            "-device",
            "cpu",
            "--workspace",
            folder,
        ]
    else:
        words = ["plan", work / DATASET, "-c", "3d_fullres", "--memory", "2", "--workspace", folder]
    return [sys.executable, "-m", "umamba.cli.main", *map(str, words)]


def start(work: Path, words: list[str]) -> subprocess.Popen:
    """The command in a session of its own, by which its descendants are found."""
    with open(work / "log.txt", "a") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def run_to_end(work: Path, words: list[str]) -> None:
    if start(work, words).wait():
        raise SystemExit((work / "log.txt").read_text()[-2000:])


def count_orphans(session: int) -> int:
    """Processes of a session that are alive 10 s after its leader was killed; they are ended."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while (left := members(session)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        os.kill(process, signal.SIGKILL)
    return len(left)


def members(session: int) -> list[int]:
    """Processes of a session that are no zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(folder.name))
    return found


def preprocessed(folder: Path) -> dict[str, Any]:
    """The arrays, their properties, plans and fingerprint."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("preprocessed/**/*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".b2nd":
            found[name] = blosc2.open(urlpath=str(file), mode="r")[:]
        elif file.suffix == ".pkl":
            found[name] = repr(pickle.loads(file.read_bytes()))
        elif file.is_file() and file.name.endswith(".nii.gz"):
            found[name] = file.read_bytes()
        elif file.name in ("umamba_bot.json", "dataset_fingerprint.json"):
            found[name] = json.loads(file.read_text())
    return found


def trained(folder: Path) -> dict[str, Any]:
    """Progress and curves but for times, the final weights and the optimizer's state."""
    (fold,) = folder.glob("results/*/*/fold_0")
    lines = [json.loads(line) for line in (fold / "progress.jsonl").read_text().splitlines()]
    content = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    found = {key: value.numpy() for key, value in content["network_weights"].items()}
    for number, moments in content["optimizer_state"]["state"].items():
        found |= {f"{number} {key}": np.asarray(value) for key, value in moments.items()}
    curves = {k: repr(v) for k, v in content["logging"].items() if "timestamps" not in k}
    progress = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return found | {"progress": progress, "curves": curves}


def predicted(folder: Path) -> dict[str, Any]:
    """Label maps and probabilities."""
    found: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.name.endswith(".nii.gz"):
            found[file.name] = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))
        elif file.suffix == ".npz":
            found[file.name] = np.load(file)["probabilities"]
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> int:
    """Entries that are missing, additional, or not equal in every bit."""
    alike = [
        np.array_equal(expected[name], found[name])
        if isinstance(expected[name], np.ndarray)
        else expected[name] == found[name]
        for name in expected.keys() & found.keys()
    ]
    return alike.count(False) + len(expected.keys() ^ found.keys())


PARTS = {"preprocess": preprocessed, "train": trained, "predict": predicted}


if __name__ == "__main__":
    sys.exit(main())
