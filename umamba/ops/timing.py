"""What a network asks of the scan's operators, and how long a backend takes for it."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from umamba.ops.dispatch import use_backend

MIN_RUNS, MAX_RUNS = 2, 20
LONG_ENOUGH = 1.0  # seconds, of all runs


@dataclass(frozen=True)
class Layout:
    """Shape, strides and type of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def filled(self, name: str, device: torch.device) -> Tensor:
        """Return a random tensor of this layout; the scan's A is stable, its steps are small."""
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        values = torch.rand(extent if 0 not in self.shape else 0, device=device)
        values = {"A": -1 - values, "delta": 0.1 * values}.get(name, 2 * values - 1)
        return values.to(self.dtype).as_strided(self.shape, self.strides).requires_grad_()


@dataclass(frozen=True)
class Call:
    """One of umamba's operators with its arguments, a Layout in place of each tensor."""

    operator: Any
    arguments: tuple[Any, ...]

    def named(self) -> dict[str, Any]:
        """Return the arguments by the names of the operator's schema."""
        names = [argument.name for argument in self.operator._schema.arguments]
        return dict(zip(names, self.arguments, strict=True))

    def size(self) -> int:
        """Return the number of elements of the tensors."""
        return sum(torch.Size(x.shape).numel() for x in self.arguments if isinstance(x, Layout))

    def __str__(self) -> str:
        named = self.named()
        widest = named.get("delta", self.arguments[0])
        text = "x".join(map(str, widest.shape))
        if "A" not in named:
            return f"convolution {text}"
        return f"scan {text}, {named['A'].shape[-1]} states"


def record_calls(run: Callable[[], object]) -> Counter[Call]:
    """Return how often `run`, on whatever device, calls umamba's operators with which tensors."""
    # On the meta device nothing is computed; the reference is what can be asked for there.
    with use_backend("reference"), _Recorder() as recorder:
        run()
    return recorder.calls


def shortest_run(call: Call, backend: str, device: torch.device) -> float:
    """Return the seconds of one forward and backward of a call, the least of a few runs."""
    arguments = [
        x.filled(name, device) if isinstance(x, Layout) else x for name, x in call.named().items()
    ]
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    times: list[float] = []
    with use_backend(backend):
        while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and sum(times) < LONG_ENOUGH):
            start = _now(device)
            result = call.operator(*arguments)
            out = result if isinstance(result, Tensor) else result[0]
            torch.autograd.grad([out], tensors, [out.detach()])
            times.append(_now(device) - start)
    return min(times)


class _Recorder(TorchDispatchMode):
    """Counts the calls of umamba's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "umamba":
            self.calls[Call(func, tuple(map(_frozen, args)))] += 1
        return func(*args, **(kwargs or {}))


def _frozen(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Layout(tuple(argument.shape), argument.stride(), argument.dtype)
    return tuple(argument) if isinstance(argument, list) else argument


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
