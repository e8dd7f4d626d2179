"""Backend of the selective scan on CUDA: an adapter to the extension of an installed mamba-ssm."""

import functools
import importlib
import logging
from typing import Any

import torch
from torch import Tensor

from umamba.ops import chunked
from umamba.ops.chunked import conv_backward, conv_forward
from umamba.ops.layout import CHUNK

__all__ = ["backward", "conv_backward", "conv_forward", "forward", "supports", "why_unavailable"]

_log = logging.getLogger(__name__)


def why_unavailable() -> str | None:
    """Return None where mamba-ssm can be used, else one sentence with the cure."""
    if not torch.cuda.is_available():
        return "mamba-ssm needs a CUDA device and torch sees none"
    return _load()[1]


def supports(device: torch.device, dtype: torch.dtype, d_state: int) -> str | None:
    """Return None if the backend can take such tensors, else the reason why not."""
    if device.type != "cuda":
        return f"mamba-ssm works on CUDA tensors only, these are on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"mamba-ssm takes float32, bfloat16 and float16, not {dtype}"
    if not 1 <= d_state <= 256:
        return f"mamba-ssm takes 1 to 256 states, not {d_state}"
    return None


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, reverse: bool,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, last_state and states as reference.forward does, and of the same shapes.

    The extension keeps its states elsewhere, so `backward` computes them again and `states` is NaN:
    a backward on another backend than the forward's shows at once. An initial state, which the
    extension does not know, goes to the chunked backend.
    """
    batch, channels, length = u.shape
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if initial_state is not None or u.numel() == 0:
        _explain_detour("an initial state or no tokens")
        return chunked.forward(*tensors, delta_softplus, initial_state, reverse, save_states)
    inputs = _inputs(tensors, reverse)
    out, kept, *gated = _extension().fwd(*inputs, delta_softplus)
    shape = (batch, -(-length // CHUNK), A.shape[1], channels) if save_states else (0,)
    states = A.new_full(shape, float("nan"))
    last_state = kept[:, :, -1, 1::2].float().contiguous()
    return _from_walk(out if z is None else gated[0], reverse), last_state, states


def backward(
    dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    initial_state: Tensor | None, states: Tensor, reverse: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients in the order of reference.backward, None for absent inputs.

    The extension ignores the gradient of the last state: with one, the chunked backend serves.
    """
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if dlast_state is not None or initial_state is not None or u.numel() == 0:
        _explain_detour("the gradient of the last state, an initial state or no tokens")
        arguments = (*tensors, delta_softplus, initial_state)
        _, _, states = chunked.forward(*arguments, reverse, True)
        return chunked.backward(dout, dlast_state, *arguments, states, reverse)
    inputs = _inputs(tensors, reverse)
    out, kept, *_ = _extension().fwd(*inputs, delta_softplus)
    ungated = None if z is None else out
    upstream = _walked(dout, u.dtype, reverse)
    gradients = _extension().bwd(*inputs, upstream, kept, ungated, None, delta_softplus, False)
    du, ddelta, dA, dB, dC, dD, dbias, *dz = gradients
    return (
        _from_walk(du, reverse),
        _from_walk(ddelta, reverse).to(delta.dtype),
        dA,
        _from_walk(dB, reverse).to(B.dtype),
        _from_walk(dC, reverse).to(C.dtype),
        None if D is None else dD,
        None if z is None else _from_walk(dz[0], reverse).to(z.dtype),
        None if delta_bias is None else dbias,
        None,
    )


def _inputs(tensors: tuple[Any, ...], reverse: bool) -> tuple[Tensor | None, ...]:
    """Return the tensors as the extension takes them: one type, tokens innermost, in walk order."""
    u, delta, A, B, C, D, z, delta_bias = tensors
    tokens = [None if x is None else _walked(x, u.dtype, reverse) for x in (u, delta, B, C, z)]
    skip, bias = (None if x is None else x.float().contiguous() for x in (D, delta_bias))
    return (*tokens[:2], A.float().contiguous(), *tokens[2:4], skip, tokens[4], bias)


def _walked(x: Tensor, dtype: torch.dtype, reverse: bool) -> Tensor:
    """Return x (..., L) in the type, contiguous, reversed where the walk is."""
    return x.to(dtype).flip(-1) if reverse else x.to(dtype).contiguous()


def _from_walk(x: Tensor, reverse: bool) -> Tensor:
    """Return a result (..., L) in the tokens' own order, token-major in memory."""
    x = x.flip(-1) if reverse else x
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@functools.cache
def _load() -> tuple[Any, str | None]:
    """Return (extension, None) or (None, reason)."""
    try:
        return importlib.import_module("selective_scan_cuda"), None
    except ImportError:
        return None, "mamba-ssm is not installed: `pip install mamba-ssm` with a CUDA toolkit there"
    except (OSError, RuntimeError) as error:
        reason = f"mamba-ssm is installed but does not load ({error}): reinstall it for this torch"
        return None, " ".join(reason.split())


def _extension() -> Any:
    extension, reason = _load()
    if extension is None:
        raise RuntimeError(reason)
    return extension


@functools.cache
def _explain_detour(what: str) -> None:
    _log.warning("mamba-ssm does not know %s: the chunked backend serves such calls", what)
