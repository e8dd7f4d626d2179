"""The NaN guard: names the module that first computes a non-finite value, and rolls back."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from umamba.files import replacing

logger = logging.getLogger(__name__)


class NanGuard:
    """Keeps a recent finite state of network and optimizer, and returns to it on a bad loss.

    `check(batch, loss)` is called after each training step; True means that the step was undone.
    The batch, the random state and the culprit's name go to `folder/non_finite_<n>.pt`.  After
    `max_events` such events training stops with a RuntimeError.  Several GPUs undo a step together,
    as their weights have to stay the same.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        keep_every: int = 50,
        max_events: int = 5,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.folder = folder
        self.keep_every = keep_every
        self.max_events = max_events
        self.n_events = 0
        self._steps = 0
        self._keep()

    def start_epoch(self) -> None:
        """Keeps the state if it is finite: a training that is resumed here has no other to keep."""
        self._steps = 0
        self._keep_if_finite()

    def check(self, batch: dict, loss: float) -> bool:
        """Whether the step was undone; keeps the state now and then when all is finite."""
        is_finite = bool(torch.as_tensor(loss).isfinite().all())
        if self._is_finite_everywhere(is_finite):
            self._steps += 1
            if self._steps % self.keep_every == 0:
                self._keep_if_finite()
            return False
        self.n_events += 1
        self.network.load_state_dict(self._weights)
        self.optimizer.load_state_dict(copy.deepcopy(self._moments))
        message = "the loss became non-finite on another GPU."
        if not is_finite:
            culprit = first_non_finite(self.network, batch["data"])
            self.network.load_state_dict(self._weights)  # running statistics may have moved
            message = (
                f"the loss became {float(loss)}: {culprit}. The weights went back to the last "
                f"finite state; {self._save(batch, culprit)}."
            )
            logger.warning(message)
        if self.n_events >= self.max_events:
            raise RuntimeError(
                f"training stopped after {self.n_events} non-finite losses; {message} Try a lower "
                f"initial_lr, or precision fp32 in the recipe."
            )
        return True

    def _is_finite_everywhere(self, is_finite: bool) -> bool:
        """Whether it is on all GPUs that train together."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return is_finite
        device = next(self.network.parameters()).device
        bad = torch.tensor(0.0 if is_finite else 1.0, device=device)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        return not bool(bad)

    def _keep_if_finite(self) -> None:
        if all(bool(p.isfinite().all()) for p in self.network.parameters()):
            self._keep()

    def _keep(self) -> None:
        self._weights = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self._moments = copy.deepcopy(self.optimizer.state_dict())

    def _save(self, batch: dict, culprit: str) -> str:
        path = self.folder / f"non_finite_{self.n_events}.pt"
        content = {key: batch[key] for key in ("data", "target")}
        content |= {"culprit": culprit, "random_state": torch.get_rng_state()}
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                torch.save(content, file)
        except OSError as error:
            return f"the batch could not be written ({error})"
        return f"the batch is in {path}"


def first_non_finite(network: nn.Module, data: torch.Tensor) -> str:
    """A sentence about the first module whose output is not finite for `data` (B, C, *spatial)."""
    if not bool(data.isfinite().all()):
        return "the batch itself holds a non-finite value"
    names = {module: name for name, module in network.named_modules() if name}
    found: list[str] = []

    def watch(module: nn.Module, inputs: Any, output: Any) -> None:
        for value in output if isinstance(output, list | tuple) else (output,):
            is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
            if is_float and not found and not bool(value.isfinite().all()):
                kind = type(module).__name__
                found.append(f"{names[module]} ({kind}) gives the first non-finite value")

    handles = [module.register_forward_hook(watch) for module in names]
    try:
        with torch.no_grad():
            network(data.to(next(network.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "the forward pass is finite from the last kept state, so an update before it diverged"
