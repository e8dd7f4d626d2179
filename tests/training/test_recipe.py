"""Tests of the training recipe: defaults, refusals, schedules and optimizers."""

import json
from itertools import pairwise

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from umamba.training.recipe import RateSchedule, Recipe


def test_an_empty_recipe_is_stock_nnunet():
    recipe = Recipe.from_dict(None)
    assert (recipe.num_epochs, recipe.num_iterations_per_epoch) == (1000, 250)
    assert recipe.to_dict() == {}
    optimizer = recipe.build_optimizer([torch.nn.Parameter(torch.zeros(2))])
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (
        1e-2,
        0.99,
        True,
        3e-5,
    )


def test_the_default_schedule_equals_nnunets_at_every_epoch():
    parameter = torch.nn.Parameter(torch.zeros(2))
    ours, theirs = (torch.optim.SGD([parameter], 1e-2) for _ in range(2))
    schedule, stock = RateSchedule(ours, Recipe()), PolyLRScheduler(theirs, 1e-2, 1000)
    for epoch in (0, 1, 499, 999):
        schedule.step(epoch)
        stock.step(epoch)
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]


def test_cosine_with_warmup_rises_then_falls_to_the_end():
    recipe = Recipe(schedule="cosine", warmup=0.1, initial_lr=1.0, final_lr=0.01)
    rates = [recipe.learning_rate(i / 100) for i in range(101)]
    assert rates[0] == 0
    assert rates[10] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.01)


def test_a_recipe_survives_json():
    recipe = Recipe(optimizer="adamw", betas=(0.8, 0.99), train_seconds=61.5, seed=3)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"optimiser": "sgd"}, "did you mean optimizer"),
        ({"optimizer": "lion"}, "choose one of sgd, adam, adamw"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"warmup": 1.5}, "warmup"),
        ({"train_seconds": -1}, "train_seconds"),
        ({"n_swings": 0}, "n_swings"),
        ({"freeze_encoder": 10}, "share of the schedule"),
        ({"loss": "dice"}, "choose one of dice_ce, ce,"),
        ({"loss": "dice_ce_all", "loss_weights": [0, 0]}, "one above it"),
        ({"loss": "ce", "loss_weights": [0.5, 0.5]}, "belong to the loss dice_ce_all"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_cure(values, part):
    with pytest.raises(ValueError, match=part):
        Recipe.from_dict(values)


def test_a_clocked_recipe_changes_its_rate_within_an_epoch():
    assert Recipe(train_seconds=60).follows_iterations
    assert not Recipe().follows_iterations
