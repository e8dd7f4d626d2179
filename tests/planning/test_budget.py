"""Tests of fitting a plan to a time: sizes, choice, recipe and validation estimate."""

import math
from types import SimpleNamespace

import pytest

from umamba.planning import budget
from umamba.planning.measure import StepCheck
from umamba.planning.planner import plan_dataset
from umamba.planning.sizes import candidates

STRIDES = [(1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)]


def sizes(patch=(40, 56, 40), batch=9):
    return candidates((32, 64, 128, 256), patch, batch, STRIDES)


def steps(seconds_at_full, peak=0):
    """A machine on which a step of the planned size takes so long."""
    asked = []

    def measure(candidate):
        asked.append(candidate)
        seconds = seconds_at_full * candidate.cost
        return SimpleNamespace(seconds=seconds, forward_seconds=seconds / 5, peak_bytes=peak)

    measure.asked = asked
    return measure


def test_a_2d_batch_shrinks_where_few_iterations_fit():
    wide = candidates((32, 64), (64, 48), 300, [(1, 1), (2, 2)])
    narrowest = min(wide, key=lambda size: size.cost)
    seconds = 20 * budget.LOADING * 100.0 * narrowest.cost
    found = budget.fit(wide, steps(100.0), seconds)
    assert 2 <= found.candidate.batch_size < narrowest.batch_size
    assert found.n_iterations * found.step_seconds <= seconds
    assert found.n_iterations > 55
    per_sample = found.step_seconds / found.candidate.batch_size
    plenty = budget.fit(wide, steps(100.0), 1e9)
    assert plenty.candidate.batch_size == narrowest.batch_size
    assert per_sample <= plenty.step_seconds / plenty.candidate.batch_size


def test_a_large_batch_is_measured_by_a_part_of_it(monkeypatch):
    seen = []

    def check_plan(plans, configuration, device):
        seen.append(plans["configurations"][configuration]["batch_size"])
        return StepCheck(1.0, 1.0, 0.5, 100, 0, 1, True, device)

    def replan(plans, configuration, *, patch_size, batch_size, features_per_stage):
        return {"configurations": {configuration: {"batch_size": batch_size}}}

    monkeypatch.setattr(budget, "check_plan", check_plan)
    monkeypatch.setattr(budget, "replan", replan)
    check = budget._measure({}, "2d", budget.Candidate((8,), (64, 64), 32, 1.0), "cpu")
    assert seen == [8]
    assert (check.seconds, check.forward_seconds) == (4.0, 2.0)
    assert check.peak_bytes == 100 + 3 * (100 - 12)


def test_a_size_for_which_memory_runs_out_is_left_out():
    widest = (32, 64, 128, 256)

    def measure(size):
        if size.features_per_stage == widest:
            raise MemoryError("CUDA out of memory")
        return steps(1.0)(size)

    assert budget.fit(sizes(), steps(1.0), 10_000.0).candidate.features_per_stage == widest
    found = budget.fit(sizes(), measure, 10_000.0)
    assert found.candidate.features_per_stage == (16, 32, 64, 128)
    assert found.candidate.patch_size == (40, 56, 40)


def test_more_time_buys_a_wider_network():
    widths = []
    for seconds in (60, 300, 1500, 1e6):
        found = budget.fit(sizes(), steps(10.0), seconds)
        widths.append(found.candidate.features_per_stage[0] * math.prod(found.candidate.patch_size))
    assert widths == sorted(widths)
    assert len(set(widths)) >= 3


def test_a_slow_machine_gets_a_smaller_patch_only_when_the_narrowest_network_is_too_slow():
    fast = budget.fit(sizes(), steps(1.0), 600)
    slow = budget.fit(sizes(), steps(400.0), 600)
    assert fast.candidate.patch_size == (40, 56, 40)
    assert math.prod(slow.candidate.patch_size) < 40 * 56 * 40


def test_what_does_not_fit_into_memory_is_left_out():
    with pytest.raises(ValueError, match="--memory"):
        budget.fit(sizes(), steps(1.0, peak=2**40), 600, memory_bytes=2**30)


def test_the_forward_pass_is_scaled_with_the_step():
    found = budget.fit(sizes(), steps(60.0), 900)
    assert found.forward_seconds == pytest.approx(found.step_seconds / budget.LOADING / 5)


def test_measuring_takes_a_small_share_of_the_time():
    machine = steps(60.0)
    budget.fit(sizes(), machine, 900)
    assert sum(2 * 60.0 * c.cost for c in machine.asked) < 0.3 * 900


def test_a_short_schedule_is_adamw_with_cosine_and_a_long_one_nnunets():
    short = budget.budget_recipe(1000, 2, 160, 700.0)
    assert short["initial_lr"] == 3e-3
    assert budget.budget_recipe(1000, 2, 160, 700.0, 1e-3)["initial_lr"] == 1e-3
    assert (short["optimizer"], short["schedule"], short["augmentation"]) == (
        "adamw",
        "cosine",
        "light",
    )
    assert short["num_epochs"] * short["num_iterations_per_epoch"] == pytest.approx(1000, rel=0.05)
    long = budget.budget_recipe(200_000, 2, 160, 1e6)
    assert "optimizer" not in long
    assert long["train_seconds"] == 1e6


@pytest.mark.parametrize("recipe", [{}, {"name": "segmamba", "loss": "ce", "num_epochs": 300}])
def test_a_budget_sets_the_length_of_a_named_recipe_and_nothing_else(
    fingerprinted, monkeypatch, recipe
):
    plans = plan_dataset(fingerprinted("tiny"), memory_gb=5, recipe=recipe)
    measured = SimpleNamespace(seconds=0.5, forward_seconds=0.1, peak_bytes=0)
    monkeypatch.setattr(budget, "_measure", lambda *arguments: measured)
    part = budget.fit_to_time(plans, "3d_fullres", seconds=400, fold=0, device="cpu")
    fitted = part["configurations"]["3d_fullres"]["recipe"]
    length = {name for name in fitted if name.startswith("num_")} | {"train_seconds"}
    assert len(length) == 4
    assert fitted["num_epochs"] < 50
    kept = {name: value for name, value in recipe.items() if name not in length}
    assert kept.items() <= fitted.items()
    assert (set(fitted) == length | set(kept)) == bool(recipe)


def test_widths_that_the_user_gives_are_kept_and_the_patch_shrinks(fingerprinted, monkeypatch):
    widths = {"features_per_stage": [24, 32, 40, 48, 56]}
    plans = plan_dataset(fingerprinted("tiny"), memory_gb=5, network_args=widths)
    measured = SimpleNamespace(seconds=60.0, forward_seconds=0.1, peak_bytes=0)
    monkeypatch.setattr(budget, "_measure", lambda *arguments: measured)
    fitted = budget.fit_to_time(plans, "3d_fullres", seconds=400, fold=0, device="cpu")
    before, after = (p["configurations"]["3d_fullres"] for p in (plans, fitted))
    features = after["architecture"]["arch_kwargs"]["features_per_stage"]
    assert features == widths["features_per_stage"][: len(features)]
    assert math.prod(after["patch_size"]) < math.prod(before["patch_size"])


def test_full_augmentation_comes_with_many_passes_over_the_cases():
    many = budget.budget_recipe(20_000, 2, 20, 700.0)
    few = budget.budget_recipe(1000, 2, 160, 700.0)
    assert "augmentation" not in many
    assert "mirroring" not in many
    assert few["augmentation"] == "light"
    assert few["mirroring"] is False


def test_validation_time_counts_tiles_and_slices():
    one = budget.validation_seconds([(40, 56, 40)], 1, (40, 56, 40), 1.0)
    eight = budget.validation_seconds([(60, 84, 60)], 1, (40, 56, 40), 1.0)
    assert one == pytest.approx(1.0, abs=0.1)
    assert eight == pytest.approx(8.0, abs=0.2)
    pairs = budget.validation_seconds([(40, 56, 40)], 1, (40, 56, 40), 1.0, n_together=2)
    assert pairs == pytest.approx(2.0, abs=0.1)
    slices = budget.validation_seconds([(10, 56, 40)], 3, (56, 40), 1.0)
    assert slices == pytest.approx(30.0, abs=0.3)
