"""`umamba evaluate`: table, files, exit codes and sentences for wrong input."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from umamba.cli import evaluate


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    generator = np.random.default_rng(0)
    for folder in ("pred", "gt"):
        (tmp_path / folder).mkdir()
        for case in ("one", "two"):
            labels = generator.integers(0, 3, (5, 9, 7)).astype(np.uint8)
            image = SimpleITK.GetImageFromArray(labels)
            SimpleITK.WriteImage(image, str(tmp_path / folder / f"{case}.nii.gz"))
    return tmp_path / "pred", tmp_path / "gt"


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    evaluate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, words)])
    return int(args.run(args))


def test_labels_on_the_command_line_give_a_table_and_two_files(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(*folders, "--labels", "1", "1,2", "--tolerance", "1.5", "1=3", "-o", out) == 0
    printed = capsys.readouterr().out
    assert str(out / "summary.json") in printed
    assert "foreground mean" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rules"]["tolerance_mm"] == {"1": 3.0, "(1, 2)": 1.5}
    assert (out / "summary.csv").is_file()


def test_dataset_json_above_the_references_is_found(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = folders[1].parent / "dataset.json"
    file.write_text(json.dumps({"labels": {"background": 0, "liver": 2}, "file_ending": ".nii.gz"}))
    assert run(*folders) == 0
    assert "2 liver" in capsys.readouterr().out


def test_a_case_that_cannot_be_read_gives_exit_code_3_and_its_name(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[0] / "two.nii.gz").write_bytes(b"no image")
    assert run(*folders, "-l", 1) == 3
    assert "two.nii.gz" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "say which labels"),
        (["-l", "liver"], "give whole numbers"),
        (["-l", "1", "--tolerance", "wide"], "give mm as 1.5"),
        (["-djfile", "nowhere.json"], "nowhere.json"),
        (["-l", "1", "--file-ending", ".mha"], "no reference"),
    ],
    ids=["no labels", "label by name", "tolerance in words", "no dataset.json", "other ending"],
)
def test_wrong_arguments_are_answered_by_one_sentence(
    folders: tuple[Path, Path], words: list[str], sentence: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        run(*folders, *words)
