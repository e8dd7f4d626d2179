"""Turns an official checkpoint and its plans into an ordinary nnU-Net model folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from umamba.inference.model_folder import read_json
from umamba.networks import NetworkEntry, create_network, get_entry, recognize_network
from umamba.networks.checkpoint import read_checkpoint
from umamba.networks.state_dict import LoadReport, unwrap

CHECKPOINT_NAME = "checkpoint_final.pth"

# Fields of plans written before nnU-Net 2.5, and what they are called in arch_kwargs today.
OLD_FIELDS = {
    "conv_kernel_sizes": "kernel_sizes",
    "pool_op_kernel_sizes": "strides",
    "n_conv_per_stage_encoder": "n_conv_per_stage",
    "n_conv_per_stage_decoder": "n_conv_per_stage_decoder",
}
OLD_ONLY = (
    "UNet_class_name",
    "UNet_base_num_features",
    "unet_max_num_features",
    "num_pool_per_axis",
    *OLD_FIELDS,
)


def import_checkpoint(
    network: str,
    checkpoint: Path,
    plans: Path,
    dataset_json: Path,
    output_folder: Path,
    *,
    configuration: str | None = None,
    fold: int | str = 0,
) -> LoadReport:
    """Writes a model folder that `umamba predict` and stock nnU-Net load.

    network: a registered name. checkpoint: the official file (nnU-Net's training checkpoint or a
    bare state dict). plans: the plans.json of its training, of nnU-Net 2.2 or later. configuration:
    default the checkpoint's own. The folder may exist if it has the same plans and not this fold.
    Raises ValueError or FileNotFoundError with one sentence for anything that does not fit.
    """
    entry = get_entry(network)
    content = read_checkpoint(checkpoint)
    weights = unwrap(content)
    check_kind(entry, weights, checkpoint)
    new_plans = modern_plans(read_json(plans), entry, plans)
    dataset = read_json(dataset_json)
    training = content.get("init_args") if isinstance(content.get("init_args"), Mapping) else {}
    chosen = str(configuration or (training or {}).get("configuration", ""))
    names = list(new_plans["configurations"])
    if chosen not in names:
        told = f"has no configuration {chosen!r}" if chosen else "holds several configurations"
        raise ValueError(f"{plans} {told}; choose with -c one of {', '.join(names)}")
    own, report = convert(entry, weights, new_plans, dataset, chosen, checkpoint)
    dims = len(PlansManager(new_plans).get_configuration(chosen).patch_size)
    axes = content.get("inference_allowed_mirroring_axes", tuple(range(dims)))
    result = {
        "network_weights": own,
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": content.get("current_epoch", 0),
        "init_args": {
            "plans": new_plans,
            "configuration": chosen,
            "fold": fold,
            "dataset_json": dataset,
        },
        # Stock prediction looks the class up by name and needs nothing but its network builder.
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": axes if axes is None else tuple(axes),
    }
    write_model_folder(output_folder, new_plans, dataset, result, fold)
    return report


def check_kind(entry: NetworkEntry, weights: Mapping[str, Tensor], file: Path) -> None:
    """Raises ValueError, saying what it looks like, for a checkpoint of another network."""
    if entry.cls.official_key_map().covers(weights):
        return
    similar = recognize_network(weights.keys())
    look = f"it looks like {' or '.join(similar)}" if similar else "nor of any registered network"
    raise ValueError(f"{file} is not a checkpoint of {entry.name}; {look}")


def modern_plans(plans: Mapping[str, Any], entry: NetworkEntry, file: Path) -> dict[str, Any]:
    """The plans in today's form with this network in all configurations of its dimensions.

    Reads architecture.arch_kwargs, or the fields of plans written before nnU-Net 2.5. Raises
    ValueError naming `file` where a configuration cannot be read.
    """
    result = copy.deepcopy(dict(plans))
    if not isinstance(result.get("configurations"), dict):
        raise ValueError(f"{file} has no configurations; give the plans.json of the training")
    for name, own in result["configurations"].items():
        resolved = resolve(plans["configurations"], name, file)
        text = json.dumps(resolved)
        if "fast_resample_data_or_seg_to_shape" in text:
            raise ValueError(
                f"{file}: {name} resamples with fast_resample_data_or_seg_to_shape, which only "
                "U-Mamba's copy of nnU-Net has; write resample_data_or_seg_to_shape instead"
            )
        if len(resolved.get("patch_size", ())) not in entry.spatial_dims:
            continue
        if "inherits_from" in own and not {"architecture", "patch_size", *OLD_ONLY} & own.keys():
            continue
        own["architecture"] = architecture(resolved, entry, name, file)
        for field in OLD_ONLY:
            own.pop(field, None)
    return result


def resolve(configurations: Mapping[str, Any], name: str, file: Path) -> dict[str, Any]:
    """A configuration with what it inherits."""
    chain: list[str] = []
    current: str | None = name
    while current is not None:
        if current not in configurations or current in chain:
            raise ValueError(f"{file}: {chain[-1]} inherits from {current}, which is not there")
        chain.append(current)
        current = configurations[current].get("inherits_from")
    resolved: dict[str, Any] = {}
    for ancestor in reversed(chain):
        resolved.update(configurations[ancestor])
    return resolved


def architecture(
    configuration: Mapping[str, Any], entry: NetworkEntry, name: str, file: Path
) -> dict[str, Any]:
    """The `architecture` block of a configuration with this network."""
    if "architecture" in configuration:
        known = dict(configuration["architecture"].get("arch_kwargs", {}))
    else:
        known = {new: configuration[old] for old, new in OLD_FIELDS.items() if old in configuration}
        base = configuration.get("UNet_base_num_features")
        largest = configuration.get("unet_max_num_features")
        if base and largest and "strides" in known:
            stages = range(len(known["strides"]))
            known["features_per_stage"] = [min(base * 2**s, largest) for s in stages]
    known["patch_size"] = configuration["patch_size"]
    needed = ("strides", "features_per_stage", "kernel_sizes", "n_conv_per_stage")
    missing = [key for key in needed if key in entry.keywords and key not in known]
    if missing:
        raise ValueError(
            f"{file}: {name} does not tell {', '.join(missing)} of the network; "
            "give the plans.json that the checkpoint was trained with"
        )
    switches = ("mixer", "deep_supervision")
    kept = {k: known[k] for k in entry.keywords if k in known and k not in switches}
    return {
        "network_class_name": entry.class_path,
        "arch_kwargs": {**kept, **entry.arguments},
        "_kw_requires_import": [],
    }


def convert(
    entry: NetworkEntry,
    weights: Mapping[str, Tensor],
    plans: dict[str, Any],
    dataset: dict[str, Any],
    configuration: str,
    file: Path,
) -> tuple[dict[str, Tensor], LoadReport]:
    """The weights under our names, checked against the network that the plans describe."""
    manager = PlansManager(copy.deepcopy(plans))
    chosen = manager.get_configuration(configuration)
    if chosen.network_arch_class_name != entry.class_path:
        dims = len(chosen.patch_size)
        raise ValueError(f"{entry.name} has no {dims}D form, which {configuration} needs")
    with torch.device("meta"):
        built = create_network(
            entry.name,
            determine_num_input_channels(manager, chosen, dataset),
            manager.get_label_manager(dataset).num_segmentation_heads,
            **chosen.network_arch_init_kwargs,
        )
    shapes = {key: tuple(value.shape) for key, value in built.state_dict().items()}
    try:
        own, report = entry.cls.official_key_map().to_own(weights, shapes)
    except ValueError as error:
        raise ValueError(f"{file} with configuration {configuration}: {error}") from error
    return {key: value.detach().clone() for key, value in own.items()}, report


def write_model_folder(
    folder: Path,
    plans: dict[str, Any],
    dataset: dict[str, Any],
    checkpoint: dict[str, Any],
    fold: int | str,
) -> None:
    """Writes plans.json, dataset.json and, last, the fold with its checkpoint."""
    target = folder / f"fold_{fold}"
    if target.exists():
        raise ValueError(f"{target} exists already; choose another folder or fold")
    if (folder / "plans.json").exists() and read_json(folder / "plans.json") != plans:
        raise ValueError(f"{folder} is the model folder of other plans; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (temporary / target.name).mkdir()
        torch.save(checkpoint, temporary / target.name / CHECKPOINT_NAME)
        for name, content in (("plans.json", plans), ("dataset.json", dataset)):
            (temporary / name).write_text(json.dumps(content, indent=4))
        folder.mkdir(exist_ok=True)
        for part in ("plans.json", "dataset.json", target.name):
            os.replace(temporary / part, folder / part)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
