"""What a request for a network means: its arguments in the plans, its plans name, its limits."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from umamba.networks.registry import NetworkEntry
from umamba.planning.plans import digest, fit_arguments
from umamba.planning.topology import strides_for_axes

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")
SHARED_ARGUMENTS = (
    "strides",
    "features_per_stage",
    "kernel_sizes",
    "n_conv_per_stage",
    "n_conv_per_stage_decoder",
)
PLANNED_ARGUMENTS = ("patch_size", "deep_supervision")


def network_arguments(
    entry: NetworkEntry, network_args: Mapping[str, Any], stock: Mapping[str, Any], dims: int
) -> dict[str, Any]:
    """Returns arch_kwargs of a registered network from those of nnU-Net's planned U-Net.

    A network with fixed strides keeps its own numbers per stage; the user's arguments go before
    the name's (a control's mixer), and these before the planner's. The user's numbers per stage
    are cut or extended to the stages.

    Args:
        network_args: the user's arguments; other strides than the planner's bring their own stages.
        stock: arch_kwargs that nnU-Net planned.
        dims: 2 or 3 spatial axes.
    """
    fixed = entry.fixed_strides
    if fixed is None:
        block = {key: stock[key] for key in SHARED_ARGUMENTS if key in entry.keywords}
    else:
        block = {"strides": strides_for_axes(fixed, dims)}
    block = {**block, **entry.arguments, **network_args}
    if "strides" in network_args:
        block["strides"] = strides_for_axes(network_args["strides"], dims)
        if "kernel_sizes" in block and "kernel_sizes" not in network_args:
            block["kernel_sizes"] = [[3] * dims] * len(block["strides"])
    if network_args:
        fit_arguments(block)
    return block


def default_plans_name(network: str, network_args: Mapping[str, Any]) -> str:
    """Returns the network's name, with a short hash where arguments differ from the planner's."""
    return f"{network}_{digest(network_args)[:6]}" if network_args else network


def check_network_args(entry: NetworkEntry, network_args: Mapping[str, Any]) -> None:
    """Raises ValueError for an argument that the network does not have or that is planned."""
    allowed = [key for key in entry.keywords if key not in PLANNED_ARGUMENTS]
    for key in network_args:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(allowed)}"
            raise ValueError(f"{entry.name} has no argument {key!r} to set: {hint}")


def check_configurations(names: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the wanted configurations in order, empty for all; ValueError names the nearest."""
    for name in names or ():
        if name not in CONFIGURATIONS:
            near = difflib.get_close_matches(name, CONFIGURATIONS, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONFIGURATIONS)}"
            raise ValueError(f"no configuration is called {name!r}: {hint}")
    wanted = set(names or ())
    if "3d_cascade_fullres" in wanted:
        wanted |= {"3d_fullres", "3d_lowres"}
    return tuple(name for name in CONFIGURATIONS if name in wanted)
