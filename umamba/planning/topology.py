"""The network's part of a plan: divisors, stages of a patch, numbers per stage, arguments."""

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from umamba.networks.registry import NetworkEntry
from umamba.planning.upstream import UpstreamEntry

Strides = tuple[tuple[int, ...], ...]

MIN_EDGE = 4  # of the deepest feature map: nnU-Net's `UNet_featuremap_min_edge_length`
MAX_FEATURES = {2: 512, 3: 320}
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
STAGE_COUNTS = ("features_per_stage", "n_conv_per_stage", "n_conv_per_stage_decoder")
SHARED_ARGUMENTS = ("strides", "kernel_sizes", *STAGE_COUNTS)
PLANNED_ARGUMENTS = ("patch_size", "deep_supervision")


def network_divisor(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Returns per axis the number that a patch must be divisible by: the product of `strides`."""
    if not strides or len({len(stride) for stride in strides}) != 1:
        raise ValueError(f"strides must be one entry per stage with the same axes, got {strides}")
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def round_patch(patch_size: Sequence[int], divisor: Sequence[int]) -> tuple[int, ...]:
    """Returns the smallest patch that holds `patch_size` and is divisible by `divisor`.

    The deepest map gets two voxels at least: norms over the voxels fail on a single one.
    """
    pairs = zip(patch_size, divisor, strict=True)
    n_steps = [max(-(-int(size) // step), 1) for size, step in pairs]
    if math.prod(n_steps) == 1:
        n_steps[-1] = 2
    return tuple(n * step for n, step in zip(n_steps, divisor, strict=True))


def strides_for_axes(fixed_strides: Sequence[Sequence[int]], spatial_dims: int) -> Strides:
    """Returns `fixed_strides` for 2 or 3 axes; a 2D network takes the last axes of a 3D entry."""
    given = len(fixed_strides[0])
    if given < spatial_dims:
        raise ValueError(
            f"strides of {given} axes cannot serve a network of {spatial_dims} axes: give "
            f"{spatial_dims} numbers a stage, or choose the configuration 2d (-c 2d)"
        )
    return tuple(tuple(int(s) for s in stride[given - spatial_dims :]) for stride in fixed_strides)


def stages_for_patch(
    spacing: Sequence[float], patch_size: Sequence[int]
) -> tuple[Strides, Strides, tuple[int, ...]]:
    """Returns strides, kernel sizes and the padded patch that nnU-Net chooses for a patch.

    Args:
        spacing: mm per voxel of the training images, in the order of `patch_size`.
        patch_size: voxels per axis before rounding.
    """
    from nnunetv2.experiment_planning.experiment_planners.network_topology import (
        get_pool_and_conv_props,
    )

    _, strides, kernel_sizes, patch, _ = get_pool_and_conv_props(
        list(spacing), [int(size) for size in patch_size], MIN_EDGE, 999999
    )
    return strides, kernel_sizes, tuple(int(size) for size in patch)


def fit_arguments(arguments: dict[str, Any]) -> None:
    """Cuts or extends the numbers per stage to as many stages as there are strides, in place.

    Each further stage is twice as wide, up to nnU-Net's maximum; of blocks the last number repeats.
    """
    strides, counts = arguments["strides"], [*STAGE_COUNTS]
    if "n_stages" in arguments:  # a network of nnU-Net's own
        arguments["n_stages"] = len(strides)
        counts.append("n_blocks_per_stage")
    for key in counts:
        if isinstance(arguments.get(key), list | tuple):
            n_values = len(strides) - 1 if key.endswith("decoder") else len(strides)
            fitted = [int(value) for value in arguments[key][:n_values]]
            while len(fitted) < n_values:
                wider = min(2 * fitted[-1], max(MAX_FEATURES[len(strides[0])], fitted[-1]))
                fitted.append(wider if key == "features_per_stage" else fitted[-1])
            arguments[key] = fitted


def network_arguments(
    entry: NetworkEntry, network_args: Mapping[str, Any], stock: Mapping[str, Any], dims: int
) -> dict[str, Any]:
    """Returns arch_kwargs of a registered network from those of nnU-Net's planned U-Net.

    A network with fixed strides keeps its own numbers per stage; the user's arguments
    (`network_args`) go before the name's (a control's mixer), these before the class's
    `planned_arguments`, and these before the planner's (`stock`). The user's strides bring their
    own stages, and numbers per stage are fitted to them.
    """
    block: dict[str, Any]
    if entry.fixed_strides is None:
        block = {key: stock[key] for key in SHARED_ARGUMENTS if key in entry.keywords}
    else:
        block = entry.own_stages(dims)
    block |= {**entry.cls.planned_arguments, **entry.arguments}
    return with_arguments(block, network_args, dims)


def with_arguments(
    planned: Mapping[str, Any], network_args: Mapping[str, Any], dims: int
) -> dict[str, Any]:
    """Returns planned arch_kwargs with the user's: own strides bring their stages and kernels."""
    block = {**planned, **network_args}
    if "strides" in network_args:
        block["strides"] = strides_for_axes(network_args["strides"], dims)
        if "kernel_sizes" in block and "kernel_sizes" not in network_args:
            block["kernel_sizes"] = [[3] * dims] * len(block["strides"])
    if network_args:
        fit_arguments(block)
    return block


def check_network_args(
    entry: NetworkEntry | UpstreamEntry, network_args: Mapping[str, Any]
) -> None:
    """Raises ValueError for an argument that the network has not or that is planned, and for a
    value that is not of the argument's kind."""
    allowed = [key for key in entry.keywords if key not in PLANNED_ARGUMENTS]
    for key, value in network_args.items():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(allowed)}"
            raise ValueError(f"{entry.name} has no argument {key!r} to set: {hint}")
        parameter = entry.parameters[key]
        default, (kind, _, optional) = parameter.default, str(parameter.annotation).partition(" | ")
        own_kind = "drop_path" if key.startswith("drop_path") else key
        told, fits = KINDS.get(own_kind) or KINDS[kind]
        lowest = 0 if isinstance(default, tuple) and 0 in default else 1
        if not (fits(value, lowest) or (optional and value is None)):
            example = "" if default in (None, parameter.empty) else f", as {json.dumps(default)}"
            raise ValueError(
                f"{entry.name}'s {key} cannot be {json.dumps(value)}: it is {told}{example}"
            )


def _is_count(value: Any, lowest: int) -> bool:
    return type(value) is int and value >= lowest


def _is_number(value: Any, below: float) -> bool:
    return type(value) in (int, float) and 0 <= value < below


def _are_counts(value: Any, lowest: int) -> bool:
    whole = isinstance(value, list | tuple) and len(value) > 0
    return whole and all(_is_count(number, lowest) for number in value)


def _are_sizes(value: Any, lowest: int) -> bool:
    whole = isinstance(value, list | tuple) and len(value) > 0
    whole = whole and all(_are_counts(sizes, lowest) for sizes in value)
    return whole and len({len(sizes) for sizes in value}) == 1


def _are_strides(value: Any, lowest: int) -> bool:
    return _are_sizes(value, lowest) and len(value) > 1 and max(value[0]) == 1


# What an argument's annotation (or, for some, its name) stands for, in words, and whether a JSON
# value is that; the second argument is the lowest number that a list may hold.
KINDS: dict[str, tuple[str, Callable[[Any, int], bool]]] = {
    "int": ("a whole number above 0", _is_count),
    "float": ("a number, not negative", lambda value, _: _is_number(value, math.inf)),
    "drop_path": ("a rate of at least 0 and below 1", lambda value, _: _is_number(value, 1)),
    "bool": ("true or false", lambda value, _: isinstance(value, bool)),
    "str": ("a word", lambda value, _: isinstance(value, str)),
    "Sequence[int]": ("a list of whole numbers above 0", _are_counts),
    "Sequence[Sequence[int]]": (
        "a list of stages, each a list of whole numbers above 0, one an axis",
        _are_sizes,
    ),
    "strides": (
        "a list of two stages or more, each a list of whole numbers above 0, one an axis, and in "
        "the first stage all 1",
        _are_strides,
    ),
    "Counts": (
        "a whole number above 0, or a list of them, one a stage",
        lambda value, lowest: _is_count(value, lowest) or _are_counts(value, lowest),
    ),
}


def check_configurations(names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the wanted configurations in order, empty for all; ValueError names the nearest."""
    wanted = set(names or ())
    for name in names or ():
        if name not in CONFIGURATIONS:
            near = difflib.get_close_matches(name, CONFIGURATIONS, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONFIGURATIONS)}"
            raise ValueError(f"no configuration is called {name!r}: {hint}")
    if "3d_cascade_fullres" in wanted:
        wanted |= {"3d_fullres", "3d_lowres"}
    return tuple(name for name in CONFIGURATIONS if name in wanted)
