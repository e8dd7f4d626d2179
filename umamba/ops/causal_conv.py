"""The causal depthwise convolution with SiLU that goes before a scan, and its two operators.

B batch, D channels, L tokens, K taps.
"""

from typing import Any

import torch
from torch import Tensor

from umamba.ops.dispatch import choose, without_autocast
from umamba.ops.layout import empty_tokens
from umamba.ops.reference import wide_type

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
    wide = wide_type(x.dtype)
    wide_bias = None if bias is None else bias.to(wide)
    return torch.ops.umamba.causal_conv1d_silu(x, weight.to(wide), wide_bias, reverse)


@torch.library.custom_op(
    "umamba::causal_conv1d_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool reverse) -> Tensor",
)
def _conv_forward(x: Tensor, *others: Any) -> Tensor:
    with without_autocast(x.device):
        return choose(x.device, x.dtype, 1).conv_forward(x, *others)


@_conv_forward.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return empty_tokens(x)


@torch.library.custom_op(
    "umamba::causal_conv1d_silu_bwd",
    mutates_args=(),
    schema="(Tensor dout, Tensor x, Tensor weight, Tensor? bias, bool reverse)"
    " -> (Tensor, Tensor, Tensor)",
)
def _conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    backend = choose(x.device, x.dtype, 1)
    with without_autocast(x.device):
        dx, dweight, dbias = backend.conv_backward(dout, x, weight, bias, reverse)
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


@_conv_backward.register_fake
def _(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty((0,) if bias is None else bias.shape)
    return empty_tokens(x), weight.new_empty(weight.shape), dbias


def _save_for_backward(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, reverse = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.reverse = reverse


def _differentiate(ctx, dout):  # type: ignore[no-untyped-def]
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.umamba.causal_conv1d_silu_bwd(dout, x, weight, bias, ctx.reverse)
    return dx, dweight, None if bias is None else dbias, None


_conv_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
