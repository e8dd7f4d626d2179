"""UMambaPlanner on synthetic fingerprints: golden plans, divisors, memory, names, refusals."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from umamba.networks import get_entry
from umamba.networks.base import SegmentationNetwork
from umamba.planning import planner as planner_file
from umamba.planning.footprint import GIB
from umamba.planning.planner import UMambaPlanner, default_plans_name, plan_dataset
from umamba.planning.plans import (
    check_plan,
    diff_plans,
    get_configuration,
    load_plans,
    network_builder,
    plans_file,
    replan,
)
from umamba.planning.topology import network_arguments, network_divisor

GOLDEN = Path(__file__).parent / "golden"
WRITE_GOLDEN = "UMAMBA_WRITE_GOLDEN"
# What depends on the counted bytes of a step is tested by its properties.
VOLATILE = ("training_bytes", "reasons")


def plan(dataset: str, network: str = "umamba_bot", **arguments: Any) -> dict[str, Any]:
    arguments = {"gpu_memory_target_in_gb": 8, "half_precision": True} | arguments
    return UMambaPlanner(dataset, network=network, **arguments).plan_experiment()


@pytest.mark.parametrize("kind", ["isotropic_ct", "anisotropic_mr", "flat"])
def test_the_plans_of_a_fingerprint_are_the_golden_ones(fingerprinted, kind):
    plans = plan(fingerprinted(kind))
    for configuration in plans["configurations"].values():
        for key in VOLATILE:
            configuration.get("planning", {}).pop(key, None)
    golden = GOLDEN / f"{kind}.json"
    if os.environ.get(WRITE_GOLDEN):
        golden.write_text(json.dumps(plans, indent=1) + "\n")
    assert diff_plans(json.loads(golden.read_text()), plans) == []


@pytest.mark.parametrize("network", ["umamba_bot", "umamba_enc", "umamba_enc_v1_noscan"])
@pytest.mark.parametrize("kind", ["isotropic_ct", "anisotropic_mr", "flat"])
def test_every_patch_is_divisible_and_the_step_fits_the_memory(fingerprinted, kind, network):
    plans = plan(fingerprinted(kind), network, gpu_memory_target_in_gb=6)
    for name in plans["configurations"]:
        part = get_configuration(plans, name)
        arguments = part["architecture"]["arch_kwargs"]
        divisor = network_divisor(arguments["strides"])
        assert all(n % d == 0 for n, d in zip(part["patch_size"], divisor, strict=True))
        assert part["batch_size"] >= 2
        assert part["planning"]["training_bytes"] <= 6 * GIB
        if "patch_size" in get_entry(network).keywords:
            assert arguments["patch_size"] == part["patch_size"]


def test_a_network_that_keeps_more_gets_a_smaller_patch_than_nnunet_would_give(fingerprinted):
    dataset = fingerprinted("isotropic_ct")
    facts = plan(dataset, "umamba_enc", half_precision=False)["configurations"]["3d_fullres"]
    before, after = facts["planning"]["nnunet_patch_size"], facts["patch_size"]
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert after != before
    assert any("changed" in reason for reason in facts["planning"]["reasons"])


def test_a_network_that_fits_keeps_the_patch_and_the_batch_of_nnunet(fingerprinted):
    facts = plan(fingerprinted("tiny"))["configurations"]["3d_fullres"]
    assert facts["patch_size"] == facts["planning"]["nnunet_patch_size"]
    assert facts["batch_size"] == facts["planning"]["nnunet_batch_size"]


def test_nnunet_builds_the_network_of_the_plans_and_it_takes_the_patch(fingerprinted):
    plans = plan(fingerprinted("tiny"), "umamba_enc")
    for name in ("2d", "3d_fullres"):
        part = get_configuration(plans, name)
        network = network_builder(part, 1, 3)()
        assert isinstance(network, SegmentationNetwork)
        n_stages = len(part["architecture"]["arch_kwargs"]["strides"])
        assert len(network.decoder.seg_layers) == n_stages - 1


@pytest.mark.parametrize("network", ["umamba_bot", "umamba_enc"])
def test_the_planned_step_runs_and_its_loss_is_finite(fingerprinted, network):
    narrow = {"features_per_stage": [8]}
    plans = plan(fingerprinted("tiny"), network, network_args=narrow, configurations=["3d_fullres"])
    step = check_plan(replan(plans, "3d_fullres", batch_size=2), "3d_fullres", device="cpu")
    assert step.finite
    assert step.parameters == plans["configurations"]["3d_fullres"]["planning"]["parameters"]


def test_all_networks_share_the_preprocessed_folders_of_the_stock_plan(fingerprinted):
    dataset = fingerprinted("tiny")
    for network in ("umamba_bot", "umamba_enc"):
        parts = plan(dataset, network)["configurations"]
        assert {part["data_identifier"] for part in parts.values()} == {
            "nnUNetPlans_2d",
            "nnUNetPlans_3d_fullres",
        }


def test_another_spacing_gets_a_folder_of_its_own(fingerprinted):
    dataset = fingerprinted("tiny")
    parts = plan(dataset, overwrite_target_spacing=(2.0, 1.5, 1.5))["configurations"]
    assert parts["3d_fullres"]["data_identifier"] == "umamba_bot_3d_fullres"
    assert parts["3d_fullres"]["spacing"] == [2.0, 1.5, 1.5]


def test_a_lowres_spacing_that_differs_from_the_stock_plan_gets_its_own_folder(fingerprinted):
    dataset = fingerprinted("isotropic_ct")
    small = plan(dataset, gpu_memory_target_in_gb=4)["configurations"]
    assert small["3d_lowres"]["data_identifier"] == "umamba_bot_3d_lowres"
    assert small["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"


def test_the_cascade_counts_the_labels_of_the_first_stage_as_channels(fingerprinted):
    plans = plan(fingerprinted("isotropic_ct"))
    parts = plans["configurations"]
    assert parts["3d_cascade_fullres"]["previous_stage"] == "3d_lowres"
    assert parts["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    assert get_configuration(plans, "3d_cascade_fullres")["planning"]["input_channels"] == 1 + 2


def test_regions_and_an_ignore_label_give_one_output_per_region(fingerprinted):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    dataset = fingerprinted("tiny", labels=labels, regions_class_order=[1, 2])
    assert plan(dataset)["configurations"]["2d"]["planning"]["num_classes"] == 2


def test_several_channels_enter_the_footprint(fingerprinted):
    dataset = fingerprinted("tiny", channels={"0": "T1", "1": "T2", "2": "FLAIR"})
    part = plan(dataset)["configurations"]["3d_fullres"]
    assert part["planning"]["input_channels"] == 3
    assert len(part["normalization_schemes"]) == 3


def test_recomputed_mixers_make_room_for_more(fingerprinted):
    dataset = fingerprinted("isotropic_ct")
    request = {"configurations": ["3d_fullres"], "gpu_memory_target_in_gb": 8}
    plain = plan(dataset, "umamba_enc", **request)["configurations"]["3d_fullres"]
    recipe = {"recompute": "mixer"}
    less = plan(dataset, "umamba_enc", recipe=recipe, plans_name="less", **request)
    part = less["configurations"]["3d_fullres"]
    assert part["recipe"] == recipe
    assert room(part) > 1.2 * room(plain)
    small = replan(less, "3d_fullres", patch_size=plain["patch_size"], batch_size=2)
    needed = small["configurations"]["3d_fullres"]["planning"]["training_bytes"]
    assert needed < 0.8 * plain["planning"]["training_bytes"] * 2 / plain["batch_size"]


def room(part):
    return math.prod(part["patch_size"]) * part["batch_size"]


def test_only_the_wanted_configurations_are_planned(fingerprinted):
    dataset = fingerprinted("isotropic_ct")
    assert list(plan(dataset, configurations=["2d"])["configurations"]) == ["2d"]
    parts = plan(dataset, configurations=["3d_fullres"])["configurations"]
    assert sorted(parts) == ["2d", "3d_fullres"], "what was planned before is kept"


def test_3d_of_flat_images_is_refused_in_a_sentence(fingerprinted):
    with pytest.raises(ValueError, match="cannot be planned as 3d_fullres"):
        plan(fingerprinted("flat"), configurations=["3d_fullres"])


def test_uvm_net_is_planned_for_segmentation_and_says_so(fingerprinted):
    part = plan(fingerprinted("odd_flat"), "uvm_net")["configurations"]["2d"]
    facts = part["planning"]
    assert part["architecture"]["arch_kwargs"]["inner_size"] == [16, 16]
    assert facts["parameters"] < 100e6
    assert facts["training_bytes"] < 2 * GIB
    assert any("inner_size [16, 16]" in reason for reason in facts["reasons"])


def test_what_the_user_says_of_uvm_net_goes_before_what_plans_have(fingerprinted):
    published = {"inner_size": [4, 5], "attention": "batch", "features_per_stage": [4] * 5}
    part = plan(fingerprinted("tiny"), "uvm_net", network_args=published)["configurations"]["2d"]
    arguments = part["architecture"]["arch_kwargs"]
    assert (arguments["inner_size"], arguments["attention"]) == ([4, 5], "batch")
    assert arguments["input_residual"] is False


def test_a_network_with_fixed_strides_keeps_them_and_leaves_out_what_it_cannot(
    fingerprinted, monkeypatch
):
    cls = get_entry("umamba_bot").cls
    strides = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    monkeypatch.setattr(cls, "spatial_dims", (3,))
    monkeypatch.setattr(cls, "fixed_strides", strides)
    widths = {"features_per_stage": [8, 16, 16, 16]}
    plans = plan(fingerprinted("anisotropic_mr"), network_args=widths)
    assert list(plans["configurations"]) == ["3d_fullres"]
    part = plans["configurations"]["3d_fullres"]
    assert part["architecture"]["arch_kwargs"]["strides"] == [list(s) for s in strides]
    assert all(size % 8 == 0 for size in part["patch_size"])


def test_the_widths_of_a_network_with_fixed_strides_stand_in_its_plans():
    entry = get_entry("swin_umamba_d")
    stock = {"strides": [[1, 1], [2, 2]], "features_per_stage": [32, 64], "kernel_sizes": []}
    block = network_arguments(entry, {}, stock, dims=2)
    widths = [96, 96, 192, 384, 768]
    assert block == {"strides": [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]]} | {
        "features_per_stage": widths
    }
    narrow = network_arguments(entry, {"features_per_stage": [8, 8, 16, 24, 32]}, stock, dims=2)
    assert narrow["features_per_stage"] == [8, 8, 16, 24, 32]


def test_network_arguments_enter_the_plans_and_a_hash_enters_the_name(fingerprinted):
    dataset = fingerprinted("tiny")
    plans = plan(dataset, network_args={"d_state": 4})
    assert plans["plans_name"].startswith("umamba_bot_")
    assert plans["plans_name"] == default_plans_name("umamba_bot", {"d_state": 4})
    assert plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["d_state"] == 4
    assert plans["plans_name"] != plan(dataset, network_args={"d_state": 8})["plans_name"]


def test_a_named_recipe_enters_the_plans_and_their_name_and_is_not_planned_over(fingerprinted):
    dataset, recipe = fingerprinted("tiny"), {"name": "segmamba", "loss": "ce"}
    plans = plan(dataset, recipe=recipe)
    assert plans["plans_name"] == "umamba_bot_segmamba"
    assert all(part["recipe"] == recipe for part in plans["configurations"].values())
    assert plan(dataset)["plans_name"] == "umamba_bot"
    with pytest.raises(ValueError, match=r"of umamba_bot with recipe segmamba.*--plans-name"):
        plan(dataset, plans_name="umamba_bot_segmamba")


def test_numbers_per_stage_of_the_user_are_fitted_to_the_stages(fingerprinted):
    few = {"features_per_stage": [8, 12]}
    parts = plan(fingerprinted("tiny"), network_args=few)["configurations"]
    for part in parts.values():
        arguments = part["architecture"]["arch_kwargs"]
        expected = [8, 12, 24, 48, 96][: len(arguments["strides"])]
        assert arguments["features_per_stage"] == expected


def test_strides_of_the_user_serve_only_the_wanted_configuration(fingerprinted):
    flat = {"strides": [[1, 1], [2, 2], [2, 2]]}
    dataset = fingerprinted("tiny")
    parts = plan(dataset, network_args=flat, configurations=["2d"])["configurations"]
    assert list(parts) == ["2d"]
    assert parts["2d"]["architecture"]["arch_kwargs"]["strides"] == flat["strides"]
    with pytest.raises(ValueError, match="2 axes cannot serve"):
        plan(dataset, network_args=flat, plans_name="all")


def test_stock_nnunet_finds_every_name_in_the_plans(fingerprinted):
    manager = PlansManager(plan(fingerprinted("tiny")))
    assert manager.experiment_planner_class is ExperimentPlanner
    assert manager.image_reader_writer_class.__name__ == "SimpleITKIO"
    for name in manager.available_configurations:
        configuration = manager.get_configuration(name)
        assert configuration.preprocessor_class.__name__ == "DefaultPreprocessor"
        assert callable(configuration.resampling_fn_probabilities)
        assert list(configuration.network_arch_init_kwargs_req_import) == []


def test_a_control_is_the_same_plan_with_another_mixer(fingerprinted):
    dataset = fingerprinted("tiny")
    scan, none = (
        plan(dataset, name)["configurations"]["3d_fullres"]
        for name in ("umamba_bot", "umamba_bot_noscan")
    )
    assert none["architecture"]["arch_kwargs"].pop("mixer") == "none"
    assert scan["architecture"] == none["architecture"]
    assert (scan["patch_size"], scan["batch_size"]) == (none["patch_size"], none["batch_size"])


@pytest.mark.parametrize("argument", ["d_stat", "patch_size", "deep_supervision"])
def test_an_argument_that_the_network_lacks_or_that_is_planned_is_refused(fingerprinted, argument):
    with pytest.raises(ValueError, match=argument):
        plan(fingerprinted("tiny"), network_args={argument: 3})


def test_arguments_that_do_not_build_a_network_are_named(fingerprinted):
    with pytest.raises(ValueError, match=r"--network-arg expand=0 .*`umamba models show"):
        plan(fingerprinted("tiny"), network_args={"expand": 0}, configurations=["2d"])


def test_unknown_networks_and_configurations_name_the_nearest(fingerprinted):
    dataset = fingerprinted("tiny")
    with pytest.raises(ValueError, match="umamba_bot"):
        plan(dataset, "umamba_bott")
    with pytest.raises(ValueError, match="3d_fullres"):
        plan(dataset, configurations=["3d_fulres"])


def test_plans_of_somebody_else_are_not_overwritten(fingerprinted):
    dataset = fingerprinted("tiny")
    plan(dataset, plans_name="mine")
    with pytest.raises(ValueError, match="--plans-name"):
        plan(dataset, "umamba_enc", plans_name="mine")
    stock = plans_file(dataset, "nnUNetPlans")
    content = load_plans(plans_file(dataset, "mine"))
    del content["umamba"]
    stock.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="nnU-Net"):
        plan(dataset, plans_name="nnUNetPlans")
    assert json.loads(stock.read_text()) == content


def test_planning_again_keeps_the_memory_and_custom_configurations(fingerprinted, monkeypatch):
    dataset = fingerprinted("tiny")
    first = plan_dataset(dataset, memory_gb=5, recipe={"num_epochs": 3})
    path = plans_file(dataset, "umamba_bot")
    first["configurations"]["3d_small"] = {"inherits_from": "3d_fullres", "batch_size": 2}
    path.write_text(json.dumps(first))
    monkeypatch.setattr(planner_file, "default_memory_gb", lambda: 77.0)
    again = plan_dataset(dataset, recipe={"num_epochs": 3})
    assert diff_plans(first, again) == []
    assert again["configurations"]["2d"]["recipe"] == {"num_epochs": 3}


def test_memory_that_no_step_fits_is_refused(fingerprinted):
    with pytest.raises(ValueError, match="--memory"):
        plan(fingerprinted("tiny"), gpu_memory_target_in_gb=0.1)


def test_too_little_memory_for_any_patch_is_said_in_the_reasons(fingerprinted):
    wide = {"features_per_stage": [512] * 3, "strides": [[1, 1], [2, 2], [2, 2]]}
    part = plan(
        fingerprinted("flat"), network_args=wide, gpu_memory_target_in_gb=0.5, configurations=["2d"]
    )["configurations"]["2d"]
    assert any("more than there is" in reason for reason in part["planning"]["reasons"])


def test_planning_forks_no_worker(fingerprinted, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a fork in a process with threads may hang")

    monkeypatch.setattr("nnunetv2.utilities.utils.Pool", refuse)
    spacing = [1.0, 1.0, 1.0]
    assert plan(fingerprinted("isotropic_ct"), overwrite_target_spacing=spacing)["configurations"]


@pytest.mark.parametrize("name", ["audit", "dataset", "dataset_fingerprint", "splits_final"])
def test_the_name_of_another_file_is_no_plans_name(fingerprinted, name):
    with pytest.raises(ValueError, match=rf"cannot be named {name}\b"):
        UMambaPlanner(fingerprinted("flat"), plans_name=name)
