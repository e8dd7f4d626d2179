"""Makes tiny datasets, and spoils them, for the tests of this folder and of the commands."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
from skimage import io

from umamba.data.dataset import RawDataset

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


def open_raw(source: Path) -> RawDataset:
    """A raw folder as it is, outside of any workspace."""
    return RawDataset(source, json.loads((source / "dataset.json").read_text()), source)


def cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def spoil(array: np.ndarray, value: float) -> np.ndarray:
    array = array.copy()
    array[2, 3, 4] = value
    return array


def save_float(path: Path, array: np.ndarray) -> None:
    write_volume(path, array.astype(np.float32))


def save_nan(path: Path, value: float) -> None:
    """Write through nibabel and check that the file holds it: SimpleITK reads 0 there."""
    image = nibabel.load(path)
    data = np.asarray(image.dataobj).copy()
    data[2, 3, 1] = value
    nibabel.save(nibabel.Nifti1Image(data, image.affine), path)
    assert not np.isfinite(np.asarray(nibabel.load(path).dataobj)).all()


def make_4d(path: Path) -> None:
    array = np.stack([make_image(0), make_image(1)])
    nibabel.save(nibabel.Nifti1Image(array.T, np.eye(4)), path)


def shear(path: Path) -> None:
    affine = np.diag([0.9, 0.8, 2.5, 1.0])
    affine[0, 1] = 0.5
    image = nibabel.Nifti1Image(make_image(0).T, affine)
    image.set_qform(None, code=0)
    image.set_sform(affine, code=1)
    nibabel.save(image, path)
