"""Tests of what `umamba train` refuses to begin over, and of what --restart removes."""

import json
from pathlib import Path

import pytest

from umamba.cli.main import main
from umamba.cli.train import check_same_plan, remove_training

PART = {"architecture": "a", "patch_size": [8, 8], "batch_size": 2}


@pytest.fixture
def model(tmp_path) -> Path:
    """A model folder with the plans and one trained and validated fold."""
    (tmp_path / "plans.json").write_text(json.dumps({"configurations": {"2d": PART}}))
    for name in ("checkpoint_final.pth", "checkpoint_best.pth", "validation/summary.json"):
        file = tmp_path / "fold_0" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path


def files_in(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("key", "value"), [("patch_size", [16, 8]), ("recipe", {"seed": 1})])
def test_folds_of_other_plans_do_not_share_a_model_folder(model, key, value):
    other = {"configurations": {"2d": PART | {key: value}}}
    for restart in (False, True):
        check_same_plan(model / "fold_1", {"configurations": {"2d": PART}}, "2d", restart)
        with pytest.raises(ValueError, match=f"fold_0 holds .* another {key}: .* remove that"):
            check_same_plan(model / "fold_1", other, "2d", restart)
    with pytest.raises(ValueError, match=f"fold_0 holds .* another {key}: .* --restart"):
        check_same_plan(model / "fold_0", other, "2d", restart=False)
    check_same_plan(model / "fold_0", other, "2d", restart=True)


def test_restart_removes_checkpoints_and_the_results_of_their_validation(model):
    remove_training(model / "fold_0", None)
    assert files_in(model) == {"plans.json"}
    remove_training(model / "fold_0", None)


def test_restart_does_not_remove_the_checkpoint_to_start_from(model):
    before = files_in(model)
    start = model / "fold_0" / ".." / "fold_0" / "checkpoint_best.pth"
    with pytest.raises(ValueError, match=r"would remove .*best\.pth: copy it"):
        remove_training(model / "fold_0", str(start))
    assert files_in(model) == before


def test_restart_and_val_exclude_each_other(capsys):
    assert main(["train", "1", "2d", "0", "--restart", "--val"]) == 2
    assert "give one of them" in capsys.readouterr().err
