"""UMambaPlanner: nnU-Net's experiment planner with a registered network in place of its U-Net."""

import contextlib
import copy
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from umamba.networks.registry import NetworkEntry, list_networks
from umamba.planning.footprint import (
    GIB,
    Footprint,
    default_memory_gb,
    default_memory_source,
)
from umamba.planning.plans import (
    STOCK_PLANS,
    Plans,
    check_plans_name,
    count_plan,
    digest,
    load_plans,
    plans_file,
    save_plans,
)
from umamba.planning.reasons import (
    adapted_reasons,
    by,
    change_reason,
    search_reasons,
    step_reason,
    upstream_reasons,
)
from umamba.planning.stock import (
    as_json,
    count_features,
    listing_without_workers,
    name_own_data,
)
from umamba.planning.topology import (
    CONFIGURATIONS,
    check_configurations,
    check_network_args,
    network_arguments,
    network_divisor,
    round_patch,
    with_arguments,
)
from umamba.planning.upstream import UPSTREAM, UpstreamEntry, find_entry

logger = logging.getLogger(__name__)

MIN_MEMORY_GB = 0.5
MIN_TARGET_GB = 0.05
USABLE_MEMORY = 0.9  # share that is planned with; the rest is for workspaces and fragmentation


def plan_dataset(
    dataset_name: str,
    *,
    memory_gb: float | None = None,
    network: str = "umamba_bot",
    **request: Any,
) -> Plans:
    """Plans a dataset whose fingerprint is there, writes the plans file and returns the plans.

    Args:
        dataset_name: nnU-Net's dataset name (or id).
        memory_gb: GiB that a training step may use. Default: that of plans already made under this
            name, so that planning again changes nothing; else the GPU's, else half of the free RAM;
            for a network of nnU-Net's own what its planner plans for.
        network: a registered network, or one of nnU-Net's own.
        request: the further arguments of `UMambaPlanner`.
    """
    planner = planner_of(network)
    return planner(
        dataset_name, gpu_memory_target_in_gb=memory_gb, network=network, **request
    ).plan_experiment()


def planner_of(network: str) -> type["UMambaPlanner"]:
    """Returns the planner of a network; that of nnU-Net's own is based on nnU-Net's planner."""
    entry = find_entry(network)
    if isinstance(entry, NetworkEntry):
        return UMambaPlanner
    stock = entry.load_planner()
    return type(UpstreamPlanner.__name__, (UpstreamPlanner, stock), {"stock_planner": stock})


def default_plans_name(
    network: str, network_args: Mapping[str, Any], recipe: str | None = None
) -> str:
    """Returns the network's name, with a short hash where arguments differ from the planner's.

    Behind it comes the name of the recipe, where one is named.
    """
    name = f"{network}_{digest(network_args)[:6]}" if network_args else network
    return f"{name}_{recipe}" if recipe else name


class UMambaPlanner(ExperimentPlanner):
    """Lets nnU-Net plan, then puts the network in and makes patch and batch fit network and memory.

    nnU-Net's own search decides the patch: where the network needs more memory than nnU-Net's
    U-Net, the search is run again with a smaller memory target until the network's step fits.

    Args:
        plans_name: default the network's name, a short hash of `network_args` if given, and the
            recipe's name if it has one.
        overwrite_target_spacing: mm, in the images' axis order, for the 3D configurations and 2d.
        network_args: keyword arguments of the network that differ from the planner's choice.
        recipe: the training recipe as a plain dict; empty is nnU-Net's own.
        configurations: names to plan; default all that nnU-Net finds sensible.
        half_precision: whether training works in 16 bits; default where there is a GPU.
        stock: further arguments of nnU-Net's planner.
    """

    entry: NetworkEntry | UpstreamEntry
    stock_planner: type[ExperimentPlanner] = ExperimentPlanner
    static_estimate_VRAM_usage = staticmethod(count_features)  # noqa: N815  nnU-Net's name

    def __init__(
        self,
        dataset_name_or_id: str | int,
        *,
        gpu_memory_target_in_gb: float | None = None,
        plans_name: str | None = None,
        overwrite_target_spacing: Sequence[float] | None = None,
        network: str = "umamba_bot",
        network_args: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        configurations: Sequence[str] | None = None,
        half_precision: bool | None = None,
        **stock: Any,
    ) -> None:
        self.entry = find_entry(network)
        self.network_args = dict(network_args or {})
        check_network_args(self.entry, self.network_args)
        self.recipe = dict(recipe or {})
        self.wanted = check_configurations(configurations)
        name = plans_name or default_plans_name(
            self.entry.name, self.network_args, self.recipe.get("name")
        )
        check_plans_name(name)
        spacing = overwrite_target_spacing
        with listing_without_workers():
            super().__init__(
                dataset_name_or_id,
                plans_name=name,
                overwrite_target_spacing=None if spacing is None else [float(mm) for mm in spacing],
                **stock,
            )
        self.plans_path = plans_file(self.dataset_name, name)
        planned = self._existing_plans().get("umamba", {})
        asked, self.memory_from = gpu_memory_target_in_gb, "as asked for"
        if asked is None and planned.get("memory_gb"):
            asked = planned["memory_gb"]
            self.memory_from = planned.get("memory_from", "as planned before")
        if asked is not None and asked < MIN_MEMORY_GB:
            raise ValueError(f"--memory must be at least {MIN_MEMORY_GB} GB, got {asked:g}")
        self.asked_memory_gb = asked
        if asked is None:
            asked, self.memory_from = self._default_memory()
        self.UNet_vram_target_GB = self.memory_gb = float(asked)
        if half_precision is None:
            half_precision = torch.cuda.is_available() and self.recipe.get("precision") != "fp32"
        self.half_precision = half_precision
        content = self.dataset_json
        self.labels = LabelManager(content["labels"], content.get("regions_class_order"))
        self.num_classes = self.labels.num_segmentation_heads
        self.input_channels = len(content.get("channel_names") or content["modality"])

    def generate_data_identifier(self, configuration_name: str) -> str:
        """Returns the stock plan's folder; `save_plans` gives another where the data differ."""
        return f"{STOCK_PLANS}_{configuration_name}"

    def get_plans_for_configuration(self, *arguments: Any) -> dict[str, Any]:
        """Returns nnU-Net's configuration with our network, patch and batch fitted to memory.

        `arguments` are spacing, median shape, data identifier, voxels of the dataset, and cache.
        """
        spacing, _, data_identifier, _, cache = arguments
        stock = super().get_plans_for_configuration(*arguments)
        if not self._is_wanted(data_identifier.removeprefix(f"{STOCK_PLANS}_"), len(spacing)):
            return stock
        budget = self._budget_bytes()
        smallest = self.UNet_min_batch_size
        plan = copy.deepcopy(stock)
        try:
            while True:
                footprint = self._put_network_in(plan, cache)
                fixed = footprint.training_bytes(0)
                batch_size = (budget - fixed) // (footprint.training_bytes(1) - fixed)
                if batch_size >= smallest:
                    break
                need = footprint.training_bytes(smallest)
                self.UNet_vram_target_GB *= min(max(budget / need, 0.5), 0.9)
                if self.UNet_vram_target_GB < MIN_TARGET_GB:
                    break
                plan = super().get_plans_for_configuration(*arguments)
        finally:
            self.UNet_vram_target_GB = self.memory_gb
        plan["batch_size"] = max(min(plan["batch_size"], batch_size), smallest)
        plan["planning"] = self._explain(stock, plan, footprint)
        return plan

    def plan_experiment(self) -> Plans:
        """Plans all configurations, writes the plans file and returns its content."""
        with contextlib.redirect_stdout(io.StringIO()):
            super().plan_experiment()
        assert self.plans is not None
        return self.plans

    def save_plans(self, plans: Plans) -> None:
        """Leaves out what the network or the user does not want, names the data, and writes."""
        self._select_configurations(plans["configurations"])
        plain = as_json(plans)
        has_own_spacing = self.overwrite_target_spacing is not None or self.suppress_transpose
        if has_own_spacing or "3d_lowres" in plain["configurations"]:
            name_own_data(plain, self.plans_identifier)
        plain["umamba"] = {
            "network": self.entry.name,
            "network_args": self.network_args,
            "recipe": self.recipe.get("name"),
            "fixed_strides": self.entry.fixed_strides is not None,
            **self._memory_facts(),
        }
        self._plan_cascade(plain["configurations"])
        # nnU-Net's own name, so that stock nnU-Net can look the planner up.
        plain["experiment_planner_used"] = self.stock_planner.__name__
        for name, configuration in self._existing_plans().get("configurations", {}).items():
            if name not in CONFIGURATIONS or (self.wanted and name not in self.wanted):
                plain["configurations"].setdefault(name, configuration)
        save_plans(plain, self.plans_path)
        self.plans = plain

    def _is_wanted(self, configuration: str, dims: int) -> bool:
        asked = not self.wanted or configuration in self.wanted
        return asked and dims in self.entry.spatial_dims

    def _default_memory(self) -> tuple[float, str]:
        """The GiB to plan for where none are asked for, and where they come from."""
        return default_memory_gb(), default_memory_source()

    def _budget_bytes(self) -> int:
        """What a training step may need."""
        return int(USABLE_MEMORY * self.memory_gb * GIB)

    def _memory_facts(self) -> dict[str, Any]:
        """What planning again keeps to."""
        return {"memory_gb": self.memory_gb, "memory_from": self.memory_from}

    def _write_architecture(self, plan: dict[str, Any]) -> None:
        """Writes the network block and the rounded patch into nnU-Net's `plan`."""
        entry = self.entry
        assert isinstance(entry, NetworkEntry)
        stock, dims = plan["architecture"]["arch_kwargs"], len(plan["patch_size"])
        block = network_arguments(entry, self.network_args, stock, dims)
        plan["patch_size"] = list(
            round_patch(plan["patch_size"], network_divisor(block["strides"]))
        )
        if "patch_size" in entry.keywords:
            block["patch_size"] = plan["patch_size"]
        plan["architecture"] = {
            "network_class_name": entry.class_path,
            "arch_kwargs": json.loads(json.dumps(block)),
            "_kw_requires_import": [],
        }

    def _put_network_in(self, plan: dict[str, Any], cache: dict[Any, Any]) -> Footprint:
        """Writes network block, rounded patch and recipe into `plan`; returns its footprint."""
        self._write_architecture(plan)
        patch = tuple(plan["patch_size"])
        plan["recipe"] = copy.deepcopy(self.recipe)
        key = ("footprint", patch, str(plan["architecture"]["arch_kwargs"]["strides"]))
        if key not in cache:
            ends = (self.input_channels, self.num_classes)
            try:
                cache[key] = count_plan(plan, *ends, self.half_precision)
            except Exception as error:
                if not self.network_args:
                    raise
                # Each network fails in its own way on arguments that do not go together.
                given = ", ".join(f"{k}={json.dumps(v)}" for k, v in self.network_args.items())
                raise ValueError(
                    f"{self.entry.name} does not work with --network-arg {given} ({error}); "
                    f"`umamba models show {self.entry.name}` tells its arguments"
                ) from error
        return cache[key]

    def _explain(
        self, stock: Mapping[str, Any], plan: Mapping[str, Any], footprint: Footprint
    ) -> dict[str, Any]:
        stock = as_json({key: stock[key] for key in ("patch_size", "batch_size")})
        need = footprint.training_bytes(plan["batch_size"])
        divisor = network_divisor(plan["architecture"]["arch_kwargs"]["strides"])
        planner = self.stock_planner.__name__
        reasons = search_reasons(planner, stock, self.memory_gb, self.memory_from)
        reasons.append(f"{self.entry.name} takes patches divisible by {by(divisor)}.")
        reasons += self._reasons(stock, plan, need)
        return {
            "input_channels": self.input_channels,
            "num_classes": self.num_classes,
            "divisor": list(divisor),
            "nnunet_patch_size": stock["patch_size"],
            "nnunet_batch_size": stock["batch_size"],
            "memory_gb": self.memory_gb,
            "half_precision": self.half_precision,
            "training_bytes": need,
            "parameters": footprint.parameter_bytes // 4,
            "reasons": reasons,
        }

    def _reasons(self, stock: Mapping[str, Any], plan: Mapping[str, Any], need: int) -> list[str]:
        """Why this patch and this batch."""
        reasons = [step_reason(self.entry.name, plan, need, self.memory_gb)]
        if need > self.memory_gb * GIB:
            logger.warning("%s: %s", plan["data_identifier"], reasons[-1])
        if isinstance(self.entry, NetworkEntry):
            arguments = plan["architecture"]["arch_kwargs"]
            planned = self.entry.cls.planned_arguments
            reasons += adapted_reasons(self.entry.name, arguments, planned)
        change = change_reason(stock, plan, need, self.memory_gb)
        return [*reasons, change] if change else reasons

    def _existing_plans(self) -> Plans:
        """Returns the plans of this name, empty if none; ValueError if they are someone else's."""
        if not self.plans_path.is_file():
            return {}
        existing = load_plans(self.plans_path)
        facts = existing.get("umamba", {})
        ours = (self.entry.name, self.network_args, self.recipe.get("name"))
        there = (facts.get("network"), facts.get("network_args"), facts.get("recipe"))
        if there != ours:
            recipe = f" with recipe {there[2]}" if there[2] else ""
            raise ValueError(
                f"{self.plans_path} holds other plans (of {there[0] or 'nnU-Net'}{recipe}): "
                "give yours another name with --plans-name"
            )
        return existing

    def _select_configurations(self, found: dict[str, Any]) -> None:
        possible = list(found)
        for name in list(found):
            if not self._is_wanted(name, 2 if name == "2d" else 3):
                del found[name]
        if not {"3d_fullres", "3d_lowres"} <= found.keys():
            found.pop("3d_cascade_fullres", None)
            found.get("3d_lowres", {}).pop("next_stage", None)
        if not found:
            asked = ", ".join(self.wanted) or "any configuration"
            dims = {2 if name == "2d" else 3 for name in possible}
            ours = {name for d in dims for name in list_networks(d, controls=False)}
            fitting = sorted(ours | UPSTREAM.keys())
            raise ValueError(
                f"{self.dataset_name} cannot be planned as {asked} with {self.entry.name}, which "
                f"is a network for {' and '.join(f'{d}D' for d in self.entry.spatial_dims)}; its "
                f"images allow {', '.join(possible)}, with one of {', '.join(fitting)}"
            )

    def _plan_cascade(self, configurations: dict[str, Any]) -> None:
        """Says that the second stage of a cascade sees the first one's labels as channels."""
        if "3d_cascade_fullres" in configurations:
            planning = copy.deepcopy(configurations["3d_fullres"]["planning"])
            n_labels = len(self.labels.foreground_labels)
            planning["input_channels"] += n_labels
            planning["reasons"].append(f"The labels of 3d_lowres are {n_labels} further channels.")
            configurations["3d_cascade_fullres"]["planning"] = planning


class UpstreamPlanner(UMambaPlanner):
    """nnU-Net's planner of one of its own networks: its plan as it is.

    Only where a memory is asked for are patch and batch made to fit it, as for any network.
    """

    entry: UpstreamEntry

    def _default_memory(self) -> tuple[float, str]:
        return self.entry.memory_gb, "what this planner of nnU-Net's is for"

    def _budget_bytes(self) -> int:
        return sys.maxsize if self.asked_memory_gb is None else super()._budget_bytes()

    def _memory_facts(self) -> dict[str, Any]:
        return {} if self.asked_memory_gb is None else super()._memory_facts()

    def _write_architecture(self, plan: dict[str, Any]) -> None:
        plain, dims = as_json(plan["architecture"]), len(plan["patch_size"])
        plain["arch_kwargs"] = with_arguments(plain["arch_kwargs"], self.network_args, dims)
        divisor = network_divisor(plain["arch_kwargs"]["strides"])
        plan["patch_size"] = [int(n) for n in round_patch(plan["patch_size"], divisor)]
        plan["architecture"] = plain

    def _reasons(self, stock: Mapping[str, Any], plan: Mapping[str, Any], need: int) -> list[str]:
        name, is_stock = self.entry.name, self.asked_memory_gb is None and not self.network_args
        if self.asked_memory_gb is not None:
            reasons = super()._reasons(stock, plan, need)
        else:
            reasons = [step_reason(name, plan, need, self.memory_gb)]
        return reasons + upstream_reasons(name, need, is_stock)
