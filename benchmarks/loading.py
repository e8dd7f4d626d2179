"""Loading of training batches: nnU-Net's processes and ours alternately, CPU seconds per batch.

    python benchmarks/loading.py [--workers N ...] [--patch Z Y X] [--batches N] [--repeats N]
    [--json FILE]

Four synthetic cases of 128^3 voxels, nnU-Net's whole augmentation, batches of two.  Each figure
is of a process of its own: CPU seconds (user and system, its loading processes included) of many
batches minus those of few, divided by the difference, and for the start those of the few; medians
over the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FEW = 4


def make_loader(folder: Path, patch: list[int]):
    """nnU-Net's loader of training batches over the cases in a folder."""
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    scales = [[1, 1, 1], [0.5] * 3, [0.25] * 3]
    transforms = nnUNetTrainer.get_training_transforms(
        patch, (-0.5, 0.5), scales, (0, 1, 2), False, use_mask_for_norm=[False]
    )
    labels = LabelManager({"background": 0, "blob": 1}, None)
    wide = [round(1.3 * n) for n in patch]
    data = nnUNetDatasetBlosc2(str(folder))
    return nnUNetDataLoader(data, 2, wide, patch, labels, 0.33, transforms=transforms)


def make_cases(folder: Path) -> None:
    """Four cases with a blob each, as preprocessing leaves them."""
    import numpy as np
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    generator = np.random.default_rng(0)
    for index in range(4):
        data = generator.normal(size=(1, 128, 128, 128)).astype(np.float32)
        seg = np.zeros(data.shape, np.int8)
        seg[:, 40:60, 40:60, 40:60] = 1
        places = {1: np.argwhere(seg == 1)[::8]}
        sizes = {"chunks": (1, 64, 64, 64), "blocks": (1, 32, 32, 32)}
        name = str(folder / f"case_{index}")
        nnUNetDatasetBlosc2.save_case(data, seg, {"class_locations": places}, name, **sizes)


def load(which: str, folder: Path, patch: list[int], n_workers: int, n_batches: int) -> dict:
    """CPU seconds and wall of that many batches, in this process."""
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import (
        NonDetMultiThreadedAugmenter,
    )

    from umamba.training.loading import Batches

    loader = make_loader(folder, patch)
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    if which == "ours":
        batches = Batches(loader, (0,), n_workers=n_workers)
    else:  # as nnU-Net's trainer makes it
        cached = max(6, n_workers // 2)
        batches = NonDetMultiThreadedAugmenter(
            loader, None, n_workers, cached, pin_memory=False, wait_time=0.002
        )
    next(batches)
    first = time.perf_counter() - wall
    for _ in range(n_batches - 1):
        next(batches)
    wall = time.perf_counter() - wall
    batches.close() if which == "ours" else batches._finish()
    return {"cpu_s": sum(os.times()[:4]) - cpu, "wall_s": wall, "first_batch_s": first}


def measure(which: str, folder: Path, args: argparse.Namespace, n_workers: int, n: int) -> dict:
    """`load` in a process of its own."""
    command = [sys.executable, __file__, "--one", which, "--folder", str(folder)]
    command += ["--workers", str(n_workers), "--batches", str(n)]
    command += ["--patch", *map(str, args.patch)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--patch", type=int, nargs=3, default=[64, 64, 64])
    parser.add_argument("--batches", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=("ours", "nnunet"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(load(args.one, args.folder, args.patch, args.workers[0], args.batches)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_cases(folder := Path(name))
        for n_workers in args.workers:
            found: dict[str, list[dict]] = {"nnunet": [], "ours": []}
            for _ in range(args.repeats):
                for which, figures in found.items():
                    few = measure(which, folder, args, n_workers, FEW)
                    many = measure(which, folder, args, n_workers, FEW + args.batches)
                    cpu = (many["cpu_s"] - few["cpu_s"]) / args.batches
                    figures.append({"cpu_per_batch": cpu, "cpu_of_start": few["cpu_s"]})
                    figures[-1]["first_batch_s"] = few["first_batch_s"]
            for which, figures in found.items():
                medians = {key: statistics.median(f[key] for f in figures) for key in figures[0]}
                rows.append({"loader": which, "workers": n_workers} | medians)
                shown = "  ".join(f"{key} {value:.3f}" for key, value in medians.items())
                print(f"{which:>7}  {n_workers} workers  {shown}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
