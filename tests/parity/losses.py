"""Which loss of ours each term of a loss case is, with its logits and target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from parity.fill import image
from parity.subjects import NotRegisteredError
from torch import Tensor, nn

from umamba.training.losses import TVERSKY_REGIONS, TVERSKY_WEIGHT, RegionTversky, build_loss
from umamba.training.recipe import Recipe
from umamba.training.recipes import get_recipe

# The recipe whose loss an official term is.
RECIPES_OF_TERMS: dict[str, dict[str, Any]] = {
    "ce": {"loss": "ce"},
    "multiclass_dice": {"loss": "dice_ce_all", "loss_weights": [0, 1]},
    "mamba_unet": get_recipe("mamba_unet"),
    "vm_unet_synapse": get_recipe("vm_unet_synapse"),
    "msvm_unet": get_recipe("msvm_unet"),
    "vm_unet_isic_bce_dice": get_recipe("vm_unet_isic"),
    "vm_unet_isic_bce": {"loss": "ce"},
    "vm_unet_isic_dice": {"loss": "dice_ce_all", "loss_weights": [0, 1]},
}

Loss = Callable[[Tensor, Tensor], Tensor]

# What the recipe's compound has, as MambaClinix's trainer.
TRAINED = {"num_region_per_axis": list(TVERSKY_REGIONS), "alpha": 0.3, "beta": 0.4}
TRAINED |= {"smooth": 1e-5, "do_bg": False, "weight_rs": TVERSKY_WEIGHT}


@dataclass
class Term:
    """A loss, what it is called with, and what the case says of it; gradients may be missing."""

    label: str
    loss: Loss
    logits: Tensor
    target: Tensor
    expected: Mapping[str, Any]
    tolerance: float


def terms_of(case: Mapping[str, Any]) -> Iterator[Term]:
    """The terms of a loss case; NotRegisteredError where we have no such loss."""
    if case["reference"].startswith("CYB08/MambaClinix-PyTorch@"):
        yield from mambaclinix_terms(case)
    elif case["terms"].keys() <= RECIPES_OF_TERMS.keys():
        yield from supervised_terms(case)
    else:
        raise NotRegisteredError(f"no losses of {case['reference']}")


def mambaclinix_terms(case: Mapping[str, Any]) -> Iterator[Term]:
    name, shape = case["name"], case["shape"]
    noise = image(f"{name}:target", (shape[0], 1, *shape[2:]))
    bounds = [float(bound) for bound in re.findall(r"t>([-.\d]+)", case["target"])]
    target = torch.from_numpy(np.digitize(noise, bounds).astype(np.float32))
    for expected in case["cases"]:
        arguments = expected["arguments"]
        is_compound = "weight_rs" in arguments
        loss = compound(arguments) if is_compound else region_tversky(arguments)
        logits = torch.from_numpy(image(name, shape)).double()
        # nnU-Net's Dice sums in float32, whatever it is given.
        yield Term(
            expected["label"], loss, logits, target, expected, 1e-7 if is_compound else 1e-12
        )


def region_tversky(arguments: Mapping[str, Any]) -> nn.Module:
    return RegionTversky(
        arguments.get("batch_dice", True),
        regions=arguments.get("num_region_per_axis", (16, 16, 16)),
        alpha=arguments.get("alpha", 0.3),
        beta=arguments.get("beta", 0.4),
        smooth=arguments.get("smooth", 1e-5),
        background=arguments.get("do_bg", False),
    )


def compound(arguments: Mapping[str, Any]) -> Loss:
    names = ("batch_dice", "smooth", "do_bg")
    dice = {name: arguments[name] for name in names} | {"ddp": False}
    weights = {name: arguments.get(name, 1) for name in ("weight_ce", "weight_dice")}
    stock = DC_and_CE_loss(dice, {}, **weights, dice_class=MemoryEfficientSoftDiceLoss)
    if {**arguments, **TRAINED} != arguments:
        tversky, weight = region_tversky(arguments), arguments["weight_rs"]
        return lambda logits, target: stock(logits, target) + weight * tversky(logits, target)
    return loss_of("mamba_clinix_tversky", stock, arguments["batch_dice"])


def supervised_terms(case: Mapping[str, Any]) -> Iterator[Term]:
    inputs = case["inputs"]
    drawn = {name: image(spec["image"], spec["shape"]) for name, spec in inputs.items()}
    label = np.digitize(drawn["label"], inputs["label"]["bins"])[:, None]
    labels = (drawn["outputs"], label.astype(np.float32))
    regions = (drawn["binary"], (drawn["target"] > inputs["target"]["threshold"]).astype("f4"))
    for name, value in case["terms"].items():
        logits, target = map(torch.from_numpy, regions if "isic" in name else labels)
        loss = loss_of(RECIPES_OF_TERMS[name], nn.Identity(), regions="isic" in name)
        yield Term(name, loss, logits, target, {"value": value}, 1e-6)


def loss_of(
    recipe: str | dict[str, Any], stock: nn.Module, batch_dice: bool = True, regions: bool = False
) -> nn.Module:
    chosen = Recipe.from_dict(get_recipe(recipe) if isinstance(recipe, str) else recipe)
    labels: Any = SimpleNamespace(has_regions=regions, ignore_label=None)
    return build_loss(
        chosen.loss, chosen.loss_weights, stock, labels, batch_dice=batch_dice, ddp=False
    )
