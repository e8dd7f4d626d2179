"""Preprocessing beside stock nnU-Net's: a whole dataset, and the resampling of one large case.

    python benchmarks/preprocessing.py [--dataset DATASET --work FOLDER] [--rows ROW ...]
        [--rounds N] [--json FILE]

The row `dataset` plans and preprocesses an nnU-Net raw folder for 2d and 3d_fullres: `umamba plan`
(with its audit) and `nnUNetv2_plan_and_preprocess`, each in a process of its own and from nothing.
Wall and CPU seconds are those of the process trees. The rows `image` and `labels` resample a
120x512x512 case with slices apart and all axes alike, in this process, on one thread: CPU seconds.
First of all the results are compared: data to 1e-5, labels and class_locations exactly.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import blosc2
import numpy as np

SHAPE = (120, 512, 512)
N_CLASSES = 100
SPACINGS = {
    "slices apart": ((5.0, 0.8, 0.8), (2.5, 1.0, 1.0)),
    "all axes alike": ((2.0, 0.8, 0.8), (1.5, 0.9, 0.9)),
}
OPTIONS = {"order_z": 0, "force_separate_z": None}


def time_dataset(dataset: Path, work: Path) -> dict[str, Any]:
    """Both commands from nothing; the figures, after the folders were compared."""
    shutil.rmtree(work, ignore_errors=True)
    stock = {
        f"nnUNet_{part}": str(work / "stock" / part) for part in ("raw", "preprocessed", "results")
    }
    for folder in stock.values():
        Path(folder).mkdir(parents=True)
    (Path(stock["nnUNet_raw"]) / dataset.name).symlink_to(dataset)
    number = dataset.name.removeprefix("Dataset").split("_")[0]
    command = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    configurations = ["-c", "2d", "3d_fullres"]
    ours = [sys.executable, "-m", "umamba.cli.main", "plan", str(dataset), *configurations]
    figures = {
        "ours": timed([*ours, "--workspace", str(work / "ours")], {}),
        "stock": timed([str(command), "-d", number, *configurations], stock),
    }
    compare_folders(
        work / "ours" / "preprocessed" / dataset.name,
        Path(stock["nnUNet_preprocessed"]) / dataset.name,
    )
    ratios = {k: round(figures["ours"][k] / figures["stock"][k], 3) for k in figures["ours"]}
    return {"row": f"dataset {dataset.name}", **figures, "ratio": ratios}


def compare_folders(ours: Path, stock: Path) -> None:
    """AssertionError where a preprocessed case differs from stock's."""
    for name in ("nnUNetPlans_2d", "nnUNetPlans_3d_fullres"):
        files = sorted((stock / name).glob("*.pkl"))
        assert files and len(files) == len(list((ours / name).glob("*.pkl")))
        for file in files:
            pair = [folder / name / file.stem for folder in (ours, stock)]
            data, labels = (
                [blosc2.open(f"{path}{suffix}")[:] for path in pair]
                for suffix in (".b2nd", "_seg.b2nd")
            )
            scale = max(1.0, float(np.abs(data[1]).max()))
            np.testing.assert_allclose(data[0], data[1], atol=1e-5 * scale, rtol=0)
            np.testing.assert_array_equal(labels[0], labels[1])
            found = [pickle.loads(Path(f"{p}.pkl").read_bytes()) for p in pair]
            places = [each["class_locations"] for each in found]
            assert places[0].keys() == places[1].keys()
            for key in places[1]:
                np.testing.assert_array_equal(places[0][key], places[1][key])


def timed(command: list[str], variables: dict[str, str]) -> dict[str, float]:
    """Runs a command without its output; wall and CPU seconds of its process tree."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall_seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(cpu, 1)}


def time_resampling(what: str, kind: str, n_rounds: int) -> dict[str, Any]:
    """CPU seconds of stock's function and of ours, alternately; the least of the rounds."""
    from nnunetv2.preprocessing.resampling import default_resampling as stock

    from umamba.preprocessing.geometry import shape_at_spacing
    from umamba.preprocessing.label_resampling import resample_labels
    from umamba.preprocessing.resampling import FUNCTION, separable_resampling

    spacing, new_spacing = SPACINGS[kind]
    shape = shape_at_spacing(SHAPE, spacing, new_spacing)
    geometry = (shape, spacing, new_spacing)
    if what == "labels":
        labels = make_labels()
        options: dict[str, Any] = {"is_seg": True, "order": 1, **OPTIONS}
        image = labels[None].astype(np.float32)

        def run() -> np.ndarray:
            return resample_labels(labels, shape, options, spacing, new_spacing)[None]
    else:
        image = np.random.default_rng(0).standard_normal((1, *SHAPE), dtype=np.float32)
        options = {"is_seg": False, "order": 3, **OPTIONS}

        def run() -> np.ndarray:
            operator = separable_resampling(FUNCTION, options, SHAPE, *geometry)
            assert operator is not None
            return operator.whole(image)

    def run_stock() -> np.ndarray:
        result: np.ndarray = stock.resample_data_or_seg_to_shape(image, *geometry, **options)
        return result

    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    for _ in range(n_rounds):
        results = []
        for name, function in (("ours", run), ("stock", run_stock)):
            used, result = cpu_seconds(function)
            seconds[name].append(used)
            results.append(result)
        tolerance = 0 if what == "labels" else 1e-5
        np.testing.assert_allclose(results[0], results[1], atol=tolerance, rtol=0)
    least = {name: {"cpu_seconds": round(min(each), 2)} for name, each in seconds.items()}
    ratio = round(min(seconds["ours"]) / min(seconds["stock"]), 4)
    return {"row": f"{what}, {kind}", **least, "ratio": {"cpu_seconds": ratio}}


def cpu_seconds(function: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """What a call costs, and its result."""
    started = time.process_time()
    result = function()
    return time.process_time() - started, result


def make_labels() -> np.ndarray:
    """N_CLASSES balls of many sizes, one over another; int16."""
    generator = np.random.default_rng(0)
    labels = np.zeros(SHAPE, np.int16)
    grid = [np.arange(n) for n in SHAPE]
    for label in range(1, N_CLASSES):
        centre, radius = generator.uniform(0, 1, 3) * SHAPE, generator.uniform(15, 60)
        # slices lie four times as far apart as rows
        offsets = [(g - c) * k for g, c, k in zip(grid, centre, (4, 1, 1), strict=True)]
        z, y, x = np.ix_(*(offset**2 for offset in offsets))
        near = [np.flatnonzero(np.abs(offset) <= radius) for offset in offsets]
        box = tuple(slice(n[0], n[-1] + 1) if len(n) else slice(0) for n in near)
        inside = z[box[0]] + y[:, box[1]] + x[:, :, box[2]] <= radius**2
        labels[box][inside] = label
    return labels


def main() -> None:
    """Prints a line per row as it is done; keeps all in the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, help="nnU-Net raw folder, for the row dataset")
    parser.add_argument("--work", type=Path, help="folder to fill; emptied first")
    rows = ("dataset", "image", "labels")
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for row in args.rows:
        if row == "dataset":
            if args.dataset is None or args.work is None:
                print("dataset: skipped, give --dataset and --work", file=sys.stderr)
                continue
            results.append(time_dataset(args.dataset.resolve(), args.work.resolve()))
            print(json.dumps(results[-1]), flush=True)
        else:
            for kind in SPACINGS:
                results.append(time_resampling(row, kind, args.rounds))
                print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
