"""Preprocessing that is killed at any file it writes ends, run again, as if it never had been."""

import os
import signal
from pathlib import Path

import pytest

from umamba.planning.fingerprint import fingerprint_dataset
from umamba.planning.planner import plan_dataset
from umamba.planning.plans import load_plans, plans_file
from umamba.planning.preprocess import folder_is_current, preprocess_dataset

CONFIGURATIONS = ["2d", "3d_fullres"]


def preprocess(dataset: str) -> dict[str, dict[str, bytes]]:
    folders = preprocess_dataset(dataset, "umamba_bot", CONFIGURATIONS, progress=False)
    return {
        name: {path.name: path.read_bytes() for path in folder.iterdir()}
        for name, folder in folders.items()
    }


def preprocess_until_killed(dataset: str, n_renames: int) -> int:
    """The signal that ended a forked process, which kills itself before one of its renames."""
    child = os.fork()
    if child == 0:
        done = 0
        rename = os.replace

        def rename_or_die(source: Path, target: Path) -> None:
            nonlocal done
            done += 1
            if done > n_renames:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = rename_or_die
        try:
            preprocess(dataset)
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the killed process is forked")
def test_killed_at_any_file_and_run_again_gives_what_an_uninterrupted_run_gives(
    sphere_dataset, nnunet_folders
):
    fingerprint_dataset(sphere_dataset, progress=False)
    plan_dataset(sphere_dataset, memory_gb=2, configurations=CONFIGURATIONS)
    plans = load_plans(plans_file(sphere_dataset, "umamba_bot"))
    expected = preprocess(sphere_dataset)
    home = nnunet_folders / "preprocessed" / sphere_dataset
    image = next((nnunet_folders / "raw" / sphere_dataset / "imagesTr").glob("case_2*"))
    killed = 0
    # 5 cases of 2 x 3 files, stamps and folders: every third rename, then from half-made folders
    for n_renames in range(0, 36, 3):
        os.utime(image)  # one case is to be made again, then all
        if n_renames % 2:
            for name in CONFIGURATIONS:
                (home / f"nnUNetPlans_{name}.stamp.json").write_text("{}")
                for path in (home / f"nnUNetPlans_{name}").iterdir():
                    path.unlink()
                (home / f"nnUNetPlans_{name}").rmdir()
        killed += preprocess_until_killed(sphere_dataset, n_renames) == signal.SIGKILL
        if killed:
            there = [name for name in CONFIGURATIONS if (home / f"nnUNetPlans_{name}").is_dir()]
            for name in there:
                if folder_is_current(sphere_dataset, plans, name):
                    files = (home / f"nnUNetPlans_{name}").iterdir()
                    assert {path.name: path.read_bytes() for path in files} == expected[name]
        assert preprocess(sphere_dataset) == expected
        assert not list(home.glob(".*"))
    assert killed >= 6
