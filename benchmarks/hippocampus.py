"""Trains U-Mamba and its peers on one CPU machine for the same time and compares validation Dice.

    python benchmarks/hippocampus.py DATASET --work FOLDER [--rows ROW ...] [--minutes M] [--json
    FILE]

DATASET is an nnU-Net raw folder (the figures in docs/results.md: 200 cases of MSD Task04
Hippocampus). Each row is one `umamba run --minutes M` in a process of its own, fold 0; CPU
seconds are those of the process tree, peak memory that of its largest process.  The row
`bot_mirrored` trains the plans of the row `bot` with mirrored patches.  The row `nnunet` trains
stock nnU-Net's plans with the stock trainer class at batch 2 for 5 epochs of `--stock-iterations`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROWS = {
    "bot": ("umamba_bot", "3d_fullres"),
    "bot_noscan": ("umamba_bot_noscan", "3d_fullres"),
    "enc": ("umamba_enc", "3d_fullres"),
    "enc_noscan": ("umamba_enc_noscan", "3d_fullres"),
    "bot_2d": ("umamba_bot", "2d"),
    "bot_2d_noscan": ("umamba_bot_noscan", "2d"),
    "enc_2d": ("umamba_enc", "2d"),
    "enc_2d_noscan": ("umamba_enc_noscan", "2d"),
}
STOCK = """
import sys, torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
plans, dataset_json = load_json(sys.argv[1]), load_json(sys.argv[2])
plans["continue_training"] = False
plans["configurations"]["3d_fullres"]["batch_size"] = 2
trainer = nnUNetTrainer(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch = 5, int(sys.argv[3])
trainer.num_val_iterations_per_epoch = 4
trainer.run_training()
"""


def run_umamba(row: str, dataset: Path, work: Path, minutes: float, threads: int) -> dict:
    """One `umamba run`; its validation summaries, time and memory."""
    network, configuration = ROWS[row]
    name = f"{row}_{minutes:g}min".replace(".", "p")
    command = [sys.executable, "-m", "umamba.cli.main", "run", str(dataset), "--network", network]
    command += ["-c", configuration, "--minutes", f"{minutes:g}", "--workspace", str(work)]
    command += ["--plans-name", name, "-t", str(threads), "--restart"]
    figures = timed(command, {})
    (fold,) = (work / "results").glob(f"*/UMambaTrainer__{name}__{configuration}/fold_0")
    return figures | {"row": row, "asked_minutes": minutes, "threads": threads} | dice_of(fold)


def run_mirrored(dataset: Path, work: Path, minutes: float, threads: int) -> dict:
    """The plans of the row `bot` trained with mirrored patches, by `umamba train`."""
    name = f"bot_{minutes:g}min".replace(".", "p")
    (file,) = (work / "preprocessed").glob(f"*/{name}.json")
    plans = json.loads(file.read_text())
    plans["plans_name"] = f"{name}_mirrored"
    plans["configurations"]["3d_fullres"]["recipe"]["mirroring"] = True
    file.with_name(f"{name}_mirrored.json").write_text(json.dumps(plans, indent=1))
    command = [sys.executable, "-m", "umamba.cli.main", "train", str(dataset), "3d_fullres", "0"]
    command += ["-p", f"{name}_mirrored", "--workspace", str(work), "-t", str(threads), "--restart"]
    figures = timed(command, {})
    (fold,) = (work / "results").glob(f"*/UMambaTrainer__{name}_mirrored__3d_fullres/fold_0")
    return figures | {"row": "bot_mirrored", "threads": threads} | dice_of(fold)


def run_stock(dataset: Path, work: Path, n_iterations: int) -> dict:
    """Stock plans and trainer class, 5 epochs; validated by our predictor without mirroring."""
    variables = {
        f"nnUNet_{part}": str(work / "stock" / part) for part in ("raw", "preprocessed", "results")
    }
    raw = Path(variables["nnUNet_raw"])
    raw.mkdir(parents=True, exist_ok=True)
    if not (raw / dataset.name).exists():
        (raw / dataset.name).symlink_to(dataset)
    folder = Path(variables["nnUNet_preprocessed"]) / dataset.name
    planner = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    number = dataset.name[len("Dataset") :].split("_")[0]
    if not (folder / "nnUNetPlans.json").is_file():
        timed([str(planner), "-d", number, "-c", "3d_fullres", "-np", "2"], variables)
    files = [str(folder / "nnUNetPlans.json"), str(folder / "dataset.json")]
    figures = timed([sys.executable, "-c", STOCK, *files, str(n_iterations)], variables)
    model = Path(variables["nnUNet_results"]) / dataset.name
    model = model / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    cases = json.loads((folder / "splits_final.json").read_text())[0]["val"]
    images = work / "stock" / "validation_images"
    images.mkdir(exist_ok=True)
    for case in cases:
        for image in (dataset / "imagesTr").glob(f"{case}_*"):
            if not (images / image.name).exists():
                (images / image.name).symlink_to(image)
    predictions = model / "fold_0" / "validation"
    umamba = [sys.executable, "-m", "umamba.cli.main"]
    words = ["-m", str(model), "-f", "0", "-i", str(images), "-o", str(predictions)]
    timed([*umamba, "predict", *words, "--disable_tta"], variables)
    labels = ["-djfile", str(dataset / "dataset.json"), "--chill"]
    timed([*umamba, "evaluate", str(predictions), str(folder / "gt_segmentations"), *labels], {})
    return figures | {"row": "nnunet", "iterations": 5 * n_iterations} | dice_of(model / "fold_0")


def timed(command: list[str], variables: dict[str, str]) -> dict:
    """Runs a command; wall and CPU seconds of its tree, peak memory (GiB) of one process."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | variables)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return {
        "wall_seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def dice_of(fold: Path) -> dict:
    """Mean Dice of the fold's validation, plain and (where there is one) mirrored."""
    found = {}
    for name in ("validation", "validation_mirrored"):
        file = fold / name / "summary.json"
        if file.is_file():
            summary = json.loads(file.read_text())
            found[name] = {
                "mean": round(summary["foreground_mean"]["Dice"], 4),
                "per_class": {k: round(v["Dice"], 4) for k, v in summary["mean"].items()},
            }
    return found


def main() -> None:
    """Runs the rows one after another, prints each when it is done, keeps them in the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = [*ROWS, "bot_mirrored", "nnunet"]
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stock-iterations", type=int, default=50, help="of each of 5 epochs")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dataset, work = args.dataset.resolve(), args.work.resolve()
    results = json.loads(args.json.read_text()) if args.json and args.json.is_file() else []
    for row in args.rows:
        if row == "nnunet":
            results.append(run_stock(dataset, work, args.stock_iterations))
        elif row == "bot_mirrored":
            results.append(run_mirrored(dataset, work, args.minutes, args.threads))
        else:
            results.append(run_umamba(row, dataset, work, args.minutes, args.threads))
        print(json.dumps(results[-1]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
