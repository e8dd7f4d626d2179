"""Which sampling is planned and why: measured, guessed from the audit, asked for, or unknown."""

import argparse
import json

import numpy as np
import pytest

from umamba.cli import plan as plan_command
from umamba.planning import sampling
from umamba.planning.fingerprint import fingerprint_dataset
from umamba.planning.hit_rates import HitRates
from umamba.planning.planner import plan_dataset
from umamba.planning.plans import get_configuration
from umamba.planning.preprocess import preprocess_dataset
from umamba.planning.sampling import class_weights, settle_sampling
from umamba.report.sampling import describe_sampling
from umamba.training.recipe import Recipe

RARE = HitRates(
    n_cases=np.array([20, 1]),
    n_total=20,
    random=np.array([0.8, 0.4]),
    centered=np.array([0.95, 0.6]),
    jittered=np.array([0.95, 0.6]),
    balanced=np.array([[1.0, 0.02], [0.5, 1.0]]),
)


@pytest.fixture
def plans(fingerprinted):
    name = fingerprinted("isotropic_ct")
    return plan_dataset(name, configurations=["3d_fullres"], memory_gb=4)


@pytest.fixture
def rare(plans, monkeypatch):
    """Plans of batch 2 whose second class almost no patch holds."""
    plans["configurations"]["3d_fullres"]["batch_size"] = 2
    monkeypatch.setattr(sampling, "folder_is_current", lambda *arguments: True)
    monkeypatch.setattr(sampling, "measure_hit_rates", lambda *arguments: RARE)
    return plans


def settled(plans, asked="auto"):
    part = get_configuration(settle_sampling(plans, ["3d_fullres"], asked), "3d_fullres")
    Recipe.from_dict(part["recipe"])
    return part


def test_a_class_seen_too_rarely_makes_the_sampling_balanced_and_says_why(rare):
    part = settled(rare)
    assert part["recipe"]["sampling"] == "balanced"
    assert part["recipe"]["class_weights"] == class_weights(RARE)
    reason = part["planning"]["reasons"][-1]
    assert reason.startswith("Sampling: balanced, for 0.5 are wanted; nnU-Net's sampling shows")
    assert "lesion, the rarest, in 0.05 patches per batch" in reason
    row = part["planning"]["sampling"]["classes"][1]
    assert row["chosen"] > 5 * row["stock"]
    assert json.loads(json.dumps(part)) == part


def test_settling_again_adds_nothing_and_another_wish_replaces_the_first(rare):
    first = settle_sampling(rare, ["3d_fullres"])
    assert settle_sampling(first, ["3d_fullres"]) == first
    again = settle_sampling(first, ["3d_fullres"], "stock")
    assert again["configurations"]["3d_fullres"]["recipe"] == {}
    assert sum("Sampling" in r for r in settled(again, "jittered")["planning"]["reasons"]) == 1


def test_a_configuration_decides_apart_from_the_one_that_it_inherits_from(rare):
    child = {"inherits_from": "3d_fullres", "batch_size": 40}
    rare["configurations"]["wide"] = child
    parts = settle_sampling(rare, ["3d_fullres", "wide"])["configurations"]
    assert parts["3d_fullres"]["recipe"]["sampling"] == "balanced"
    assert parts["wide"]["recipe"] == {}


@pytest.mark.parametrize("asked", ["stock", "jittered"])
def test_what_is_asked_for_is_planned_whatever_the_rates(rare, asked):
    part = settled(rare, asked)
    assert part["recipe"] == ({} if asked == "stock" else {"sampling": "jittered"})
    assert f"Sampling: {asked}, as asked" in part["planning"]["reasons"][-1]


def test_a_batch_of_one_has_no_forced_patch_to_balance(rare):
    rare["configurations"]["3d_fullres"]["batch_size"] = 1
    part = settled(rare)
    assert part["recipe"] == {}
    assert "with a batch of 1 it forces no patch" in part["planning"]["reasons"][-1]


def test_the_more_patches_hold_a_class_anyway_the_less_is_it_forced():
    assert class_weights(RARE) == pytest.approx([0.1111, 0.8889])


def test_without_preprocessed_cases_the_rates_are_guessed_from_the_audit(plans, nnunet_folders):
    parts = {"n": 60, "per_case_median": 1.0, "median_voxels": 50}
    labels = {
        "1": {"name": "organ", "share": 0.02, "n_cases": 60, "components": parts},
        "2": {"name": "lesion", "share": 1e-6, "n_cases": 1, "components": parts},
    }
    audit = nnunet_folders / "preprocessed" / plans["dataset_name"] / "audit.json"
    audit.write_text(json.dumps({"summary": {"labels": labels}}))
    planning = settled(plans)["planning"]
    assert "lesion, the rarest" in planning["reasons"][-1]
    lines = describe_sampling(planning).splitlines()
    assert lines[0].split()[:4] == ["class", "cases", "voxels", "parts"]
    assert "1 of 60" in lines[2] and "50 voxels" in lines[2]


def test_where_nothing_is_known_sampling_is_nnunets_and_that_is_said(plans):
    part = settled(plans)
    assert part["recipe"] == {}
    assert "nothing is preprocessed or audited yet" in part["planning"]["reasons"][-1]
    assert settled(plans, "balanced")["recipe"] == {"sampling": "balanced"}


def test_an_unknown_wish_is_refused(plans):
    with pytest.raises(ValueError, match="choose one of auto, stock"):
        settle_sampling(plans, ["3d_fullres"], "random")


def test_a_common_class_leaves_recipe_and_regions_as_they_are(sphere_dataset, nnunet_folders):
    file = nnunet_folders / "raw" / sphere_dataset / "dataset.json"
    content = json.loads(file.read_text())
    content["labels"] = {"background": 0, "whole": [1, 2], "core": [2]}
    file.write_text(json.dumps(content | {"regions_class_order": [1, 2]}))
    fingerprint_dataset(sphere_dataset, progress=False)
    plans = plan_dataset(sphere_dataset, configurations=["3d_fullres"], memory_gb=2)
    preprocess_dataset(sphere_dataset, plans["plans_name"], ["3d_fullres"], progress=False)
    part = settled(plans)
    assert part["recipe"] == {}
    rows = {row["name"]: row for row in part["planning"]["sampling"]["classes"]}
    assert rows["whole"]["stock"] == 1 and rows["core"]["n_cases"] == 0
    assert "whole, the rarest" in part["planning"]["reasons"][-1]


def test_cases_that_were_preprocessed_for_other_plans_are_not_counted(sphere_dataset):
    fingerprint_dataset(sphere_dataset, progress=False)
    plans = plan_dataset(sphere_dataset, configurations=["3d_fullres"], memory_gb=2)
    preprocess_dataset(sphere_dataset, plans["plans_name"], ["3d_fullres"], progress=False)
    assert "the rarest" in settled(plans)["planning"]["reasons"][-1]
    plans["configurations"]["3d_fullres"]["spacing"] = [2.5, 1.1, 1.1]
    assert "nothing is preprocessed" in settled(plans)["planning"]["reasons"][-1]


def test_plan_tells_the_rates_and_a_wish_makes_plans_of_another_name(
    sphere_dataset, nnunet_folders, capsys
):
    parser = argparse.ArgumentParser()
    plan_command.add_parser(parser.add_subparsers())
    words = ["plan", sphere_dataset, "-c", "3d_fullres", "--memory", "2"]
    args = parser.parse_args([*words, "--sampling", "jittered"])
    assert plan_command.run(args) == 0
    said = capsys.readouterr().out
    assert "sphere  5 of 5" in said and "Sampling: jittered, as asked" in said
    file = nnunet_folders / "preprocessed" / sphere_dataset / "umamba_bot_jittered.json"
    recipe = json.loads(file.read_text())["configurations"]["3d_fullres"]["recipe"]
    assert recipe == {"sampling": "jittered"}
