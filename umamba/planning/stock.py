"""nnU-Net's planner as it is: what it counts, what it plans, and which data are the same."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from umamba.planning.cases import Cases, list_cases
from umamba.planning.footprint import conv_features
from umamba.planning.plans import Plans, preprocessing_part


def count_features(
    patch_size: Sequence[int], input_channels: int, output_channels: int, *architecture: Any
) -> int:
    """Returns nnU-Net's number of feature elements, of a network on the meta device.

    `architecture` is the class name, arch_kwargs, and the names of those that are imported.
    """
    with torch.device("meta"):
        network = get_network_from_plans(
            *architecture, input_channels, output_channels, False, deep_supervision=False
        )
    own_count = getattr(network, "compute_conv_feature_map_size", None)
    if own_count is not None:
        return int(own_count(patch_size))
    return conv_features(network, input_channels, patch_size)


def name_own_data(plans: Plans, plans_identifier: str) -> None:
    """Gives a folder of its own to every configuration whose data are not the stock plan's."""
    with contextlib.redirect_stdout(io.StringIO()), listing_without_workers():
        stock = as_json(_StockPlanner(plans["dataset_name"]).plan_experiment())
    for name, configuration in plans["configurations"].items():
        if "inherits_from" in configuration:
            continue
        ours, there = preprocessing_part(plans, name), name in stock["configurations"]
        if not there or ours != preprocessing_part(stock, name):
            configuration["data_identifier"] = f"{plans_identifier}_{name}"


@contextlib.contextmanager
def listing_without_workers() -> Iterator[None]:
    """Lets nnU-Net's planners, made within this context, list the cases by themselves.

    They fork a pool for it, which may hang for ever in a process that has threads.
    """

    def list_here(raw_folder: str, dataset_json: Mapping[str, Any]) -> Cases:
        return list_cases(Path(raw_folder), dataset_json)

    module = vars(sys.modules[ExperimentPlanner.__module__])
    name = "get_filenames_of_train_images_and_targets"
    stock, module[name] = module[name], list_here
    try:
        yield
    finally:
        module[name] = stock


def as_json(plans: Plans) -> Plans:
    """A copy in JSON's types, as it will be read back; numpy's numbers become plain in `plans`."""
    recursive_fix_for_json_export(plans)
    return json.loads(json.dumps(plans))


class _StockPlanner(ExperimentPlanner):
    """Counts on the meta device and writes no plans."""

    static_estimate_VRAM_usage = staticmethod(count_features)  # noqa: N815

    def save_plans(self, plans: Plans) -> None:
        pass
