"""Checkpoints: written whole, the one before kept, torn ones passed over, random state in them."""

from __future__ import annotations

import copy
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from umamba.files import replacing
from umamba.networks.checkpoint import read_checkpoint

FINAL, LATEST, PREVIOUS, BEST = (
    f"checkpoint_{name}.pth" for name in ("final", "latest", "previous", "best")
)
NAMES = (FINAL, LATEST, PREVIOUS, BEST)
"""In the order in which a training goes on from them."""


def write_checkpoint(content: dict[str, Any], file: Path) -> None:
    """Writes a checkpoint to the disk, whole or not at all; OSError where that fails.

    The latest one before it becomes the previous one, so that a whole one is there at any moment.
    """
    with replacing(file) as temporary:
        # An open file, not its name: there torch's own writer makes a full disk a RuntimeError.
        with open(temporary, "wb") as target:
            torch.save(on_cpu(content), target)
            target.flush()
            # Else a power cut may leave the new name with nothing in it.
            os.fsync(target.fileno())
        if file.name == LATEST and file.is_file():
            os.replace(file, file.with_name(PREVIOUS))


def on_cpu(content: Any) -> Any:
    """A copy of nested dictionaries and lists with all tensors on the CPU."""
    if isinstance(content, torch.Tensor):
        return content.cpu()
    if not isinstance(content, dict | list):
        return content
    copied = copy.copy(content)
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        copied[key] = on_cpu(value)
    return copied


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a training in `folder` goes on from, None where there is none.

    Says which ones are damaged and passed over; ValueError where all are.
    """
    damaged = []
    for file in (folder / name for name in NAMES):
        if not file.is_file():
            continue
        try:
            if "network_weights" not in read_checkpoint(file):
                raise ValueError(f"{file} holds no training")
        except ValueError:
            damaged.append(file.name)
            continue
        if damaged:
            print(f"{' and '.join(damaged)} in {folder} cannot be read: using {file.name}")
        return file
    if damaged:
        raise ValueError(
            f"{' and '.join(damaged)} in {folder} cannot be read and there is no other checkpoint: "
            f"begin anew with --restart"
        )
    return None


def seed_main_process(seed: int) -> None:
    """Seeds torch (CUDA too), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The random state of torch, CUDA, numpy and Python, as tensors and numbers."""
    numpy_state: Any = np.random.get_state()
    _, keys, position, has_gauss, gauss = numpy_state
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": [int(position), int(has_gauss), float(gauss)],
        "python": torch.tensor(words),
        "python_rest": [version, python_gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` gave; CUDA's only where there are as many devices."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_rest"]))
    version, gauss = state["python_rest"]
    random.setstate((version, tuple(state["python"].tolist()), gauss))
