"""The causal depthwise convolution with SiLU that goes before a scan, and its two operators.

B batch, D channels, L tokens, K taps; in the operators K directions and E channels of each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from umamba.ops.dispatch import choose, without_autocast
from umamba.ops.layout import empty_walked
from umamba.ops.reference import wide_type
from umamba.ops.walks import conv_backward, conv_forward, sequence_walk, takes_walks

MAX_TAPS = 8  # of the C library


def causal_conv1d_silu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, reverse: bool = False
) -> Tensor:
    """Return silu(conv(x)) (B, D, L), where token t sees itself and the K-1 tokens before it.

    x (B, D, L), any strides; weight (D, K) or (D, 1, K) as in torch's Conv1d; bias (D,). The last
    tap multiplies the current token. With `reverse` "before" means after: the walk goes from the
    last token to the first. The result has the type of x, lies channel-last in memory, and is
    computed in float32 (float64 for float64).
    Raises ValueError for shapes that do not agree and more than 8 taps.
    """
    if weight.ndim == 3 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"x must be (B, D, L) and weight (D, K) or (D, 1, K); they are {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if not 1 <= weight.shape[1] <= MAX_TAPS:
        raise ValueError(f"the convolution has {weight.shape[1]} taps; 1 to {MAX_TAPS} are allowed")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, x needs {tuple(x.shape[1:2])}")
    return conv_walks(
        x.unsqueeze(1),
        weight.unsqueeze(0),
        None if bias is None else bias.unsqueeze(0),
        sequence_walk(x.shape[-1], reverse),
    ).squeeze(1)


def conv_walks(x: Tensor, weight: Tensor, bias: Tensor | None, walks: Sequence[int]) -> Tensor:
    """Return silu(conv(x)) (B, K, E, L) along K walks through the same tokens (ops.walks).

    x (B, K, E, L), or (B, 1, E, L) for all directions; weight (K, E, taps); bias (K, E). For the
    rest see causal_conv1d_silu.
    """
    wide = wide_type(x.dtype)
    wide_bias = None if bias is None else bias.to(wide)
    return torch.ops.umamba.causal_conv1d_silu(x, weight.to(wide), wide_bias, walks)


@torch.library.custom_op(
    "umamba::causal_conv1d_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, SymInt[] walks) -> Tensor",
)
def _conv_forward(x: Tensor, *others: Any) -> Tensor:
    backend = choose(x.device, x.dtype, 1)
    with without_autocast(x.device):
        if takes_walks(backend):
            return backend.conv_forward(x, *others)
        return conv_forward(backend, x, *others)


@_conv_forward.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    return empty_walked(x, len(weight))


@torch.library.custom_op(
    "umamba::causal_conv1d_silu_bwd",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor? bias, SymInt[] walks)"
    " -> (Tensor, Tensor, Tensor)",
)
def _conv_backward(dout: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    backend = choose(x.device, x.dtype, 1)
    with without_autocast(x.device):
        if takes_walks(backend):
            dx, dweight, dbias = backend.conv_backward(dout, x, *others)
        else:
            dx, dweight, dbias = conv_backward(backend, dout, x, *others)
    return dx, dweight, dweight.new_empty(0) if dbias is None else dbias


@_conv_backward.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, walks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty((0,) if bias is None else bias.shape)
    return empty_walked(x, x.shape[1]), weight.new_empty(weight.shape), dbias


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, walks = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.walks = walks


def _differentiate(ctx, dout):  # type: ignore[no-untyped-def]
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.umamba.causal_conv1d_silu_bwd(dout, x, weight, bias, ctx.walks)
    return dx, dweight, None if bias is None else dbias, None


_conv_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
