"""Tests of reading a model folder: folds, checkpoints, network."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from model_folders import make_dataset_json, make_model_folder, make_plans

from umamba.inference.model_folder import (
    UnknownFoldError,
    available_folds,
    find_model_folder,
    read_checkpoint,
    select_folds,
)
from umamba.inference.predictor import UMambaPredictor

FINAL = "checkpoint_final.pth"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "m", folds=(0, 2, "all"))


@pytest.fixture
def predictor():
    return UMambaPredictor(device=torch.device("cpu"))


def test_model_folder_is_found_at_below_and_above_the_path(tmp_path):
    folder = make_model_folder(tmp_path / "results" / "Dataset999_Tiny" / "T__tiny__3d_fullres")
    for path in (folder, folder / "fold_0", tmp_path, tmp_path / "results"):
        assert find_model_folder(path) == folder


def test_several_model_folders_are_listed(tmp_path):
    for name in ("a", "b"):
        make_model_folder(tmp_path / name)
    with pytest.raises(ValueError, match=r"several.*/a, .*/b"):
        find_model_folder(tmp_path)


def test_folder_without_a_network_says_what_a_model_folder_has(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"plans\.json"):
        find_model_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_model_folder(tmp_path / "nowhere")


def test_folds_default_to_all_numbered_ones(trained):
    assert available_folds(trained, FINAL) == [0, 2, "all"]
    assert select_folds(trained, None, FINAL) == (0, 2)
    assert select_folds(trained, ["all"], FINAL) == ("all",)


def test_missing_fold_names_the_folds_that_exist(trained):
    with pytest.raises(UnknownFoldError, match=r"fold 1, 4 .* that have it: 0, 2, all"):
        select_folds(trained, [0, 1, 4], FINAL)


def test_missing_checkpoint_names_the_checkpoints_that_exist(tmp_path):
    folder = make_model_folder(tmp_path / "m", checkpoint_name="checkpoint_best.pth")
    with pytest.raises(UnknownFoldError, match=r"there are checkpoint_best\.pth.*-chk"):
        select_folds(folder, None, FINAL)


def test_checkpoint_with_numpy_numbers_of_the_log_is_read_safely(trained):
    checkpoint = read_checkpoint(trained / "fold_0" / FINAL)
    assert checkpoint["logging"]["mean_fg_dice"] == [0.5, 0.25]


def test_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return print, ("executed",)

    file = tmp_path / FINAL
    torch.save({"network_weights": {}, "init_args": Harmful()}, file)
    with pytest.raises(ValueError, match=r"checkpoint_final\.pth .*other than tensors"):
        read_checkpoint(file)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_truncated_checkpoint_is_named(trained, tmp_path, share):
    whole = (trained / "fold_0" / FINAL).read_bytes()
    file = tmp_path / FINAL
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"checkpoint_final\.pth .*copy it again"):
        read_checkpoint(file)


def test_file_that_is_no_training_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / FINAL)
    with pytest.raises(ValueError, match="umamba models import"):
        read_checkpoint(tmp_path / FINAL)
    (tmp_path / FINAL).write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"checkpoint_final\.pth"):
        read_checkpoint(tmp_path / FINAL)


def test_checkpoint_of_another_network_is_one_sentence(predictor, trained, tmp_path):
    plans = make_plans()
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [4, 10]
    folder = make_model_folder(tmp_path / "m", plans)
    shutil.copy(trained / "fold_0" / FINAL, folder / "fold_0" / FINAL)
    with pytest.raises(ValueError, match=r"not written by the network .*PlainConvUNet.* another"):
        predictor.initialize_from_trained_model_folder(folder)


def test_network_that_is_not_installed_is_named(predictor, tmp_path):
    folder = make_model_folder(tmp_path / "m")
    plans = make_plans(class_path="nobodys_package.networks.Net")
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ValueError, match=r"nobodys_package\.networks\.Net.*not installed"):
        predictor.initialize_from_trained_model_folder(folder)


def test_configuration_that_the_plans_lack_is_named(predictor, tmp_path):
    folder = make_model_folder(tmp_path / "m")
    (folder / "plans.json").write_text(json.dumps(make_plans(configuration="3d_lowres")))
    with pytest.raises(ValueError, match=r"3d_fullres, which its plans\.json does not have"):
        predictor.initialize_from_trained_model_folder(folder)


def test_broken_plans_are_named(predictor, tmp_path):
    folder = make_model_folder(tmp_path / "m", dataset_json=make_dataset_json())
    (folder / "plans.json").write_text('{"configurations": ')
    with pytest.raises(ValueError, match=r"plans\.json is not valid JSON"):
        predictor.initialize_from_trained_model_folder(folder)
