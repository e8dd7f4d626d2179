"""Inputs of the scan's tests, and how results are compared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umamba.ops.dispatch import find_backend
from umamba.ops.layout import CHUNK
from umamba.ops.selective_scan import selective_scan

# name -> (B, D, L, N, G); lengths around a chunk, odd widths, groups
SHAPES = {
    "one_token": (2, 4, 1, 1, 1),
    "below_a_chunk": (1, 5, CHUNK - 1, 8, 1),
    "one_chunk": (2, 8, CHUNK, 16, 4),
    "above_a_chunk": (1, 17, CHUNK + 1, 16, 1),
    "many_chunks": (2, 12, 1000, 16, 4),
    "odd_states": (1, 33, 70, 5, 3),
}
OPTIONS = {
    "bare": (),
    "skip": ("D",),
    "gate": ("z",),
    "bias_softplus": ("delta_bias", "delta_softplus"),
    "all": ("D", "z", "delta_bias", "delta_softplus", "initial_state"),
    "all_reverse": ("D", "z", "delta_bias", "delta_softplus", "initial_state", "reverse"),
}


def make_inputs(
    shape: tuple[int, int, int, int, int],
    options: tuple[str, ...] = OPTIONS["all"],
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor | bool]:
    """Random arguments of selective_scan, representable in half precision where that is asked."""
    B, D, L, N, G = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    softplus = "delta_softplus" in options
    delta = normal(B, D, L) if softplus else normal(B, D, L).abs() * 0.3
    arguments: dict[str, Tensor | bool] = {
        "u": normal(B, D, L).to(dtype),
        "delta": delta.to(dtype),
        "A": -torch.exp(0.5 * normal(D, N)).float().to(wide(dtype)),
        "B": normal(B, G, N, L).to(dtype),
        "C": normal(B, G, N, L).to(dtype),
    }
    extra = {
        "D": normal(D).float().to(wide(dtype)),
        "z": normal(B, D, L).to(dtype),
        "delta_bias": (normal(D) - 1).float().to(wide(dtype)),
        "initial_state": normal(B, D, N).float().to(wide(dtype)),
    }
    arguments.update({name: value for name, value in extra.items() if name in options})
    arguments.update({name: name in options for name in ("delta_softplus", "reverse")})
    return arguments


def run(arguments: dict[str, Tensor | bool], upstream_seed: int = 1) -> dict[str, Tensor]:
    """Output, last state and the gradient of every tensor for fixed upstream gradients."""
    tensors = {k: v.clone().requires_grad_() for k, v in arguments.items() if torch.is_tensor(v)}
    flags = {k: v for k, v in arguments.items() if not torch.is_tensor(v)}
    out, last = selective_scan(**tensors, **flags, return_last_state=True)
    generator = torch.Generator().manual_seed(upstream_seed)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x)
        for x in (out, last)
    ]
    gradients = torch.autograd.grad([out, last], list(tensors.values()), upstream)
    named = {f"d{name}": g for name, g in zip(tensors, gradients, strict=True)}
    return {"out": out.detach(), "last_state": last.detach(), **named}


def skip_unless_usable(backend: str) -> None:
    """Skips the test, with the reason, where the backend does not take tensors on a CPU."""
    found = find_backend(backend)
    reason = found.why_unavailable() or found.supports(torch.device("cpu"), torch.float32, 16)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def is_interpreted(backend: str) -> bool:
    """Whether every operation of the backend's kernels is a call of Python."""
    return backend == "triton" and not torch.cuda.is_available()


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    difference = (actual.double() - expected).abs().max().item() if expected.numel() else 0.0
    return difference / scale if scale else difference
