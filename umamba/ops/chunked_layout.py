"""How the chunked backend cuts a scan into groups, segments and blocks, and joins it again.

B batch, D channels, L tokens, S segments of the sequence, T tokens of a segment, G groups of
channels that share B and C, E channels of a group, N states. Channels lie innermost, and tokens in
the order in which the state meets them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from umamba.ops.layout import CHUNK
from umamba.ops.reference import wide_type

MIN_WIDTH = 64  # channels; shorter rows would make the tensor operations slow


class Cut:
    """The sizes of one scan of u (B, D, L) with A (D, N) and B (B, G, N, L)."""

    def __init__(self, u: Tensor, A: Tensor, B: Tensor, reverse: bool) -> None:
        self.batch, channels, self.length = u.shape
        self.groups, self.n_states = B.shape[1], A.shape[1]
        self.width = channels // self.groups
        self.reverse, self.wide = reverse, wide_type(u.dtype)
        # Segments cost a second pass: only where a token alone, of fewer than `few` numbers, would
        # leave the device idle.
        few, enough = (2**11, 2**14) if u.device.type == "cpu" else (2**17, 2**19)
        per_token = max(1, self.batch * channels * self.n_states)
        wanted = math.ceil(enough / per_token) if per_token < few else 1
        self.segments = max(1, min(wanted, self.length // CHUNK))
        self.segment_length = self.length  # T; a multiple of CHUNK if there are several
        if self.segments > 1:
            self.segment_length = math.ceil(self.length / CHUNK / self.segments) * CHUNK
        self.n_chunks = math.ceil(self.segment_length / CHUNK)  # of a segment

    def blocks(self, elements: int) -> Iterator[tuple[slice, slice]]:
        """Yield (samples, channels of a group) such that one token has at most `elements`."""
        per_channel = max(1, self.segments * self.groups * self.n_states)
        width = max(1, min(self.width, max(MIN_WIDTH, elements // per_channel)))
        batch = max(1, elements // (per_channel * width))
        for b in range(0, self.batch, batch):
            for e in range(0, self.width, width):
                yield slice(b, b + batch), slice(e, e + width)

    def tokens(self, x: Tensor) -> Tensor:
        """Return (B, D, L) as (B, S, T, G, E)."""
        return self._segmented(x.transpose(1, 2).unflatten(2, (self.groups, self.width)))

    def matrix(self, x: Tensor) -> Tensor:
        """Return (B, G, N, L) as (B, S, T, G, N)."""
        return self._segmented(x.permute(0, 3, 1, 2))

    def rates(self, A: Tensor) -> Tensor:
        """Return (D, N) as (G, N, E)."""
        return self._grouped(A.to(self.wide))

    def state(self, state: Tensor | None, device: torch.device) -> Tensor:
        """Return (B, D, N) as (B, G, N, E), zeros for None."""
        if state is not None:
            return self._grouped(state.to(self.wide))
        shape = (self.batch, self.groups, self.n_states, self.width)
        return torch.zeros(shape, dtype=self.wide, device=device)

    def saved(self, states: Tensor) -> Tensor:
        """Return the states before each chunk (B, chunks, N, D) as (B, S, chunks, N, G, E)."""
        states = _padded(states.to(self.wide), self.segments * self.n_chunks)
        states = states.unflatten(1, (self.segments, self.n_chunks))
        return states.unflatten(4, (self.groups, self.width))

    def whole(self, x: Tensor) -> Tensor:
        """Return (B, S, T, G, E) as (B, D, L): the inverse of `tokens`."""
        return self._joined(x).flatten(2).transpose(1, 2)

    def whole_matrix(self, x: Tensor) -> Tensor:
        """Return (B, S, T, G, N) as (B, G, N, L), token-major in memory."""
        return self._joined(x).transpose(1, 2).contiguous().transpose(2, 3)

    def whole_state(self, x: Tensor) -> Tensor:
        """Return (..., G, N, E) as (..., D, N): the inverse of `state` and `rates`."""
        return x.transpose(-1, -2).flatten(-3, -2).contiguous()

    def whole_saved(self, x: Tensor) -> Tensor:
        """Return (B, S, chunks, N, G, E) as (B, chunks, N, D): the inverse of `saved`."""
        return x.flatten(4).flatten(1, 2)[:, : math.ceil(self.length / CHUNK)].contiguous()

    def _grouped(self, x: Tensor) -> Tensor:
        split = x.unflatten(-2, (self.groups, self.width))
        return split.transpose(-1, -2).contiguous()

    def _segmented(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (B, S, T, ...); tokens beyond L are zero: no step, nothing changes."""
        x = x.to(self.wide)
        x = x.flip(1) if self.reverse else x
        padded = _padded(x, self.segments * self.segment_length)
        return padded.unflatten(1, (self.segments, self.segment_length)).contiguous()

    def _joined(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)[:, : self.length]
        return tokens.flip(1) if self.reverse else tokens


def window_elements(x: Tensor) -> int:
    """Return how many numbers a window should have: what a CPU's cache or a GPU's work needs."""
    return 2**17 if x.device.type == "cpu" else 2**24


def _padded(x: Tensor, length: int) -> Tensor:
    """Return x (B, l, ...) with zeros appended up to `length`."""
    missing = length - x.shape[1]
    return functional.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
