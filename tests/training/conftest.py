"""A tiny planned and preprocessed dataset for the training tests."""

import copy
import json

import numpy as np
import pytest
import SimpleITK

from umamba.planning.fingerprint import fingerprint_dataset
from umamba.planning.planner import plan_dataset
from umamba.planning.plans import replan
from umamba.planning.preprocess import preprocess_dataset

NAME = "Dataset703_Blobs"


@pytest.fixture(scope="session")
def blob_folders(tmp_path_factory):
    """nnU-Net's folders with five preprocessed cases, each with a bright and a dark blob."""
    root = tmp_path_factory.mktemp("blobs")
    with pytest.MonkeyPatch.context() as patch:
        for part in ("raw", "preprocessed", "results"):
            (root / part).mkdir()
            patch.setenv(f"nnUNet_{part}", str(root / part))
        raw = root / "raw" / NAME
        (raw / "imagesTr").mkdir(parents=True)
        (raw / "labelsTr").mkdir()
        generator = np.random.default_rng(0)
        for index in range(5):
            shape = (14, 24 + index, 21)
            grid = np.indices(shape).astype(float)
            label = np.zeros(shape, np.uint8)
            for value, centre in ((1, (6, 8, 7)), (2, (8, 17, 14))):
                distance = sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True))
                label[distance < 18] = value
            image = np.choose(label, (0.0, 4.0, -4.0)) + generator.normal(size=shape)
            for array, file in (
                (image.astype(np.float32), raw / "imagesTr" / f"case_{index}_0000.nii.gz"),
                (label, raw / "labelsTr" / f"case_{index}.nii.gz"),
            ):
                SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(file))
        content = {
            "channel_names": {"0": "MR"},
            "labels": {"background": 0, "bright": 1, "dark": 2},
            "numTraining": 5,
            "file_ending": ".nii.gz",
        }
        (raw / "dataset.json").write_text(json.dumps(content))
        fingerprint_dataset(NAME, progress=False)
        plans = plan_dataset(NAME, configurations=["3d_fullres"], memory_gb=2)
        preprocess_dataset(NAME, plans["plans_name"], ["3d_fullres"], progress=False)
    return root, plans, content


@pytest.fixture
def blobs(blob_folders, tmp_path, monkeypatch):
    """(plans of a tiny network, dataset.json); results go to a folder of the test's own."""
    root, plans, content = blob_folders
    monkeypatch.setenv("nnUNet_raw", str(root / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(root / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    small = replan(
        copy.deepcopy(plans),
        "3d_fullres",
        batch_size=2,
        features_per_stage=[4, 8, 8, 8],
        recipe={
            "optimizer": "adamw",
            "initial_lr": 1e-2,
            "num_epochs": 2,
            "num_iterations_per_epoch": 3,
            "num_val_iterations_per_epoch": 1,
            "augmentation": "light",
            "seed": 0,
        },
    )
    return small, content
