"""Makes tiny datasets for the tests of this folder and of the commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import SimpleITK
from skimage import io

SHAPE, SPACING = (5, 8, 7), (2.5, 0.8, 0.9)  # (z, y, x)


def make_image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def make_label(values: tuple[int, ...] = (1, 2), shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    for i, value in enumerate(values):
        label[..., 1 + 2 * i : 3 + 2 * i, 2:5] = value
    return label


def write_volume(
    path: Path,
    array: np.ndarray,
    spacing: tuple[float, ...] = SPACING,
    origin: tuple[float, ...] = (-10.0, 20.0, 3.0),
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1][: image.GetDimension()])
    image.SetOrigin(origin[: image.GetDimension()])
    SimpleITK.WriteImage(image, str(path), True)
    return path


def write_picture(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    io.imsave(str(path), pixels, check_contrast=False)
    return path


def read_array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def write_dataset_json(folder: Path, n: int, **changes: object) -> None:
    content: dict[str, object] = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "one": 1, "two": 2},
        "numTraining": n,
        "file_ending": ".nii.gz",
    }
    content.update(changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))


def make_nnunet(
    folder: Path, n: int = 3, ending: str = ".nii.gz", n_channels: int = 1, **changes: object
) -> Path:
    """Write a clean dataset in nnU-Net's raw format, cases a0, a1, ..."""
    for i in range(n):
        for c in range(n_channels):
            write_volume(folder / "imagesTr" / f"a{i}_{c:04d}{ending}", make_image(10 * i + c))
        write_volume(folder / "labelsTr" / f"a{i}{ending}", make_label())
    names = {str(c): f"channel {c}" for c in range(n_channels)}
    write_dataset_json(folder, n, **{"channel_names": names, "file_ending": ending, **changes})
    return folder


def make_bare(folder: Path, n: int = 3, values: tuple[int, ...] = (1, 2)) -> Path:
    """Write images/ and labels/ with equal names, cases a0, a1, ..."""
    for i in range(n):
        write_volume(folder / "images" / f"a{i}.nii.gz", make_image(i))
        write_volume(folder / "labels" / f"a{i}.nii.gz", make_label(values))
    return folder
