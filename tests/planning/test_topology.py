"""Divisors, rounding of patches, and the stages of a patch."""

import inspect
import json

import pytest

from umamba.networks import get_entry, list_networks
from umamba.planning.topology import (
    MIN_EDGE,
    check_network_args,
    fit_arguments,
    network_divisor,
    round_patch,
    stages_for_patch,
    strides_for_axes,
)


def test_the_divisor_is_the_product_of_the_strides_of_each_axis():
    assert network_divisor([[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]) == (2, 8, 8)


def test_strides_with_unequal_axes_are_refused():
    with pytest.raises(ValueError, match="same axes"):
        network_divisor([[1, 1], [2, 2, 2]])


@pytest.mark.parametrize(
    ("patch", "divisor", "expected"),
    [
        ((40, 56, 40), (8, 8, 8), (40, 56, 40)),
        ((41, 57, 3), (8, 8, 8), (48, 64, 8)),
        ((6, 10, 12), (16, 16, 16), (16, 16, 32)),
    ],
)
def test_a_patch_is_rounded_up_to_the_divisor_and_two_voxels_of_the_deepest_map(
    patch, divisor, expected
):
    assert round_patch(patch, divisor) == expected


def test_a_2d_network_takes_the_last_axes_of_fixed_strides():
    assert strides_for_axes([(1, 1, 1), (1, 2, 2), (2, 2, 2)], 2) == ((1, 1), (2, 2), (2, 2))
    with pytest.raises(ValueError, match="2 axes"):
        strides_for_axes([(1, 1), (2, 2)], 3)


@pytest.mark.parametrize("patch", [(40, 56, 40), (17, 200, 93), (5, 33, 64)])
def test_the_stages_of_a_patch_divide_it_and_leave_the_smallest_edge(patch):
    strides, kernels, padded = stages_for_patch((2.0, 1.0, 1.0), patch)
    divisor = network_divisor(strides)
    assert len(strides) == len(kernels)
    assert all(size % step == 0 for size, step in zip(padded, divisor, strict=True))
    deepest = [size // step for size, step in zip(padded, divisor, strict=True)]
    assert all(edge >= min(MIN_EDGE, size) for edge, size in zip(deepest, patch, strict=True))


def test_widths_double_up_to_the_maximum_and_counts_repeat():
    arguments = {
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 4],
        "features_per_stage": [32, 64],
        "n_conv_per_stage": [2, 1],
        "n_conv_per_stage_decoder": [1, 3, 4, 5, 6],
    }
    fit_arguments(arguments)
    assert arguments["features_per_stage"] == [32, 64, 128, 256, 320]
    assert arguments["n_conv_per_stage"] == [2, 1, 1, 1, 1]
    assert arguments["n_conv_per_stage_decoder"] == [1, 3, 4, 5]


@pytest.mark.parametrize(
    ("network", "argument", "value"),
    [
        ("umamba_bot", "features_per_stage", 8),
        ("umamba_bot", "features_per_stage", [0, 8]),
        ("umamba_bot", "features_per_stage", ["a"]),
        ("umamba_bot", "strides", [1, 2, 2]),
        ("umamba_bot", "strides", [[1, 1, 1]]),
        ("umamba_bot", "strides", [[1, 1, 1], [2, 2]]),
        ("umamba_bot", "strides", [[2, 2, 2], [2, 2, 2]]),  # logits of half the size
        ("umamba_bot", "kernel_sizes", [3, 3]),
        ("umamba_bot", "n_conv_per_stage", 0),
        ("umamba_bot", "d_state", True),
        ("umamba_bot", "expand", "2"),
        ("mamba_clinix", "drop_path", 1.5),
        ("mamba_unet", "depths", 3),
        ("uvm_net", "attention", 3),
        ("uvm_net", "input_residual", 1),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_what_the_argument_is(network, argument, value):
    with pytest.raises(ValueError, match=f"^{network}'s {argument} cannot be .*: it is "):
        check_network_args(get_entry(network), {argument: value})


@pytest.mark.parametrize("name", list_networks())
def test_the_defaults_of_every_network_are_of_their_kinds(name):
    entry = get_entry(name)
    parameters = inspect.signature(entry.cls).parameters
    defaults = {key: parameters[key].default for key in entry.keywords}
    given = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
    given.pop("deep_supervision")
    check_network_args(entry, json.loads(json.dumps(given)))
