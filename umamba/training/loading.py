"""Batches by their number: the same batch however many processes load, and after a resume."""

from __future__ import annotations

import contextlib
import math
import pickle
import random
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from torch.utils.data import DataLoader, Dataset

from umamba.processes import begin_worker

SHARED_MEMORY = Path("/dev/shm")
READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError)


class NumberedBatches(Dataset):
    """What nnU-Net's `loader` gives for batch `number`, a function of `seed` and number alone.

    A batch that cannot be made because a file of a case is damaged is the ValueError to raise: an
    exception that is raised in a loading process comes with the traceback of that process.
    """

    def __init__(self, loader: nnUNetDataLoader, seed: Sequence[int]) -> None:
        self.loader = loader
        self.seed = tuple(seed)

    def __getitem__(self, number: int) -> dict[str, Any] | ValueError:
        with random_state_kept():
            try:
                seed_all(*self.seed, number)
                return self.loader.generate_train_batch()
            except READ_ERRORS as error:
                seed_all(*self.seed, number)
                if damage := self._find_damage():
                    return ValueError(damage)
                raise error

    def _find_damage(self) -> str | None:
        """A sentence about the first file of the seeded batch's cases that cannot be read."""
        data = self.loader._data
        for case in dict.fromkeys(self.loader.get_indices()):
            for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
                file = Path(data.source_folder) / f"{case}{suffix}"
                if fault := find_fault(file):
                    return (
                        f"{file} of case {case} cannot be read ({fault}): delete it, preprocess "
                        f"again (umamba plan, or umamba run), and run the same command again"
                    )
            if (earlier := data.folder_with_segs_from_previous_stage) is not None:
                file = Path(earlier) / f"{case}.b2nd"
                if fault := find_fault(file):
                    return (
                        f"{file}, the first stage's prediction of case {case}, cannot be read "
                        f"({fault}): delete it and validate the first stage again (--val)"
                    )
        return None


class Batches:
    """Endless batches in order from number `start` on, made ahead of use by `n_workers` processes.

    Without workers they are made in this process when they are asked for. The processes end with
    this one, however it ends. Where shared memory is too small for the batches under way they go
    through pipes, which is said in a sentence.
    """

    def __init__(
        self,
        loader: nnUNetDataLoader,
        seed: Sequence[int],
        start: int = 0,
        n_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.generator = loader  # nnU-Net's name of it, whose description goes to debug.json
        options: dict[str, Any] = {}
        self._piped = False
        if n_workers > 0:
            ahead = max(2, math.ceil(6 / n_workers))
            self._piped = not fits_shared_memory(loader, n_workers * ahead)
            options = {
                "prefetch_factor": ahead,
                "worker_init_fn": _begin,
                # Forked workers need not import torch; elsewhere Python's choice is the safe one.
                "multiprocessing_context": "fork" if sys.platform.startswith("linux") else None,
            }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
            batches = DataLoader(
                NumberedBatches(loader, seed),
                batch_size=None,
                sampler=range(start, sys.maxsize),
                num_workers=n_workers,
                pin_memory=pin_memory,
                collate_fn=_to_arrays if self._piped else _unchanged,
                generator=torch.Generator(),  # else starting would move the training's own stream
                **options,
            )
            self._batches: Iterator[Any] = iter(batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        batch = next(self._batches)
        if isinstance(batch, ValueError):
            raise batch
        return _apply(torch.from_numpy, np.ndarray, batch) if self._piped else batch

    def close(self) -> None:
        """Ends the loading processes."""
        self._batches = iter(())


@contextlib.contextmanager
def explaining_dead_workers() -> Iterator[None]:
    """Raises ValueError with the cure for torch's error of a loading process that was killed.

    Around a whole training: torch raises it wherever the training is at that moment.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise
        raise ValueError(
            "a process that loads batches was killed, most likely for want of memory: free some, "
            "or load with fewer (nnUNet_n_proc_DA=1), and run the same command again"
        ) from error


def fits_shared_memory(loader: nnUNetDataLoader, n_batches: int) -> bool:
    """Whether that many batches for training, and as many for validation, fit into /dev/shm."""
    if not SHARED_MEMORY.is_dir():
        return True
    try:
        data, _, previous, _ = loader._data.load_case(loader.indices[0])
    except READ_ERRORS:  # which the first batch tells
        return True
    n_channels = data.shape[0] + len(loader.annotated_classes_key) * (1 + (previous is not None))
    n_bytes = 4 * n_channels * loader.batch_size * math.prod(map(int, loader.final_patch_size))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if 2 * n_batches * n_bytes <= free:
        return True
    print(
        f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, too few for batches of "
        f"{n_bytes / 2**20:.0f} MiB: they go through pipes, which is slower (docker: --ipc=host)"
    )
    return False


def find_fault(file: Path) -> str | None:
    """Why a preprocessed file cannot be read to its end, None where it can."""
    try:
        if file.suffix == ".pkl":
            load_pickle(str(file))
        else:
            blosc2.open(urlpath=str(file), mode="r")[:]
    except READ_ERRORS as error:
        return "it is missing" if not file.is_file() else f"{type(error).__name__}: {error}"
    return None


def seed_all(*numbers: int) -> None:
    """Seeds numpy, Python and torch's CPU from non-negative numbers."""
    words = np.random.SeedSequence(numbers).generate_state(12)
    np.random.seed(words[:4])
    random.seed(words[4:8].tobytes())
    # The generator, not torch.manual_seed: that also seeds CUDA, which is the training's own.
    torch.default_generator.manual_seed(int(words[8]) << 32 | int(words[9]))


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Gives numpy, Python and torch's CPU their random state back."""
    states = np.random.get_state(), random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
        torch.set_rng_state(states[2])


def _begin(worker: int) -> None:
    begin_worker()


def _unchanged(batch: Any) -> Any:
    return batch


def _to_arrays(batch: Any) -> Any:
    return _apply(torch.Tensor.numpy, torch.Tensor, batch)


def _apply(function: Callable[[Any], Any], kind: type, content: Any) -> Any:
    """`content` with `function` applied to all of that kind in its values and their lists."""
    if isinstance(content, dict):
        # The cases' names are an array of strings, which no tensor can hold.
        return {k: v if k == "keys" else _apply(function, kind, v) for k, v in content.items()}
    if isinstance(content, list):
        return [_apply(function, kind, value) for value in content]
    return function(content) if isinstance(content, kind) else content
