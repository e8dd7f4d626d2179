"""Trains one fold: resolves the trainer class itself, resumes, and starts several GPUs if asked."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import cleanup_ddp, find_free_network_port, setup_ddp
from torch.backends import cudnn

from umamba.processes import count_cores
from umamba.training.checkpoints import BEST
from umamba.training.trainer import UMambaTrainer

Validator = Callable[[UMambaTrainer, bool], None]


@dataclass(frozen=True)
class TrainingRun:
    """One fold of one configuration; `validator` (a module-level function) does the validation.

    `checkpoint` is the file to go on from, or to validate.
    """

    plans: dict
    configuration: str
    fold: int | str
    dataset_json: dict
    device: str = "cpu"
    checkpoint: Path | None = None
    only_validation: bool = False
    validate_best: bool = False
    save_probabilities: bool = False
    disable_checkpointing: bool = False
    pretrained_weights: str | None = None
    n_gpus: int = 1
    validator: Validator | None = None


def train_fold(run: TrainingRun) -> Path:
    """Trains and validates; returns the fold's folder. nnU-Net's variables must be set."""
    # Loading and augmenting take all cores but one, 12 at most (nnU-Net's usual number).
    n_loaders = max(1, min(count_cores() - 1, 12))
    os.environ.setdefault("nnUNet_n_proc_DA", str(n_loaders))
    if run.n_gpus > 1:
        if not run.device.startswith("cuda"):
            raise ValueError(f"-num_gpus {run.n_gpus} needs CUDA devices, not {run.device}")
        os.environ["MASTER_ADDR"] = "localhost"
        os.environ.setdefault("MASTER_PORT", str(find_free_network_port()))
        torch.multiprocessing.spawn(_train_rank, args=(run,), nprocs=run.n_gpus, join=True)
        return fold_folder(run)
    return _train(run)


def fold_folder(run: TrainingRun) -> Path:
    """Where this run's checkpoints and validation go."""
    base = Path(os.environ["nnUNet_results"]) / run.plans["dataset_name"]
    name = f"{UMambaTrainer.__name__}__{run.plans['plans_name']}__{run.configuration}"
    return base / name / f"fold_{run.fold}"


def _train(run: TrainingRun) -> Path:
    resumes = run.checkpoint is not None and not run.only_validation
    plans = copy.deepcopy(run.plans) | {"continue_training": resumes}
    trainer = UMambaTrainer(
        plans, run.configuration, run.fold, run.dataset_json, torch.device(run.device)
    )
    trainer.disable_checkpointing = run.disable_checkpointing
    trainer.validator = run.validator
    trainer.starts_afresh = run.pretrained_weights is None
    if run.checkpoint is not None:
        trainer.load_checkpoint(str(run.checkpoint))
    elif run.pretrained_weights is not None:
        trainer.initialize()
        load_pretrained_weights(trainer.network, run.pretrained_weights)
    if torch.cuda.is_available():
        cudnn.deterministic = False
        cudnn.benchmark = True
    if not run.only_validation:
        trainer.run_training()
    folder = Path(trainer.output_folder)
    if run.validate_best:
        trainer.load_checkpoint(str(folder / BEST))
    trainer.perform_actual_validation(run.save_probabilities)
    return folder


def _train_rank(rank: int, run: TrainingRun) -> None:
    setup_ddp(rank, run.n_gpus)
    torch.cuda.set_device(rank)
    _train(run)
    cleanup_ddp()
