"""What a training step really takes on a device: seconds, and bytes at its peak."""

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from umamba.memory import available_memory
from umamba.planning.footprint import GIB, run_network


@dataclass(frozen=True)
class StepCheck:
    """What a dry run of a training step at the planned patch cost; a forward is one of inference.

    The peak is the growth over the memory in use before the network was built.
    """

    seconds: float
    cpu_seconds: float
    forward_seconds: float
    peak_bytes: int
    counted_bytes: int
    parameters: int
    finite: bool
    device: str


class TrialStep(Protocol):
    """A network, a batch on its device, and a training step with them, as often as one likes."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def image(self) -> torch.Tensor: ...

    def run(self) -> bool:
        """Does one step; tells whether its loss is finite."""


class NoiseStep:
    """A step of stock nnU-Net's optimizer with cross-entropy and Dice of every output."""

    def __init__(self, network: nn.Module, image: torch.Tensor) -> None:
        self.network, self.image = network.to(image.device).train(), image
        self.optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.99, nesterov=True)

    def run(self) -> bool:
        """Does one step; tells whether its loss is finite."""
        return _step_is_finite(self.network, self.optimizer, self.image)


def measure_step(make_step: Callable[[], TrialStep], device: str, counted: int) -> StepCheck:
    """Makes a step, runs it to warm up and once more to measure; returns what the second cost.

    counted: the bytes that were planned. Raises MemoryError where there is not enough of it.
    """
    where = torch.device(device)
    # The system does not refuse memory that it has not got, it kills who uses it.
    if where.type == "cpu" and counted > (free := available_memory()):
        raise MemoryError(f"it takes {counted / GIB:.1f} GB and {free / GIB:.1f} GB are free")
    before = _reset_peak(where)
    try:
        step = make_step()
        finite = step.run()
        start, cpu_start = time.perf_counter(), time.process_time()
        finite = step.run() and finite
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        peak = _read_peak(where) - before
        forward_seconds = _forward_seconds(step.network.eval(), step.image)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(str(error).split("\n")[0]) from error
        raise
    return StepCheck(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        forward_seconds=forward_seconds,
        peak_bytes=max(peak, 0),
        counted_bytes=counted,
        parameters=sum(p.numel() for p in step.network.parameters()),
        finite=finite,
        device=str(where),
    )


def _step_is_finite(
    network: nn.Module, optimizer: torch.optim.Optimizer, image: torch.Tensor
) -> bool:
    optimizer.zero_grad(set_to_none=True)
    loss = image.new_zeros(())
    for logits in run_network(network, image):
        shape = (logits.shape[0], *logits.shape[2:])
        target = torch.randint(logits.shape[1], shape, device=image.device)
        probabilities = torch.softmax(logits.float(), 1)
        overlap = probabilities.gather(1, target[:, None]).mean()
        loss = loss + nn.functional.cross_entropy(logits.float(), target) - overlap
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    optimizer.step()
    return bool(torch.isfinite(loss))


@torch.inference_mode()
def _forward_seconds(network: nn.Module, image: torch.Tensor) -> float:
    """The second of two forward passes: the first prepares the weights."""
    taken = 0.0
    for _ in range(2):
        start = time.perf_counter()
        float(run_network(network, image)[0].flatten()[0])  # waits for the device
        taken = time.perf_counter() - start
    return taken


def _reset_peak(device: torch.device) -> int:
    """Makes `_read_peak` begin anew; returns the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        # Freed pages go back to the system first, so that they are not taken for memory in use;
        # then 5 sets the resident high-water mark to the present size.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _read_peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    for line in status.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
