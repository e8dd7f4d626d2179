"""Tests of `umamba run` and the main command: the chain, budgets, and wrong names."""

import gc
import json
import shlex
import time

import numpy as np
import pytest
import SimpleITK

from umamba.cli.main import COMMANDS, build_parser, main
from umamba.cli.run import command_without_budget
from umamba.preprocessing.case_store import CaseStore

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Bare images/ and labels/ of five small cases, and no variable of nnU-Net's."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    data = tmp_path / "My Data"
    for part in ("images", "labels"):
        (data / part).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(5):
        label = np.zeros((12, 18 + index, 17), np.uint8)
        label[3:8, 5:12, 4:11] = 1
        image = (label * 4 + generator.normal(size=label.shape)).astype(np.float32)
        for array, part in ((image, "images"), (label, "labels")):
            SimpleITK.WriteImage(
                SimpleITK.GetImageFromArray(array), str(data / part / f"p {index}.nii.gz")
            )
    return data


def test_every_command_has_help(capsys):
    parser = build_parser()
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([command, "--help"])
        assert stop.value.code == 0
        assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--network", "umamba_bott"], "umamba_bot"),
        (["--recipe", "swin_umanba"], "did you mean swin_umamba"),
        (["-f", "seven"], "0, 1, 2, 3, 4 or all"),
        (["--minutes", "5", "--epochs", "3"], "exclude each other"),
        (["--minutes", "0.1"], "too short"),
        (["--memory", "-1"], "gigabytes above 0"),
    ],
)
def test_wrong_words_are_usage_errors_before_any_work(folder, capsys, words, part):
    assert main(["run", str(folder), *words]) == 2
    assert part in capsys.readouterr().err
    assert not (folder / "umamba-work").exists()


def test_missing_pretrained_weights_stop_before_the_data_are_read(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("UMAMBA_PRETRAINED", str(tmp_path / "weights"))
    words = ["run", str(folder), "--network", "swin_umamba_d", "--minutes", "5", "--pretrained"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "vssmtiny_dp01_ckpt_epoch_292.pth" in error
    assert "umamba models fetch vssm_tiny" in error
    assert main([*words[:3], "umamba_bot", *words[4:]]) == 2
    assert not (folder / "umamba-work").exists()


def test_a_missing_dataset_is_one_sentence(tmp_path, capsys):
    assert main(["run", str(tmp_path / "nowhere"), "--minutes", "5"]) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "Traceback" not in error


def test_all_faults_of_a_dataset_are_listed_at_once(folder, capsys):
    whole = (folder / "images" / "p 1.nii.gz").read_bytes()
    (folder / "images" / "p 1.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "labels" / "p 3.nii.gz").write_bytes(b"")
    assert main(["run", str(folder), "--minutes", "5"]) == 1
    error = capsys.readouterr().err
    assert "p 1" in error
    assert "p 3" in error


def test_training_gets_the_memory_and_the_time_that_planning_has_left(folder, monkeypatch):
    def fit_to_time(plans, configuration, **_):
        plans["configurations"][configuration]["recipe"]["train_seconds"] = 60.0
        return plans

    def settle_sampling(plans, *_):
        time.sleep(0.5)
        return plans

    def train(plans, _, configuration, *__):
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, CaseStore)]
        seconds = plans["configurations"][configuration]["recipe"]["train_seconds"]
        assert 10 < seconds <= 59.5
        raise ValueError("this is enough")

    monkeypatch.setattr("umamba.planning.budget.fit_to_time", fit_to_time)
    monkeypatch.setattr("umamba.cli.common.settle_sampling", settle_sampling)
    monkeypatch.setattr("umamba.cli.run.train", train)
    with pytest.raises(ValueError, match="this is enough"):
        main(["--debug", "run", str(folder), "--minutes", "5", "--memory", "2", "-device", "cpu"])


@pytest.mark.slow
def test_a_cpu_without_a_budget_gets_an_estimate_and_three_commands(folder, capsys):
    assert main(["run", str(folder), "-device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "days" in error
    assert error.count("umamba run") == 3


def test_the_commands_to_choose_from_are_the_one_given_with_a_budget():
    words = ["umamba", "run", "My Data", "--network", "swin_umamba", "--configuration", "2d"]
    words += ["--memory", "4.0", "--recompute", "mixer", "--workspace", "W S"]
    words += ["--network-arg", "d_state=8", "--fold", "all", "--pretrained"]
    args = build_parser().parse_args(words[1:])
    assert shlex.split(command_without_budget(args)) == words


@pytest.mark.slow
def test_an_unknown_configuration_names_the_nearest(folder, capsys):
    assert main(["run", str(folder), "--minutes", "5", "-c", "3d_fulres"]) == 2
    assert "3d_fullres" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_goes_in_and_a_validated_segmentation_comes_out(folder, tmp_path, capsys):
    words = ["run", str(folder), "--minutes", "1.5", "-device", "cpu"]
    assert main(words) == 0
    said = capsys.readouterr().out
    (fold,) = (folder / "umamba-work" / "results").glob("*/*/fold_0")
    summary = json.loads((fold / "validation" / "summary.json").read_text())
    assert summary["foreground_mean"]["Dice"] > 0.5
    assert (fold / "report.html").stat().st_size > 10_000
    assert "umamba predict -m" in said

    # The same command again finds everything done: it validates, reports, and trains nothing.
    log = (fold / "progress.jsonl").read_text()
    assert main(words) == 0
    assert (fold / "progress.jsonl").read_text() == log

    out = tmp_path / "out.nii.gz"
    image = folder / "images" / "p 2.nii.gz"
    assert (
        main(["predict", "-m", str(fold.parent), "-f", "0", "-i", str(image), "-o", str(out)]) == 0
    )
    shape = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(out))).shape
    assert shape == (12, 20, 17)
