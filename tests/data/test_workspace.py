"""The workspace: which place wins, and what is said when none can."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from umamba.data.workspace import VARIABLES, resolve_workspace


def set_variables(monkeypatch, folder: Path) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, str(folder / name))


def test_the_option_wins_over_everything(monkeypatch, tmp_path):
    set_variables(monkeypatch, tmp_path / "env")
    (tmp_path / "umamba.toml").write_text('workspace = "file"')
    assert resolve_workspace(tmp_path, "given").raw == tmp_path / "given" / "raw"


def test_the_three_variables_win_over_a_file(monkeypatch, tmp_path):
    set_variables(monkeypatch, tmp_path / "env")
    (tmp_path / "umamba.toml").write_text('workspace = "file"')
    found = resolve_workspace(tmp_path)
    assert found.raw == tmp_path / "env" / "nnUNet_raw"
    assert found.results == tmp_path / "env" / "nnUNet_results"


@pytest.mark.parametrize("missing", VARIABLES)
def test_two_of_three_variables_are_an_error_that_names_the_third(monkeypatch, tmp_path, missing):
    set_variables(monkeypatch, tmp_path)
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"{missing} is not"):
        resolve_workspace(tmp_path)


def test_a_file_above_the_dataset_is_found_and_read_relative_to_itself(tmp_path):
    dataset = tmp_path / "study" / "data"
    dataset.mkdir(parents=True)
    (tmp_path / "study" / "umamba.toml").write_text('workspace = "../work"')
    assert resolve_workspace(dataset).root == tmp_path / "work"


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "umamba.toml").write_text("workspace = ")
    with pytest.raises(ValueError, match=r"umamba\.toml is not valid TOML"):
        resolve_workspace(tmp_path)


def test_the_dataset_folder_is_the_default(tmp_path):
    assert resolve_workspace(tmp_path).root == tmp_path / "umamba-work"


def test_a_dataset_that_cannot_be_written_to_goes_to_the_current_folder(monkeypatch, tmp_path):
    dataset = tmp_path / "archive" / "Knees"
    dataset.mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda *args: False)
    found = resolve_workspace(dataset)
    assert found.root == tmp_path / "umamba-work" / "Knees"
    assert "cannot be written to" in found.describe()


def test_a_dataset_within_a_workspace_uses_that_workspace(tmp_path):
    place = resolve_workspace(None, tmp_path / "W").activate()
    dataset = place.raw / "Dataset007_X"
    dataset.mkdir()
    assert resolve_workspace(dataset).root == place.root


def test_resolving_makes_no_folder_and_activating_makes_three_and_sets_the_variables(tmp_path):
    place = resolve_workspace(None, tmp_path / "W")
    assert not place.root.exists()
    place.activate()
    for name in VARIABLES:
        assert Path(os.environ[name]).is_dir()


def test_a_workspace_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "W").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        resolve_workspace(None, tmp_path / "W")


def test_a_second_dataset_of_one_process_does_not_land_in_the_first_ones_workspace(tmp_path):
    resolve_workspace(None, tmp_path / "W").activate()
    assert resolve_workspace(None).raw == tmp_path / "W" / "raw"
    (tmp_path / "other").mkdir()
    assert resolve_workspace(tmp_path / "other").root == tmp_path / "other" / "umamba-work"


def test_the_users_own_variables_still_count_after_they_were_activated(monkeypatch, tmp_path):
    set_variables(monkeypatch, tmp_path / "env")
    resolve_workspace(tmp_path).activate()
    assert resolve_workspace(tmp_path).raw == tmp_path / "env" / "nnUNet_raw"
