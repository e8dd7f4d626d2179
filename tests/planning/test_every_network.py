"""Every registered network on every kind of data: what is planned runs, and so do smaller sizes."""

from __future__ import annotations

import pytest
import torch

from umamba.networks import get_entry, list_networks
from umamba.planning.planner import plan_dataset
from umamba.planning.plans import get_configuration, network_builder, replan
from umamba.planning.sizes import sizes_of
from umamba.planning.topology import network_divisor

NETWORKS = list_networks(controls=False)
RGB = {"0": "R", "1": "G", "2": "B"}
CHANNELS = {"flat": RGB, "odd_flat": RGB}
KINDS = ("isotropic_ct", "anisotropic_mr", "flat", "odd", "odd_flat", "micro")
# The controls, too, where the data are small.
FITTING = {
    kind: list_networks(2 if kind in CHANNELS else None, controls=kind == "odd") for kind in KINDS
}


def configuration_of(name: str, kind: str) -> str:
    return "3d_fullres" if 3 in get_entry(name).spatial_dims and kind not in CHANNELS else "2d"


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in FITTING.items() for name in names]
)
def test_the_network_takes_its_planned_patch_and_batch(
    fingerprinted, shallow_arguments, kind, name
):
    configuration = configuration_of(name, kind)
    plans = plan_dataset(
        fingerprinted(kind, channels=CHANNELS.get(kind)),
        memory_gb=8,
        network=name,
        network_args=shallow_arguments(name),
        configurations=[configuration],
    )
    part = get_configuration(plans, configuration)
    patch, divisor = (
        part["patch_size"],
        network_divisor(part["architecture"]["arch_kwargs"]["strides"]),
    )
    assert all(size % step == 0 for size, step in zip(patch, divisor, strict=True))
    n_channels = len(CHANNELS.get(kind, [1]))
    with torch.device("meta"):
        network = network_builder(part, n_channels, 3, deep_supervision=True)().train()
        images = torch.empty(part["batch_size"], n_channels, *patch)
        outputs = network(images)
        network.decoder.deep_supervision = False
        logits = network(images)
    assert len(outputs) == len(network.deep_supervision_scales)
    assert logits.shape == outputs[0].shape == (part["batch_size"], 3, *patch)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_size_that_a_time_budget_may_choose_builds_and_runs(
    fingerprinted, shallow_arguments, name
):
    configuration = configuration_of(name, "tiny")
    arguments = shallow_arguments(name)
    del arguments["features_per_stage"]
    plans = plan_dataset(
        fingerprinted("tiny"),
        memory_gb=8,
        network=name,
        network_args=arguments,
        configurations=[configuration],
    )
    part = get_configuration(plans, configuration)
    sizes = sizes_of(part)
    widths = part["architecture"]["arch_kwargs"]["features_per_stage"]
    assert any(
        list(size.patch_size) == part["patch_size"] and list(size.features_per_stage) == widths
        for size in sizes
    )
    # The widths of the planned patch were built to be listed.
    assert len({size.features_per_stage for size in sizes}) == 3
    narrow = sizes[0].features_per_stage
    for size in sizes:
        if size.features_per_stage != narrow:
            continue
        # The planning entry's figures come from a forward pass of the changed plan.
        changed = replan(
            plans,
            configuration,
            patch_size=size.patch_size,
            batch_size=size.batch_size,
            features_per_stage=size.features_per_stage,
        )
        now = get_configuration(changed, configuration)
        assert now["patch_size"] == list(size.patch_size)
        assert now["planning"]["training_bytes"] > 0


def test_widths_that_the_network_does_not_take_are_no_candidates(fingerprinted):
    plans = plan_dataset(
        fingerprinted("isotropic_ct"),
        memory_gb=8,
        network="mamba_clinix",
        network_args={"features_per_stage": [8]},
    )
    widths = {size.features_per_stage for size in sizes_of(plans["configurations"]["3d_fullres"])}
    assert (8, 16, 32, 64, 128, 256) in widths
    assert (8, 8, 8, 16, 32, 64) not in widths
