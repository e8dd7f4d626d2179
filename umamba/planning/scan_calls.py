"""The scans of planned networks: each network runs once on the meta device, at no cost."""

import pydoc
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from umamba.networks import get_entry
from umamba.ops.timing import Call, record_calls
from umamba.planning.overview import STANDARD_PATCH, standard_network
from umamba.planning.plans import get_configuration, load_plans, network_builder, read_json

TYPICAL = {"umamba_bot": 3, "segmamba": 3, "vm_unet": 2}  # networks and their dimensions
TYPICAL_BATCH = 2


def plans_calls(path: Path, configuration: str | None = None) -> Counter[Call]:
    """Returns the scans of one training step in each configuration of a plans file, or in one.

    Plans that `umamba plan` did not write need their dataset.json beside them. Raises ValueError or
    FileNotFoundError with the file and the cure, also where no network has a scan.
    """
    plans = load_plans(path)
    names = [configuration] if configuration else list(plans["configurations"])
    calls: Counter[Call] = Counter()
    for name in names:
        part = get_configuration(plans, name)
        missing = [key for key in ("architecture", "patch_size", "batch_size") if key not in part]
        if missing:
            raise ValueError(f"{name} of {path} has no {', '.join(missing)}: plan again")
        class_name = part["architecture"]["network_class_name"]
        if pydoc.locate(class_name) is None:
            raise ValueError(f"{path} names the network {class_name}, which is not installed")
        channels, classes = _ends(part, plans, name, path)
        with torch.device("meta"):
            network = network_builder(part, channels, classes)()
        calls += _network_calls(network, channels, part["patch_size"], part["batch_size"])
    if not calls:
        raise ValueError(f"no network of {path} ({', '.join(names)}) has a scan to time")
    return calls


def typical_calls(on_gpu: bool) -> Counter[Call]:
    """Returns the scans of three networks in nnU-Net's plans for large images.

    For a CPU the patch is half as long, as plans for a CPU have it.
    """
    calls: Counter[Call] = Counter()
    for name, dims in TYPICAL.items():
        patch = [extent if on_gpu else extent // 2 for extent in STANDARD_PATCH[dims]]
        network = standard_network(get_entry(name), dims)
        calls += _network_calls(network, 1, patch, TYPICAL_BATCH)
    return calls


def _network_calls(
    network: nn.Module, channels: int, patch_size: Sequence[int], batch_size: int
) -> Counter[Call]:
    """The calls of one forward pass; gradients are on, as in training."""
    image = torch.empty(batch_size, channels, *patch_size, device="meta")
    return record_calls(lambda: network(image))


def _ends(
    configuration: Mapping[str, Any], plans: dict[str, Any], name: str, path: Path
) -> tuple[int, int]:
    """Input channels and classes of a configuration."""
    if "planning" in configuration:
        facts = configuration["planning"]
        return facts["input_channels"], facts["num_classes"]
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    file = path.with_name("dataset.json")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: it tells the channels and classes of {path}")
    dataset_json, manager = read_json(file), PlansManager(plans)
    part = manager.get_configuration(name)
    return (
        determine_num_input_channels(manager, part, dataset_json),
        manager.get_label_manager(dataset_json).num_segmentation_heads,
    )
