"""`umamba plan`: arguments, what it prints, exit codes; the chain without training."""

import argparse
import json

import pytest
import torch

from umamba.cli import common
from umamba.cli import plan as plan_command
from umamba.cli.main import UsageError
from umamba.cli.train import check_start
from umamba.networks import get_entry
from umamba.networks.vmamba import VMambaClassifier, VMambaEncoder
from umamba.training.recipes import get_recipe


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan_command.add_parser(parser.add_subparsers())
    return parser.parse_args(["plan", *words])


def test_network_arguments_are_json_and_bare_words_are_text():
    words = ["d_state=32", "features-per-stage=[8, 16]", "mixer=conv", "expand=1.5"]
    words.append("kernel_sizes=null")
    assert plan_command.parse_network_args(words, get_entry("umamba_bot")) == {
        "d_state": 32,
        "features_per_stage": [8, 16],
        "mixer": "conv",
        "expand": 1.5,
        "kernel_sizes": None,
    }


@pytest.mark.parametrize("word", ["d_state", "=3", "strides=[[1,1]"])
def test_a_malformed_network_argument_is_a_usage_error(word):
    with pytest.raises(UsageError, match="--network-arg"):
        plan_command.parse_network_args([word], get_entry("umamba_bot"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--network", "umamba_bt"], "umamba_bot"),
        (["-c", "3d_fulres"], "did you mean 3d_fullres"),
        (["--network-arg", "d_stat=3"], "did you mean d_state"),
        (["--network-arg", "features_per_stage=8"], "a list of whole numbers"),
        (["--memory", "-1"], "gigabytes above 0"),
        (["--memory", "nan"], "gigabytes above 0"),
        (["-np", "0"], "at least 1"),
        (["-p", "audit"], "plans cannot be named audit"),
        (["-overwrite_target_spacing", "1", "1"], "three numbers"),
    ],
)
def test_wrong_names_are_usage_errors_before_the_data_are_touched(words, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        plan_command.run(parse(str(tmp_path / "nowhere"), *words))


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (["--network", "segmamba"], UsageError, "no ImageNet weights are published for segmamba"),
        (["--network", "swin_umamba"], FileNotFoundError, "vssmtiny_dp01_ckpt_epoch_292.pth"),
    ],
)
def test_pretrained_weights_that_are_not_there_stop_before_the_data_are_touched(
    words, kind, said, tmp_path, monkeypatch
):
    monkeypatch.setenv("UMAMBA_PRETRAINED", str(tmp_path / "weights"))
    with pytest.raises(kind, match=said):
        plan_command.run(parse(str(tmp_path / "nowhere"), *words, "--pretrained"))


def test_a_loss_for_labels_is_refused_on_regions():
    recipe = get_recipe("mamba_clinix_tversky")
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    dataset = argparse.Namespace(name="D", dataset_json={"labels": labels})
    with pytest.raises(UsageError, match="overlapping regions"):
        common.check_recipe(recipe, dataset)
    common.check_recipe(get_recipe("mamba_clinix"), dataset)
    dataset.dataset_json["labels"] = {"background": 0, "core": 1, "ignore": 2}
    common.check_recipe(recipe, dataset)


def test_pretrained_weights_that_cannot_be_read_stop_before_the_data_are_touched(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK")
    words = ["--network", "swin_umamba", "--pretrained", str(tmp_path / "cut.pth")]
    with pytest.raises(ValueError, match=r"cut\.pth is damaged"):
        plan_command.run(parse(str(tmp_path / "nowhere"), *words))


def test_pretrained_weights_enter_the_recipe_of_plans_of_their_own(
    sphere_dataset, nnunet_folders, capsys
):
    classifier = VMambaClassifier(VMambaEncoder(3, depths=(1,) * 4), 2)
    file = nnunet_folders / "weights.pth"
    torch.save(classifier.official_key_map().to_official(classifier.state_dict()), file)
    words = ("--network", "swin_umamba_d", "--network-arg", "depths=[1, 1, 1, 1]")
    words += ("--memory", "4", "--no-preprocess", "-p", "tuned", "--pretrained", str(file))
    assert plan_command.run(parse(sphere_dataset, *words)) == 0
    said = capsys.readouterr().out
    assert "tensors taken, 0 adapted" in said
    home = nnunet_folders / "preprocessed" / sphere_dataset
    plans = json.loads((home / "tuned.json").read_text())
    assert plans["configurations"]["2d"]["recipe"]["pretrained"] == str(file)
    assert plan_command.option_suffix(parse("x", "--pretrained")) == "_pretrained"
    assert plan_command.option_suffix(parse("x")) == ""


def test_recomputing_enters_the_recipe_and_gives_the_plans_another_name(
    sphere_dataset, nnunet_folders
):
    words = ("-c", "3d_fullres", "--memory", "2", "--no-preprocess", "--no-audit")
    assert plan_command.run(parse(sphere_dataset, *words, "--recompute", "mixer")) == 0
    home = nnunet_folders / "preprocessed" / sphere_dataset
    plans = json.loads((home / "umamba_bot_recompute.json").read_text())
    assert plans["configurations"]["3d_fullres"]["recipe"] == {"recompute": "mixer"}


def test_a_dataset_is_planned_checked_and_preprocessed(sphere_dataset, nnunet_folders, capsys):
    words = ("-c", "3d_fullres", "--memory", "2", "--check", "-device", "cpu")
    assert plan_command.run(parse(sphere_dataset, *words)) == 0
    said = capsys.readouterr().out
    home = nnunet_folders / "preprocessed" / sphere_dataset
    plans = json.loads((home / "umamba_bot.json").read_text())
    patch = "x".join(map(str, plans["configurations"]["3d_fullres"]["patch_size"]))
    assert f"patch {patch}" in said
    assert "the loss is finite" in said
    assert f"umamba train {sphere_dataset} 3d_fullres 0 -p umamba_bot" in said
    assert len(list((home / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 5


def test_a_step_that_does_not_fit_is_told_with_the_cure(monkeypatch):
    def check_plan(*arguments):
        raise MemoryError("CUDA out of memory")

    monkeypatch.setattr("umamba.planning.plans.check_plan", check_plan)
    configuration = {"planning": {"memory_gb": 24.0}}
    plans = {"plans_name": "large", "configurations": {"2d": configuration}}
    with pytest.raises(ValueError, match=r"CUDA out of memory.*--memory less than the 24 GB"):
        plan_command.check(plans, ["2d"], {}, "cpu")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recompute", "mixer"], "resenc_m has no mixers to recompute"),
        (["--pretrained"], "no ImageNet weights are published for resenc_m"),
        (["--recipe", "swin_umamba"], "freezes a pretrained encoder, and resenc_m has none"),
        (["--network-arg", "mixer=none"], "resenc_m has no argument 'mixer'"),
        (["--network-arg", "n_blocks_per_stage=2"], "a list of whole numbers"),
    ],
)
def test_what_a_network_of_nnunets_own_has_no_use_for_is_a_usage_error(words, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        plan_command.run(parse(str(tmp_path / "nowhere"), "--network", "resenc-m", *words))


def test_no_preprocess_stops_after_the_plans(sphere_dataset, nnunet_folders):
    words = (
        "-c",
        "2d",
        "--memory",
        "2",
        "--no-preprocess",
        "--no-audit",
        "--network",
        "umamba-enc",
    )
    assert plan_command.run(parse(sphere_dataset, *words)) == 0
    home = nnunet_folders / "preprocessed" / sphere_dataset
    assert (home / "umamba_enc.json").is_file()
    assert [path for path in home.iterdir() if path.is_dir()] == []


def test_a_file_that_is_no_checkpoint_is_no_start_of_a_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        check_start(tmp_path / "gone.pth")
    torch.save({"state_dict": {"w": torch.zeros(1)}}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="no network_weights"):
        check_start(tmp_path / "bare.pth")


def test_a_gpu_that_is_not_there_is_told_before_the_data_are_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device is visible"):
        plan_command.run(parse(str(tmp_path / "nowhere"), "-device", "cuda"))


@pytest.mark.parametrize(
    ("words", "device"),
    [([], None), (["-device", "cpu"], None), (["-device", "cuda:1"], "cuda:1"),
     (["-device", "cuda", "-np", "4"], None)],
)  # fmt: skip
def test_a_gpu_that_is_asked_for_resamples_unless_processes_do(words, device):
    assert common.preprocessing_device(parse("data", *words)) == device
