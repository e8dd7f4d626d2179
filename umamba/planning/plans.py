"""Plans files: read, check, write, compare, and change one configuration consistently."""

import copy
import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from umamba.blocks.recompute import recompute_mixers
from umamba.files import write_json
from umamba.planning.footprint import Footprint, count_footprint
from umamba.planning.measure import NoiseStep, StepCheck, TrialStep, measure_step
from umamba.planning.topology import (
    fit_arguments,
    network_divisor,
    round_patch,
    stages_for_patch,
)

Plans = dict[str, Any]

STOCK_PLANS = "nnUNetPlans"
# Files that nnU-Net and the audit keep in the folder of the plans.
TAKEN_NAMES = ("audit", "dataset", "dataset_fingerprint", "splits_final")
REQUIRED = (
    "dataset_name",
    "plans_name",
    "image_reader_writer",
    "transpose_forward",
    "configurations",
)
PREPROCESSING_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
# Normalizations that look at no other case.
PER_CASE = {
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
}


def load_plans(path: Path) -> Plans:
    """Returns the plans in `path`; ValueError or FileNotFoundError name the file and the cure."""
    if not path.is_file():
        there = ", ".join(list_plans(path.parent)) or "none"
        raise FileNotFoundError(
            f"no plans file {path} (plans there: {there}): run `umamba plan` first"
        )
    plans = read_json(path)
    missing = [key for key in REQUIRED if key not in plans]
    if missing:
        raise ValueError(f"{path} is no plans file, it has no {', '.join(missing)}: plan again")
    return plans


def check_plans_name(name: str) -> None:
    """ValueError for a name under which other files are kept beside the plans."""
    if name in TAKEN_NAMES:
        raise ValueError(
            f"plans cannot be named {name}, which {name}.json of the preprocessed folder is not "
            "for: choose another --plans-name"
        )


def list_plans(folder: Path) -> list[str]:
    """Returns the names of the plans files in a preprocessed dataset folder, sorted."""
    names = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and {"configurations", "plans_name"} <= content.keys():
            names.append(path.stem)
    return names


def plans_file(dataset_name: str, plans_name: str) -> Path:
    """Returns where nnU-Net keeps the plans of a dataset."""
    return preprocessed_folder(dataset_name) / f"{plans_name}.json"


def preprocessed_folder(dataset_name: str) -> Path:
    """Returns `<nnUNet_preprocessed>/<dataset>`."""
    from nnunetv2.paths import nnUNet_preprocessed

    return Path(nnUNet_preprocessed) / dataset_name


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file; ValueError names the file that cannot be read as JSON."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): repair or delete it") from error


def save_plans(plans: Mapping[str, Any], path: Path | None = None) -> Path:
    """Writes plans atomically, to their place under nnUNet_preprocessed unless `path` is given."""
    path = path or plans_file(plans["dataset_name"], plans["plans_name"])
    write_json(path, plans)
    return path


def get_configuration(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a copy of a configuration with what it inherits; ValueError with nearest names."""
    configurations = plans["configurations"]
    if name not in configurations:
        near = difflib.get_close_matches(name, configurations, n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"plans {plans['plans_name']} have no configuration {name!r}, only "
            f"{', '.join(configurations)}{hint}"
        )
    configuration: dict[str, Any] = copy.deepcopy(configurations[name])
    parent = configuration.get("inherits_from")
    if parent is None:
        return configuration
    if parent == name or parent not in configurations:
        raise ValueError(f"configuration {name} inherits from {parent}, which is not in the plans")
    return get_configuration(plans, parent) | configuration


def network_builder(
    configuration: Mapping[str, Any],
    input_channels: int,
    num_classes: int,
    deep_supervision: bool | None = None,
) -> Callable[[], nn.Module]:
    """Returns a function that builds the configuration's network the way nnU-Net builds it.

    Its mixers are recomputed in backward where the configuration's recipe says so; whether it has
    deep supervision the recipe says, too, if it is not given.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    architecture, recipe = configuration["architecture"], configuration.get("recipe", {})
    if deep_supervision is None:
        deep_supervision = recipe.get("enable_deep_supervision", True)

    def build() -> nn.Module:
        network: nn.Module = get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            input_channels,
            num_classes,
            allow_init=False,
            deep_supervision=deep_supervision,
        )
        recompute_mixers(network, recipe.get("recompute") == "mixer")
        return network

    return build


def count_plan(
    configuration: Mapping[str, Any], input_channels: int, num_classes: int, half_precision: bool
) -> Footprint:
    """Returns what a training step of the configuration keeps, with its recipe's optimizer.

    half_precision: what it is unless the recipe asks for fp32.
    """
    recipe = configuration.get("recipe", {})
    build = network_builder(configuration, input_channels, num_classes)
    n_moments = 1 if recipe.get("optimizer", "sgd") == "sgd" else 2
    half_precision = half_precision and recipe.get("precision") != "fp32"
    patch_size = configuration["patch_size"]
    return count_footprint(build, input_channels, patch_size, half_precision, n_moments)


def check_plan(
    plans: Mapping[str, Any],
    configuration: str,
    device: str,
    make_step: Callable[[], TrialStep] | None = None,
) -> StepCheck:
    """Runs a training step on noise at the planned patch and batch; returns what it costs.

    make_step: makes the step; by default one of stock nnU-Net's optimizer and a loss like its.
    Raises MemoryError where there is too little.
    """
    part = get_configuration(plans, configuration)
    channels, classes = part["planning"]["input_channels"], part["planning"]["num_classes"]
    footprint = count_plan(part, channels, classes, device.startswith("cuda"))

    def noise_step() -> TrialStep:
        shape = (part["batch_size"], channels, *part["patch_size"])
        image = torch.randn(shape, device=device)
        return NoiseStep(network_builder(part, channels, classes)(), image)

    counted = footprint.training_bytes(part["batch_size"])
    return measure_step(make_step or noise_step, device, counted)


def replan(
    plans: Mapping[str, Any],
    configuration: str,
    *,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    features_per_stage: Sequence[int] | None = None,
    recipe: Mapping[str, Any] | None = None,
    reason: str = "as asked",
) -> Plans:
    """Returns plans in which one configuration is changed and stays consistent.

    A new patch (voxels per axis) gets nnU-Net's stages for it, unless the network's strides are
    fixed, is rounded up to the divisor and enters the arguments of a network that is tied to it;
    the numbers per stage are cut or extended to the stages. `recipe` is merged over the
    configuration's. A configuration that inherits keeps doing so for all that is not changed.
    """
    changed: Plans = copy.deepcopy(dict(plans))
    before = get_configuration(changed, configuration)
    after = copy.deepcopy(before)
    arguments = after["architecture"]["arch_kwargs"]
    if patch_size is not None:
        facts = changed.get("umamba", {})
        tied = facts.get("fixed_strides") or "strides" in facts.get("network_args", {})
        _set_patch(after, patch_size, bool(tied))
    if features_per_stage is not None:
        arguments["features_per_stage"] = list(features_per_stage)
    fit_arguments(arguments)
    if batch_size is not None:
        if batch_size < 1:
            raise ValueError(f"a batch size must be at least 1, got {batch_size}")
        after["batch_size"] = int(batch_size)
    if recipe is not None:
        after["recipe"] = {**after.get("recipe", {}), **recipe}
    _note(before, after, reason)
    own = changed["configurations"][configuration]
    own.update({key: value for key, value in after.items() if before.get(key) != value})
    return changed


def _set_patch(
    configuration: dict[str, Any], patch_size: Sequence[int], tied_strides: bool
) -> None:
    axes = len(configuration["patch_size"])
    if len(patch_size) != axes or min(patch_size) < 1:
        raise ValueError(f"patch_size must be {axes} positive numbers, got {list(patch_size)}")
    arguments = configuration["architecture"]["arch_kwargs"]
    if not tied_strides:
        strides, kernels, _ = stages_for_patch(configuration["spacing"], patch_size)
        arguments["strides"] = [list(stride) for stride in strides]
        if "kernel_sizes" in arguments:
            arguments["kernel_sizes"] = [list(kernel) for kernel in kernels]
    patch = list(round_patch(patch_size, network_divisor(arguments["strides"])))
    configuration["patch_size"] = patch
    if "patch_size" in arguments:
        arguments["patch_size"] = patch


def _note(before: Mapping[str, Any], after: dict[str, Any], reason: str) -> None:
    """Keeps the figures of the "planning" entry true and adds the reason."""
    old, new = ({**part, **part["architecture"]["arch_kwargs"]} for part in (before, after))
    changes = [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in ("patch_size", "batch_size", "features_per_stage", "n_conv_per_stage")
        if old.get(key) != new.get(key)
    ]
    planning = after["planning"]
    ends = (planning["input_channels"], planning["num_classes"])
    footprint = count_plan(after, *ends, planning["half_precision"])
    planning["divisor"] = list(network_divisor(new["strides"]))
    planning["training_bytes"] = footprint.training_bytes(after["batch_size"])
    planning["parameters"] = footprint.parameter_bytes // 4
    planning.setdefault("reasons", []).append(f"{'; '.join(changes) or 'recipe'}: {reason}")


def diff_plans(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Returns one line per value that differs: `path: first -> second`."""
    lines: list[str] = []

    def compare(path: str, a: Any, b: Any) -> None:
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in {**a, **b}:
                compare(f"{path}.{key}" if path else str(key), a.get(key), b.get(key))
        elif json.dumps(a) != json.dumps(b):
            lines.append(f"{path}: {json.dumps(a)} -> {json.dumps(b)}")

    compare("", first, second)
    return lines


def preprocessing_part(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Returns what decides the content of a configuration's preprocessed folder."""
    resolved = get_configuration(plans, configuration)
    alone = PER_CASE.issuperset(resolved["normalization_schemes"])
    return {
        "image_reader_writer": plans["image_reader_writer"],
        "transpose_forward": plans["transpose_forward"],
        "intensities": None if alone else plans["foreground_intensity_properties_per_channel"],
        **{key: resolved[key] for key in PREPROCESSING_KEYS},
    }


def digest(content: Any) -> str:
    """Returns 16 hexadecimal digits that identify a JSON value."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
