"""Tests of what `umamba train` looks at before it starts: all cases there, splits of all cases."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from umamba.cli.train import check_preprocessed, check_splits


@pytest.fixture
def check(blob_folders, tmp_path, monkeypatch):
    """(the check of a copy of the preprocessed cases, the copy, the plans)."""
    root, plans, _ = blob_folders
    home = tmp_path / "preprocessed" / plans["dataset_name"]
    shutil.copytree(root / "preprocessed" / plans["dataset_name"], home)
    (home / "splits_final.json").unlink(missing_ok=True)
    monkeypatch.setenv("nnUNet_raw", str(root / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    plans = copy.deepcopy(plans)
    return lambda: check_preprocessed(plans, "3d_fullres", 0), home, plans


def folder_of(home: Path, plans: dict) -> Path:
    return home / plans["configurations"]["3d_fullres"]["data_identifier"]


def make_stock(home: Path, plans: dict) -> Path:
    """As stock nnU-Net leaves a preprocessed folder: nothing tells what it is of."""
    folder = folder_of(home, plans)
    folder.with_name(f"{folder.name}.stamp.json").unlink()
    return folder


def test_a_whole_folder_passes_also_stock_nnunets_and_without_the_raw_dataset(
    check, tmp_path, monkeypatch
):
    run, home, plans = check
    run()
    make_stock(home, plans)
    run()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nothing"))
    run()


@pytest.mark.parametrize("ending", [".b2nd", "_seg.b2nd", ".pkl"])
@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_a_half_preprocessed_folder_is_refused(check, ending, empty):
    run, home, plans = check
    file = folder_of(home, plans) / f"case_3{ending}"
    file.unlink()
    if empty:
        file.touch()
    with pytest.raises(ValueError, match="not of these plans and all cases"):
        run()
    make_stock(home, plans)
    with pytest.raises(ValueError, match="lacks 1 of 5 cases, case_3 among them"):
        run()


def test_without_the_raw_dataset_the_number_of_cases_tells(check, tmp_path, monkeypatch):
    run, home, plans = check
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "nothing"))
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        (folder_of(home, plans) / f"case_3{ending}").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 5 cases"):
        run()


def test_a_folder_of_other_plans_is_refused(check):
    run, _, plans = check
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="not of these plans"):
        run()


def test_a_missing_folder_is_refused(check):
    run, home, plans = check
    shutil.rmtree(folder_of(home, plans))
    with pytest.raises(ValueError, match="is missing"):
        run()


def five_folds(cases: list[str]) -> list[dict]:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    folds = generate_crossval_split(cases, seed=12345, n_splits=5)
    return [{part: list(map(str, keys)) for part, keys in fold.items()} for fold in folds]


CASES = [f"case_{index}" for index in range(5)]


@pytest.mark.parametrize(
    ("splits", "fault"),
    [
        (five_folds(CASES), None),
        (five_folds([*CASES, "case_9"]), "names case_9, which is no case"),
        ([{"train": CASES[:3], "val": CASES[3:4]}], None),
    ],
    ids=["of all cases", "of more cases", "written by hand"],
)
def test_splits_are_of_the_cases_that_are_there(check, capsys, splits, fault):
    run, home, _ = check
    (home / "splits_final.json").write_text(json.dumps(splits))
    if fault is None:
        run()
    else:
        with pytest.raises(ValueError, match=fault):
            run()
    assert ("leaves out 1 cases (case_4" in capsys.readouterr().out) == (len(splits) == 1)


def test_splits_that_were_drawn_from_fewer_cases_are_refused(tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(five_folds(CASES)))
    check_splits(file, set(CASES), 0)
    with pytest.raises(ValueError, match=r"drawn from fewer .* delete it"):
        check_splits(file, {*CASES, "case_5", "case_6"}, 0)


@pytest.mark.parametrize(
    ("fold", "note"),
    [
        (0, ""),
        (1, "trains fold 1 with cases that validate it (case_2 the first)"),
        (2, "has no fold 2: a fifth of all cases"),
    ],
)
def test_what_nnunet_tells_of_a_written_split_in_its_log_alone_is_said(
    tmp_path, capsys, fold, note
):
    file = tmp_path / "splits_final.json"
    splits = [{"train": CASES[:3], "val": CASES[3:]}, {"train": CASES[:3], "val": CASES[2:]}]
    file.write_text(json.dumps(splits))
    check_splits(file, set(CASES), fold)
    told = capsys.readouterr().out
    assert note in told and bool(told) == bool(note)


@pytest.mark.parametrize("content", [{"train": CASES}, [{"train": CASES}], [CASES], 5])
def test_a_file_that_holds_no_splits_is_refused(tmp_path, content):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"splits_final.json is no list of folds .* delete it"):
        check_splits(file, set(CASES), 0)
