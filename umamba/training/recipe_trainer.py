"""`RecipeTrainer`: nnU-Net's trainer, set up by the recipe in the plans."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from umamba.blocks.recompute import recompute_mixers
from umamba.networks.precision import autocast_type, compile_backward_without_autocast
from umamba.training.augmentation import thin_out
from umamba.training.checkpoints import seed_main_process
from umamba.training.losses import build_loss
from umamba.training.nnunet_hooks import ddp_wrapper, without_autocast
from umamba.training.recipe import RateSchedule, Recipe


class RecipeTrainer(nnUNetTrainer):
    """nnU-Net's trainer with optimizer, schedule, loss, augmentation, precision of the recipe.

    The recipe is read from `plans["configurations"][configuration]["recipe"]`; without one,
    training is stock nnU-Net's.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's own signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        recipe = Recipe.from_dict(self.configuration_manager.configuration.get("recipe"))
        self.recipe = recipe
        self.initial_lr = recipe.initial_lr
        self.weight_decay = recipe.weight_decay
        self.num_epochs = recipe.num_epochs
        self.num_iterations_per_epoch = recipe.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = recipe.num_val_iterations_per_epoch
        self.enable_deep_supervision = recipe.enable_deep_supervision
        self.seed = secrets.randbits(31) if recipe.seed is None else recipe.seed

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, RateSchedule]:
        """Optimizer and schedule of the recipe."""
        optimizer = self.recipe.build_optimizer(self.network.parameters())
        return optimizer, RateSchedule(optimizer, self.recipe)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:
        """nnU-Net's choice, without mirroring where the recipe switches it off."""
        rotation, dummy_2d, initial, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.recipe.mirroring:
            axes = None
            self.inference_allowed_mirroring_axes = None
        if self.recipe.augmentation == "none":
            initial = self.configuration_manager.patch_size
        return rotation, dummy_2d, initial, axes

    def get_training_transforms(self, *args: Any, **kwargs: Any) -> BasicTransform:
        """nnU-Net's training transforms, thinned out as the recipe's `augmentation` says."""
        transforms = nnUNetTrainer.get_training_transforms(*args, **kwargs)
        if self.recipe.augmentation != "nnunet":
            thin_out(transforms, self.recipe.augmentation)
        return transforms

    def initialize(self) -> None:
        """Builds network, optimizer and loss from the seed, and settles the precision."""
        self.seed = self._from_first_gpu(self.seed)
        seed_main_process(self.seed)
        with ddp_wrapper(find_unused_parameters=self.recipe.freeze_encoder > 0):
            super().initialize()
        if self.recipe.recompute == "mixer":
            recompute_mixers(self._bare_network)
        if self.device.type == "cuda":
            self._settle_precision()

    def _settle_precision(self) -> None:
        dtype = autocast_type(self.recipe.precision)
        if dtype != torch.float16:
            self.grad_scaler = None
        if dtype is None:
            self.network.forward = without_autocast(self.network.forward)
        else:
            torch.set_autocast_dtype("cuda", dtype)
            compile_backward_without_autocast()
        self.print_to_log_file(f"precision: {dtype or torch.float32}")

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """The scales that the network declares, else those of the strides in the plans."""
        declared = getattr(self._bare_network, "deep_supervision_scales", None)
        if declared is None or not self.enable_deep_supervision:
            return super()._get_deep_supervision_scales()
        return [list(scale) for scale in declared]

    @property
    def _bare_network(self) -> Any:
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)

    def _build_loss(self) -> torch.nn.Module:
        """The recipe's loss; without deep supervision where the network has a single output."""
        # nnU-Net weighs the coarsest output with 0: with a single one the loss would be 0 / 0.
        scales = self._get_deep_supervision_scales()
        self.enable_deep_supervision = scales is not None and len(scales) > 1
        return build_loss(
            self.recipe.loss,
            self.recipe.loss_weights,
            super()._build_loss(),
            self.label_manager,
            batch_dice=self.configuration_manager.batch_dice,
            ddp=self.is_ddp,
        )

    def _from_first_gpu(self, number: Any) -> Any:
        """The first GPU's number on all of them: each has a clock and a random seed of its own."""
        if not self.is_ddp:
            return number
        shared = [number]
        torch.distributed.broadcast_object_list(shared, 0)
        return shared[0]
