"""Memory that one training step of a network needs, counted on the meta device, and measured."""

import ctypes
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)

NetworkBuilder = Callable[[], nn.Module]

LOSS_COPIES = 4
"""Tensors of the logits' size that the loss keeps: softmax, log-softmax, target, gradient."""

WORKING_COPIES = 3
"""Buffers of the largest tensor in use at once in backward: two gradients and a workspace."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one sample, and of the parameters; `training_bytes` adds them up."""

    saved_bytes: int
    largest_bytes: int
    logit_bytes: int
    input_bytes: int
    parameter_bytes: int
    half_precision: bool = False

    def training_bytes(self, batch_size: int) -> int:
        """Returns the bytes that a step with an optimizer of one or two moments holds at its peak.

        Parameters count four times (values, gradients, two moments) and under autocast once more
        in 16 bits; logits in float32, as the loss takes them.
        """
        per_sample = self.saved_bytes + WORKING_COPIES * self.largest_bytes
        per_sample += LOSS_COPIES * self.logit_bytes + 2 * self.input_bytes
        copies = 4.5 if self.half_precision else 4
        return batch_size * per_sample + int(copies * self.parameter_bytes)


def conv_features(network: nn.Module, input_channels: int, patch_size: Sequence[int]) -> int:
    """Returns the number of elements that all convolutions put out for one patch.

    This is the number that nnU-Net's planner budgets with (`compute_conv_feature_map_size`).

    Args:
        network: on any device; a network on the meta device costs neither memory nor arithmetic.
        patch_size: voxels per axis.
    """
    device = next(network.parameters()).device
    image = torch.empty(1, input_channels, *patch_size, device=device)
    with torch.no_grad(), _ConvolutionCounter() as counter:
        network(image)
    return counter.n_elements


def count_footprint(
    build: NetworkBuilder,
    input_channels: int,
    patch_size: Sequence[int],
    half_precision: bool = False,
) -> Footprint:
    """Returns what one sample of a training step keeps, by a forward pass on the meta device.

    Args:
        build: makes the network in training mode; called under the meta device.
        patch_size: voxels per axis.
        half_precision: as under autocast, where convolutions work in 16 bits and mixers, which
            leave autocast, in float32. The meta device has no autocast, so it is acted out.
    """
    with torch.device("meta"):
        network = build()
        image = torch.empty(1, input_channels, *patch_size)
    parameter_bytes = sum(p.numel() * 4 for p in network.parameters())
    if half_precision:
        for module in network.modules():
            if isinstance(module, _ConvNd):
                module.half().register_forward_pre_hook(_to_half)
            elif isinstance(module, _NormBase):
                module.half()
    parameters = {_key(p) for p in network.parameters()}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        key = _key(tensor)
        if key not in parameters:
            # The storage is held, so that its address cannot serve a second tensor.
            kept[key] = (tensor.untyped_storage().nbytes(), tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        outputs = network(image)
    logits = outputs if isinstance(outputs, list | tuple) else [outputs]
    sizes = [size for size, _ in kept.values()]
    return Footprint(
        saved_bytes=sum(sizes),
        largest_bytes=max(sizes, default=0),
        logit_bytes=sum(output.numel() * 4 for output in logits),
        input_bytes=image.numel() * 4,
        parameter_bytes=parameter_bytes,
        half_precision=half_precision,
    )


def training_bytes(
    build: NetworkBuilder,
    input_channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    half_precision: bool = False,
) -> int:
    """Returns the bytes of one training step, from activations to the optimizer's moments."""
    footprint = count_footprint(build, input_channels, patch_size, half_precision)
    return footprint.training_bytes(batch_size)


@dataclass(frozen=True)
class StepCheck:
    """What a dry run of training steps at the planned patch cost; a forward is one of inference."""

    seconds: float
    cpu_seconds: float
    forward_seconds: float
    peak_bytes: int
    counted_bytes: int
    parameters: int
    finite: bool
    device: str


def measure_step(
    build: NetworkBuilder,
    input_channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    *,
    n_steps: int = 1,
    device: str | None = None,
) -> StepCheck:
    """Runs one warm-up and `n_steps` training steps on noise; returns the median step's cost.

    The peak is the growth over the memory in use before the network was built.

    Args:
        device: torch device; None takes the GPU if there is one.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    counted = training_bytes(build, input_channels, patch_size, batch_size, where.type == "cuda")
    before = _reset_peak(where)
    network = build().to(where).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.99, nesterov=True)
    image = torch.randn(batch_size, input_channels, *patch_size, device=where)
    costs: list[tuple[float, float]] = []
    finite = True
    for _ in range(n_steps + 1):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = _step(network, optimizer, image)
        finite = finite and bool(torch.isfinite(loss))
        costs.append((time.perf_counter() - start, time.process_time() - cpu_start))
    peak = max(_read_peak(where) - before, 0)
    timed = sorted(costs[1:] or costs)
    seconds, cpu_seconds = timed[len(timed) // 2]
    return StepCheck(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        forward_seconds=_forward_seconds(network.eval(), image),
        peak_bytes=peak,
        counted_bytes=counted,
        parameters=sum(p.numel() for p in network.parameters()),
        finite=finite,
        device=str(where),
    )


class _ConvolutionCounter(TorchDispatchMode):
    """Adds up the elements of every convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.n_elements += output.numel()
        return output


def _to_half(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.half() for tensor in inputs)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, image: torch.Tensor
) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(image.device.type, enabled=image.device.type == "cuda"):
        outputs = network(image)
    loss = image.new_zeros(())
    for logits in outputs if isinstance(outputs, list | tuple) else [outputs]:
        target = torch.randint(
            logits.shape[1], (logits.shape[0], *logits.shape[2:]), device=image.device
        )
        probabilities = torch.softmax(logits.float(), 1)
        overlap = probabilities.gather(1, target[:, None]).mean()
        loss = loss + nn.functional.cross_entropy(logits.float(), target) - overlap
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 12)
    optimizer.step()
    return loss.detach()


@torch.inference_mode()
def _forward_seconds(network: nn.Module, image: torch.Tensor) -> float:
    """The second of two forward passes: the first prepares the weights."""
    taken = 0.0
    for _ in range(2):
        start = time.perf_counter()
        with torch.autocast(image.device.type, enabled=image.device.type == "cuda"):
            outputs = network(image)
        float((outputs[0] if isinstance(outputs, list | tuple) else outputs).flatten()[0])
        taken = time.perf_counter() - start
    return taken


def _reset_peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    gc.collect()
    try:
        # Freed pages go back to the system first, so that they are not taken for memory in use;
        # then 5 sets the resident high-water mark to the present size.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        logger.debug("the peak of resident memory cannot be reset here")
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
