"""UMambaPlanner: nnU-Net's experiment planner with a registered network in place of its U-Net."""

import contextlib
import copy
import io
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from umamba.networks.registry import get_entry
from umamba.planning import plans as plans_files
from umamba.planning.footprint import Footprint, conv_features, count_footprint
from umamba.planning.machine import GIB, default_memory_gb
from umamba.planning.network_block import (
    CONFIGURATIONS,
    check_configurations,
    check_network_args,
    default_plans_name,
    network_arguments,
)
from umamba.planning.topology import network_divisor, round_patch

logger = logging.getLogger(__name__)

STOCK_PLANS = "nnUNetPlans"
MIN_MEMORY_GB = 0.5
MIN_TARGET_GB = 0.05
USABLE_MEMORY = 0.9
"""Share that is planned with; the rest is for workspaces and fragmentation."""


def plan_dataset(
    dataset_name: str,
    *,
    network: str = "umamba_bot",
    plans_name: str | None = None,
    memory_gb: float | None = None,
    network_args: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    configurations: Sequence[str] | None = None,
    overwrite_target_spacing: Sequence[float] | None = None,
) -> plans_files.Plans:
    """Plans a dataset whose fingerprint is there, writes the plans file and returns the plans.

    Args:
        dataset_name: nnU-Net's dataset name (or id).
        plans_name: default the network's name, and a short hash of `network_args` if given.
        memory_gb: GiB that a training step may use. Default: that of plans already made under this
            name, so that planning again changes nothing; else the GPU's, else half of the free RAM.
        network_args: keyword arguments of the network that differ from the planner's choice.
        recipe: the training recipe as a plain dict; empty is nnU-Net's own.
        configurations: names to plan; default all that nnU-Net finds sensible.
        overwrite_target_spacing: mm, in the images' axis order, for the 3D configurations and 2d.
    """
    planner = UMambaPlanner(
        dataset_name,
        plans_name=plans_name,
        gpu_memory_target_in_gb=memory_gb,
        overwrite_target_spacing=overwrite_target_spacing,
        network=network,
        network_args=network_args,
        recipe=recipe,
        configurations=configurations,
    )
    return planner.plan_experiment()


class UMambaPlanner(ExperimentPlanner):
    """Lets nnU-Net plan, then puts the network in and makes patch and batch fit network and memory.

    nnU-Net's own search decides the patch: where the network needs more memory than nnU-Net's
    U-Net, the search is run again with a smaller memory target until the network's step fits.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
        *,
        network: str = "umamba_bot",
        network_args: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        configurations: Sequence[str] | None = None,
        half_precision: bool | None = None,
    ) -> None:
        self.entry = get_entry(network)
        self.network_args = dict(network_args or {})
        check_network_args(self.entry, self.network_args)
        self.recipe = dict(recipe or {})
        self.wanted = check_configurations(configurations)
        name = plans_name or default_plans_name(self.entry.name, self.network_args)
        spacing = overwrite_target_spacing
        super().__init__(
            dataset_name_or_id,
            8,
            preprocessor_name,
            name,
            [float(mm) for mm in spacing] if spacing is not None else None,
            suppress_transpose,
        )
        self.plans_path = plans_files.plans_file(self.dataset_name, name)
        existing = self._existing_plans()
        planned = existing.get("umamba", {}).get("memory_gb")
        memory = gpu_memory_target_in_gb or planned or default_memory_gb()
        if memory < MIN_MEMORY_GB:
            raise ValueError(f"--memory must be at least {MIN_MEMORY_GB} GB, got {memory:g}")
        self.UNet_vram_target_GB = self.memory_gb = float(memory)
        if half_precision is None:
            precision = self.recipe.get("precision")
            half_precision = torch.cuda.is_available() and precision != "fp32"
        self.half_precision = half_precision
        self.labels = LabelManager(
            self.dataset_json["labels"], self.dataset_json.get("regions_class_order")
        )
        self.num_classes = self.labels.num_segmentation_heads

    @staticmethod
    def static_estimate_VRAM_usage(
        patch_size: Sequence[int],
        input_channels: int,
        output_channels: int,
        arch_class_name: str,
        arch_kwargs: Mapping[str, Any],
        arch_kwargs_req_import: Sequence[str],
    ) -> int:
        """Returns nnU-Net's number of feature elements, of a network on the meta device."""
        architecture = {
            "network_class_name": arch_class_name,
            "arch_kwargs": arch_kwargs,
            "_kw_requires_import": arch_kwargs_req_import,
        }
        with torch.device("meta"):
            network = plans_files.network_builder(
                {"architecture": architecture}, input_channels, output_channels, False
            )()
        own_count = getattr(network, "compute_conv_feature_map_size", None)
        if own_count is not None:
            return int(own_count(patch_size))
        return conv_features(network, input_channels, patch_size)

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Returns the stock plan's folder; `save_plans` gives another where the data differ."""
        return f"{STOCK_PLANS}_{configuration_name}"

    def get_plans_for_configuration(
        self,
        spacing: Sequence[float],
        median_shape: Sequence[int],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[Any, Any],
    ) -> dict[str, Any]:
        """Returns nnU-Net's configuration with our network, patch and batch fitted to memory."""
        arguments = (spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache)
        stock = super().get_plans_for_configuration(*arguments)
        name = data_identifier.removeprefix(f"{STOCK_PLANS}_")
        if len(spacing) not in self.entry.spatial_dims or (self.wanted and name not in self.wanted):
            return stock
        budget = int(USABLE_MEMORY * self.memory_gb * GIB)
        plan = copy.deepcopy(stock)
        try:
            while True:
                footprint = self._put_network_in(plan, _cache)
                batch_size = self._largest_batch(footprint, budget, plan["batch_size"])
                if batch_size >= self.UNet_min_batch_size:
                    break
                need = footprint.training_bytes(self.UNet_min_batch_size)
                self.UNet_vram_target_GB *= min(max(budget / need, 0.5), 0.9)
                if self.UNet_vram_target_GB < MIN_TARGET_GB:
                    batch_size = self.UNet_min_batch_size
                    break
                plan = super().get_plans_for_configuration(*arguments)
        finally:
            self.UNet_vram_target_GB = self.memory_gb
        plan["batch_size"] = batch_size
        plan["recipe"] = copy.deepcopy(self.recipe)
        plan["planning"] = self._explain(stock, plan, footprint)
        return plan

    def plan_experiment(self) -> plans_files.Plans:
        """Plans all configurations, writes the plans file and returns its content."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            super().plan_experiment()
        logger.debug("nnU-Net's planner said:\n%s", said.getvalue())
        assert self.plans is not None
        return self.plans

    def save_plans(self, plans: plans_files.Plans) -> None:
        """Leaves out what the network or the user does not want, names the data, and writes."""
        self._select_configurations(plans)
        recursive_fix_for_json_export(plans)
        plain = json.loads(json.dumps(plans))
        self._name_data(plain)
        plain["umamba"] = {
            "network": self.entry.name,
            "network_args": self.network_args,
            "fixed_strides": self.entry.fixed_strides is not None,
            "memory_gb": self.memory_gb,
        }
        self._plan_cascade(plain["configurations"])
        # nnU-Net's own name, so that stock nnU-Net can look the planner up.
        plain["experiment_planner_used"] = ExperimentPlanner.__name__
        for name, configuration in self._existing_plans().get("configurations", {}).items():
            if name not in CONFIGURATIONS or (self.wanted and name not in self.wanted):
                plain["configurations"].setdefault(name, configuration)
        plans_files.save_plans(plain, self.plans_path)
        self.plans = plain

    def _put_network_in(self, plan: dict[str, Any], cache: dict[Any, Any]) -> Footprint:
        """Writes the network block and the rounded patch into `plan`; returns its footprint."""
        dims = len(plan["patch_size"])
        stock = plan["architecture"]["arch_kwargs"]
        block = network_arguments(self.entry, self.network_args, stock, dims)
        patch = round_patch(plan["patch_size"], network_divisor(block["strides"]))
        if "patch_size" in self.entry.keywords:
            block["patch_size"] = list(patch)
        plan["patch_size"] = list(patch)
        plan["architecture"] = {
            "network_class_name": self.entry.class_path,
            "arch_kwargs": json.loads(json.dumps(block)),
            "_kw_requires_import": [],
        }
        key = ("footprint", patch, str(block["strides"]))
        if key not in cache:
            channels = self._input_channels()
            build = plans_files.network_builder(plan, channels, self.num_classes)
            cache[key] = count_footprint(build, channels, patch, self.half_precision)
        return cache[key]

    def _largest_batch(self, footprint: Footprint, budget: int, at_most: int) -> int:
        """Returns the largest batch up to `at_most` whose step fits, 0 if none does."""
        fixed = footprint.training_bytes(0)
        per_sample = footprint.training_bytes(1) - fixed
        return max(min(at_most, (budget - fixed) // per_sample), 0)

    def _explain(
        self, stock: Mapping[str, Any], plan: Mapping[str, Any], footprint: Footprint
    ) -> dict[str, Any]:
        name, patch, batch = self.entry.name, plan["patch_size"], plan["batch_size"]
        stock_patch, stock_batch = [int(n) for n in stock["patch_size"]], int(stock["batch_size"])
        divisor = network_divisor(plan["architecture"]["arch_kwargs"]["strides"])
        need = footprint.training_bytes(batch)
        reasons = [
            f"nnU-Net's search gave patch {_by(stock_patch)} and batch {stock_batch} at "
            f"{self.memory_gb:g} GB.",
            f"{name} takes patches divisible by {_by(divisor)}.",
            f"A training step of {name} at patch {_by(patch)} and batch {batch} needs about "
            f"{need / GIB:.1f} GB of {self.memory_gb:g} GB.",
        ]
        if need > self.memory_gb * GIB:
            reasons.append("This is more than there is, and the patch cannot shrink any further.")
            logger.warning("%s: %s", plan["data_identifier"], reasons[-2])
        elif patch != stock_patch or batch != stock_batch:
            reasons.append("Patch and batch were changed so that network and memory agree.")
        return {
            "input_channels": self._input_channels(),
            "num_classes": self.num_classes,
            "divisor": list(divisor),
            "nnunet_patch_size": stock_patch,
            "nnunet_batch_size": stock_batch,
            "memory_gb": self.memory_gb,
            "half_precision": self.half_precision,
            "training_bytes": need,
            "parameters": footprint.parameter_bytes // 4,
            "reasons": reasons,
        }

    def _input_channels(self) -> int:
        return len(self.dataset_json.get("channel_names") or self.dataset_json["modality"])

    def _existing_plans(self) -> plans_files.Plans:
        """Returns the plans of this name, empty if none; ValueError if they are someone else's."""
        if not self.plans_path.is_file():
            return {}
        existing = plans_files.load_plans(self.plans_path)
        facts = existing.get("umamba", {})
        if facts.get("network") != self.entry.name or facts["network_args"] != self.network_args:
            raise ValueError(
                f"{self.plans_path} holds other plans (of {facts.get('network', 'nnU-Net')}): "
                "give yours another name with --plans-name"
            )
        return existing

    def _select_configurations(self, plans: plans_files.Plans) -> None:
        found = plans["configurations"]
        for name in list(found):
            dims = 2 if name == "2d" else 3
            if dims not in self.entry.spatial_dims or (self.wanted and name not in self.wanted):
                del found[name]
        if "3d_fullres" not in found or "3d_lowres" not in found:
            found.pop("3d_cascade_fullres", None)
            if "3d_lowres" in found:
                found["3d_lowres"].pop("next_stage", None)
        if not found:
            asked = ", ".join(self.wanted) or "any configuration"
            raise ValueError(
                f"{self.dataset_name} cannot be planned as {asked} with {self.entry.name}, which "
                f"is a network for {' and '.join(f'{d}D' for d in self.entry.spatial_dims)}"
            )

    def _plan_cascade(self, configurations: dict[str, Any]) -> None:
        """Says that the second stage of a cascade sees the first one's labels as channels."""
        if "3d_cascade_fullres" in configurations:
            planning = copy.deepcopy(configurations["3d_fullres"]["planning"])
            n_labels = len(self.labels.foreground_labels)
            planning["input_channels"] += n_labels
            planning["reasons"].append(f"The labels of 3d_lowres are {n_labels} further channels.")
            configurations["3d_cascade_fullres"]["planning"] = planning

    def _name_data(self, plans: plans_files.Plans) -> None:
        """Gives a folder of its own to every configuration whose data are not the stock plan's."""
        own = self.overwrite_target_spacing is not None or self.suppress_transpose
        if not own and "3d_lowres" not in plans["configurations"]:
            return
        stock = self._stock_plans()
        for name, configuration in plans["configurations"].items():
            if "inherits_from" in configuration:
                continue
            shared = name in stock["configurations"] and plans_files.preprocessing_part(
                plans, name
            ) == plans_files.preprocessing_part(stock, name)
            if not shared:
                configuration["data_identifier"] = f"{self.plans_identifier}_{name}"

    def _stock_plans(self) -> plans_files.Plans:
        with contextlib.redirect_stdout(io.StringIO()):
            plans = _StockPlanner(self.dataset_name).plan_experiment()
        recursive_fix_for_json_export(plans)
        return json.loads(json.dumps(plans))


class _StockPlanner(ExperimentPlanner):
    """nnU-Net's planner as it is, but counting on the meta device and writing no plans."""

    static_estimate_VRAM_usage = staticmethod(  # noqa: N815
        UMambaPlanner.static_estimate_VRAM_usage
    )

    def save_plans(self, plans: plans_files.Plans) -> None:
        pass


def _by(sizes: Sequence[int]) -> str:
    return "x".join(str(int(size)) for size in sizes)
