"""The named recipes: the settings that official code trains with, selectable for any network."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class NamedRecipe:
    """One training setting.

    source: where the official code has it. values: fields of `Recipe` that differ from nnU-Net's.
    networks: registered names that the official code trains so, and their controls.
    """

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)
    networks: tuple[str, ...] = ()


_SINGLE_OUTPUT = {"enable_deep_supervision": False}
_ADAM = {"optimizer": "adam", "initial_lr": 1e-4, "weight_decay": 1e-5, "eps": 1e-5}
_ADAMW = {"optimizer": "adamw", "schedule": "cosine"}
_SLICES = {"loss": "dice_ce_all", "precision": "fp32", **_SINGLE_OUTPUT}
_VM_UNET = {
    **{**_SLICES, **_ADAMW, "num_epochs": 300},
    **{"initial_lr": 1e-3, "final_lr": 1e-5, "weight_decay": 1e-2},
}

RECIPES: dict[str, NamedRecipe] = {
    "nnunet": NamedRecipe("nnunetv2 2.8.1, nnUNetTrainer"),
    "umamba": NamedRecipe(
        "U-Mamba, nnUNetTrainerUMambaBot and nnUNetTrainerUMambaEnc: nnU-Net's own",
        networks=("umamba_bot", "umamba_enc", "umamba_bot_v1", "umamba_enc_v1"),
    ),
    "umamba_no_amp": NamedRecipe(
        "U-Mamba, nnUNetTrainerUMambaEncNoAMP", {"precision": "fp32"}, ("umamba_enc",)
    ),
    "swin_umamba": NamedRecipe(
        "Swin-UMamba, nnUNetTrainerSwinUMamba and nnUNetTrainerSwinUMambaD",
        {
            **_ADAMW,
            "initial_lr": 1e-4,
            "final_lr": 1e-6,
            "weight_decay": 0.05,
            "eps": 1e-5,
            "freeze_encoder": 0.01,
        },
        ("swin_umamba", "swin_umamba_d"),
    ),
    "segmamba": NamedRecipe(
        "SegMamba, 3_train.py: plain cross-entropy",
        {"loss": "ce", "rate_per_iteration": True, **_SINGLE_OUTPUT},
        ("segmamba",),
    ),
    "nnmamba": NamedRecipe(
        "nnMamba, nnUNetTrainerV2_fullGIL_mamba",
        {"initial_lr": 1e-4, "precision": "fp32"},
        ("nnmamba", "nnmamba_single"),
    ),
    "lightm_unet": NamedRecipe(
        "LightM-UNet, nnUNetTrainerLightMUNet",
        {**_ADAM, "num_epochs": 100, "precision": "fp32", **_SINGLE_OUTPUT},
        ("lightm_unet",),
    ),
    "mamba_clinix": NamedRecipe("MambaClinix, nnUNetTrainerMambaClinix", _ADAM, ("mamba_clinix",)),
    "mamba_clinix_tversky": NamedRecipe(
        "MambaClinix, nnUNetTrainerMambaClinixTRS: Dice, cross-entropy and region-specific Tversky",
        {**_ADAM, "loss": "region_tversky"},
        ("mamba_clinix",),
    ),
    "vm_unet_synapse": NamedRecipe(
        "VM-UNet, train_synapse.py",
        {**_VM_UNET, "n_swings": 3},
        ("vm_unet",),
    ),
    "vm_unet_isic": NamedRecipe(
        "VM-UNet, train.py: binary cross-entropy and Dice where the dataset has regions",
        {**_VM_UNET, "n_swings": 6},
        ("vm_unet",),
    ),
    "mamba_unet": NamedRecipe(
        "Mamba-UNet, train_fully_supervised_2D_VIM.py: 10,000 iterations",
        {
            **_SLICES,
            "loss_weights": (0.5, 0.5),
            "momentum": 0.9,
            "nesterov": False,
            "weight_decay": 1e-4,
            "rate_per_iteration": True,
            "num_epochs": 40,
        },
        ("mamba_unet",),
    ),
    "msvm_unet": NamedRecipe(
        "MSVM-UNet, train_synapse.py",
        {
            **_SLICES,
            **_ADAMW,
            "loss_weights": (0.4, 0.6),
            "initial_lr": 5e-4,
            "final_lr": 1e-6,
            "weight_decay": 1e-3,
            "num_epochs": 300,
            "freeze_encoder": 10 / 300,
        },
        ("msvm_unet",),
    ),
}


def get_recipe(name: str) -> dict[str, Any]:
    """The fields of `Recipe` of that name (`-` and `_` are the same), JSON values, name included.

    Raises ValueError with the nearest names for an unknown one.
    """
    wanted = name.strip().lower().replace("-", "_")
    if wanted not in RECIPES:
        near = difflib.get_close_matches(wanted, RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(RECIPES)}"
        raise ValueError(f"no recipe is called {name!r}; {hint}")
    values = RECIPES[wanted].values.items()
    return {"name": wanted} | {k: list(v) if isinstance(v, tuple) else v for k, v in values}


def official_recipes(network: str) -> list[str]:
    """The names of the recipes that a network's official code trains with; none if unknown."""
    return [name for name, recipe in RECIPES.items() if network in recipe.networks]
