"""nnU-Net's own networks: their plans are those of nnU-Net's planners."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from umamba.networks import get_entry, list_networks
from umamba.planning import reasons
from umamba.planning.footprint import GIB
from umamba.planning.overview import standard_network
from umamba.planning.planner import plan_dataset
from umamba.planning.plans import get_configuration, replan
from umamba.planning.upstream import UPSTREAM, find_entry

NOT_STOCK = ("planning", "recipe", "data_identifier")


def stock_plans(name: str, dataset: str, folder: Path) -> dict[str, Any]:
    """What nnU-Net's own command writes; its networks are built on the meta device."""
    planner = UPSTREAM[name].load_planner()(dataset)
    with torch.device("meta"):
        planner.plan_experiment()
    file = folder / "preprocessed" / dataset / f"{planner.plans_identifier}.json"
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in UPSTREAM for kind in ("isotropic_ct", "anisotropic_mr")),
        ("plainconv_unet", "flat"),
        ("resenc_m", "flat"),
        ("resenc_m", "micro"),
    ],
)
def test_the_plan_is_that_of_nnunets_planner(fingerprinted, nnunet_folders, name, kind):
    dataset = fingerprinted(kind)
    stock = stock_plans(name, dataset, nnunet_folders)
    plans = plan_dataset(dataset, network=name)
    assert plans["plans_name"] == name
    for own in ("umamba", "plans_name"):
        del plans[own]
    del stock["plans_name"]
    for part in (*plans["configurations"].values(), *stock["configurations"].values()):
        for key in NOT_STOCK:
            part.pop(key, None)
    assert plans == stock


def test_the_data_are_those_of_the_stock_plan_where_they_are_the_same(fingerprinted):
    dataset = fingerprinted("isotropic_ct")
    parts = plan_dataset(dataset, network="plainconv_unet")["configurations"]
    assert {part["data_identifier"] for part in parts.values()} == {
        f"nnUNetPlans_{name}" for name in parts
    }
    small = plan_dataset(dataset, memory_gb=4, network="plainconv_unet")["configurations"]
    assert small["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert small["3d_lowres"]["data_identifier"] == "plainconv_unet_3d_lowres"


def test_a_memory_that_is_asked_for_is_kept_to_and_planning_again_keeps_it(fingerprinted):
    dataset = fingerprinted("anisotropic_mr")
    stock = plan_dataset(dataset, network="resenc_m")["configurations"]["2d"]
    request = {"network": "resenc_m", "plans_name": "small", "configurations": ["2d"]}
    plans = plan_dataset(dataset, memory_gb=2, **request)
    part = plans["configurations"]["2d"]
    assert part["planning"]["training_bytes"] <= 2 * GIB < stock["planning"]["training_bytes"]
    assert plan_dataset(dataset, **request) == plans


def test_a_target_that_this_machine_has_not_got_is_said_with_the_cure(fingerprinted, monkeypatch):
    monkeypatch.setattr(reasons, "machine_memory", lambda: (3 * GIB, "the 3.0 GB of RAM"))
    part = plan_dataset(fingerprinted("isotropic_ct"), network="resenc_l")["configurations"]["2d"]
    assert part["planning"]["memory_gb"] == 24
    assert "more than the 3.0 GB of RAM" in part["planning"]["reasons"][-1]
    assert "--memory 3" in part["planning"]["reasons"][-1]


def test_arguments_of_the_user_enter_the_network_and_numbers_are_fitted_to_the_stages(
    fingerprinted,
):
    narrow = {"features_per_stage": [8, 16], "n_blocks_per_stage": [1]}
    plans = plan_dataset(fingerprinted("tiny"), network="resenc_m", network_args=narrow)
    part = plans["configurations"]["3d_fullres"]
    arguments = part["architecture"]["arch_kwargs"]
    n_stages = len(arguments["strides"])
    assert arguments["n_stages"] == n_stages
    assert arguments["features_per_stage"][:3] == [8, 16, 32]
    assert arguments["n_blocks_per_stage"] == [1] * n_stages
    smaller = replan(plans, "3d_fullres", patch_size=(8, 16, 16), batch_size=2)
    changed = get_configuration(smaller, "3d_fullres")
    fewer = changed["architecture"]["arch_kwargs"]
    assert fewer["n_stages"] == len(fewer["strides"]) == len(fewer["n_blocks_per_stage"])
    assert fewer["n_stages"] < n_stages
    assert changed["planning"]["training_bytes"] < part["planning"]["training_bytes"]
    with pytest.raises(ValueError, match="n_conv_per_stage"):
        plan_dataset("Dataset701_Planned", network="resenc_m", network_args={"d_state": 4})


@pytest.mark.parametrize("name", ["plainconv_unet", "resenc_m"])
def test_the_architecture_of_the_table_is_what_the_planner_writes(fingerprinted, name):
    plans = plan_dataset(fingerprinted("anisotropic_mr"), network=name)
    for configuration, dims in (("2d", 2), ("3d_fullres", 3)):
        planned = plans["configurations"][configuration]["architecture"]
        arguments = planned["arch_kwargs"]
        made = UPSTREAM[name].architecture(arguments["strides"], arguments["features_per_stage"])
        made["arch_kwargs"]["kernel_sizes"] = arguments["kernel_sizes"]
        assert made == planned
        assert sum(p.numel() for p in standard_network(UPSTREAM[name], dims).parameters()) > 30e6


def test_a_name_is_looked_up_among_all_networks():
    assert find_entry("ResEnc-M") is UPSTREAM["resenc_m"]
    assert find_entry("segmamba") is get_entry("segmamba")
    assert not set(UPSTREAM) & set(list_networks())
    with pytest.raises(ValueError, match="did you mean plainconv_unet"):
        find_entry("plainconv")
    with pytest.raises(ValueError, match="umamba_bot"):
        find_entry("umamba_bott")
    with pytest.raises(ValueError, match="swin_unet is a module without plans"):
        find_entry("swin_unet")
