"""LBMamba: the Mamba-1 mixer with a scan that sees a few tokens ahead, and layers of it.

B batch, C channels. arXiv 2506.15976; cvlab-stonybrook/LBMamba@52155516 (bimamba_type "none", lbm).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor, nn

from umamba.blocks.mamba import Mamba
from umamba.blocks.ss2d import VSSBlock
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

        norm = functools.partial(nn.RMSNorm, eps=1e-5)
        layer = functools.partial(
            VSSBlock, d_model, spatial_dims=spatial_dims, mixer=mixer, norm=norm
        )
        builders = [functools.partial(build, walk) for walk in walks]
        self.layers = nn.ModuleList(layer(builders[k % 2]) for k in range(depth))
        self.ends_reversed = mixer == "scan" and depth % 2 == 1 and not restore_order

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, *spatial, C) -> the same shape, in at least float32."""
        for layer in self.layers:
            tokens = layer(tokens)
        # parity: LBVim does not undo its last flip. Reversed, any order of the tokens has all axes
        # mirrored.
        return tokens.flip(tuple(range(1, tokens.ndim - 1))) if self.ends_reversed else tokens
