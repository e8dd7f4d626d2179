"""Plans files: errors that name the file, inheritance, differences, and consistent changes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from umamba.files import write_json
from umamba.planning.plans import (
    count_plan,
    diff_plans,
    get_configuration,
    list_plans,
    load_plans,
    network_builder,
    plans_file,
    preprocessing_part,
    replan,
    save_plans,
)
from umamba.planning.topology import network_divisor

GOLDEN = Path(__file__).parent / "golden" / "anisotropic_mr.json"


@pytest.fixture
def plans() -> dict[str, Any]:
    """The golden plans, with Enc (which is tied to its patch) in place of Bot."""
    content = json.loads(GOLDEN.read_text())
    for part in content["configurations"].values():
        part["architecture"]["network_class_name"] = "umamba.networks.umamba.UMambaEnc"
        part["architecture"]["arch_kwargs"]["patch_size"] = part["patch_size"]
        part["planning"] |= {"training_bytes": 10**12, "reasons": []}
    return content


def test_a_recipe_of_32_bits_is_counted_so_on_a_gpu(plans):
    part = get_configuration(plans, "2d")
    halved, whole = (count_plan(part, 1, 2, half).training_bytes(2) for half in (True, False))
    part["recipe"] = {"precision": "fp32"}
    assert halved < count_plan(part, 1, 2, True).training_bytes(2) == whole


def test_broken_json_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "torn.json"
    path.write_text('{"plans_name": ')
    with pytest.raises(ValueError, match=r"torn\.json is not valid JSON"):
        load_plans(path)


def test_json_that_is_no_plans_file_is_an_error_that_names_what_it_lacks(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text('{"labels": {}}')
    with pytest.raises(ValueError, match=r"dataset\.json is no plans file.*configurations"):
        load_plans(path)


def test_missing_plans_are_an_error_that_lists_those_there(plans, tmp_path):
    save_plans(plans, tmp_path / "umamba_enc.json")
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "torn.json").write_text("{")
    assert list_plans(tmp_path) == ["umamba_enc"]
    with pytest.raises(FileNotFoundError, match="plans there: umamba_enc"):
        load_plans(tmp_path / "umamba_en.json")


def test_plans_are_saved_where_nnunet_looks_for_them(plans, nnunet_folders):
    path = save_plans(plans)
    assert path == plans_file("Dataset701_Planned", "umamba_bot")
    assert path == nnunet_folders / "preprocessed" / "Dataset701_Planned" / "umamba_bot.json"


def test_saved_plans_are_loaded_unchanged_and_leave_no_temporary_file(plans, tmp_path):
    path = save_plans(plans, tmp_path / "deep" / "x.json")
    assert load_plans(path) == plans
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unknown_configuration_names_the_nearest(plans):
    with pytest.raises(ValueError, match="did you mean 3d_fullres"):
        get_configuration(plans, "3d_fulres")


def test_a_configuration_has_what_it_inherits(plans):
    plans["configurations"]["small"] = {"inherits_from": "2d", "batch_size": 3}
    part = get_configuration(plans, "small")
    assert part["batch_size"] == 3
    assert part["spacing"] == plans["configurations"]["2d"]["spacing"]
    plans["configurations"]["lost"] = {"inherits_from": "nowhere"}
    with pytest.raises(ValueError, match="nowhere"):
        get_configuration(plans, "lost")


def test_differences_are_told_by_their_path():
    a = {"x": {"y": [1, 2], "z": 1}, "gone": True}
    b = {"x": {"y": [1, 3], "z": 1}, "new": "n"}
    assert diff_plans(a, b) == [
        "x.y: [1, 2] -> [1, 3]",
        "gone: true -> null",
        'new: null -> "n"',
    ]


def test_the_preprocessing_part_ignores_patch_network_and_recipe(plans):
    part = preprocessing_part(plans, "3d_fullres")
    changed = replan(plans, "3d_fullres", patch_size=(8, 64, 64), recipe={"num_epochs": 2})
    assert preprocessing_part(changed, "3d_fullres") == part
    changed["configurations"]["3d_fullres"]["spacing"][0] += 0.5
    assert preprocessing_part(changed, "3d_fullres") != part


@pytest.mark.parametrize("patch", [(16, 64, 64), (13, 70, 33), (20, 320, 320)])
def test_a_new_patch_is_divisible_and_the_network_is_built_for_it(plans, patch):
    part = get_configuration(replan(plans, "3d_fullres", patch_size=patch), "3d_fullres")
    arguments = part["architecture"]["arch_kwargs"]
    steps = network_divisor(arguments["strides"])
    assert all(size % step == 0 for size, step in zip(part["patch_size"], steps, strict=True))
    assert all(new >= asked for new, asked in zip(part["patch_size"], patch, strict=True))
    assert arguments["patch_size"] == part["patch_size"]
    n_stages = len(arguments["strides"])
    assert len(arguments["features_per_stage"]) == len(arguments["kernel_sizes"]) == n_stages
    assert len(arguments["n_conv_per_stage_decoder"]) == n_stages - 1
    network_builder(part, 1, 3)()


def test_a_small_patch_keeps_four_voxels_at_the_bottleneck(plans):
    part = replan(plans, "3d_fullres", patch_size=(8, 32, 32))["configurations"]["3d_fullres"]
    steps = network_divisor(part["architecture"]["arch_kwargs"]["strides"])
    edges = [size // step for size, step in zip(part["patch_size"], steps, strict=True)]
    assert min(edges) >= 4


def test_replanning_changes_what_is_asked_and_nothing_else(plans):
    before = copy.deepcopy(plans)
    narrow = [8, 16, 32, 64, 64, 64, 64]
    changed = replan(
        plans,
        "2d",
        batch_size=3,
        features_per_stage=narrow,
        recipe={"initial_lr": 0.003},
        reason="it must fit five minutes",
    )
    assert plans == before
    part = changed["configurations"]["2d"]
    arguments = part["architecture"]["arch_kwargs"]
    n_stages = len(arguments["strides"])
    assert part["batch_size"] == 3
    assert arguments["features_per_stage"] == narrow[:n_stages]
    assert part["recipe"] == {"initial_lr": 0.003}
    assert "it must fit five minutes" in part["planning"]["reasons"][-1]
    assert (
        part["planning"]["training_bytes"]
        < before["configurations"]["2d"]["planning"]["training_bytes"]
    )
    paths = {line.split(":")[0].split(".")[2] for line in diff_plans(before, changed)}
    assert paths == {"batch_size", "architecture", "recipe", "planning"}


def test_replanning_merges_the_recipe(plans):
    once = replan(plans, "2d", recipe={"initial_lr": 0.1, "num_epochs": 5})
    twice = replan(once, "2d", recipe={"num_epochs": 7})
    assert twice["configurations"]["2d"]["recipe"] == {"initial_lr": 0.1, "num_epochs": 7}


def test_replanning_an_inheriting_configuration_leaves_its_parent_alone(plans):
    plans["configurations"]["small"] = {"inherits_from": "3d_fullres"}
    changed = replan(plans, "small", batch_size=5)
    assert changed["configurations"]["3d_fullres"] == plans["configurations"]["3d_fullres"]
    assert changed["configurations"]["small"]["batch_size"] == 5
    assert "spacing" not in changed["configurations"]["small"]


def test_strides_of_the_user_survive_a_new_patch(plans):
    strides = [[1, 1], [2, 2], [4, 4]]
    plans["umamba"]["network_args"] = {"strides": strides}
    arguments = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    arguments |= {"strides": strides, "kernel_sizes": [[3, 3]] * 3}
    part = replan(plans, "2d", patch_size=(50, 90))["configurations"]["2d"]
    assert part["architecture"]["arch_kwargs"]["strides"] == strides
    assert part["patch_size"] == [56, 96]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": (4, 4)}, "3 positive numbers"),
        ({"patch_size": (0, 8, 8)}, "positive"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_impossible_changes_are_refused(plans, change, words):
    with pytest.raises(ValueError, match=words):
        replan(plans, "3d_fullres", **change)
