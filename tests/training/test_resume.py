"""Tests of killed and resumed trainings: the same to the last bit, and nothing left running."""

import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.soak import members
from umamba.networks.checkpoint import read_checkpoint
from umamba.training import checkpoints, trainer
from umamba.training.checkpoints import BEST, FINAL, LATEST, PREVIOUS, find_checkpoint
from umamba.training.run import TrainingRun, fold_folder, train_fold
from umamba.training.trainer import UMambaTrainer

pytestmark = [
    pytest.mark.slow,
    # nnU-Net's logger takes the mean of Dice values of classes that a batch did not show.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TIMES = ("elapsed_s", "epoch_s")


@pytest.fixture
def plan(blobs, monkeypatch):
    """(plans, dataset.json) of four epochs of three iterations, a checkpoint after each epoch."""
    plans, content = blobs
    recipe = plans["configurations"]["3d_fullres"]["recipe"]
    recipe |= {"num_epochs": 4, "augmentation": "nnunet", "warmup": 0.2, "seed": 3}
    monkeypatch.setattr(trainer, "SAVE_EVERY_SECONDS", -1.0)
    return plans, content


def run_of(plan, results: Path, **options) -> TrainingRun:
    """A training whose results go to a folder of its own."""
    os.environ["nnUNet_results"] = str(results)
    return TrainingRun(plan[0], "3d_fullres", 0, plan[1], validator=lambda *_: None, **options)


def train(plan, results: Path) -> Path:
    """Trains, or goes on where a training in this folder stopped, as `umamba train` does."""
    folder = fold_folder(run_of(plan, results))
    found = find_checkpoint(folder)
    return train_fold(run_of(plan, results, checkpoint=found))


@pytest.fixture(scope="module")
def outcomes() -> dict:
    """Of trainings that several tests compare with."""
    return {}


@pytest.fixture
def whole(plan, tmp_path, outcomes, one_thread) -> dict:
    """The outcome of a training in one piece on one thread, which makes its own batches."""
    if not outcomes:
        outcomes |= outcome(train(plan, tmp_path / "whole"))
    return outcomes


@pytest.fixture
def train_and_die(plan, tmp_path, monkeypatch):
    """Trains in a process of its own session, which `die(trainer_module)` is to end; its id."""

    def run(results: Path, prepare) -> int:
        def child():
            os.setsid()
            torch.set_num_threads(1)  # OpenMP's threads are not there in a forked process
            prepare()
            train(plan, results)
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        return process.pid

    return run


def kill_self(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def outcome(folder: Path) -> dict:
    """All that a training leaves but for times."""
    lines = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    content = read_checkpoint(folder / FINAL)
    logging = content["logging"]
    curves = {key: repr(values) for key, values in logging.items() if "timestamps" not in key}
    own = content["umamba"]
    return {
        "progress": repr([{k: v for k, v in line.items() if k not in TIMES} for line in lines]),
        "curves": curves,
        "weights": content["network_weights"],
        "optimizer": content["optimizer_state"],
        "best": (content["_best_ema"], read_checkpoint(folder / BEST)["network_weights"]),
        "own": {key: value for key, value in own.items() if key != "trained_seconds"},
    }


def assert_equal(one, other, where="outcome") -> None:
    """Asserts that nested content agrees in every bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}.{index}")
    else:
        assert one == other, where


def kill_in_the_second_epoch():
    step = UMambaTrainer.train_step
    counted = itertools.count()
    UMambaTrainer.train_step = lambda self, batch: (
        kill_self() if next(counted) == 4 else step(self, batch)
    )


def kill_while_the_second_checkpoint_is_written():
    save = torch.save

    def torn(content, target):
        if content["current_epoch"] == 2 and LATEST in target.name:
            target.write(b"torn")
            target.flush()
            kill_self()
        save(content, target)

    torch.save = torn


def kill_between_the_two_renamings():
    replace = os.replace
    counted = itertools.count()

    def renamed(source, target):
        if Path(target).name == LATEST and next(counted) == 1:
            kill_self()
        replace(source, target)

    os.replace = renamed


def kill_between_progress_and_checkpoint():
    save = UMambaTrainer._save
    UMambaTrainer._save = lambda self, name: (
        kill_self() if self.current_epoch == 2 else save(self, name)
    )


@pytest.mark.parametrize("n_workers", [0, 2])
@pytest.mark.parametrize(
    "prepare",
    [
        kill_in_the_second_epoch,
        kill_while_the_second_checkpoint_is_written,
        kill_between_the_two_renamings,
        kill_between_progress_and_checkpoint,
    ],
)
def test_a_killed_training_that_is_resumed_equals_one_in_one_piece(
    plan, whole, tmp_path, train_and_die, monkeypatch, prepare, n_workers
):
    monkeypatch.setenv("nnUNet_n_proc_DA", str(n_workers))
    train_and_die(tmp_path / "killed", prepare)
    again = train(plan, tmp_path / "killed")
    assert_equal(outcome(again), whole)
    left = {file.name for file in again.glob("checkpoint*")}
    assert left == {FINAL, BEST}
    assert len((again / "progress.jsonl").read_text().splitlines()) == 4
    cost = json.loads((again / "training.json").read_text())
    assert cost["iterations"] == 12


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_training_that_is_stopped_and_resumed_twice_equals_one_in_one_piece(
    plan, whole, tmp_path, monkeypatch, n_threads
):
    torch.set_num_threads(n_threads)
    if n_threads > 1:  # other sums than with one
        whole = outcome(train(plan, tmp_path / "threads"))
    step = UMambaTrainer.train_step

    def stop(self, batch):
        if next(counted) == stop_at:
            raise KeyboardInterrupt
        return step(self, batch)

    monkeypatch.setattr(UMambaTrainer, "train_step", stop)
    for steps in (4, 5, 99):
        stop_at, counted = steps, itertools.count()
        try:
            again = train(plan, tmp_path / "stopped")
        except KeyboardInterrupt:
            np.random.seed(99)  # nothing may depend on where this process is
            torch.manual_seed(99)
    assert_equal(outcome(again), whole)


def test_without_a_seed_trainings_differ_and_a_resumed_one_keeps_its_own(plan, tmp_path):
    del plan[0]["configurations"]["3d_fullres"]["recipe"]["seed"]
    first, second = (read_checkpoint(train(plan, tmp_path / n) / FINAL) for n in ("a", "b"))
    assert first["umamba"]["seed"] != second["umamba"]["seed"]
    name = next(iter(first["network_weights"]))
    assert not torch.equal(first["network_weights"][name], second["network_weights"][name])
    folder = fold_folder(run_of(plan, tmp_path / "a"))
    (folder / FINAL).rename(folder / LATEST)
    plan[0]["configurations"]["3d_fullres"]["recipe"]["num_epochs"] = 5
    again = read_checkpoint(train(plan, tmp_path / "a") / FINAL)
    assert again["umamba"]["seed"] == first["umamba"]["seed"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to find processes")
def test_the_loading_processes_end_with_a_training_that_is_killed(
    tmp_path, train_and_die, monkeypatch
):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    seen = tmp_path / "seen"

    def prepare():
        def die(self, batch):
            seen.write_text(str(len(members(os.getpid()))))
            kill_self()

        UMambaTrainer.train_step = die

    session = train_and_die(tmp_path / "killed", prepare)
    assert int(seen.read_text()) == 1 + 2 + 1  # itself, for training and for validation
    end = time.monotonic() + 10
    while members(session) and time.monotonic() < end:
        time.sleep(0.1)
    assert members(session) == []


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_told_to_stop_does_so_with_its_loading_processes(
    plan, tmp_path, monkeypatch, signal_
):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")

    def child():
        os.setsid()
        torch.set_num_threads(1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        plan[0]["configurations"]["3d_fullres"]["recipe"]["num_epochs"] = 1000
        train(plan, tmp_path / "stopped")

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    file = fold_folder(run_of(plan, tmp_path / "stopped")) / "progress.jsonl"
    end = time.monotonic() + 60
    while not file.is_file() and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(process.pid, signal_)  # as a terminal does
    process.join(10)
    assert process.exitcode not in (None, 0)
    end = time.monotonic() + 10
    while members(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert members(process.pid) == []


@pytest.mark.parametrize(
    ("torn", "taken"),
    [
        ([LATEST], PREVIOUS),
        ([LATEST, PREVIOUS], BEST),
        ([FINAL], LATEST),
        ([], FINAL),
    ],
    ids=["latest", "latest and previous", "final", "none"],
)
def test_a_torn_checkpoint_is_passed_over_and_said(tmp_path, capsys, torn, taken):
    names = (FINAL, LATEST, PREVIOUS, BEST)
    for name in names[names.index(torn[0] if torn else FINAL) :]:
        content = {"network_weights": {"a": torch.zeros(1000)}}
        checkpoints.write_checkpoint(content, tmp_path / name)
        if name in torn:
            whole = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert find_checkpoint(tmp_path) == tmp_path / taken
    told = capsys.readouterr().out
    assert all(name in told for name in (*torn, taken)) if torn else told == ""


def test_a_training_whose_checkpoints_are_all_torn_says_how_to_begin_anew(tmp_path):
    assert find_checkpoint(tmp_path) is None
    (tmp_path / LATEST).write_bytes(b"torn")
    with pytest.raises(ValueError, match="--restart"):
        find_checkpoint(tmp_path)


def test_the_latest_checkpoint_is_kept_as_the_previous_one(tmp_path):
    for number in range(3):
        checkpoints.write_checkpoint({"network_weights": {}, "number": number}, tmp_path / LATEST)
    assert read_checkpoint(tmp_path / LATEST)["number"] == 2
    assert read_checkpoint(tmp_path / PREVIOUS)["number"] == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_said_once_and_the_training_goes_on(plan, tmp_path, monkeypatch, caplog):
    write = checkpoints.torch.save
    counted = itertools.count()

    def full(content, target):
        if LATEST in target.name and next(counted) < 2:
            raise OSError(28, "No space left on device")
        write(content, target)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    folder = train(plan, tmp_path / "full")
    assert next(counted) == 3
    told = [record.message for record in caplog.records if "no space is left" in record.message]
    assert len(told) == 1
    assert {file.name for file in folder.glob("checkpoint*")} == {FINAL, BEST}


def test_a_final_checkpoint_that_cannot_be_written_fails_and_keeps_the_latest(
    plan, whole, tmp_path, monkeypatch
):
    write = checkpoints.torch.save

    def full(content, target):
        if FINAL in target.name:
            raise OSError(28, "No space left on device")
        write(content, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.torch, "save", full)
        with pytest.raises(OSError, match="no space is left"):
            train(plan, tmp_path / "full")
    folder = fold_folder(run_of(plan, tmp_path / "full"))
    assert {file.name for file in folder.glob(".*")} == set()
    assert find_checkpoint(folder) == folder / LATEST
    assert_equal(outcome(train(plan, tmp_path / "full")), whole)


def test_a_resumed_training_that_writes_no_checkpoint_keeps_those_that_are_there(plan, tmp_path):
    folder = train(plan, tmp_path / "a")
    (folder / FINAL).rename(folder / LATEST)
    (folder / BEST).rename(folder / PREVIOUS)
    plan[0]["configurations"]["3d_fullres"]["recipe"]["num_epochs"] = 5
    checkpoint = folder / LATEST
    train_fold(run_of(plan, tmp_path / "a", checkpoint=checkpoint, disable_checkpointing=True))
    assert {file.name for file in folder.glob("checkpoint*")} == {LATEST, PREVIOUS}


def test_a_torn_last_line_of_the_progress_is_dropped(plan, tmp_path):
    folder = train(plan, tmp_path / "a")
    (folder / FINAL).rename(folder / LATEST)
    with open(folder / "progress.jsonl", "a") as file:
        file.write('{"epoch": 4, "elap')
    plan[0]["configurations"]["3d_fullres"]["recipe"]["num_epochs"] = 5
    train(plan, tmp_path / "a")
    lines = (folder / "progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3, 4]


def test_random_state_survives_a_checkpoint(tmp_path):
    checkpoints.seed_main_process(4)
    np.random.normal()  # leaves a second value behind for the next call
    state = {"network_weights": {}, "random_state": checkpoints.random_state()}
    checkpoints.write_checkpoint(state, tmp_path / LATEST)

    def drawn():
        return np.random.normal(), checkpoints.random.gauss(0, 1), float(torch.rand(()))

    expected = drawn()
    drawn()
    checkpoints.set_random_state(read_checkpoint(tmp_path / LATEST)["random_state"])
    assert drawn() == expected


def test_splits_plot_and_copies_of_the_plans_are_written_whole(plan, tmp_path, monkeypatch):
    written = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (written.append(Path(b).name), replace(a, b))[1]
    )
    home = Path(os.environ["nnUNet_preprocessed"]) / plan[0]["dataset_name"]
    (home / "splits_final.json").unlink(missing_ok=True)
    train(plan, tmp_path / "a")
    copies = {"plans.json", "dataset.json", "dataset_fingerprint.json"}
    assert {"splits_final.json", "progress.png"} | copies <= set(written)
    assert len(json.loads((home / "splits_final.json").read_text())) == 5
