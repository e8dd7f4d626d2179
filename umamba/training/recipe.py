"""The training recipe: how a network is trained, as plain data in the plans."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

import torch

CHOICES: dict[str, tuple[str, ...]] = {
    "loss": ("dice_ce", "ce", "dice_ce_all", "region_tversky"),
    "optimizer": ("sgd", "adam", "adamw"),
    "schedule": ("poly", "cosine"),
    "augmentation": ("nnunet", "light", "none"),
    "precision": ("auto", "fp16", "bf16", "fp32"),
    "recompute": ("none", "mixer"),
    "sampling": ("stock", "jittered", "balanced"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything of a training but the network; the defaults are stock nnU-Net's.

    `train_seconds` makes the schedule follow the wall clock instead of the epochs: the learning
    rate reaches its end, and the training ends, when that many seconds have passed, however many
    iterations the machine got through.  `precision` concerns CUDA only ("auto": bf16 where the
    GPU has it, else fp16); on a CPU training is float32.  `warmup` is the share of the schedule
    in which the learning rate rises linearly from zero.  `mirroring` decides about mirrored
    training patches and, with them, whether prediction may mirror.  `pretrained` names ImageNet
    weights (`umamba models fetch`) or the path of a file that the encoder starts from.
    `recompute` "mixer" saves memory: mixers keep only what their scans gave, and compute the rest
    again in backward (blocks.recompute); the gradients are the same.

    `name` is that of the named recipe it comes from.  `loss_weights` are those of cross-entropy and
    Dice in the loss "dice_ce_all".  `n_swings` counts the cosine's falls and rises: 1 falls once,
    3 falls, rises and falls.  `rate_per_iteration` makes the learning rate change at every
    iteration in place of every epoch, as it does with `warmup` and `train_seconds` anyway.
    `freeze_encoder` is the share of the schedule in which the encoder's weights stay as they are,
    to whole epochs and at least one (0.01 of 1000 epochs: the first 10).
    `sampling` is how the patches with forced foreground are chosen (training.sampling), and
    `class_weights` how often each class is chosen in "balanced", all alike without them.
    """

    name: str | None = None
    loss: str = "dice_ce"
    loss_weights: tuple[float, float] = (1.0, 1.0)
    optimizer: str = "sgd"
    initial_lr: float = 1e-2
    final_lr: float = 0.0
    weight_decay: float = 3e-5
    momentum: float = 0.99
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "poly"
    n_swings: int = 1
    rate_per_iteration: bool = False
    warmup: float = 0.0
    freeze_encoder: float = 0.0
    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    train_seconds: float | None = None
    enable_deep_supervision: bool = True
    augmentation: str = "nnunet"
    mirroring: bool = True
    precision: str = "auto"
    recompute: str = "none"
    sampling: str = "stock"
    class_weights: tuple[float, ...] | None = None
    seed: int | None = None
    pretrained: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"recipe: {name} is {value!r}; choose one of {', '.join(allowed)}")
        counts = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
        for name in (*counts, "n_swings"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"recipe: {name} is {value!r}; it must be a whole number above 0")
        for name in ("warmup", "freeze_encoder"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(
                    f"recipe: {name} is {value}; it is a share of the schedule, 0 to 1"
                )
        weights = tuple(self.loss_weights)
        if len(weights) != 2 or min(weights) < 0 or max(weights) == 0:
            raise ValueError(
                f"recipe: loss_weights are {list(weights)}; give those of cross-entropy and Dice, "
                "not below 0 and one above it"
            )
        if weights != (1, 1) and self.loss != "dice_ce_all":
            raise ValueError(
                f"recipe: loss_weights belong to the loss dice_ce_all, and the loss is {self.loss}"
            )
        if self.class_weights is not None:
            if self.sampling != "balanced" or not all(w > 0 for w in self.class_weights):
                raise ValueError(
                    f"recipe: class_weights are {list(self.class_weights)}; they are above 0, one "
                    f'for each class, and belong to the sampling "balanced"'
                )
            object.__setattr__(self, "class_weights", tuple(self.class_weights))
        seconds = self.train_seconds
        if seconds is not None and seconds <= 0:
            raise ValueError(f"recipe: train_seconds is {seconds}; it must be above 0")
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "loss_weights", weights)

    @classmethod
    def from_dict(cls, values: dict | None) -> Recipe:
        """The recipe of the plans' `"recipe"` entry; raises ValueError on an unknown key."""
        values = dict(values or {})
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                close = get_close_matches(key, names, 1)
                hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
                raise ValueError(f"recipe: unknown key {key!r}; {hint}")
        return cls(**values)

    def to_dict(self) -> dict:
        """Plain JSON values, only those that differ from the defaults."""
        default = dataclasses.asdict(Recipe())
        values = {k: v for k, v in dataclasses.asdict(self).items() if v != default[k]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @property
    def follows_iterations(self) -> bool:
        """Whether the learning rate changes within an epoch (stock nnU-Net's changes per epoch)."""
        return self.rate_per_iteration or self.train_seconds is not None or self.warmup > 0

    def learning_rate(self, progress: float) -> float:
        """The learning rate at `progress`, the share of the schedule that has passed (0 to 1)."""
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            return self.initial_lr * progress / self.warmup
        if self.schedule == "poly":
            return self.initial_lr * (1 - progress) ** 0.9
        left = (progress - self.warmup) / (1 - self.warmup)
        share = 0.5 * (1 + math.cos(math.pi * self.n_swings * left))
        return self.final_lr + (self.initial_lr - self.final_lr) * share

    def build_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer over `parameters` at the initial learning rate."""
        lr, decay, momentum = self.initial_lr, self.weight_decay, self.momentum
        if self.optimizer != "sgd":
            adam = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.Adam
            return adam(parameters, lr, betas=self.betas, eps=self.eps, weight_decay=decay)
        nesterov = self.nesterov and momentum > 0
        return torch.optim.SGD(
            parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=decay
        )


class RateSchedule:
    """Sets the optimizer's learning rate from the recipe; `step(epoch)` is what nnU-Net calls."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.optimizer = optimizer
        self.recipe = recipe

    def step(self, epoch: int) -> None:
        """nnU-Net's call per epoch; of no effect where the rate follows iterations."""
        if not self.recipe.follows_iterations:
            self.set_progress(epoch / self.recipe.num_epochs)

    def set_progress(self, progress: float) -> None:
        """The learning rate of `progress` (0 to 1) in every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(progress)
