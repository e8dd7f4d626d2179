"""Tests of the named recipes: they are valid, equal the official schedules, and are documented."""

import json
from pathlib import Path

import pytest
import torch

from umamba.training.recipe import RateSchedule, Recipe
from umamba.training.recipes import RECIPES, get_recipe, official_recipes

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "recipes.md"


@pytest.mark.parametrize("name", RECIPES)
def test_a_named_recipe_is_valid_json_and_keeps_its_name_in_the_plans(name):
    values = get_recipe(name)
    assert json.loads(json.dumps(values)) == values
    assert Recipe.from_dict(values).to_dict() == values
    assert RECIPES[name].source
    assert f"| `{name}` |" in DOCS.read_text()


def test_nnunets_recipe_differs_from_the_default_by_its_name_alone():
    assert Recipe.from_dict(get_recipe("nnunet")) == Recipe(name="nnunet")


@pytest.mark.parametrize(
    ("name", "n_epochs_down"),
    [
        ("swin_umamba", 1000),
        ("vm_unet_synapse", 100),
        ("vm_unet_isic", 50),
        ("msvm_unet", 300),
    ],
)
def test_the_cosines_equal_those_of_the_official_schedulers_at_every_epoch(name, n_epochs_down):
    recipe = Recipe.from_dict(get_recipe(name))
    ours, theirs = (recipe.build_optimizer([torch.nn.Parameter(torch.zeros(1))]) for _ in range(2))
    official = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, n_epochs_down, recipe.final_lr)
    schedule = RateSchedule(ours, recipe)
    assert not recipe.follows_iterations
    for epoch in range(recipe.num_epochs):
        schedule.step(epoch)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6)
        theirs.step()
        official.step()


def test_optimizers_are_built_as_the_official_codes_build_them():
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    clinix, swin, mamba_unet = (
        Recipe.from_dict(get_recipe(name)).build_optimizer(parameters)
        for name in ("mamba_clinix", "swin_umamba", "mamba_unet")
    )
    assert [type(o).__name__ for o in (clinix, swin, mamba_unet)] == ["Adam", "AdamW", "SGD"]
    for adam, decay in ((clinix, 1e-5), (swin, 0.05)):
        group = adam.param_groups[0]
        assert (group["lr"], group["weight_decay"], group["eps"]) == (1e-4, decay, 1e-5)
    group = mamba_unet.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 1e-4)


def test_an_unknown_name_is_refused_with_the_nearest():
    assert get_recipe("Swin-UMamba") == get_recipe("swin_umamba")
    with pytest.raises(ValueError, match="did you mean segmamba"):
        get_recipe("segmanba")
    with pytest.raises(ValueError, match="known: nnunet, umamba"):
        get_recipe("xyz")


def test_a_network_knows_the_recipes_of_its_official_code():
    assert official_recipes("swin_umamba_d") == ["swin_umamba"]
    assert official_recipes("mamba_clinix") == ["mamba_clinix", "mamba_clinix_tversky"]
    assert official_recipes("hymamba") == []
