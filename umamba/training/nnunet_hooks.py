"""Other parts in place of some that nnU-Net's trainer takes from its own module."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.parallel import DistributedDataParallel

from umamba.files import replacing, write_json


@contextlib.contextmanager
def nnunet_names(**replacements: Any) -> Iterator[None]:
    """Other things under these names in the module of nnU-Net's trainer, within this context."""
    names = vars(sys.modules[nnUNetTrainer.__module__])
    before = {name: names[name] for name in replacements}
    names.update(replacements)
    try:
        yield
    finally:
        names.update(before)


@contextlib.contextmanager
def ddp_wrapper(find_unused_parameters: bool) -> Iterator[None]:
    """What nnU-Net wraps its network in within this context, on several GPUs.

    Frozen parameters get no gradient, which is an error unless DDP looks for unused ones; that
    costs a walk through the graph at every step.
    """
    wrapper = functools.partial(
        DistributedDataParallel, find_unused_parameters=find_unused_parameters
    )
    with nnunet_names(DDP=wrapper):
        yield


def whole_files() -> contextlib.AbstractContextManager[None]:
    """nnU-Net's trainer writes splits and copies of plans and fingerprint whole in this context."""

    def save_json(content: Any, file: str, sort_keys: bool = True) -> None:
        write_json(Path(file), content)

    def copyfile(source: str, target: str) -> None:
        with replacing(Path(target)) as temporary:
            shutil.copyfile(source, temporary)

    return nnunet_names(save_json=save_json, shutil=types.SimpleNamespace(copyfile=copyfile))


def unstarted_loaders(
    get_dataloaders: Callable[[], Any], loader_class: Callable[..., nnUNetDataLoader]
) -> list[nnUNetDataLoader]:
    """The loaders, of this class, that nnU-Net's method makes; it starts them, here it does not."""
    made: list[nnUNetDataLoader] = []

    def keep(loader: nnUNetDataLoader, transform: None) -> Iterator[None]:
        made.append(loader)
        return iter([None])  # nnU-Net takes a first batch

    with nnunet_names(
        nnUNetDataLoader=loader_class,
        get_allowed_n_proc_DA=lambda: 0,
        SingleThreadedAugmenter=keep,
    ):
        get_dataloaders()
    return made


def checkpoint_of(save_checkpoint: Callable[[str], None]) -> dict[str, Any]:
    """What nnU-Net's method would write into a file."""
    made: list[dict[str, Any]] = []
    with nnunet_names(torch=types.SimpleNamespace(save=lambda content, _: made.append(content))):
        save_checkpoint("")
    return made[0]


def without_autocast(forward: Callable) -> Callable:
    """`forward` in float32, shielded from the autocast that nnU-Net's steps always open."""

    def shielded(x: torch.Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    return shielded
