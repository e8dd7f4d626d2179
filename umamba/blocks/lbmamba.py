"""LBMamba: the Mamba-1 mixer with a scan that sees a few tokens ahead, and layers of it.

B batch, C channels. arXiv 2506.15976; cvlab-stonybrook/LBMamba@52155516 (bimamba_type "none", lbm).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor, nn

from umamba.blocks.mamba import Mamba
from umamba.blocks.mixer import build_mixer
from umamba.ops.dispatch import in_float32
from umamba.ops.local_scan import window_of
from umamba.ops.token_orders import token_order


class LBMamba(Mamba):
    """Mamba whose scans also run backwards within windows of tokens (ops.local_scan).

    The parameters and their names are those of Mamba: any layer of Mamba can become one of these.
    window: tokens of a window, None for the official size by the number of tokens (4, 8 or
    16), with which the same weights are another function at another shape. The causal convolution
    stays causal. Where `orders` has several, all of them are locally bidirectional; the official
    bidirectional variant is so in its forward direction only.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
        orders: Sequence[str] = ("raster",),
        merge: str = "sum",
        window: int | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            bias=bias,
            conv_bias=conv_bias,
            orders=orders,
            merge=merge,
        )
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; a window has at least one token")
        self.window = window

    def scan_window(self, n_tokens: int) -> int:
        """The window of a scan of so many tokens."""
        return window_of(n_tokens) if self.window is None else self.window


class AlternatingLayers(nn.Module):
    """`depth` times x + LBMamba(RMSNorm(x)), scanning forwards and backwards by turns.

    Two layers reach every token from every other, with the parameters of two layers of Mamba.
    order: how the first layer walks the tokens; the second walks it from its end.
    mixer: as in MixerLayer; spatial_dims are the axes of the convolution of "conv".
    restore_order: off, an odd depth returns the tokens in reversed order, as LBVim does. There the
    tokens are flipped after every layer; here only the walk turns, which is the same.
    """

    def __init__(
        self,
        d_model: int,
        *,
        depth: int = 2,
        spatial_dims: int = 1,
        order: str = "raster",
        mixer: str = "scan",
        restore_order: bool = False,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        window: int | None = None,
    ) -> None:
        super().__init__()
        base = order.removesuffix("_reversed")
        walks = (order, base if token_order(order).reverse else f"{base}_reversed")

        def build(walk: str) -> LBMamba:
            return LBMamba(
                d_model,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                orders=(walk,),
                window=window,
            )

        mixers = [
            build_mixer(mixer, functools.partial(build, walks[k % 2]), d_model, spatial_dims)
            for k in range(depth)
        ]
        self.layers = nn.ModuleList(Layer(d_model, built) for built in mixers)
        self.ends_reversed = mixer == "scan" and depth % 2 == 1 and not restore_order

    @in_float32
    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, *spatial, C) -> the same shape, in at least float32."""
        for layer in self.layers:
            tokens = layer(tokens)
        # parity: LBVim does not undo its last flip. Reversed, any order of the tokens has all axes
        # mirrored.
        return tokens.flip(tuple(range(1, tokens.ndim - 1))) if self.ends_reversed else tokens


class Layer(nn.Module):
    """x + mixer(RMSNorm(x)), x itself without a mixer."""

    def __init__(self, d_model: int, mixer: nn.Module | None) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = None if mixer is None else nn.RMSNorm(d_model, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, *spatial, C) -> the same shape."""
        if self.mixer is None or self.norm is None:
            return tokens
        return tokens + self.mixer(self.norm(tokens))
