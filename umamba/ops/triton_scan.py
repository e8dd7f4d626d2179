"""The scan on GPUs by Triton: the backend's answers and the launches of the forward kernels.

Letters: B batch, K directions, E channels of a direction, L tokens, N states, G groups of channels.
The kernels are in files of their own, imported on first use: triton is no need of this package.
"""

import functools
import importlib.metadata
import importlib.util
import math
import os
import re
from typing import Any

import torch
from torch import Tensor

from umamba.ops.layout import CHUNK, empty_saved, empty_state, empty_walked

TAKES_WALKS = True

# Programs to a multiprocessor: as many as keep it busy, and as many as it holds at once.
ENOUGH, FULL = 5, 20

OLDEST_TRITON = (3, 3)  # the first whose kernels have tuples
# torch's CUDA builds bring the first of these, others bring Triton under another name.
DISTRIBUTIONS = (
    "triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows",
)  # fmt: skip


def why_unavailable() -> str | None:
    """Return None where Triton's kernels can run, else one sentence with the cure."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    version = _triton_version()
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) < OLDEST_TRITON:
        return (
            f"triton {version} is too old, the kernels need 3.3 or newer; "
            "upgrade torch to 2.7 or newer, which brings it"
        )
    if not torch.cuda.is_available() and not _interpreting():
        return "Triton needs a GPU and torch sees none"
    return None


def supports(device: torch.device, dtype: torch.dtype, d_state: int) -> str | None:
    """Return None if the backend can take such tensors, else the reason why not."""
    if device.type != ("cpu" if _interpreting() else "cuda"):
        return f"Triton works on CUDA tensors only, these are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"Triton takes float32, bfloat16 and float16, not {dtype}"
    if not 1 <= d_state <= 64:
        return f"Triton takes 1 to 64 states, not {d_state}"
    return None


def takes_window(window: int) -> bool:
    """Return whether forward and backward do the locally bidirectional scan in such windows."""
    return window in (4, 8, 16)


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
    walks: tuple[int, ...], merged: bool, save_states: bool, window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out (B, K, E, L), last_state (B, K, E, N) and the states before each chunk.

    u, z (B, K or 1, E, L); delta (B, K, E, L); A (K, E, N); B, C (B, K, G, N, L); D, delta_bias
    (K, E); initial_state (B, K, E, N); walks 7 integers for each direction. `merged` sums out over
    the directions to (B, 1, E, L). states (K, B, ceil(L / CHUNK), E * N) in walk order, empty
    unless `save_states`. In memory out is (K or 1, B, L, E) and last_state (K, B, E, N).
    """
    from umamba.ops.triton_forward import launch

    batch, K, E, L = delta.shape
    summed = merged and K > 1
    dtype = torch.float32 if summed or window > 1 else u.dtype
    out = empty_walked(u, 1 if merged else K, dtype)
    last_state = empty_state(A, batch)
    states = empty_saved(A, batch, L, save_states)
    if out.numel():
        lanes = 64 if torch.version.hip else 32
        n_programs = math.ceil(E / lanes) * batch * (1 if merged else K)
        count = segments(n_programs, L, _n_multiprocessors(u.device))
        with torch.cuda.device_of(u):  # Triton launches on the current device
            launch(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, tuple(walks),
                out.permute(1, 0, 3, 2), last_state.transpose(0, 1),
                states if save_states else None, summed, count, lanes, window,
            )  # fmt: skip
    elif initial_state is not None:
        last_state.copy_(initial_state)
    else:
        last_state.zero_()
    return out.to(u.dtype), last_state, states


def backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients (triton_scan_backward.backward)."""
    from umamba.ops import triton_scan_backward

    with torch.cuda.device_of(arguments[0]):
        return triton_scan_backward.backward(*arguments)


def conv_forward(*arguments: Any) -> Tensor:
    """Return silu(conv(x)) (triton_conv.conv_forward)."""
    from umamba.ops import triton_conv

    with torch.cuda.device_of(arguments[0]):
        return triton_conv.conv_forward(*arguments)


def conv_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of the convolution (triton_conv.conv_backward)."""
    from umamba.ops import triton_conv

    with torch.cuda.device_of(arguments[0]):
        return triton_conv.conv_backward(*arguments)


def segments(n_programs: int, length: int, n_multiprocessors: int) -> int:
    """Return into how many segments the walk is cut, given the programs that there are without.

    Segments cost a second pass over the tokens, so they come in only below ENOUGH programs (of one
    warp each) to a multiprocessor, and then in the number that fills it.
    """
    n_chunks = math.ceil(length / CHUNK)
    if n_programs >= ENOUGH * n_multiprocessors:
        return 1
    wanted = max(min(FULL * n_multiprocessors // n_programs, n_chunks), 1)
    # The same number of chunks in all but the last segment, and none without a chunk.
    return math.ceil(n_chunks / math.ceil(n_chunks / wanted)) if wanted > 2 else 1


def _triton_version() -> str:
    """Return the installed version, "" where no distribution tells it; triton is not imported."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _interpreting() -> bool:
    """Return whether Triton interprets its kernels, which then take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


@functools.cache
def _n_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
