"""Memory that one training step of a network needs: counted on the meta device, and measured."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from umamba.blocks.recompute import RecomputableLayer, recompute_mixers
from umamba.memory import available_memory

NetworkBuilder = Callable[[], nn.Module]
GIB = 1024**3
LOSS_COPIES = 4  # of the logits, kept by the loss: softmax, log-softmax, target, gradient
WORKING_COPIES = 3  # of the largest tensor, at once in backward: two gradients and a workspace


def default_memory_gb() -> float:
    """Returns the GPU's memory in GiB if there is one, else half of the free RAM, at least 2."""
    there, _ = machine_memory()
    if torch.cuda.is_available():
        return round(there / GIB, 1)
    return float(max(there // 2 // GIB, 2))


def default_memory_source() -> str:
    """Returns in words where the default memory comes from."""
    _, what = machine_memory()
    return f"all of {what}" if torch.cuda.is_available() else f"half of {what}"


def machine_memory() -> tuple[int, str]:
    """Returns the bytes of the GPU, or of the free RAM where there is none, and names them."""
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return gpu.total_memory, f"the {gpu.total_memory / GIB:.1f} GB of the {gpu.name}"
    free = available_memory()
    return free, f"the {free / GIB:.1f} GB of RAM that are free here"


@dataclass(frozen=True)
class Footprint:
    """Bytes of one sample, and of the parameters; `training_bytes` adds them up.

    n_moments: numbers that the optimizer keeps for each parameter.

    saved_bytes: what the graph keeps until backward. peak_saved_bytes: the most of it that there is
    in backward, which is more where a layer is recomputed (blocks.recompute).
    """

    saved_bytes: int
    peak_saved_bytes: int
    largest_bytes: int
    logit_bytes: int
    input_bytes: int
    parameter_bytes: int
    half_precision: bool = False
    n_moments: int = 1

    def training_bytes(self, batch_size: int) -> int:
        """Returns the bytes that a step with an optimizer of one or two moments holds at its peak.

        Parameters count three times with SGD (values, gradients, momentum) and four times with
        Adam, and under autocast once more in 16 bits; logits in float32, as the loss takes them.
        """
        per_sample = self.peak_saved_bytes + WORKING_COPIES * self.largest_bytes
        per_sample += LOSS_COPIES * self.logit_bytes + 2 * self.input_bytes
        copies = 2 + self.n_moments + (0.5 if self.half_precision else 0)
        return batch_size * per_sample + int(copies * self.parameter_bytes)


def conv_features(network: nn.Module, input_channels: int, patch_size: Sequence[int]) -> int:
    """Returns the number of elements that all convolutions put out for one patch.

    This is the number that nnU-Net's planner budgets with (`compute_conv_feature_map_size`). A
    network on the meta device costs neither memory nor arithmetic.
    """
    device = next(network.parameters()).device
    image = torch.empty(1, input_channels, *patch_size, device=device)
    with torch.no_grad(), _ConvolutionCounter() as counter:
        network(image)
    return counter.n_elements


class _ConvolutionCounter(TorchDispatchMode):
    """Adds up the elements of every convolution's output."""

    n_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.n_elements += output.numel()
        return output


def count_footprint(
    build: NetworkBuilder,
    input_channels: int,
    patch_size: Sequence[int],
    half_precision: bool = False,
    n_moments: int = 1,
) -> Footprint:
    """Returns what one sample of a training step keeps, by a forward pass on the meta device.

    With `half_precision` it is as under autocast, where convolutions work in 16 bits and mixers,
    which leave autocast, in float32. The meta device has no autocast, so it is acted out.
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
    forward = _Forward(network, image)
    saved = sum(forward.kept)
    return Footprint(
        saved_bytes=saved,
        peak_saved_bytes=max([saved, *_while_recomputing(network, image, forward)]),
        largest_bytes=max(forward.kept, default=0),
        logit_bytes=4 * forward.n_logits,
        input_bytes=image.numel() * 4,
        parameter_bytes=parameter_bytes,
        half_precision=half_precision,
        n_moments=n_moments,
    )


class _Forward:
    """A forward pass: the bytes of each storage that its graph keeps, and what is alive on the way.

    layers: the bytes that are alive before and after each layer that may be recomputed.
    """

    def __init__(self, network: nn.Module, image: torch.Tensor) -> None:
        self.layers: list[tuple[int, int]] = []
        allocations = _Allocations(network)
        before: list[int] = []

        def enter(*_: Any) -> None:
            before.append(sum(allocations.living()))

        def leave(*_: Any) -> None:
            self.layers.append((before.pop(), sum(allocations.living())))

        hooks = []
        for layer in network.modules():
            if isinstance(layer, RecomputableLayer):
                hooks.append(layer.register_forward_pre_hook(enter))
                hooks.append(layer.register_forward_hook(leave))
        with allocations:
            outputs = run_network(network, image.clone())
        for hook in hooks:
            hook.remove()
        self.n_logits = sum(output.numel() for output in outputs)
        # Only the graph is held from here on, so that what lives is what it keeps.
        graph = [output.grad_fn for output in outputs]
        del outputs
        self.kept = allocations.living()
        del graph


def _while_recomputing(network: nn.Module, image: torch.Tensor, forward: _Forward) -> list[int]:
    """The bytes there are while backward recomputes each layer: what was before it, and the layer.

    Empty if no layer of the network is recomputed; those that can be must be so all together.
    """
    if not any(isinstance(m, RecomputableLayer) and m.recomputes for m in network.modules()):
        return []
    recompute_mixers(network, False)
    plain = _Forward(network, image).layers
    recompute_mixers(network)
    pairs = zip(forward.layers, plain, strict=True)
    return [before + (end - start) for (before, _), (start, end) in pairs]


class _Allocations(TorchDispatchMode):
    """Knows which storages of the operations' results are alive, without holding them.

    The parameters of the network, of which there are views, do not count.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.parameters = {StorageWeakRef(p.untyped_storage()) for p in network.parameters()}
        self.n_bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._remember(leaf)
        return output

    def _remember(self, tensor: torch.Tensor) -> None:
        storage = StorageWeakRef(tensor.untyped_storage())
        if storage not in self.parameters:
            self.n_bytes[storage] = tensor.untyped_storage().nbytes()

    def living(self) -> list[int]:
        """Returns the bytes of each storage that is alive."""
        return [size for storage, size in self.n_bytes.items() if not storage.expired()]


def _to_half(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.half() for tensor in inputs)


def run_network(network: nn.Module, image: torch.Tensor) -> Sequence[torch.Tensor]:
    """The logits of one or several stages, under autocast on a GPU as in training."""
    with torch.autocast("cuda") if image.is_cuda else contextlib.nullcontext():
        outputs = network(image)
    return outputs if isinstance(outputs, list | tuple) else [outputs]
