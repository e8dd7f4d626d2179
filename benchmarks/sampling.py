"""How often training patches hold a rare class, and where in the patch, per foreground sampling.

    python benchmarks/sampling.py [--batches 300] [--json FILE]

Twelve synthetic cases of 48^3 voxels have an organ, a third of them a spot of about twenty voxels,
too. Batches of two patches of 24^3 are drawn by nnU-Net's loader and by ours. Counted are the
patches that hold each class, beside the rate that planning expects, and the position of the spot:
the share of patches with a spot that have it in their inner eighth (of 12^3 voxels), which a
position drawn evenly would give in 12.5 %. The last column is the share of patches that still hold
a spot after nnU-Net's augmentation. Speed: CPU seconds of the loader per batch.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from umamba.files import write_json
from umamba.planning.hit_rates import HitRates, measure_hit_rates
from umamba.planning.sampling import class_weights
from umamba.training.recipe import Recipe
from umamba.training.sampling import loader_class

SIDE, PATCH, BATCH, N_CASES = 48, (24, 24, 24), 2, 12
LABELS = {"background": 0, "organ": 1, "spot": 2}
ROTATION = (-30 / 360 * 2 * np.pi, 30 / 360 * 2 * np.pi)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_cases(folder)
        data = nnUNetDatasetBlosc2(str(folder))
        rates = measure_hit_rates(folder, PATCH, [1, 2])
        rows = {
            sampling: measure(data, sampling, rates, args.batches)
            for sampling in ("stock", "jittered", "balanced")
        }
    columns = list(rows["stock"])
    print(f"{N_CASES} cases, {args.batches} batches of {BATCH} patches of {PATCH[0]}^3\n")
    print(f"| sampling | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for sampling, row in rows.items():
        print(f"| {sampling} | {' | '.join(f'{value:.3g}' for value in row.values())} |")
    if args.json:
        write_json(args.json, {"batches": args.batches, "rows": rows})
    return 0


def make_cases(folder: Path) -> None:
    """Writes preprocessed cases as nnU-Net does."""
    generator = np.random.default_rng(0)
    grid = np.indices((SIDE,) * 3)
    for index in range(N_CASES):
        seg = np.zeros((SIDE,) * 3, np.int16)
        for value, radius, there in ((1, 8.0, True), (2, 1.7, index % 3 == 0)):
            centre = generator.uniform(10, SIDE - 10, 3).reshape(3, 1, 1, 1)
            if there:
                seg[((grid - centre) ** 2).sum(0) < radius**2] = value
        image = np.choose(seg, (0.0, 1.0, -1.0)) + generator.normal(0, 0.5, seg.shape)
        located = DefaultPreprocessor._sample_foreground_locations(seg[None], [1, 2])
        nnUNetDatasetBlosc2.save_case(
            image[None].astype(np.float32),
            seg[None],
            {"class_locations": located},
            str(folder / f"case_{index:02d}"),
            chunks=(1, *PATCH),
            blocks=(1, *PATCH),
        )


def measure(
    data: nnUNetDatasetBlosc2, sampling: str, rates: HitRates, n_batches: int
) -> Mapping[str, Any]:
    """Draws batches, plain and augmented, and counts."""
    weights = class_weights(rates) if sampling == "balanced" else None
    make_loader = loader_class(Recipe(sampling=sampling, class_weights=weights))
    labels = LabelManager(LABELS, None)
    loader = make_loader(data, BATCH, PATCH, PATCH, labels, 0.33)
    np.random.seed(0)
    started = time.process_time()
    patches = [patch for _ in range(n_batches) for patch in next(loader)["target"][:, 0].numpy()]
    seconds = (time.process_time() - started) / n_batches
    spots = [np.argwhere(patch == 2).mean(0) for patch in patches if (patch == 2).any()]
    middle = np.abs(np.array(spots) + 0.5 - np.array(PATCH) / 2) < np.array(PATCH) / 4
    expected = rates.per_patch(sampling, BATCH, weights)
    return {
        "organ, share of patches": float(np.mean([(patch == 1).any() for patch in patches])),
        "expected": float(expected[0]),
        "spot, share of patches": len(spots) / len(patches),
        "expected ": float(expected[1]),
        "spot in the middle": float(middle.all(axis=1).mean()),
        "spot, augmented": augmented_share(data, make_loader, labels, n_batches),
        "CPU-ms per batch": 1000 * seconds,
    }


def augmented_share(
    data: nnUNetDatasetBlosc2, make_loader: Any, labels: LabelManager, n_batches: int
) -> float:
    """The share of patches that hold a spot after nnU-Net's training transforms."""
    with contextlib.redirect_stdout(None):
        transforms = nnUNetTrainer.get_training_transforms(
            PATCH, ROTATION, None, (0, 1, 2), False, use_mask_for_norm=[False]
        )
    initial = get_patch_size(PATCH, ROTATION, ROTATION, ROTATION, (0.85, 1.25))
    loader = make_loader(data, BATCH, initial, PATCH, labels, 0.33, transforms=transforms)
    np.random.seed(0)
    held = [(patch == 2).any() for _ in range(n_batches) for patch in next(loader)["target"]]
    return float(np.mean([bool(value) for value in held]))


if __name__ == "__main__":
    raise SystemExit(main())
