"""What a machine's scan is worth: its error against float64, and its speed.

B batch, D channels, L tokens, N states, G groups.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from umamba.ops.causal_conv import causal_conv1d_silu
from umamba.ops.dispatch import use_backend
from umamba.ops.local_scan import local_scan
from umamba.ops.selective_scan import selective_scan

TOLERANCE = 5e-6  # of outputs and gradients in float32, relative to the largest value of the tensor
WINDOW = 8  # tokens, of the locally bidirectional scan


def scan_errors(
    backend: str, device: torch.device, *, channels: int = 20, length: int = 150
) -> dict[str, float]:
    """Return the error of the output, the last state and each gradient of float32 scans.

    Relative to the largest value of the tensor, against the reference in float64; with all options
    on, two groups, and the causal convolution before the plain scan, with and without an initial
    state, and the locally bidirectional one, whose gradients are added. The sizes fit no block.
    """
    inputs = make_inputs(2, channels, length, 16, groups=2, dtype=torch.float64)
    with use_backend("reference"):
        expected = _results(inputs)
    with use_backend(backend):
        actual = _results({name: x.to(device, torch.float32) for name, x in inputs.items()})
    return {name: _relative_error(actual[name], expected[name]) for name in expected}


def tokens_per_second(backend: str, device: torch.device, length: int) -> tuple[float, float]:
    """Return how many tokens of 64 channels a scan does per second, also with backward."""
    inputs = make_inputs(1, 64, length, 16, dtype=torch.float32)
    # Without an initial state, as in networks: mamba-ssm knows none.
    scanned: dict[str, Any] = {
        name: x.to(device).requires_grad_()
        for name, x in inputs.items()
        if name != "initial_state" and not name.startswith("conv")
    }

    def forward() -> Tensor:
        with torch.no_grad():
            return selective_scan(**scanned, delta_softplus=True)

    def both() -> tuple[Tensor, ...]:
        out = selective_scan(**scanned, delta_softplus=True)
        return torch.autograd.grad([out], list(scanned.values()), [torch.ones_like(out)])

    with use_backend(backend):
        return length / _shortest(forward, device), length / _shortest(both, device)


def make_inputs(
    batch: int, channels: int, length: int, n_states: int, *, groups: int = 1, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return random arguments of a scan with all options, channel-last, and of the convolution."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    def tokens() -> Tensor:
        return normal(batch, length, channels).transpose(1, 2)

    def matrix() -> Tensor:
        return normal(batch, length, groups, n_states).permute(0, 2, 3, 1)

    return {
        "u": tokens(),
        "delta": tokens(),
        "A": -torch.exp(0.5 * normal(channels, n_states)),
        "B": matrix(),
        "C": matrix(),
        "D": normal(channels),
        "z": tokens(),
        "delta_bias": normal(channels) - 1,
        "initial_state": normal(batch, channels, n_states),
        "conv_weight": normal(channels, 4),
        "conv_bias": normal(channels),
    }


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; inf for NaN."""
    difference = (actual.detach().double().cpu() - expected.detach().double()).abs().max()
    error = float(difference / expected.detach().abs().max())
    return error if error == error else float("inf")


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Return the shortest wall time of three runs, in seconds, after one that is not counted."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _results(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    scanned: dict[str, Any] = dict(tensors)
    weight, bias = scanned.pop("conv_weight"), scanned.pop("conv_bias")
    scanned["u"] = causal_conv1d_silu(tensors["u"], weight, bias)
    out, last_state = selective_scan(**scanned, delta_softplus=True, return_last_state=True)
    stateless = {name: x for name, x in scanned.items() if name != "initial_state"}
    plain = selective_scan(**stateless, delta_softplus=True)  # mamba-ssm knows no initial state
    local = local_scan(**stateless, delta_softplus=True, window=WINDOW)
    results = [out, last_state, plain, local]
    upstream = [torch.cos(torch.arange(x.numel())).reshape(x.shape).to(x) for x in results]
    gradients = torch.autograd.grad(results, list(tensors.values()), upstream)
    named = {f"gradient of {name}": g for name, g in zip(tensors, gradients, strict=True)}
    outputs = {"output": out, "last state": last_state, "stateless output": plain}
    return {**outputs, "local output": local, **named}
