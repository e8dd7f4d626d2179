"""`UMambaTrainer`: one training by a recipe and the clock, killed and resumed as it may be."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import empty_cache
from tqdm import tqdm

from umamba.files import write_json
from umamba.networks.checkpoint import read_checkpoint
from umamba.networks.precision import autocast
from umamba.networks.pretrained import find_file, initialize_encoder
from umamba.training.checkpoints import (
    BEST,
    FINAL,
    LATEST,
    PREVIOUS,
    random_state,
    set_random_state,
    write_checkpoint,
)
from umamba.training.loading import Batches, explaining_dead_workers, seed_all
from umamba.training.nan_guard import NanGuard
from umamba.training.nnunet_hooks import checkpoint_of, unstarted_loaders, whole_files
from umamba.training.progress import (
    PatientWriter,
    ProgressFile,
    ProgressPlot,
    add_line,
    print_epoch,
    process_cost,
)
from umamba.training.recipe_trainer import RecipeTrainer
from umamba.training.sampling import loader_class

SAVE_EVERY_SECONDS = 120.0


class UMambaTrainer(RecipeTrainer):
    """nnU-Net's trainer with recipe, NaN guard, time budget and a validator that is handed in.

    On a CPU a training that is resumed goes on to the last bit as it would have.

    `validator(trainer, save_probabilities)` replaces nnU-Net's final validation.  A training that
    `starts_afresh`, from no checkpoint, takes the recipe's pretrained weights.
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
        self._write = PatientWriter()  # the log, too, which begins at once
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.iteration = 0
        self._resumed_state: dict | None = None
        self.save_every: int = 50  # nnU-Net's, annotated
        self._progress_file = ProgressFile(Path(self.output_folder) / "progress.jsonl")
        self.clock = time.monotonic
        self._seconds_before = 0.0
        self._seconds = 0.0
        self._started: float | None = None
        self._saved_at = self.clock()
        self.disable_checkpointing: bool = False  # nnU-Net's, annotated
        self._plot = ProgressPlot(self.logger.plot_progress_png, self._write)
        self.logger.plot_progress_png = self._plot.now_and_then
        self._guard: NanGuard | None = None
        self._bar = tqdm(disable=True)
        self._last_loss: Any = np.asarray(np.nan, np.float32)

    # --- one training ------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Network, its pretrained weights, loaders and files; then the clock starts."""
        # Found before nnU-Net unpacks data and starts the loaders.
        wanted = self.recipe.pretrained if self.starts_afresh else None
        pretrained = find_file(wanted) if wanted else None
        if pretrained is not None:
            self._take_pretrained(pretrained)
        with whole_files():
            super().on_train_start()
        # Hooks of the guard are not seen within a compiled network.
        self._guard = NanGuard(self._bare_network, self.optimizer, Path(self.output_folder))
        if self.local_rank == 0:
            self._progress_file.keep_before(self.current_epoch)
        if (state := self._resumed_state) is not None:
            self._guard.n_events = state["non_finite_losses"]
            self._last_loss = np.asarray(state["last_loss"], np.float32)
        if self.local_rank > 0:
            seed_all(self.seed, self.local_rank, self.iteration)
        elif state is not None:
            set_random_state(state["random_state"])
        self._started = self._saved_at = self.clock()

    def get_dataloaders(self) -> tuple[Batches, Batches]:
        """nnU-Net's loaders, whose batches go on where the training does."""
        loaders = unstarted_loaders(super().get_dataloaders, loader_class(self.recipe))
        n_workers = get_allowed_n_proc_DA()
        fold = 0 if self.fold == "all" else int(self.fold) + 1
        starts = self.iteration, self.current_epoch * self.num_val_iterations_per_epoch
        training, validation = (
            Batches(
                loader,
                (self.seed, part, fold, self.local_rank),
                start,
                n_workers if part == 0 else (n_workers + 1) // 2,
                pin_memory=self.device.type == "cuda",
            )
            for part, (loader, start) in enumerate(zip(loaders, starts, strict=True))
        )
        return training, validation

    def run_training(self) -> None:
        """nnU-Net's epochs; with a time budget, as many as it lasts for."""
        self.on_train_start()
        with (
            explaining_dead_workers(),
            contextlib.closing(self.dataloader_train),
            contextlib.closing(self.dataloader_val),
        ):
            while self.current_epoch < self.num_epochs and not self._is_time_up():
                self._run_epoch()
        self.on_train_end()

    def _run_epoch(self) -> None:
        self.on_epoch_start()
        self.on_train_epoch_start()
        outputs: list[dict] = []
        while len(outputs) < self.num_iterations_per_epoch and not (outputs and self._is_time_up()):
            outputs.append(self.train_step(next(self.dataloader_train)))
        self.on_train_epoch_end(outputs)
        with torch.no_grad():
            self.on_validation_epoch_start()
            n_batches = self.num_val_iterations_per_epoch
            outputs = [self.validation_step(next(self.dataloader_val)) for _ in range(n_batches)]
            self.on_validation_epoch_end(outputs)
        self.on_epoch_end()

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
            return min(1.0, self._seconds / self.recipe.train_seconds)
        return min(1.0, self.iteration / (self.num_epochs * self.recipe.num_iterations_per_epoch))

    def _elapsed(self) -> float:
        running = self.clock() - self._started if self._started is not None else 0.0
        return self._seconds_before + running

    def _is_time_up(self) -> bool:
        if self.recipe.train_seconds is None:
            return False
        self._seconds = self._from_first_gpu(self._elapsed())
        return self._seconds >= self.recipe.train_seconds

    def on_train_epoch_start(self) -> None:
        """Freezes or frees the encoder; where a time is given, sets the epoch's iterations."""
        if self.recipe.freeze_encoder > 0:
            for parameter in self._bare_network.encoder_parameters():
                parameter.requires_grad_(self.progress >= self.recipe.freeze_encoder)
        if self.recipe.train_seconds is not None and self.iteration > 0:
            elapsed, epochs_left = self._seconds, self.num_epochs - self.current_epoch
            wanted = (self.recipe.train_seconds - elapsed) / epochs_left * self.iteration / elapsed
            self.num_iterations_per_epoch = max(1, round(wanted))
        if self._guard is not None:
            self._guard.start_epoch()
        super().on_train_epoch_start()
        self._bar = tqdm(
            total=self.num_iterations_per_epoch,
            desc=f"epoch {self.current_epoch + 1}/{self.num_epochs}",
            unit="it",
            leave=False,
            disable=self.local_rank != 0 or not sys.stderr.isatty(),
        )

    def train_step(self, batch: dict) -> dict:
        """One iteration at the schedule's learning rate."""
        if self.recipe.follows_iterations:
            self.lr_scheduler.set_progress(self.progress)
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
        """Writes `progress.jsonl` and checkpoints, the latest one every two minutes at least."""
        epoch, best = self.current_epoch, self._best_ema
        # nnU-Net's would not know yet of this epoch's line, and the latest not of the best score.
        disabled = self.disable_checkpointing
        self.disable_checkpointing = True
        super().on_epoch_end()
        self.disable_checkpointing = disabled
        if self.local_rank != 0:
            return
        self._report_epoch(epoch)
        if self._best_ema is not best:  # an undefined one differs from itself
            self._write(self._save, BEST)
        due = self.clock() - self._saved_at > SAVE_EVERY_SECONDS
        due |= self.current_epoch % self.save_every == 0
        if due and self.current_epoch < self.num_epochs and self._write(self._save, LATEST):
            self._saved_at = self.clock()

    def _save(self, name: str) -> None:
        self.current_epoch -= 1  # nnU-Net writes one more, for the epoch in which it saves
        try:
            self.save_checkpoint(str(Path(self.output_folder) / name))
        finally:
            self.current_epoch += 1

    def _report_epoch(self, epoch: int) -> None:
        last = functools.partial(self.logger.get_value, step=-1)
        elapsed = self._elapsed()
        record = {
            "epoch": epoch,
            "elapsed_s": round(elapsed, 3),
            "epoch_s": round(last("epoch_end_timestamps") - last("epoch_start_timestamps"), 3),
            "train_loss": float(last("train_losses")),
            "val_loss": float(last("val_losses")),
            "mean_fg_dice": float(last("mean_fg_dice")),
            "dice_per_class": [float(value) for value in last("dice_per_class_or_region")],
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "iterations": self.iteration,
        }
        self._write(self._progress_file.add, record)
        whole = self.recipe.train_seconds or elapsed / max(self.progress, 1e-9)
        print_epoch(record, self.num_epochs, max(0.0, whole - elapsed))

    def on_train_end(self) -> None:
        """The final checkpoint, and `training.json` with what the training cost."""
        # nnU-Net's would remove the latest one of a resumed training that writes none, too.
        self._save(FINAL)
        empty_cache(self.device)
        self.print_to_log_file("Training done.")
        if self.local_rank == 0:
            for name in () if self.disable_checkpointing else (LATEST, PREVIOUS):
                (Path(self.output_folder) / name).unlink(missing_ok=True)
            if self.current_epoch > 0:
                self._plot.draw(self.output_folder)
            cost = {
                "iterations": self.iteration,
                "epochs": self.current_epoch,
                "trained_seconds": round(self._elapsed(), 1),
                "parameters": sum(p.numel() for p in self.network.parameters()),
                "device": str(self.device),
                **process_cost(),
            }
            write_json(Path(self.output_folder) / "training.json", cost)

    def print_to_log_file(self, *args: Any, add_timestamp: bool = True, **_: Any) -> None:
        """nnU-Net's log goes to its file only; the terminal shows one line per epoch instead."""
        if self.local_rank == 0:
            words = (f"{datetime.now()}:", *args) if add_timestamp else args
            self._write(add_line, Path(self.log_file), " ".join(map(str, words)))

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
        checkpoint = checkpoint_of(super().save_checkpoint)
        # Stock prediction looks this name up; the network comes from the plans either way.
        checkpoint["trainer_name"] = "nnUNetTrainer"
        checkpoint["umamba"] = {
            "iteration": self.iteration,
            "trained_seconds": self._elapsed(),
            "seed": self.seed,
            "random_state": random_state(),
            "non_finite_losses": self._guard.n_events if self._guard is not None else 0,
            "last_loss": float(self._last_loss),
        }
        write_checkpoint(checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Reads `filename` safely first (`weights_only=True`), then as nnU-Net does."""
        checkpoint = read_checkpoint(Path(filename_or_checkpoint))
        self.starts_afresh = False
        super().load_checkpoint(str(filename_or_checkpoint))
        own = checkpoint.get("umamba", {})
        counted = self.current_epoch * self.num_iterations_per_epoch
        self.iteration = int(own.get("iteration", counted))
        self._seconds = self._seconds_before = float(own.get("trained_seconds", 0.0))
        if "random_state" in own:  # one of an earlier version has none
            self.seed, self._resumed_state = own["seed"], own
