"""CPU time and memory of `umamba predict` against stock nnU-Net, on one model folder and images.

    python benchmarks/predict.py -m MODEL_FOLDER -i IMAGES [--cases 20] [--folds 0] [--mirroring]

Stock `nnUNetv2_predict_from_modelfolder`, `umamba predict --nnunet-exact` and `umamba predict` each
run as one command on the same cases; user and system seconds are those of the whole process tree.
Stock and exact labels must be equal voxel for voxel, else no table is printed and the exit code
is 1.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-i", "--images", type=Path, required=True)
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--folds", nargs="+", default=["0"])
    parser.add_argument("--mirroring", action="store_true", help="with test-time mirroring")
    parser.add_argument("--threads", type=int, default=None, help="threads of umamba")
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
    rows = {
        name: measure([*words, "-o", str(work / name.replace(" ", ""))])
        for name, words in commands.items()
    }
    folders = {name: work / name.replace(" ", "") for name in commands}
    n_exact, _ = differing_voxels(folders["stock"], folders["umamba --nnunet-exact"])
    n_ours, n_voxels = differing_voxels(folders["umamba --nnunet-exact"], folders["umamba"])
    if n_exact:
        print(f"exact labels differ from stock in {n_exact} voxels", file=sys.stderr)
        return 1
    stock = rows["stock"]["cpu_s"]
    print(f"{args.cases} cases, {os.cpu_count()} cores, mirroring {args.mirroring}\n")
    print("| command | CPU-s | of stock | wall s | peak of one process, MiB |")
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        share = row["cpu_s"] / stock
        print(
            f"| {name} | {row['cpu_s']:.1f} | {share:.2f} | {row['wall_s']:.1f} "
            f"| {row['peak_mib']:.0f} |"
        )
    print("\nexact equals stock voxel for voxel; ", end="")
    print(f"umamba differs from exact in {n_ours} of {n_voxels} voxels ({n_ours / n_voxels:.5%})")
    return 0


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
