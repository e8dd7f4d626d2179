"""A 300x512x512 CT with 15 or 105 classes: everything around the network, ours beside stock.

    python benchmarks/large_volume.py [--classes 15] [--planes 300] [--skip-stock] [--max-ram 4G]
    python benchmarks/large_volume.py --real MODEL_FOLDER --image FILE

The network is cheap (a mean over 5x5x5 voxels and a pointwise perceptron) or, with --real, fold 0
of a trained one (CTNormalization); its own time, measured where it is called, is subtracted.
Both commands run with one thread per process.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import json
import math
import os
import pydoc
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from torch import nn

# Tiles of a CT model that were planned for 100 classes and a 12 GiB GPU; their logits for 105
# classes take 236 MiB, those of 128x128x128 would take 840.
PATCH = (64, 96, 96)
SPACING, TARGET_SPACING = (1.5, 0.8, 0.8), (1.5, 1.5, 1.5)
ROOT = Path(__file__).resolve().parents[1]
TIMED, FINAL = "benchmarks.large_volume.TimedNetwork", "checkpoint_final.pth"
# Of a real image, what is compared with exact arithmetic: slices z, y, x of its middle.
CROP = (100, 200, 200)


class TimedNetwork(nn.Module):
    """A network of the class `timed`; counts the time of its calls."""

    def __init__(
        self, input_channels: int, num_classes: int, *, timed: str, **arguments: Any
    ) -> None:
        super().__init__()
        self.inner = pydoc.locate(timed)(input_channels, num_classes=num_classes, **arguments)
        self.spent = {"cpu_s": 0.0, "wall_s": 0.0, "calls": 0}
        if "BENCHMARK_TIMES" in os.environ:
            atexit.register(self._write)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        start, wall = time.thread_time(), time.monotonic()
        x = self.inner(x)
        self.spent["cpu_s"] += time.thread_time() - start
        self.spent["wall_s"] += time.monotonic() - wall
        self.spent["calls"] += 1
        return x

    def _write(self) -> None:
        if self.spent["calls"]:
            Path(os.environ["BENCHMARK_TIMES"]).write_text(json.dumps(self.spent))


class CheapNetwork(nn.Module):
    """Logits that are smooth in space, for next to no time."""

    def __init__(
        self, input_channels: int, num_classes: int, *, deep_supervision: bool = False
    ) -> None:
        super().__init__()
        self.hidden = nn.Conv3d(input_channels, 8, 1)
        self.head = nn.Conv3d(8, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for dim in (2, 3, 4):
            kernel, padding = [1, 1, 1], [0, 0, 0]
            kernel[dim - 2], padding[dim - 2] = 5, 2
            x = nn.functional.avg_pool3d(x, kernel, 1, padding, count_include_pad=False)
        return self.head(torch.sin(self.hidden(x)))


def make_image(file: Path, shape: tuple[int, int, int]) -> None:
    """A body with organs, int16 Hounsfield units, noise as of a scanner."""
    random = np.random.default_rng(0)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[1:]], indexing="ij")
    body = (x / 0.85) ** 2 + (y / 0.6) ** 2 < 1
    organs = random.uniform((-0.6, -0.4, 0, 0.08, -120), (0.6, 0.4, 1, 0.3, 400), (40, 5))
    image = np.empty(shape, np.int16)
    for i in range(shape[0]):
        plane = np.where(body, 40.0, -1000.0)
        for ox, oy, oz, radius, value in organs:
            reach = radius**2 - (1.5 * (i / shape[0] - oz)) ** 2
            if reach > 0:
                plane[((x - ox) ** 2 + (y - oy) ** 2 < reach) & body] = value
        image[i] = plane + random.normal(0, 12, plane.shape)
    written = SimpleITK.GetImageFromArray(image)
    written.SetSpacing(SPACING[::-1])
    written.SetOrigin((-200.0, -180.0, 30.0))
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(written, str(file))


def make_model(folder: Path, n_classes: int) -> Path:
    intensities = {"mean": 60.0, "std": 120.0, "percentile_00_5": -900.0, "percentile_99_5": 400.0}
    resampling = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    name = "resample_data_or_seg_to_shape"
    plans = {
        "dataset_name": "Dataset999_Large", "plans_name": "large",
        "image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {"0": intensities},
        "configurations": {"3d_fullres": {
            "data_identifier": "large_3d", "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2, "patch_size": list(PATCH), "spacing": list(TARGET_SPACING),
            "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
            "resampling_fn_data": name,
            "resampling_fn_data_kwargs": resampling | {"order": 3},
            "resampling_fn_seg": name,
            "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
            "resampling_fn_probabilities": name,
            "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
            "architecture": {
                "network_class_name": TIMED,
                "arch_kwargs": {"timed": "benchmarks.large_volume.CheapNetwork"},
                "_kw_requires_import": [],
            },
            "batch_dice": False,
        }},
    }  # fmt: skip
    labels = {"background": 0} | {f"organ_{i}": i for i in range(1, n_classes)}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1,
               "file_ending": ".nii.gz"}  # fmt: skip
    torch.manual_seed(0)
    network = CheapNetwork(1, n_classes)
    nn.init.normal_(network.hidden.weight, std=2.0)
    nn.init.normal_(network.head.weight, std=3.0)
    write_model(folder, plans, dataset, network.state_dict())
    return folder


def time_model(trained: Path, folder: Path) -> Path:
    """A copy of a trained model whose network counts the time of its calls."""
    found = torch.load(trained / "fold_0" / FINAL, map_location="cpu", weights_only=False)
    plans, dataset = (json.loads((trained / f"{f}.json").read_text()) for f in ("plans", "dataset"))
    configuration = plans["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]
    architecture["arch_kwargs"]["timed"] = architecture["network_class_name"]
    architecture["network_class_name"] = TIMED
    configuration.pop("recipe", None)  # of the training, which is over
    write_model(folder, plans, dataset, found["network_weights"])
    return folder


def write_model(folder: Path, plans: dict, dataset: dict, weights: dict[str, torch.Tensor]) -> None:
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    checkpoint = {
        "network_weights": {f"inner.{name}": value for name, value in weights.items()},
        "trainer_name": "nnUNetTrainer",
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0,
                      "dataset_json": dataset, "device": torch.device("cpu")},
        "inference_allowed_mirroring_axes": None,
    }  # fmt: skip
    torch.save(checkpoint, folder / "fold_0" / FINAL)


def label_exactly(model: Path, file: Path) -> np.ndarray:
    """The labels (z, y, x) of an image in float64 from end to end, network included.

    For an isotropic enough CT in a model of CTNormalization and the default resampling.
    """
    from nnunetv2.inference.sliding_window_prediction import (
        compute_gaussian,
        compute_steps_for_sliding_window,
    )
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from skimage.transform import resize

    found = torch.load(model / "fold_0" / FINAL, map_location="cpu", weights_only=False)
    plans, dataset = found["init_args"]["plans"], found["init_args"]["dataset_json"]
    configuration, n_classes = plans["configurations"]["3d_fullres"], len(dataset["labels"])
    how = configuration["architecture"]
    words = (how["network_class_name"], how["arch_kwargs"], how["_kw_requires_import"])
    network = get_network_from_plans(*words, 1, n_classes, deep_supervision=False)
    network.load_state_dict(found["network_weights"])
    network.double().eval()

    read = SimpleITK.ReadImage(str(file))
    image = SimpleITK.GetArrayFromImage(read).astype(np.float64)
    facts = plans["foreground_intensity_properties_per_channel"]["0"]
    data = np.clip(image, facts["percentile_00_5"], facts["percentile_99_5"])
    data = (data - facts["mean"]) / facts["std"]
    shape = compute_new_shape(image.shape, read.GetSpacing()[::-1], configuration["spacing"])
    data = resize(data, shape, 3, mode="edge", anti_aliasing=False)
    patch = configuration["patch_size"]
    lacking = [max(0, p - n) for p, n in zip(patch, shape, strict=True)]
    data = np.pad(data, [(n // 2, n - n // 2) for n in lacking])
    gaussian = compute_gaussian(tuple(patch), 1 / 8, 10, torch.float64, torch.device("cpu")).numpy()
    sums, weights = np.zeros((n_classes, *data.shape)), np.zeros(data.shape)
    with torch.inference_mode():
        for corner in itertools.product(*compute_steps_for_sliding_window(data.shape, patch, 0.5)):
            part = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
            logits = network(torch.from_numpy(data[part].copy())[None, None])[0].numpy()
            sums[(slice(None), *part)] += logits * gaussian
            weights[part] += gaussian
    inside = tuple(slice(n // 2, n // 2 + s) for n, s in zip(lacking, shape, strict=True))
    best, labels = np.full(image.shape, -np.inf), np.zeros(image.shape, np.uint8)
    for label in range(n_classes):
        logits = (sums[label] / weights)[inside]
        logits = resize(logits, image.shape, 1, mode="edge", anti_aliasing=False)
        labels[logits > best] = label
        np.maximum(best, logits, out=best)
    return labels


def measure(words: list[str], folder: Path, limit: int | None = None) -> dict[str, float]:
    """Runs a command: CPU and wall seconds, those of the network apart, and memory."""
    times = folder / "times.json"
    times.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "BENCHMARK_TIMES": str(times),
        "nnUNet_raw": str(folder), "nnUNet_preprocessed": str(folder),
        "nnUNet_results": str(folder),
    }  # fmt: skip
    before = (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))) if limit else None
    log = (folder / "log.txt").open("w")
    start = time.monotonic()
    process = subprocess.Popen(
        words, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=before
    )
    peak = {"tree_pss": 0, "one_rss": 0}
    watching = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, peak, watching))
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - start
    watching.set()
    watcher.join()
    if status:
        raise SystemExit(
            f"{' '.join(words)}\nended with {status}:\n" + (folder / "log.txt").read_text()[-3000:]
        )
    network = json.loads(times.read_text())
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "cpu_s": cpu, "wall_s": wall,
        "network_cpu_s": network["cpu_s"], "network_wall_s": network["wall_s"],
        "outside_cpu_s": cpu - network["cpu_s"], "outside_wall_s": wall - network["wall_s"],
        "peak_rss_mib": usage.ru_maxrss / 1024, "peak_tree_pss_mib": peak["tree_pss"] / 1024,
    }  # fmt: skip


def watch(root: int, peak: dict[str, int], stop: threading.Event) -> None:
    """Records the largest sum of the PSS of a process and its descendants, in KiB."""
    while not stop.wait(1.0):
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except (OSError, IndexError):
                    continue
                children.setdefault(parent, []).append(int(entry.name))
        waiting, total = [root], 0
        while waiting:
            pid = waiting.pop()
            waiting += children.get(pid, [])
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += next(int(x.split()[1]) for x in lines if x.startswith("Pss:"))
            except (OSError, StopIteration):
                continue
        peak["tree_pss"] = max(peak["tree_pss"], total)


def difference(first: Path, second: Path) -> float:
    a, b = (SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(f))) for f in (first, second))
    return float(np.count_nonzero(a != b) / a.size)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=15)
    parser.add_argument("--planes", type=int, default=300, help="of the image")
    parser.add_argument("--real", type=Path, help="a model folder with a trained fold 0")
    parser.add_argument("--image", type=Path, help="for --real")
    parser.add_argument("--max-ram", help="passed to umamba predict")
    parser.add_argument("--enforce", type=float, help="GiB of data that the system allows umamba")
    parser.add_argument("--skip-stock", action="store_true")
    parser.add_argument("--skip-exact", action="store_true")
    parser.add_argument("--work", type=Path, help="keep everything here")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return compare(args, args.work or Path(temporary))


def compare(args: argparse.Namespace, work: Path) -> int:
    shape: tuple[int, ...] = (args.planes, 512, 512)
    images, model = work / f"images_{args.planes}", work / f"model_{args.classes}"
    if args.real:
        images, model = work / "images_real", work / "model_real"
        real = SimpleITK.ReadImage(str(args.image))
        shape = real.GetSize()[::-1]
    if not images.exists():
        images.mkdir(parents=True)
        if args.real:
            shutil.copy(args.image, images / "ct_0000.nii.gz")
        else:
            make_image(images / "ct_0000.nii.gz", shape)
    if not model.exists():
        time_model(args.real, model) if args.real else make_model(model, args.classes)
    n_classes = len(json.loads((model / "dataset.json").read_text())["labels"])
    common = ["-i", str(images), "-m", str(model), "-f", "0", "-device", "cpu", "--disable_tta"]
    ours = [sys.executable, "-m", "umamba.cli.main", "predict", *common, "-t", "1"]
    if args.max_ram:
        ours += ["--max-ram", args.max_ram]
    stock = [str(Path(sys.executable).parent / "nnUNetv2_predict_from_modelfolder"), *common,
             "-npp", "1", "-nps", "1", "--disable_progress_bar"]  # fmt: skip
    limit = int(args.enforce * 2**30) if args.enforce else None
    commands = {"umamba": ours}
    if not args.skip_exact:
        commands["umamba --nnunet-exact"] = [*ours, "--nnunet-exact"]
    if not args.skip_stock:
        commands["stock"] = stock
    rows, labels = {}, {}
    for name, words in commands.items():
        output = work / f"{name.replace(' ', '')}_{model.name}_{images.name}"
        mine = limit if name != "stock" else None
        rows[name] = measure([*words, "-o", str(output)], work, mine)
        labels[name] = output / "ct.nii.gz"
        log = (work / "log.txt").read_text()
        print("\n".join(x for x in log.splitlines() if "expected peak" in x))
        print(name, {k: round(v, 1) for k, v in rows[name].items()}, flush=True)
    volumes = math.prod(shape) * (2 + 1) / 2**20
    print(f"\n{n_classes} classes, {shape}, image and label map {volumes:.0f} MiB\n")
    print(
        "| command | outside the network: CPU-s | wall s | network CPU-s | peak MiB above volumes |"
    )
    print("|---|---|---|---|---|")
    for name, row in rows.items():
        peak = max(row["peak_rss_mib"], row["peak_tree_pss_mib"]) - volumes
        print(f"| {name} | {row['outside_cpu_s']:.1f} | {row['outside_wall_s']:.1f} "
              f"| {row['network_cpu_s']:.1f} | {peak:.0f} |")  # fmt: skip
    names, differences = list(labels), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            share = difference(labels[first], labels[second])
            differences[f"{first}, {second}"] = share
            print(f"labels of {first} and {second} differ in {share:.2e} of the voxels")
    if args.real:
        crop = work / "crop" / "ct_0000.nii.gz"
        crop.parent.mkdir(exist_ok=True)
        corner = [(n - c) // 2 for n, c in zip(shape, CROP, strict=True)]
        part = SimpleITK.RegionOfInterest(real, CROP[::-1], corner[::-1])
        SimpleITK.WriteImage(part, str(crop))
        exact = label_exactly(model, crop)
        for name, words in commands.items():
            output = work / f"{name.replace(' ', '')}_crop"
            words = [str(crop.parent) if word == str(images) else word for word in words]
            measure([*words, "-o", str(output)], work)
            found = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(output / "ct.nii.gz")))
            differences[f"{name}, float64 (crop)"] = share = float(np.mean(found != exact))
            print(
                f"labels of {name} and of float64 differ in {share:.2e} of the "
                f"{exact.size} voxels of a crop, {np.mean(exact > 0):.0%} foreground"
            )
    if args.json:
        volume = {"classes": n_classes, "shape": shape, "volumes_mib": volumes}
        limits = {"max_ram": args.max_ram, "enforced_gib": args.enforce}
        content = volume | limits | {"commands": rows, "labels_differ": differences}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
