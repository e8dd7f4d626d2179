"""Tests of numbered batches: equal for any number of processes, from any start, damage named."""

import functools
import os
import pickle
import random
import shutil
import signal
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from umamba.training import loading
from umamba.training.loading import Batches, NumberedBatches
from umamba.training.nnunet_hooks import unstarted_loaders
from umamba.training.trainer import UMambaTrainer

SEED = (5, 0, 1, 0)


def trainer_of(blobs) -> UMambaTrainer:
    plans, content = blobs
    plans["configurations"]["3d_fullres"]["recipe"]["augmentation"] = "nnunet"
    plans["continue_training"] = False
    trainer = UMambaTrainer(plans, "3d_fullres", 0, content, torch.device("cpu"))
    trainer.initialize()
    return trainer


@pytest.fixture
def loader(blobs):
    """nnU-Net's loader of training batches with all of its augmentation."""
    stock = functools.partial(nnUNetTrainer.get_dataloaders, trainer_of(blobs))
    return unstarted_loaders(stock, nnUNetDataLoader)[0]


def take(batches, n: int) -> list:
    return [next(batches) for _ in range(n)]


def equal(one, other) -> bool:
    """Whether two batches agree in every bit."""
    targets = zip(one["target"], other["target"], strict=True)
    return (
        list(one["keys"]) == list(other["keys"])
        and torch.equal(one["data"], other["data"])
        and all(torch.equal(a, b) for a, b in targets)
    )


def test_a_batch_is_a_function_of_seed_and_number_alone(loader):
    batches = NumberedBatches(loader, SEED)
    in_turn = [batches[number] for number in range(3)]
    sent = pickle.loads(pickle.dumps(NumberedBatches(loader, SEED)))  # as to a spawned process
    assert equal(sent[2], in_turn[2])
    others = [*in_turn[:2], NumberedBatches(loader, (5, 1, 1, 0))[2]]
    assert not any(equal(other, in_turn[2]) for other in others)


@pytest.mark.parametrize("n_workers", [1, 2])
def test_any_number_of_processes_gives_the_same_batches_in_the_same_order(loader, n_workers):
    here, there = Batches(loader, SEED), Batches(loader, SEED, n_workers=n_workers)
    assert all(equal(next(here), next(there)) for _ in range(5))
    later = Batches(loader, SEED, start=5, n_workers=n_workers)
    assert equal(next(here), next(later))
    there.close()
    later.close()


def test_loading_leaves_the_random_state_of_the_training_alone(loader):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    next(Batches(loader, SEED))
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == before


def test_batches_too_large_for_shared_memory_go_through_pipes(loader, monkeypatch, capsys):
    whole = next(Batches(loader, SEED, n_workers=1))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2**20))
    piped = Batches(loader, SEED, n_workers=1)
    batch = next(piped)
    assert equal(batch, whole)
    assert not batch["data"].is_shared()
    assert whole["data"].is_shared()
    piped.close()
    assert "1 MiB free" in capsys.readouterr().out


@pytest.mark.parametrize("n_workers", [0, 1])
@pytest.mark.parametrize("ending", [".b2nd", "_seg.b2nd", ".pkl"])
def test_a_torn_file_is_named_with_its_case_and_the_cure(loader, tmp_path, ending, n_workers):
    folder = tmp_path / "torn"
    shutil.copytree(loader._data.source_folder, folder)
    loader._data.source_folder = str(folder)
    torn = folder / f"{loader.indices[0]}{ending}"
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    batches = Batches(loader, SEED, n_workers=n_workers)
    with pytest.raises(ValueError, match=r"delete it, preprocess again") as caught:
        take(batches, 50)
    batches.close()
    assert str(torn) in str(caught.value)
    assert f"case {loader.indices[0]}" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_an_error_that_no_file_explains_is_not_hidden_nor_looked_for_in_other_cases(
    loader, monkeypatch
):
    def fail(**_):
        raise RuntimeError("a transform's own fault")

    read, find_fault = [], loading.find_fault
    monkeypatch.setattr(
        loading, "find_fault", lambda file: (read.append(file), find_fault(file))[1]
    )
    keys = next(Batches(loader, SEED))["keys"]
    loader.transforms = fail
    with pytest.raises(RuntimeError, match="own fault"):
        next(Batches(loader, SEED))
    assert {file.name for file in read} == {
        f"{key}{ending}" for key in keys for ending in (".b2nd", "_seg.b2nd", ".pkl")
    }
    assert len(loader.indices) > len(set(keys))


def test_a_loading_process_that_is_killed_ends_the_training_with_a_sentence(loader):
    batches = Batches(loader, SEED, n_workers=1)
    next(batches)
    (worker,) = batches._batches._workers
    # Torch's handler raises wherever this process is; without it the next batch does.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.kill(worker.pid, signal.SIGKILL)
    with (
        pytest.raises(ValueError, match="nnUNet_n_proc_DA=1"),
        loading.explaining_dead_workers(),
    ):
        take(batches, 50)
    batches.close()
    signal.signal(signal.SIGCHLD, before)


def test_closing_ends_the_processes(loader):
    batches = Batches(loader, SEED, n_workers=2)
    next(batches)
    workers = batches._batches._workers
    batches.close()
    end = time.monotonic() + 10
    while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(worker.is_alive() for worker in workers)


def test_the_recipe_chooses_the_class_of_the_loader_and_the_position_its_first_batch(
    blobs, monkeypatch
):
    class Sampled(nnUNetDataLoader):
        """Stands for a class that draws patches in another way."""

    monkeypatch.setattr("umamba.training.trainer.loader_class", lambda recipe: Sampled)
    trainer = trainer_of(blobs)
    training, validation = trainer.get_dataloaders()
    assert type(training.generator) is type(validation.generator) is Sampled
    first, checked = take(training, 4), take(validation, 3)
    trainer.iteration, trainer.current_epoch = 3, 2  # one validation batch per epoch
    training, validation = trainer.get_dataloaders()
    assert equal(next(training), first[3])
    assert equal(next(validation), checked[2])
    assert not equal(first[0], checked[0])


def test_a_file_without_faults_has_none(loader):
    folder = Path(loader._data.source_folder)
    assert {loading.find_fault(file) for file in folder.iterdir()} == {None}
    assert loading.find_fault(folder / "absent.pkl") == "it is missing"
