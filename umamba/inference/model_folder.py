"""Reads a model folder: plans, folds and checkpoints, and builds the network from them alone."""

from __future__ import annotations

import json
import pydoc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from umamba.networks.checkpoint import read_checkpoint as read_tensors

Fold = int | str
SEARCH_DEPTH = 4


class UnknownFoldError(ValueError):
    """A fold or checkpoint was asked for that the model folder does not have."""


def find_model_folder(path: str | Path) -> Path:
    """The model folder (plans.json, dataset.json, fold_*) at, around or alone below `path`.

    Raises FileNotFoundError where there is none, ValueError where there are several.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no model folder {path}; give the folder with plans.json")
    if _is_model_folder(path):
        return path
    if path.name.startswith("fold_") and _is_model_folder(path.parent):
        return path.parent
    found: list[Path] = []
    level = [path]
    for _ in range(SEARCH_DEPTH):
        level = sorted(d for p in level for d in p.iterdir() if d.is_dir())
        found += [d for d in level if _is_model_folder(d)]
    if not found:
        raise FileNotFoundError(
            f"{path} holds no model folder: one has plans.json, dataset.json and fold_0, fold_1 ..."
        )
    if len(found) > 1:
        listing = ", ".join(map(str, found))
        raise ValueError(f"{path} holds several model folders, choose one of them: {listing}")
    return found[0]


def available_folds(folder: Path, checkpoint_name: str) -> list[Fold]:
    """The folds that have this checkpoint, numbers first, then "all"."""
    names = [p.name.removeprefix("fold_") for p in folder.glob("fold_*")
             if (p / checkpoint_name).is_file()]  # fmt: skip
    numbers: list[Fold] = sorted(int(n) for n in names if n.isdigit())
    return numbers + [n for n in names if n == "all"]


def select_folds(
    folder: Path, folds: Sequence[Fold] | None, checkpoint_name: str
) -> tuple[Fold, ...]:
    """The folds to use: those asked for, else all numbered ones, else "all".

    Raises UnknownFoldError naming the folds that exist.
    """
    there = available_folds(folder, checkpoint_name)
    if not there:
        others = sorted({p.name for p in folder.glob("fold_*/checkpoint_*.pth")})
        hint = (f"there are {', '.join(others)}: choose with -chk" if others
                else "its training has not reached a checkpoint yet")  # fmt: skip
        raise UnknownFoldError(f"no fold of {folder} has {checkpoint_name}; {hint}")
    if folds is None:
        return tuple(f for f in there if f != "all") or tuple(there)
    wanted = tuple(f if f == "all" else int(f) for f in folds)
    missing = [str(f) for f in wanted if f not in there]
    if missing:
        raise UnknownFoldError(
            f"fold {', '.join(missing)} of {folder} has no {checkpoint_name}; "
            f"folds that have it: {', '.join(map(str, there))}"
        )
    return wanted


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`; a ValueError or FileNotFoundError names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; a model folder needs it, copy it along")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object; restore it")
    return content


def read_checkpoint(file: Path) -> dict[str, Any]:
    """A training checkpoint, read as tensors, numbers and names only: no code in it can run."""
    checkpoint = read_tensors(file)
    if not {"network_weights", "init_args"} <= checkpoint.keys():
        raise ValueError(
            f"{file} is not a checkpoint of nnU-Net's trainers (no network_weights and init_args); "
            "import official weights with `umamba models import`"
        )
    return checkpoint


def build_network(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, dataset_json: dict
) -> nn.Module:
    """The network that the plans describe, deep supervision off, weights not yet loaded."""
    class_path = configuration_manager.network_arch_class_name
    try:
        found = pydoc.locate(class_path)
    except pydoc.ErrorDuringImport as error:
        message = f"the network {class_path} of plans.json fails to import: {error}"
        raise ValueError(message) from error
    if found is None:
        raise ValueError(
            f"plans.json names the network {class_path}, which is not installed; install the "
            f"package {class_path.split('.')[0]} that it comes from"
        )
    return get_network_from_plans(
        class_path,
        configuration_manager.network_arch_init_kwargs,
        configuration_manager.network_arch_init_kwargs_req_import,
        determine_num_input_channels(plans_manager, configuration_manager, dataset_json),
        plans_manager.get_label_manager(dataset_json).num_segmentation_heads,
        allow_init=False,
        deep_supervision=False,
    )


def check_weights(network: nn.Module, weights: dict[str, torch.Tensor], file: Path) -> None:
    """Raises ValueError unless the weights fit the network, name by name and shape by shape."""
    own = network.state_dict()
    missing = [k for k in own if k not in weights]
    unknown = [k for k in weights if k not in own]
    reshaped = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if missing or unknown or reshaped:
        example = (reshaped or missing or unknown)[0]
        raise ValueError(
            f"{file} was not written by the network of its plans.json ({type(network).__name__}): "
            f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(reshaped)} of another "
            f"shape, for example {example}; put the plans.json of its own training beside it"
        )


def _is_model_folder(path: Path) -> bool:
    return (path / "plans.json").is_file() and any(path.glob("fold_*"))
