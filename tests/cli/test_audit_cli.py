"""`umamba audit` and `umamba env`: exit codes, what is printed, what is written."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from umamba.cli import audit, env

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@pytest.fixture
def dataset(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        for kind in ("images", "labels"):
            array = np.random.default_rng(i).integers(0, 2, (5, 7, 6)).astype(np.uint8)
            path = tmp_path / "my knees" / kind / f"k{i}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
    return tmp_path / "my knees"


def call(module, *words: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    args = parser.parse_args(words)
    return args.run(args)


def test_a_clean_dataset_exits_with_0_and_shows_what_was_read(dataset, capsys):
    assert call(audit, "audit", str(dataset)) == 0
    printed = capsys.readouterr().out
    assert str(dataset / "umamba-work") in printed
    assert "2 cases, no fault" in printed
    assert "foreground" in printed


def test_faults_exit_with_1_and_are_printed_and_written_with_their_cures(dataset, capsys, tmp_path):
    (dataset / "images" / "k0.nii.gz").write_bytes(b"")
    (dataset / "labels" / "k1.nii.gz").unlink()
    assert call(audit, "audit", str(dataset), "--json", str(tmp_path / "out.json")) == 1
    printed = capsys.readouterr().out
    assert "2 faults in" in printed
    assert "cure: " in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert {Path(fault["file"]).name for fault in written["faults"]} == {"k0.nii.gz", "k1.nii.gz"}


def test_the_place_of_the_json_file_must_exist(dataset):
    with pytest.raises(FileNotFoundError, match="no folder"):
        call(audit, "audit", str(dataset), "--json", "nowhere/out.json")


def test_env_prints_lines_a_shell_understands(dataset, capsys):
    assert call(env, "env", str(dataset)) == 0
    words = shlex.split(capsys.readouterr().out)
    values = dict(word.split("=", 1) for word in words if word != "export")
    assert values["nnUNet_raw"] == str(dataset / "umamba-work" / "raw")
    assert list(values) == [*VARIABLES, "nnUNet_extTrainer"]
    assert Path(values["nnUNet_extTrainer"]).parts[-3:] == ("umamba", "training", "nnunet_trainers")


def test_env_makes_no_folder_and_refuses_a_missing_one(dataset):
    call(env, "env", str(dataset))
    assert not (dataset / "umamba-work").exists()
    with pytest.raises(FileNotFoundError, match="no folder"):
        call(env, "env", "./nowhere")


def test_importing_the_commands_imports_nothing_heavy():
    code = (
        "import sys, umamba.cli.audit, umamba.cli.env;"
        "print([m for m in ('torch', 'numpy', 'SimpleITK', 'nibabel') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
