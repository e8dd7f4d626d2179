"""Tests of the lock between commands: who holds it, who may share, and what a kill leaves."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from umamba.lock import InUseError, holding

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from umamba.lock import holding
sys.argv = ["umamba", "plan", "my data"]
with holding(Path({folder!r}), "planning"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    code = HOLDER.format(folder=str(tmp_path / "w"))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_is_told_at_once_who_holds_the_folder(holder, tmp_path):
    started = time.monotonic()
    with pytest.raises(InUseError) as caught, holding(tmp_path / "w", "training"):
        pass
    assert time.monotonic() - started < 1
    assert re.fullmatch(
        rf"{tmp_path}/w is in use \(planning: process {holder.pid} on \S+ since "
        r"[-0-9]+ [:0-9]+, umamba plan 'my data'\): wait until that has ended, or end it, and run "
        "this command again",
        str(caught.value),
    )


def test_a_killed_holder_holds_nobody_up(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with holding(tmp_path / "w", "training"):
        pass
    assert list((tmp_path / "w").iterdir()) == []


def test_the_lock_ends_with_its_block_and_leaves_no_file(tmp_path):
    for _ in range(2):
        with holding(tmp_path, "training"):
            assert len(list(tmp_path.iterdir())) == 1
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_the_lock_made_goes_with_it_unless_something_is_in_it(tmp_path):
    with holding(tmp_path / "w" / "out", "a test"):
        pass
    assert list((tmp_path / "w").iterdir()) == []
    with holding(tmp_path / "out", "a test"):
        (tmp_path / "out" / "result").touch()
    assert (tmp_path / "out" / "result").is_file()


def test_other_parts_share_the_folder(tmp_path):
    with (
        holding(tmp_path, "prediction", part=0),
        holding(tmp_path, "prediction", part=1),
        pytest.raises(InUseError),
        holding(tmp_path, "prediction", part=1),
    ):
        pass


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_that_outlives_its_parents_block_keeps_no_lock(tmp_path):
    fork = multiprocessing.get_context("fork")
    with holding(tmp_path, "training"):
        child = fork.Process(target=time.sleep, args=(30,))
        child.start()
    with holding(tmp_path, "training"):
        pass
    child.kill()
    child.join()


def hold_as_another_user(folder: Path) -> str:
    """What a process of another user prints that asks for a folder."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    code = (
        "import os, sys; from pathlib import Path; from umamba.lock import InUseError, holding\n"
        "os.chdir(sys.argv[1]); os.setuid(65534)\n"
        "try:\n"
        "    with holding(Path(), 'training'): print('went on')\n"
        "except InUseError as error: print(error)"
    )
    words = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_a_folder_that_cannot_be_written_is_not_locked(tmp_path):
    assert hold_as_another_user(tmp_path) == "went on\n"


def test_users_who_share_a_folder_notice_each_other(holder, tmp_path):
    (tmp_path / "w").chmod(0o777)
    assert f"is in use (planning: process {holder.pid}" in hold_as_another_user(tmp_path / "w")
