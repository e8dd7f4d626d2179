"""`UMambaTrainer`: nnU-Net's trainer, driven by the recipe in the plans and the clock."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from umamba.blocks.recompute import recompute_mixers
from umamba.files import replacing, write_json
from umamba.networks.checkpoint import read_checkpoint
from umamba.networks.precision import (
    autocast,
    autocast_type,
    compile_backward_without_autocast,
)
from umamba.networks.pretrained import find_file, initialize_encoder
from umamba.training.losses import build_loss
from umamba.training.nan_guard import NanGuard
from umamba.training.recipe import RateSchedule, Recipe

INTENSITY = ("Gaussian", "Multiplicative", "Contrast", "SimulateLow", "Gamma")
SAVE_EVERY_SECONDS = 120.0
PLOT_EVERY_SECONDS = 60.0  # drawing takes a second, which short epochs would feel


class UMambaTrainer(nnUNetTrainer):
    """nnU-Net's trainer with recipe, NaN guard, time budget and a validator that is handed in.

    The recipe is read from `plans["configurations"][configuration]["recipe"]`; without one,
    training is stock nnU-Net's.  `validator(trainer, save_probabilities)` replaces nnU-Net's
    final validation.  A training that `starts_afresh`, from no checkpoint, takes the recipe's
    pretrained weights.
    """

    starts_afresh = True
    validator: Callable[[UMambaTrainer, bool], None] | None = None

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
        self.iteration = 0
        self.save_every: int = 50  # nnU-Net's, annotated
        self._progress_file = Path(self.output_folder) / "progress.jsonl"
        self.clock = time.monotonic
        self._seconds_before = 0.0
        self._started: float | None = None
        self._saved_at = self.clock()
        self._plotted_at = -PLOT_EVERY_SECONDS
        self._plot = self.logger.plot_progress_png
        self.logger.plot_progress_png = self._plot_now_and_then
        self._guard: NanGuard | None = None
        self._bar = tqdm(disable=True)
        self._last_loss: Any = np.asarray(np.nan, np.float32)

    # --- what the recipe decides -------------------------------------------------------------

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
        """Builds network, optimizer and loss, and settles the precision."""
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

    # --- one training ------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Network, its pretrained weights, loaders and files; then the clock starts."""
        # Found before nnU-Net unpacks data and starts the loaders.
        wanted = self.recipe.pretrained if self.starts_afresh else None
        pretrained = find_file(wanted) if wanted else None
        if self.recipe.seed is not None:
            torch.manual_seed(self.recipe.seed)
            np.random.seed(self.recipe.seed)
        if pretrained is not None:
            self._take_pretrained(pretrained)
        super().on_train_start()
        # Hooks of the guard are not seen within a compiled network.
        self._guard = NanGuard(self._bare_network, self.optimizer, Path(self.output_folder))
        self._keep_progress_before(self.current_epoch)
        self._started = self._saved_at = self.clock()

    def _take_pretrained(self, file: Path) -> None:
        if not self.was_initialized:
            self.initialize()
        report = initialize_encoder(self._bare_network, file)
        self.print_to_log_file(f"pretrained {file}: {report}")
        if self.local_rank == 0:
            print(f"pretrained: {report} ({file.name})")

    def plot_network_architecture(self) -> None:
        """Nothing: nnU-Net's plot needs a package that no longer works, and logs that each time."""

    @property
    def progress(self) -> float:
        """The share of the schedule that has passed, 0 to 1."""
        if self.recipe.train_seconds is not None:
            return min(1.0, self._elapsed() / self.recipe.train_seconds)
        return min(1.0, self.iteration / (self.num_epochs * self.recipe.num_iterations_per_epoch))

    def _elapsed(self) -> float:
        running = self.clock() - self._started if self._started is not None else 0.0
        return self._seconds_before + running

    def on_train_epoch_start(self) -> None:
        """Freezes or frees the encoder; where a time is given, sets the epoch's iterations."""
        if self.recipe.freeze_encoder > 0:
            for parameter in self._bare_network.encoder_parameters():
                parameter.requires_grad_(self.progress >= self.recipe.freeze_encoder)
        if self.recipe.train_seconds is not None and self.iteration > 0:
            elapsed, epochs_left = self._elapsed(), self.num_epochs - self.current_epoch
            wanted = (self.recipe.train_seconds - elapsed) / epochs_left * self.iteration / elapsed
            self.num_iterations_per_epoch = max(1, round(wanted))
        super().on_train_epoch_start()
        self._bar = tqdm(
            total=self.num_iterations_per_epoch,
            desc=f"epoch {self.current_epoch + 1}/{self.num_epochs}",
            unit="it",
            leave=False,
            disable=self.local_rank != 0 or not sys.stderr.isatty(),
        )

    def train_step(self, batch: dict) -> dict:
        """One iteration at the schedule's learning rate; skipped when the time is used up."""
        if self.recipe.follows_iterations:
            self.lr_scheduler.set_progress(self.progress)
        if self.recipe.train_seconds is not None and self.progress >= 1.0 and self.iteration > 0:
            return {"loss": self._last_loss}
        output = super().train_step(batch)
        self.iteration += 1
        if self._guard is not None:
            with autocast(self.device, self.recipe.precision):
                if self._guard.check(batch, output["loss"]):
                    output = {"loss": self._last_loss}
        self._last_loss = output["loss"]
        self._bar.update()
        return output

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Closes the epoch's bar and logs the loss."""
        self._bar.close()
        super().on_train_epoch_end(train_outputs)

    def on_epoch_end(self) -> None:
        """Checkpoints at least every two minutes, writes `progress.jsonl`, prints one line."""
        due = self.clock() - self._saved_at > SAVE_EVERY_SECONDS
        epoch = self.current_epoch
        every = self.save_every
        if due:
            self.save_every, self._saved_at = 1, self.clock()
        super().on_epoch_end()
        self.save_every = every
        if self.local_rank == 0:
            self._report_epoch(epoch)

    def _plot_now_and_then(self, folder: str) -> None:
        last = self.current_epoch == self.num_epochs - 1
        if last or self.clock() - self._plotted_at > PLOT_EVERY_SECONDS:
            self._plot(folder)
            self._plotted_at = self.clock()

    def _report_epoch(self, epoch: int) -> None:
        last = functools.partial(self.logger.get_value, step=-1)
        dice = [float(value) for value in last("dice_per_class_or_region")]
        elapsed = self._elapsed()
        record = {
            "epoch": epoch,
            "elapsed_s": round(elapsed, 3),
            "epoch_s": round(last("epoch_end_timestamps") - last("epoch_start_timestamps"), 3),
            "train_loss": float(last("train_losses")),
            "val_loss": float(last("val_losses")),
            "mean_fg_dice": float(last("mean_fg_dice")),
            "dice_per_class": dice,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "iterations": self.iteration,
        }
        with open(self._progress_file, "a") as file:
            file.write(json.dumps(record) + "\n")
        whole = self.recipe.train_seconds or elapsed / max(self.progress, 1e-9)
        left = max(0.0, whole - elapsed)
        shown = " ".join(f"{value:.3f}" for value in dice[:12])
        print(
            f"epoch {epoch + 1:>4}/{self.num_epochs}  {format_seconds(left):>8} left  "
            f"loss {record['train_loss']:+.3f}  pseudo Dice {shown}  lr {record['lr']:.2e}",
            flush=True,
        )

    def _keep_progress_before(self, epoch: int) -> None:
        """Drops the lines of epochs that will be trained (again)."""
        if self.local_rank == 0 and self._progress_file.is_file():
            lines = self._progress_file.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["epoch"] < epoch]
            self._progress_file.write_text("".join(f"{line}\n" for line in kept))

    def on_train_end(self) -> None:
        """The final checkpoint, and `training.json` with what the training cost."""
        super().on_train_end()
        if self.local_rank == 0:
            cost = {
                "iterations": self.iteration,
                "epochs": self.current_epoch,
                "trained_seconds": round(self._elapsed(), 1),
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "device": str(self.device),
                **process_cost(),
            }
            write_json(Path(self.output_folder) / "training.json", cost)

    def print_to_log_file(self, *args: Any, **options: Any) -> None:
        """nnU-Net's log goes to its file; the terminal shows one line per epoch instead."""
        super().print_to_log_file(*args, **options | {"also_print_to_console": False})

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Final validation by the `validator` that was handed in, else nnU-Net's own."""
        if self.validator is None:
            super().perform_actual_validation(save_probabilities)
        else:
            self.validator(self, save_probabilities)

    # --- checkpoints -------------------------------------------------------------------------

    def save_checkpoint(self, filename: str) -> None:
        """Writes nnU-Net's checkpoint whole or not at all, for stock prediction to read."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)  # our own bytes
        # Stock prediction looks this name up; the network comes from the plans either way.
        checkpoint["trainer_name"] = "nnUNetTrainer"
        checkpoint["umamba"] = {"iteration": self.iteration, "trained_seconds": self._elapsed()}
        with replacing(Path(filename)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Reads `filename` safely first (`weights_only=True`), then as nnU-Net does."""
        checkpoint = read_checkpoint(Path(filename_or_checkpoint))
        self.starts_afresh = False
        super().load_checkpoint(str(filename_or_checkpoint))
        own = checkpoint.get("umamba", {})
        self.iteration = int(
            own.get("iteration", self.current_epoch * self.num_iterations_per_epoch)
        )
        self._seconds_before = float(own.get("trained_seconds", 0.0))


@contextlib.contextmanager
def ddp_wrapper(find_unused_parameters: bool) -> Iterator[None]:
    """What nnU-Net wraps its network in within this context, on several GPUs.

    Frozen parameters get no gradient, which is an error unless DDP looks for unused ones; that
    costs a walk through the graph at every step.
    """
    stock, find = vars(sys.modules[nnUNetTrainer.__module__]), find_unused_parameters
    stock["DDP"] = functools.partial(DistributedDataParallel, find_unused_parameters=find)
    try:
        yield
    finally:
        stock["DDP"] = DistributedDataParallel


def process_cost() -> dict[str, float]:
    """CPU seconds of this process and its ended children, and its peak memory (GiB)."""
    try:
        import resource
    except ImportError:  # Windows
        return {"cpu_seconds": round(time.process_time(), 1)}
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return {"cpu_seconds": round(seconds, 1), "peak_gib": round(own.ru_maxrss / unit, 2)}


def thin_out(transforms: BasicTransform, level: str) -> None:
    """Reduces nnU-Net's composed training transforms in place to `level`: "light" or "none".

    "light" keeps rotation and scaling within narrower limits, brightness, one gamma, and mirroring;
    "none" keeps only what training needs (cropping, label handling, deep supervision targets).
    """
    kept, n_gammas = [], 0
    for transform in transforms.transforms:
        inner = transform.transform if isinstance(transform, RandomTransform) else transform
        is_gamma = isinstance(inner, GammaTransform)
        n_gammas += is_gamma
        left_out = type(inner).__name__.startswith(INTENSITY)
        if isinstance(inner, SpatialTransform):
            inner.p_rotation, inner.p_scaling = (0.2, 0.2) if level == "light" else (0.0, 0.0)
            inner.scaling = (0.8, 1.2)
        elif level == "none":
            left_out = left_out or isinstance(inner, MirrorTransform)
        elif isinstance(inner, MultiplicativeBrightnessTransform) or (is_gamma and n_gammas > 1):
            left_out = False
        if not left_out:
            kept.append(transform)
    transforms.transforms = kept


def without_autocast(forward: Callable) -> Callable:
    """`forward` in float32, shielded from the autocast that nnU-Net's steps always open."""

    def shielded(x: torch.Tensor) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    return shielded


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`; days from 48 hours on."""
    seconds = round(seconds)
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} d"
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
