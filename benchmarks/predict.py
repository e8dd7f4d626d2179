"""CPU time and memory of `umamba predict` against stock nnU-Net, on one model folder and images.

    python benchmarks/predict.py -m MODEL_FOLDER -i IMAGES [--cases 20] [--folds 0] [--mirroring]

Stock `nnUNetv2_predict_from_modelfolder`, `umamba predict --nnunet-exact` and `umamba predict` each
run as one command on the same cases; user and system seconds are those of the whole process tree.
Stock and exact labels must be equal voxel for voxel, else no table is printed and the exit code
is 1. `--precision bfloat16` adds `umamba predict` in that precision, `--labels FOLDER` the mean
Dice of each against these label maps, and `--no-stock` leaves out stock and exact.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import SimpleITK

from umamba.evaluation.summary import evaluate_folder, labels_of_dataset


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-i", "--images", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--folds", nargs="+", default=["0"])
    parser.add_argument("--mirroring", action="store_true", help="with test-time mirroring")
    parser.add_argument("--threads", type=int, default=None, help="threads of umamba")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of a further run")
    parser.add_argument("--labels", type=Path, help="label maps to compare with")
    parser.add_argument("--no-stock", action="store_true", help="compare with umamba's default")
    parser.add_argument("-o", "--output", type=Path, help="keep predictions here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.output or Path(temporary)
        images = link_cases(args.model, args.images, args.cases, work / "images")
        return compare(args, images, work)


def compare(args: argparse.Namespace, images: Path, work: Path) -> int:
    tail = [] if args.mirroring else ["--disable_tta"]
    threads = ["-t", str(args.threads)] if args.threads else []
    common = ["-i", str(images), "-m", str(args.model), "-f", *args.folds, "-device", "cpu", *tail]
    binaries = Path(sys.executable).parent
    ours = [sys.executable, "-m", "umamba.cli.main", "predict", *common, *threads]
    commands = {
        "stock": [str(binaries / "nnUNetv2_predict_from_modelfolder"), *common],
        "umamba --nnunet-exact": [*ours, "--nnunet-exact"],
        "umamba": ours,
    }
    if args.no_stock:
        del commands["stock"], commands["umamba --nnunet-exact"]
    if args.precision:
        extra = ["--precision", args.precision]
        commands[" ".join(["umamba", *extra])] = [*ours, *extra]
    folders = {name: work / name.replace(" ", "") for name in commands}
    rows = {name: measure([*words, "-o", str(folders[name])]) for name, words in commands.items()}
    first = next(iter(commands))
    n_other = {name: differing_voxels(folders[first], folders[name]) for name in commands}
    if n_other.get("umamba --nnunet-exact", (0, 0))[0]:
        n_exact = n_other["umamba --nnunet-exact"][0]
        print(f"exact labels differ from stock in {n_exact} voxels", file=sys.stderr)
        return 1
    print(f"{args.cases} cases, {os.cpu_count()} cores, mirroring {args.mirroring}\n")
    columns = ["command", "CPU-s", f"of {first}", "wall s", "peak of one process, MiB"]
    columns.append(f"voxels that differ from {first}")
    truth = mean_dice(folders[first], args.labels) if args.labels else {}
    columns += [f"Dice {label}" for label in truth]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name, row in rows.items():
        different, total = n_other[name]
        cells = [name, f"{row['cpu_s']:.1f}", f"{row['cpu_s'] / rows[first]['cpu_s']:.2f}"]
        cells += [f"{row['wall_s']:.1f}", f"{row['peak_mib']:.0f}"]
        cells.append(f"{different} of {total} ({different / total:.1e})")
        if args.labels:
            cells += [f"{dice:.5f}" for dice in mean_dice(folders[name], args.labels).values()]
        print(f"| {' | '.join(cells)} |")
    return 0


def mean_dice(predictions: Path, references: Path) -> dict[str, float]:
    """Mean Dice over the predicted cases, by the names of the labels in dataset.json."""
    dataset_json = json.loads((predictions / "dataset.json").read_text())
    labels, ignore = labels_of_dataset(dataset_json)
    found = evaluate_folder(
        predictions, references, labels, ignore_label=ignore, chill=True, n_workers=1,
        file_ending=dataset_json["file_ending"], output=predictions / "summary.json",
    )  # fmt: skip
    means = found["mean"]
    return {name: means[str(label)]["Dice"] for name, label in labels.items()}


def link_cases(model: Path, images: Path, n_cases: int, target: Path) -> Path:
    """A folder of links to the channels of the first `n_cases` cases."""
    ending = json.loads((model / "dataset.json").read_text())["file_ending"]
    files = sorted(images.glob(f"*_[0-9][0-9][0-9][0-9]{ending}"))
    chosen = sorted({f.name[: -len(ending) - 5] for f in files})[:n_cases]
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        link = target / file.name
        if file.name[: -len(ending) - 5] in chosen and not link.exists():
            link.symlink_to(file.resolve())
    return target


def measure(words: list[str]) -> dict[str, float]:
    """Runs a command; CPU seconds of its process tree, wall seconds, largest process in MiB."""
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}\nexit code {process.returncode}:\n{errors}")
    return {
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "wall_s": time.monotonic() - start,
        "peak_mib": usage.ru_maxrss / 1024,
    }


def differing_voxels(first: Path, second: Path) -> tuple[int, int]:
    """Voxels with other labels, and all voxels, over the label maps of two folders."""
    ending = json.loads((first / "dataset.json").read_text())["file_ending"]
    names = sorted(p.name for p in first.glob(f"*{ending}"))
    if not names or names != sorted(p.name for p in second.glob(f"*{ending}")):
        raise SystemExit(f"{first} and {second} do not hold the same cases")
    differing = total = 0
    for name in names:
        a, b = (
            SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(folder / name)))
            for folder in (first, second)
        )
        differing += int(np.count_nonzero(a != b))
        total += a.size
    return differing, total


if __name__ == "__main__":
    sys.exit(main())
