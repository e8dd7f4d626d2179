"""Turns an official checkpoint into an ordinary nnU-Net model folder."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from umamba.files import replacing_together, write_json
from umamba.inference.model_folder import read_json
from umamba.networks import NetworkEntry, get_entry, recognize_network
from umamba.networks.checkpoint import read_weights
from umamba.networks.state_dict import LoadReport

# Fields of plans written before nnU-Net 2.5, and what they are called in arch_kwargs today.
OLD_FIELDS = {
    "conv_kernel_sizes": "kernel_sizes",
    "pool_op_kernel_sizes": "strides",
    "n_conv_per_stage_encoder": "n_conv_per_stage",
    "n_conv_per_stage_decoder": "n_conv_per_stage_decoder",
}
WIDTHS = ("UNet_base_num_features", "unet_max_num_features")
OLD_ONLY = {"UNet_class_name", "num_pool_per_axis", *WIDTHS, *OLD_FIELDS}
PREPARATION = ("patch_size", "spacing")
NEEDED = ("strides", "features_per_stage", "kernel_sizes", "n_conv_per_stage")

# Preparation of networks that were not trained in nnU-Net, where nnU-Net's plans can say the same.
OFFICIAL_PREPARATION: dict[str, dict[str, Any]] = {
    "segmamba": {
        "patch_size": [128, 128, 128],
        "spacing": [1.0, 1.0, 1.0],
        "normalization": "ZScoreNormalization",
    },
}

Shapes = dict[str, tuple[int, ...]]


def import_checkpoint(
    network: str,
    checkpoint: Path,
    plans: Path | None,
    dataset_json: Path,
    output_folder: Path,
    *,
    configuration: str | None = None,
    fold: int | str = 0,
    network_args: Mapping[str, Any] | None = None,
) -> LoadReport:
    """Writes a model folder that `umamba predict` and stock nnU-Net load.

    network: a registered name. checkpoint: the official file (nnU-Net's training checkpoint or a
    bare state dict). plans: the plans.json of its training, of nnU-Net 2.2 or later; None for a
    network that was trained outside nnU-Net in a way that plans can describe. configuration:
    default the checkpoint's own. network_args: arguments of the network that neither plans nor
    checkpoint tell. The folder may exist if it has the same plans and not this fold.
    Raises ValueError or FileNotFoundError with one sentence for anything that does not fit.
    """
    entry = get_entry(network)
    content, weights = read_weights(checkpoint)
    key_map = entry.cls.official_key_map()
    if not key_map.covers(weights):
        raise ValueError(f"{checkpoint} is not a checkpoint of {entry.name}; {_look(weights)}")
    for file in filter(None, (plans, dataset_json)):
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; check the path")
    dataset = read_json(dataset_json)
    if not ({"channel_names", "modality"} & dataset.keys() and dataset.get("labels")):
        raise ValueError(
            f"{dataset_json} does not tell channel_names and labels; give the dataset.json of the "
            "training"
        )
    if plans is None:
        new_plans = official_plans(entry, dataset)
        plans = output_folder / "plans.json"
    else:
        new_plans = modern_plans(read_json(plans), entry, plans)

    training = content.get("init_args")
    trained = training.get("configuration") if isinstance(training, Mapping) else None
    names = list(new_plans["configurations"])
    chosen = str(configuration or trained or (names[0] if len(names) == 1 else ""))
    if chosen not in names:
        told = f"has no configuration {chosen!r}" if chosen else "holds several configurations"
        raise ValueError(f"{plans} {told}; choose with -c one of {', '.join(names)}")

    manager = PlansManager(new_plans)
    settings = manager.get_configuration(chosen)
    untold = [key for key in PREPARATION if key not in settings.configuration]
    if untold:
        raise ValueError(
            f"{plans}: {chosen} does not tell {', '.join(untold)}; give the plans.json that the "
            "checkpoint was trained with"
        )
    dims = len(settings.patch_size)
    if settings.network_arch_class_name != entry.class_path:
        raise ValueError(f"{entry.name} has no {dims}D form, which {chosen} needs")
    given = key_map.own_shapes(weights)
    arguments = told_arguments(entry, settings.network_arch_init_kwargs, given)
    arguments |= network_args or {}
    if arguments != settings.network_arch_init_kwargs:
        new_plans["configurations"][chosen]["architecture"] = _block(entry, arguments)

    def shapes_for(n_channels: int, n_classes: int) -> Shapes:
        with torch.device("meta"):
            network = entry.cls(n_channels, n_classes, **arguments)
        return {key: tuple(value.shape) for key, value in network.state_dict().items()}

    counts = (
        determine_num_input_channels(manager, settings, dataset),
        manager.get_label_manager(dataset).num_segmentation_heads,
    )
    try:
        own, report = key_map.to_own(weights, shapes_for(*counts))
    except ValueError as error:
        check_counts(shapes_for, counts, given, f"{checkpoint} with configuration {chosen}")
        raise ValueError(
            f"{checkpoint} with configuration {chosen}: {error}; what plans do not tell is given "
            "with --network-arg"
        ) from error

    axes = content.get("inference_allowed_mirroring_axes", range(dims))
    init_args = {"plans": new_plans, "configuration": chosen, "fold": fold, "dataset_json": dataset}
    result = {
        "network_weights": {key: value.detach().clone() for key, value in own.items()},
        "optimizer_state": None,
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": None,
        "current_epoch": content.get("current_epoch", 0),
        "init_args": init_args,
        # Stock prediction looks the class up by name and needs nothing but its network builder.
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": axes if axes is None else tuple(axes),
    }
    _write_model_folder(output_folder, result)
    return report


def _look(weights: Mapping[str, Any]) -> str:
    """What a checkpoint looks like, for a sentence."""
    similar = recognize_network(weights.keys())
    if any(get_entry(name).cls.official_key_map().fits(weights) for name in similar):
        return f"it has umamba's own names ({' or '.join(similar)}): predict with its model folder"
    return f"it looks like {' or '.join(similar)}" if similar else "nor of any registered network"


def told_arguments(
    entry: NetworkEntry, planned: Mapping[str, Any], given: Shapes
) -> dict[str, Any]:
    """The planned arguments of a network, with those that its checkpoint tells in their place."""
    told: dict[str, Any] = {}
    if entry.control_of is None:
        with contextlib.suppress(KeyError):  # missing tensors are reported later, all of them
            told = entry.cls.arguments_of(given)
    return {**planned, **{key: value for key, value in told.items() if key in entry.keywords}}


def check_counts(
    shapes_for: Callable[[int, int], Shapes], counts: tuple[int, int], given: Shapes, what: str
) -> None:
    """Raises ValueError where a checkpoint has other numbers of channels or classes.

    shapes_for: the network's shapes for such numbers. counts: channels and classes of the dataset.
    given: the checkpoint's shapes under our names. what: the checkpoint, for the sentence.
    """
    for index, noun in enumerate(("input channels", "classes")):
        # An extent that grows with the number tells the checkpoint's.
        more = [list(counts), list(counts)]
        more[0][index] += 1
        more[1][index] += 2
        try:
            planned, one, two = (shapes_for(*numbers) for numbers in (counts, *more))
        except ValueError:  # a network that takes no other number
            continue
        for key in sorted(given.keys() & planned.keys() & one.keys() & two.keys()):
            for axis, (low, high) in enumerate(zip(one[key], two[key], strict=True)):
                if high <= low or len(given[key]) <= axis:
                    continue
                found = more[0][index] + (given[key][axis] - low) // (high - low)
                if given[key][axis] != planned[key][axis] and found != counts[index]:
                    raise ValueError(
                        f"{what}: it has {found} {noun} where dataset.json has {counts[index]}; "
                        "give the dataset.json of its training"
                    )


def official_plans(entry: NetworkEntry, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Plans of one configuration for a network that was not trained in nnU-Net.

    Raises ValueError where the network's own preparation is not one that plans can describe.
    """
    if entry.name not in OFFICIAL_PREPARATION:
        raise ValueError(
            f"{entry.name} needs plans: give --plans with the plans.json of its training, or, if "
            "it was not trained in nnU-Net, with plans of your own (`umamba plan DATASET --network "
            f"{entry.name}`), whose spacing, patch and normalization must be those of its training"
        )
    official = OFFICIAL_PREPARATION[entry.name]
    dims = len(official["patch_size"])
    n_channels = len(dataset.get("channel_names") or dataset["modality"])
    resampling: dict[str, Any] = {}
    for kind, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        options = {"is_seg": kind == "seg", "order": order, "order_z": 0}
        resampling[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        resampling[f"resampling_fn_{kind}_kwargs"] = {**options, "force_separate_z": False}
    name = "2d" if dims == 2 else "3d_fullres"
    configuration = {
        "data_identifier": f"{entry.name}_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": official["patch_size"],
        "spacing": official["spacing"],
        "normalization_schemes": [official["normalization"]] * n_channels,
        "use_mask_for_norm": [False] * n_channels,
        **resampling,
        "architecture": _block(entry, entry.own_stages(dims)),
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset000_Imported",
        "plans_name": entry.name,
        "image_reader_writer": dataset.get("overwrite_image_reader_writer", "SimpleITKIO"),
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "experiment_planner_used": "ExperimentPlanner",
        "foreground_intensity_properties_per_channel": {
            str(channel): {} for channel in range(n_channels)
        },
        "configurations": {name: configuration},
    }


def modern_plans(plans: Mapping[str, Any], entry: NetworkEntry, file: Path) -> dict[str, Any]:
    """The plans in today's form with this network in all configurations of its dimensions.

    Reads architecture.arch_kwargs, or the fields of plans written before nnU-Net 2.5. Raises
    ValueError naming `file` where a configuration cannot be read.
    """
    result = copy.deepcopy(dict(plans))
    if not isinstance(result.get("configurations"), dict):
        raise ValueError(f"{file} has no configurations; give the plans.json of the training")
    for name, own in result["configurations"].items():
        resolved = _resolve(plans["configurations"], name, file)
        if "fast_resample_data_or_seg_to_shape" in json.dumps(resolved):
            raise ValueError(
                f"{file}: {name} resamples with fast_resample_data_or_seg_to_shape, which only "
                "U-Mamba's copy of nnU-Net has; write resample_data_or_seg_to_shape instead"
            )
        if len(resolved.get("patch_size", ())) not in entry.spatial_dims:
            continue
        if "inherits_from" in own and not {"architecture", "patch_size", *OLD_ONLY} & own.keys():
            continue
        own["architecture"] = _architecture(resolved, entry, name, file)
        for field in OLD_ONLY:
            own.pop(field, None)
    return result


def _resolve(
    configurations: Mapping[str, Any], name: str, file: Path, heirs: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A configuration with what it inherits; `heirs` are those that inherit from it."""
    if name not in configurations or name in heirs:
        raise ValueError(f"{file}: {heirs[-1]} inherits from {name}, which is not there")
    own = configurations[name]
    parent = own.get("inherits_from")
    return own if parent is None else _resolve(configurations, parent, file, (*heirs, name)) | own


def _architecture(
    configuration: Mapping[str, Any], entry: NetworkEntry, name: str, file: Path
) -> dict[str, Any]:
    """The `architecture` block of a configuration with this network."""
    planned = configuration.get("architecture", {})
    if entry.fixed_strides is not None and planned.get("network_class_name") != entry.class_path:
        # The stages in these plans are those of nnU-Net's U-Net: the network keeps its own.
        return _block(entry, entry.own_stages(len(configuration["patch_size"])))
    if planned:
        known = dict(planned.get("arch_kwargs", {}))
    else:
        known = {new: configuration[old] for old, new in OLD_FIELDS.items() if old in configuration}
        base, largest = (configuration.get(key) for key in WIDTHS)
        if base and largest and "strides" in known:
            stages = range(len(known["strides"]))
            known["features_per_stage"] = [min(base * 2**s, largest) for s in stages]
    known["patch_size"] = configuration["patch_size"]
    missing = [key for key in NEEDED if key in entry.keywords and key not in known]
    if missing and entry.fixed_strides is None:  # the others have defaults of their own
        raise ValueError(
            f"{file}: {name} does not tell {', '.join(missing)} of the network; "
            "give the plans.json that the checkpoint was trained with"
        )
    switches = ("mixer", "deep_supervision")
    return _block(entry, {k: known[k] for k in entry.keywords if k in known and k not in switches})


def _block(entry: NetworkEntry, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The plans' form of a network with these arguments and those that its name implies."""
    return {
        "network_class_name": entry.class_path,
        "arch_kwargs": {**arguments, **entry.arguments},
        "_kw_requires_import": [],
    }


def _write_model_folder(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Writes plans.json, dataset.json and, last, the fold with its checkpoint."""
    training = checkpoint["init_args"]
    if folder.is_file():
        raise ValueError(f"{folder} is a file; choose a folder")
    plans, target = training["plans"], folder / f"fold_{training['fold']}"
    if target.exists():
        raise ValueError(f"{target} exists already; choose another folder or fold")
    if (folder / "plans.json").exists() and read_json(folder / "plans.json") != plans:
        raise ValueError(f"{folder} is the model folder of other plans; choose another folder")
    with replacing_together(target) as temporary:
        (temporary / target.name).mkdir()
        torch.save(checkpoint, temporary / target.name / "checkpoint_final.pth")
        write_json(temporary / "plans.json", plans)
        write_json(temporary / "dataset.json", training["dataset_json"])
