"""Tests of `umamba predict`: arguments, exit codes, outputs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from umamba.cli import predict
from umamba.cli.main import UsageError
from umamba.networks import precision

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from model_folders import (
    make_dataset_json,
    make_model_folder,
    make_plans,
    read_array,
    write_cases,
    write_nifti,
)

SHAPES = {"a": (5, 12, 13), "b": (4, 9, 17), "c": (6, 10, 8)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model") / "m", folds=(0, 1))


@pytest.fixture
def images(tmp_path):
    return write_cases(tmp_path / "images", SHAPES)


def call(*words):
    parser = argparse.ArgumentParser()
    predict.add_parser(parser.add_subparsers())
    args = parser.parse_args(
        ["predict", *map(str, words), "-device", "cpu", "--disable_progress_bar"]
    )
    return args.run(args)


def test_folder_is_predicted_with_nnunets_side_files(model, images, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("-m", model, "-i", images, "-o", out, "-f", 0, "--disable_tta") == 0
    assert {p.name for p in out.iterdir()} == {
        "a.nii.gz", "b.nii.gz", "c.nii.gz",
        "dataset.json", "plans.json", "predict_from_raw_data_args.json",
    }  # fmt: skip
    assert read_array(out / "a.nii.gz").shape == SHAPES["a"]
    assert json.loads((out / "plans.json").read_text())["plans_name"] == "tiny"
    assert json.loads((out / "predict_from_raw_data_args.json").read_text())["folds"] == [0]
    assert "3 of 3 cases predicted" in capsys.readouterr().out


def test_single_file_is_predicted_into_a_single_file(model, images, tmp_path):
    out = tmp_path / "new" / "label.nii.gz"
    assert call("-m", model, "-i", images / "b_0000.nii.gz", "-o", out) == 0
    assert [p.name for p in out.parent.iterdir()] == ["label.nii.gz"]
    assert read_array(out).shape == SHAPES["b"]


def test_channels_of_one_case_are_given_one_after_the_other(tmp_path):
    model = make_model_folder(tmp_path / "m", make_plans(n_channels=2), make_dataset_json(2))
    images = write_cases(tmp_path / "images", {"a": SHAPES["a"]}, n_channels=2)
    files = sorted(images.iterdir())
    assert call("-m", model, "-i", *files, "-o", tmp_path / "out") == 0
    assert call("-m", model, "-i", images, "-o", tmp_path / "out2") == 0
    first, second = (read_array(tmp_path / o / "a.nii.gz") for o in ("out", "out2"))
    assert np.array_equal(first, second)


def test_missing_channel_is_named(tmp_path, capsys):
    model = make_model_folder(tmp_path / "m", make_plans(n_channels=2), make_dataset_json(2))
    images = write_cases(tmp_path / "images", {"a": SHAPES["a"], "b": SHAPES["b"]}, n_channels=2)
    (images / "b_0001.nii.gz").unlink()
    assert call("-m", model, "-i", images, "-o", tmp_path / "out") == 3
    assert "b_0000.nii.gz" in capsys.readouterr().err


def test_parts_predict_their_own_cases(model, images, tmp_path):
    out = tmp_path / "out"
    assert call("-m", model, "-i", images, "-o", out, "-num_parts", 2, "-part_id", 1) == 0
    assert [p.name for p in out.glob("*.nii.gz")] == ["b.nii.gz"]


def test_exact_arithmetic_and_float32_agree_on_most_voxels(model, images, tmp_path):
    assert call("-m", model, "-i", images, "-o", tmp_path / "ours") == 0
    assert call("-m", model, "-i", images, "-o", tmp_path / "exact", "--nnunet-exact") == 0
    for name in SHAPES:
        ours, exact = (read_array(tmp_path / o / f"{name}.nii.gz") for o in ("ours", "exact"))
        assert (ours != exact).mean() < 0.1


@pytest.mark.parametrize("has", [True, False])
def test_bfloat16_is_hinted_at_where_it_would_help_and_was_not_chosen(
    model, images, tmp_path, monkeypatch, capsys, has
):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: has)
    out = tmp_path / "out"
    words = ("-m", model, "-i", images, "-o", out, "-f", 0, "--disable_tta")
    hint = "This processor computes bfloat16: with --precision bfloat16"
    assert call(*words) == 0
    assert (hint in capsys.readouterr().out) is has
    for more in (["--precision", "float32"], ["--nnunet-exact"], ["--continue"]):
        assert call(*words, *more) == 0
        assert "This processor" not in capsys.readouterr().out


def test_the_precision_asked_for_is_used_and_written_down(
    model, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: False)
    out = tmp_path / "out"
    words = ("-m", model, "-i", images, "-o", out, "--precision", "bfloat16")
    with pytest.raises(UsageError, match="this processor does not compute bfloat16"):
        call(*words)
    assert not out.exists()
    monkeypatch.setattr(precision, "computes_bfloat16", lambda device: True)
    seen = []
    monkeypatch.setattr(
        "umamba.inference.predictor.autocast",
        lambda *how: seen.append(how[-1]) or precision.autocast(*how),
    )
    assert call(*words) == 0
    assert set(seen) == {"bfloat16"}
    assert "This processor" not in capsys.readouterr().out
    settings = json.loads((out / "predict_from_raw_data_args.json").read_text())
    assert settings["precision"] == "bfloat16"


def test_images_in_two_dimensions_keep_their_format(tmp_path):
    plans = make_plans(patch_size=(16, 12), spacing=(1.0, 1.0), reader="NaturalImage2DIO")
    model = make_model_folder(
        tmp_path / "m", plans, make_dataset_json(ending=".png"), mirror_axes=(0, 1)
    )
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(1, 255, (33, 21)).astype(np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels), str(images / "p_0000.png"))
    assert call("-m", model, "-i", images, "-o", tmp_path / "out") == 0
    assert read_array(tmp_path / "out" / "p.png").shape == (33, 21)


def test_an_output_that_is_another_file_is_a_usage_error(model, images, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.txt is a file; give a folder"):
        call("-m", model, "-i", images, "-o", tmp_path / "notes.txt")


def test_a_color_picture_needs_no_channel_number(tmp_path):
    plans = make_plans(
        n_channels=3, patch_size=(16, 12), spacing=(1.0, 1.0), reader="NaturalImage2DIO"
    )
    model = make_model_folder(
        tmp_path / "m", plans, make_dataset_json(3, ending=".png"), mirror_axes=(0, 1)
    )
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(1, 255, (33, 21, 3)).astype(np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=True), str(images / "p.png"))
    assert call("-m", model, "-i", images, "-o", tmp_path / "out") == 0
    assert read_array(tmp_path / "out" / "p.png").shape == (33, 21)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["-f", "3"], "fold 3 .*: 0, 1"),
        (["-f", "best"], "-f takes fold numbers"),
        (["-chk", "checkpoint_best.pth"], r"checkpoint_best\.pth.*checkpoint_final\.pth"),
        (["-step_size", "1.5"], "-step_size"),
        (["-num_parts", "2", "-part_id", "2"], "-part_id must be 0 to 1"),
        (["--skip-empty", "--nnunet-exact"], "leave out --skip-empty"),
        (["--precision", "bfloat16", "--nnunet-exact"], "leave out --precision bfloat16"),
        (["-device", "cpu", "--max-vram", "4G"], "--max-vram is for GPUs"),
    ],
    ids=[
        "fold",
        "fold name",
        "checkpoint",
        "step",
        "part",
        "skip and exact",
        "precision",
        "no GPU",
    ],
)
def test_wrong_names_and_numbers_are_usage_errors(model, images, tmp_path, words, match):
    with pytest.raises(UsageError, match=match):
        call("-m", model, "-i", images, "-o", tmp_path / "out", *words)


def test_cascade_asks_for_the_first_stage(images, tmp_path, capsys):
    plans = make_plans(configuration="3d_cascade_fullres")
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    model = make_model_folder(tmp_path / "m", plans)
    words = ("-m", model, "-i", images, "-o", tmp_path / "out")
    with pytest.raises(ValueError, match="3d_lowres first"):
        call(*words)
    empty = tmp_path / "low"
    empty.mkdir()
    assert call(*words, "-prev_stage_predictions", empty) == 1
    assert "a.nii.gz of the first stage is missing" in capsys.readouterr().err


def test_a_label_map_of_the_first_stage_that_does_not_fit_is_named(images, tmp_path, capsys):
    plans = make_plans(configuration="3d_cascade_fullres")
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    model, low, spacing = (
        make_model_folder(tmp_path / "m", plans),
        tmp_path / "low",
        (3.0, 0.8, 1.3),
    )
    write_nifti(low / "a.nii.gz", np.zeros(SHAPES["a"], np.uint8), (3.0, 0.8, 1.0))
    write_nifti(low / "b.nii.gz", np.full(SHAPES["b"], 7, np.uint8), spacing)
    write_nifti(low / "c.nii.gz", np.ones(SHAPES["c"], np.uint8), spacing)
    words = ("-m", model, "-i", images, "-o", tmp_path / "out")
    assert call(*words, "-prev_stage_predictions", low) == 3
    errors = capsys.readouterr().err
    assert f"a: {low / 'a.nii.gz'} has spacing (3, 0.8, 1) mm" in errors.replace(".gz:", ".gz")
    assert f"b: {low / 'b.nii.gz'} holds label value(s) 7" in errors.replace(".gz:", ".gz")
    assert [p.name for p in (tmp_path / "out").glob("*.nii.gz")] == ["c.nii.gz"]


def test_importing_the_command_loads_nothing_heavy():
    code = (
        "import argparse, sys; from umamba.cli import predict; "
        "predict.add_parser(argparse.ArgumentParser().add_subparsers()); "
        "print([m for m in ('torch', 'numpy', 'nnunetv2', 'SimpleITK') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
