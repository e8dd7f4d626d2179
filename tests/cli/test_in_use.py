"""Tests that a second command in one workspace ends at once and names the first."""

from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK

from umamba.cli.main import main
from umamba.lock import holding


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Bare images/ and labels/ of two small cases, with a workspace beside."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for name in "ab":
            array = np.random.default_rng(ord(name)).integers(0, 2, (6, 9, 9)).astype(np.uint8)
            file = tmp_path / "data" / part / f"{name}.nii.gz"
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(file))
    return tmp_path / "data"


def prepared(dataset):
    from umamba.data.dataset import prepare_dataset

    raw, workspace = prepare_dataset(str(dataset), None)
    return raw.name, workspace


@pytest.mark.parametrize("words", [["plan"], ["run", "--epochs", "1"]], ids=["plan", "run"])
def test_planning_waits_for_nobody_who_plans(dataset, capsys, words):
    name, workspace = prepared(dataset)
    with holding(workspace.preprocessed / name, "planning"):
        before = sorted(workspace.preprocessed.rglob("*"))
        assert main([words[0], str(dataset), *words[1:]]) == 1
        assert sorted(workspace.preprocessed.rglob("*")) == before
    error = capsys.readouterr().err
    assert f"{workspace.preprocessed / name} is in use (planning: process " in error
    assert "Traceback" not in error


def test_a_fold_is_trained_by_one_process_and_restart_removes_nothing_of_another(dataset, capsys):
    name, workspace = prepared(dataset)
    home = workspace.preprocessed / name
    home.mkdir(parents=True)
    plans = {"plans_name": "p", "dataset_name": name, "configurations": {"2d": {}}}
    plans |= {"image_reader_writer": "SimpleITKIO", "transpose_forward": [0, 1, 2]}
    (home / "p.json").write_text(json.dumps(plans))
    (home / "dataset.json").write_text("{}")
    fold = workspace.results / name / "UMambaTrainer__p__2d" / "fold_0"
    with holding(fold, "training"):
        (fold / "checkpoint_latest.pth").write_text("of the other")
        words = ["train", str(dataset), "2d", "0", "-p", "p", "--restart", "-device", "cpu"]
        assert main(words) == 1
        assert (fold / "checkpoint_latest.pth").read_text() == "of the other"
    assert f"{fold} is in use (training: process " in capsys.readouterr().err
