"""The shapes of the scans in published networks, and how long a GPU needs for each at the least.

B batch, K directions, E channels of a direction, L tokens, N states.

A floor is the largest of three times: of the bytes that must move, of the exponentials and
logarithms (16 a clock and multiprocessor), and of the instructions (128 lanes a clock and
multiprocessor), all states and sums in float32. Counted per (b, k, e, l), with N = 16:

              special functions         instruction slots   bytes (s: of an element)
    forward   N + 4 (softplus, gate)    5 N + 10            s (1 + (u, out, gate) / K + 2 N / E)
    backward  N + 6                     13 N + 20           s (2 + (u, du, dout, gates) / K
                                                               + 2 N / E) + 8 N / E
and 4 N / 128 (forward) and 4 N / 256 (backward) bytes of kept states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

N_STATES = 16
SPECIAL_PER_CLOCK = 16  # of a multiprocessor of compute capability 8.0 to 9.0
LANES_PER_CLOCK = 128

RASTER = ("raster",)
CROSS = ("raster", "transposed", "raster_reversed", "transposed_reversed")


class Shape(NamedTuple):
    """A scan as a network runs it. gated: the gate is part of the scan."""

    name: str
    batch: int
    orders: tuple[str, ...]
    channels: int
    spatial: tuple[int, ...]
    gated: bool = True

    @property
    def n_directions(self) -> int:
        return len(self.orders)

    @property
    def n_tokens(self) -> int:
        return math.prod(self.spatial)

    @property
    def size(self) -> str:
        """BxKxExL."""
        return f"{self.batch}x{self.n_directions}x{self.channels}x{self.n_tokens}"


def tri_orientated(n_slices: int) -> tuple[str, ...]:
    return ("raster", "raster_reversed", f"inter_slice_{n_slices}")


SHAPES = (
    Shape("U-Mamba Enc 128^3, stage 0", 2, RASTER, 64, (128, 128, 128)),
    Shape("SegMamba 128^3, stage 0", 2, tri_orientated(64), 96, (64, 64, 64)),
    Shape("VM-UNet 256^2, stage 0", 32, CROSS, 192, (64, 64), gated=False),
    Shape("U-Mamba Enc 128^3, stage 0, one patch", 1, RASTER, 64, (128, 128, 128)),
    Shape("U-Mamba Enc 128^3, stage 1", 2, RASTER, 128, (64, 64, 64)),
    Shape("U-Mamba Enc 128^3, stage 2", 2, RASTER, 256, (32, 32, 32)),
    Shape("U-Mamba Enc 128^3, stage 3", 2, RASTER, 512, (16, 16, 16)),
    Shape("SegMamba 128^3, stage 1", 2, tri_orientated(32), 192, (32, 32, 32)),
    Shape("SegMamba 128^3, stage 2", 2, tri_orientated(16), 384, (16, 16, 16)),
    Shape("SegMamba 128^3, stage 3", 2, tri_orientated(8), 768, (8, 8, 8)),
    Shape("VM-UNet 256^2, stage 1", 32, CROSS, 384, (32, 32), gated=False),
    Shape("SegMamba 128^3, stage 0, one patch", 1, tri_orientated(64), 96, (64, 64, 64)),
    Shape("VM-UNet 256^2, stage 0, one image", 1, CROSS, 192, (64, 64), gated=False),
    Shape("U-Mamba Enc CT 40x224x192, stage 0", 2, RASTER, 64, (40, 224, 192)),
    Shape("U-Mamba Enc CT 40x224x192, stage 1", 2, RASTER, 128, (40, 112, 96)),
    Shape("U-Mamba Enc CT 40x224x192, stage 2", 2, RASTER, 256, (20, 56, 48)),
)
TINY_SHAPES = (
    Shape("one direction", 2, RASTER, 4, (2, 3, 6)),
    Shape("tri-orientated", 1, tri_orientated(4), 4, (4, 2, 3)),
    Shape("cross", 2, CROSS, 4, (4, 6), gated=False),
)


def floors(shape: Shape, element_bytes: int, facts: Mapping[str, float]) -> tuple[float, float]:
    """The least milliseconds of forward and of backward on a device (see common.device_facts)."""
    n, k, e = N_STATES, shape.n_directions, shape.channels
    clocks = facts["multiprocessors"] * facts["clock_ghz"] * 1e9
    elements = shape.batch * k * e * shape.n_tokens
    matrices = element_bytes * 2 * n / e
    shared = 2 + shape.gated  # u, out and the gate, in bytes of each direction's part
    forward = element_bytes * (1 + shared / k) + matrices + 4 * n / 128
    shared = 3 + 2 * shape.gated
    backward = element_bytes * (2 + shared / k) + matrices + 8 * n / e + 4 * n / 256
    times = []
    for special, slots, size in ((n + 4, 5 * n + 10, forward), (n + 6, 13 * n + 20, backward)):
        each = max(
            size / facts["copy_bytes_per_second"],
            special / (SPECIAL_PER_CLOCK * clocks),
            slots / (LANES_PER_CLOCK * clocks),
        )
        times.append(1e3 * elements * each)
    return times[0], times[1]
