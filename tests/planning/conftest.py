"""Fixtures of the planning tests: nnU-Net's folders, synthetic fingerprints and tiny datasets."""

import json
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch

from umamba.planning import fingerprint

FINGERPRINTS: dict[str, dict[str, Any]] = {
    "isotropic_ct": {"shape": (220, 260, 250), "spacing": (1.0, 0.9, 0.9), "cases": 60},
    "anisotropic_mr": {"shape": (20, 320, 310), "spacing": (3.6, 0.7, 0.7), "cases": 40},
    "flat": {"shape": (1, 520, 700), "spacing": (999.0, 1.0, 1.0), "cases": 90},
    "tiny": {"shape": (21, 34, 37), "spacing": (2.0, 1.0, 1.0), "cases": 6},
    "odd": {"shape": (9, 37, 20), "spacing": (3.0, 1.0, 1.0), "cases": 6},
    "odd_flat": {"shape": (1, 50, 70), "spacing": (999.0, 1.0, 1.0), "cases": 6},
    "micro": {"shape": (6, 10, 12), "spacing": (3.0, 1.0, 1.0), "cases": 6},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def stock_lists_files_in_threads(monkeypatch: pytest.MonkeyPatch):
    """Stock nnU-Net forks twelve processes to list the files of a dataset."""
    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fingerprint, "SAMPLED_VOXELS", 5_000)


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def fingerprinted(nnunet_folders: Path) -> Callable[..., str]:
    """Makes a dataset of one empty image whose fingerprint tells of many cases."""

    def make(kind: str, channels: dict[str, str] | None = None, **dataset_json: Any) -> str:
        facts = FINGERPRINTS[kind]
        name = "Dataset701_Planned"
        raw = nnunet_folders / "raw" / name
        content = {
            "channel_names": channels or {"0": "CT" if kind == "isotropic_ct" else "MR"},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": facts["cases"],
            "file_ending": ".nii.gz",
        } | dataset_json
        write_case(raw, "case_0", np.zeros((4, 5, 6)), n_channels=len(content["channel_names"]))
        (raw / "dataset.json").write_text(json.dumps(content))
        statistics = dict.fromkeys(
            ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0
        )
        channels_there = range(len(content["channel_names"]))
        fingerprint = {
            "spacings": [facts["spacing"]] * facts["cases"],
            "shapes_after_crop": [facts["shape"]] * facts["cases"],
            "foreground_intensity_properties_per_channel": {
                str(channel): statistics for channel in channels_there
            },
            "median_relative_size_after_cropping": 1.0,
        }
        home = nnunet_folders / "preprocessed" / name
        home.mkdir()
        (home / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        return name

    return make


@pytest.fixture
def sphere_dataset(nnunet_folders: Path) -> str:
    """Makes five anisotropic cases of a bright sphere, of different odd shapes and spacings."""
    name = "Dataset702_Spheres"
    raw = nnunet_folders / "raw" / name
    generator = np.random.default_rng(7)
    for index in range(5):
        shape = (11 + index, 24 + index, 21)
        grid = np.indices(shape) - np.array(shape).reshape(3, 1, 1, 1) / 2
        sphere = (grid * np.array((2, 1, 1)).reshape(3, 1, 1, 1)) ** 2
        label = (sphere.sum(0) < 49).astype(np.uint8)
        image = label * 3.0 + generator.normal(size=shape)
        write_case(raw, f"case_{index}", image, label, spacing=(2.0 + 0.1 * index, 1.0, 1.0))
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "sphere": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    return name


def write_case(
    raw: Path,
    name: str,
    image: np.ndarray,
    label: np.ndarray | None = None,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    n_channels: int = 1,
) -> None:
    """Writes an image (z, y, x) per channel and its label, zeros by default; spacing (z, y, x)."""
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    label = np.zeros(image.shape, np.uint8) if label is None else label
    files = {raw / "labelsTr" / f"{name}.nii.gz": label.astype(np.uint8)}
    for channel in range(n_channels):
        files[raw / "imagesTr" / f"{name}_{channel:04d}.nii.gz"] = image.astype(np.float32)
    for path, array in files.items():
        content = SimpleITK.GetImageFromArray(array)
        content.SetSpacing(spacing[::-1])
        SimpleITK.WriteImage(content, str(path))
