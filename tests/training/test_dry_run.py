"""A step of training on noise: every kind of labels, the recipe's loss, and nothing left behind."""

import copy
import os

import pytest

from umamba.training.dry_run import DryRun

LABELS = {
    "labels": {"background": 0, "a": 1, "b": 2},
    "regions and an ignore label": {"background": 0, "ab": [1, 2], "b": 2, "ignore": 3},
}


def plans_of(recipe: dict) -> dict:
    """Plans of a small 2D network."""
    strides = [[1, 1], [2, 2], [2, 2]]
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "batch_size": 2,
        "patch_size": [16, 24],
        "spacing": [1.0, 1.0],
        "batch_dice": True,
        "architecture": {
            "network_class_name": "umamba.networks.umamba.UMambaBot",
            "arch_kwargs": {"strides": strides, "features_per_stage": [4, 8, 8]},
            "_kw_requires_import": [],
        },
        "recipe": recipe,
    }
    return {
        "dataset_name": "Dataset999_None",
        "plans_name": "umamba_bot",
        "label_manager": "LabelManager",
        "configurations": {"2d": configuration},
    }


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(
    "recipe",
    [{}, {"loss": "dice_ce_all", "optimizer": "adamw", "enable_deep_supervision": False}],
    ids=["stock", "own"],
)
def test_a_step_is_run_and_nothing_is_left(kind, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    content = {"channel_names": {"0": "MR", "1": "CT"}, "file_ending": ".nii.gz"}
    if "regions" in kind:
        content["regions_class_order"] = [1, 2]
    plans = plans_of(recipe)
    before = copy.deepcopy(plans)
    step = DryRun(plans, "2d", content | {"labels": LABELS[kind]}, "cpu")
    assert step.image.shape == (2, 2, 16, 24)
    weights = copy.deepcopy(step.network.state_dict())
    assert step.run()
    assert any((weights[key] != value).any() for key, value in step.network.state_dict().items())
    assert plans == before
    assert list(tmp_path.iterdir()) == []
    assert os.environ["nnUNet_results"] == str(tmp_path / "results")
    assert "nnUNet_preprocessed" not in os.environ
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("one_thread")
def test_a_network_of_one_output_is_trained_without_deep_supervision():
    plans = plans_of({})
    part = plans["configurations"]["2d"]
    part |= {"patch_size": [16, 32, 16], "batch_size": 1, "spacing": [1.0] * 3}
    arguments = {
        "strides": [[1] * 3, *[[2] * 3] * 4],
        "features_per_stage": [4, 8, 8, 8, 8],
        "depths": [1] * 4,
    }
    part["architecture"]["network_class_name"] = "umamba.networks.segmamba.SegMamba"
    part["architecture"]["arch_kwargs"] = arguments
    content = {"channel_names": {"0": "MR"}, "labels": LABELS["labels"], "file_ending": ".nii.gz"}
    assert DryRun(plans, "2d", content, "cpu").run()
