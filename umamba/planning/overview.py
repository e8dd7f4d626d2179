"""What is told of each network at a glance, for `umamba models list` and the README's table."""

from typing import Any

import torch
from torch import nn

from umamba.networks import list_networks
from umamba.networks.registry import NetworkEntry
from umamba.planning.plans import network_builder
from umamba.planning.topology import network_arguments
from umamba.planning.upstream import UPSTREAM, UpstreamEntry, find_entry

# What nnU-Net plans for large images of equal spacing, one channel and two classes.
STANDARD_PATCH = {2: (512, 512), 3: (128, 128, 128)}
STANDARD_FEATURES = {2: (32, 64, 128, 256, 512, 512, 512, 512), 3: (32, 64, 128, 256, 320, 320)}


def all_networks(spatial_dims: int | None = None, *, controls: bool = True) -> list[str]:
    """The names of the registered networks (as `list_networks`), then those of nnU-Net's own."""
    return [*list_networks(spatial_dims, controls=controls), *UPSTREAM]


def standard_parameters(entry: NetworkEntry | UpstreamEntry, dims: int) -> int:
    """Parameters of a network in nnU-Net's plan for large images."""
    return sum(parameter.numel() for parameter in standard_network(entry, dims).parameters())


def standard_network(entry: NetworkEntry | UpstreamEntry, dims: int) -> nn.Module:
    """A network on the meta device as nnU-Net plans for large images: 512^2, 8 stages; 128^3, 6."""
    n_stages = len(STANDARD_FEATURES[dims])
    strides = [[1] * dims] + [[2] * dims] * (n_stages - 1)
    if isinstance(entry, UpstreamEntry):
        part = {"architecture": entry.architecture(strides, STANDARD_FEATURES[dims])}
        with torch.device("meta"):
            return network_builder(part, 1, 2, deep_supervision=False)()
    stock = {
        "features_per_stage": list(STANDARD_FEATURES[dims]),
        "strides": strides,
        "kernel_sizes": [[3] * dims] * n_stages,
        "n_conv_per_stage": [2] * n_stages,
        "n_conv_per_stage_decoder": [2] * (n_stages - 1),
    }
    arguments = network_arguments(entry, {}, stock, dims)
    if "patch_size" in entry.keywords:
        arguments["patch_size"] = list(STANDARD_PATCH[dims])
    with torch.device("meta"):
        return entry.cls(1, 2, **arguments)


def overview(name: str) -> dict[str, Any]:
    """One row: name, dimensions, parameters per dimension, paper, origin, its licence, weights.

    equals: the official code whose recorded cases the network passes. pretrained: the published
    ImageNet weights that it can start from. For nnU-Net's own networks it is the code itself.
    """
    entry = find_entry(name)
    return {
        "name": entry.name,
        "dims": list(entry.spatial_dims),
        "parameters": {f"{d}D": standard_parameters(entry, d) for d in entry.spatial_dims},
        "paper": entry.paper,
        "licence": entry.licence,
        "equals": entry.reference,
        "pretrained": list(entry.pretrained_files),
        "control_of": entry.control_of,
    }


def markdown_table() -> str:
    """The README's table of the registered networks but their controls."""
    lines = ["| name | paper | parameters | equals (tested) | its licence | ImageNet weights |"]
    lines.append("|---|---|---|---|---|---|")
    for row in map(overview, list_networks(controls=False)):
        number = row["paper"].removeprefix("arXiv:")
        repository, commit = row["equals"].split("@")
        cells = (
            f"`{row['name']}`",
            f"[{number}](https://arxiv.org/abs/{number})",
            ", ".join(f"{dims} {millions(n)}" for dims, n in row["parameters"].items()),
            f"[{repository}](https://github.com/{repository}/tree/{commit.split(',')[0]})",
            row["licence"],
            ", ".join(f"`{name}`" for name in row["pretrained"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def millions(n_parameters: int) -> str:
    """`67.4 M`."""
    return f"{n_parameters / 1e6:.1f} M"
