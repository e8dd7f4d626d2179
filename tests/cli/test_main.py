"""Tests of the `umamba` command itself: errors in one sentence, a quick end by signals."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from umamba.cli import env
from umamba.cli.common import UsageError
from umamba.cli.main import main
from umamba.files import OutputError

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys, threading, time
from pathlib import Path
from umamba.cli import env, main
from umamba.files import replacing

def run(args):
    with replacing(Path(sys.argv[1])) as temporary:
        temporary.write_text("half")
        {body}

main.GRACE = 0.3
env.run = run
sys.exit(main.main(["env"]))
"""


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (ValueError("a is b: do c"), 1, "error: a is b: do c"),
        (UsageError("give -i"), 2, "error: give -i"),
        (OutputError("x cannot be written: why"), 1, "error: x cannot be written: why"),
        (PermissionError(13, "Permission denied", "/a/b"), 1, "error: /a/b: permission denied"),
        (IsADirectoryError(21, "Is a directory", "/a/b"), 1, "error: /a/b: is a directory"),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), 1, "error: /a: no space is left "
         "on its disk; free some or choose another place"),
        (KeyError("x"), 1, "error: KeyError: 'x'\n(the traceback: the same command with --debug)"),
        (KeyboardInterrupt(), 1, "\nstopped; run the same command again to continue"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)  # fmt: skip
def test_an_error_is_one_sentence(monkeypatch, capsys, error, code, expected):
    def run(args):
        raise error

    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == code
    assert capsys.readouterr().err == expected + "\n"


def test_handlers_of_signals_are_put_back(monkeypatch):
    monkeypatch.setattr(env, "run", lambda args: 0)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main(["env"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_reader_of_the_output_that_ends_first_is_no_error():
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "umamba.cli.main", "env"]
    done = subprocess.run(
        words, stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_command_ends_with_its_code_after_all_that_was_to_be_done():
    """Although the process is not taken apart: exit handlers run, threads are waited for."""
    body = """
        import atexit, threading, time
        from umamba.cli import env, main
        def run(args):
            atexit.register(lambda: print("handler"))
            threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
            print("command")
            return 3
        env.run = run
        main.run_and_leave()"""
    words = [sys.executable, "-c", textwrap.dedent(body), "env"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (3, "command\nthread\nhandler\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    words = [sys.executable, "-m", "umamba.cli.main", "env"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space is left") and done.stderr.count("\n") == 1


STUCK = "threading.Thread(target=time.sleep, args=(60,)).start()"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("busy", ["pass", STUCK], ids=["idle", "stuck thread"])
def test_a_signal_ends_the_command_soon_and_leaves_nothing_half_written(tmp_path, number, busy):
    body = f"{busy}; print('ready', flush=True); time.sleep(60)"
    code, errors, took = end(tmp_path, body, number)
    assert code == 1
    assert took < 5
    assert errors == "\nstopped; run the same command again to continue\n"
    assert list(tmp_path.iterdir()) == []


def test_an_error_that_follows_from_a_signal_is_not_told_as_one(tmp_path):
    body = """
        print('ready', flush=True)
        try:
            time.sleep(60)
        except KeyboardInterrupt:  # as the import of some libraries does
            raise RecursionError"""
    code, errors, _ = end(tmp_path, body, signal.SIGINT)
    assert (code, errors) == (1, "\nstopped; run the same command again to continue\n")


def test_a_stop_before_the_command_begins_is_said_in_the_same_words(monkeypatch, capsys):
    def build_parser():
        raise KeyboardInterrupt

    monkeypatch.setattr("umamba.cli.main.build_parser", build_parser)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "\nstopped; run the same command again to continue\n"


def test_a_second_signal_ends_the_command_at_once(tmp_path):
    body = """
        main.GRACE = 60
        print('ready', flush=True)
        try:
            time.sleep(60)
        finally:
            time.sleep(60)"""
    code, _, took = end(tmp_path, body, signal.SIGTERM, signal.SIGTERM)
    assert code == 1
    assert took < 5
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_is_ended_by_its_parent_without_a_word(tmp_path):
    body = """
        import multiprocessing
        child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.5)  # Python drops a signal that comes while it forks
        child.terminate()
        child.join()
        assert child.exitcode == -15
        print('ready', flush=True)
        time.sleep(60)"""
    _, errors, _ = end(tmp_path, body, signal.SIGTERM)
    assert errors == "\nstopped; run the same command again to continue\n"


def end(tmp_path, body, *signals):
    """Starts a command, sends it the signals when it is ready; (code, errors, seconds)."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body), str(tmp_path / "a.txt")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    started = time.monotonic()
    for number in signals:
        process.send_signal(number)
        time.sleep(0.3)
    try:
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, errors, time.monotonic() - started
