"""Directions of a scan on a CPU: in place against copies in the order walked.

    python benchmarks/directions.py [--cases ss2d tri] [--repeats 10] [--json FILE]

For each case, in one process and in turn, forward with backward on one thread, the shortest CPU
time of the repeats in ms:
    first    tokens gathered in each order, convolution and scan of each direction by the C library
             along the sequence, results scattered and summed
    scans    the same without the gathers, scatters and sums
    copies   the gathers, scatters and sums alone, with their backward
    place    one convolution and one scan of all directions, along their walks
    whole first, whole    first and place with the projections to delta, B and C between convolution
             and scan: what a mixer calls
In the first four delta, B and C are given, in the order that each form needs. "gone" is
(first - place) / copies: 1 if all that the copies cost is gone; "whole gone" likewise, which counts
also what else the single call saves or costs. The outputs must be equal. "extra" are the bytes that
torch allocates (by its profiler) for the walks beyond those for as many raster walks: 0 if nothing
is allocated for an order.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from umamba.cli.main import keep_freed_memory
from umamba.ops.causal_conv import causal_conv1d_silu, conv_walks
from umamba.ops.directions import DirectionParameters, scan_directions
from umamba.ops.selective_scan import scan_walks, selective_scan
from umamba.ops.token_orders import token_order
from umamba.ops.walks import order_walk, sequence_walk

N_STATES, N_TAPS, DT_RANK = 16, 4, 6
CROSS = ("raster", "transposed", "raster_reversed", "transposed_reversed")
TRI = ("raster", "raster_reversed", "inter_slice_64")
CASES = {  # batch, d_inner, spatial, orders, with convolution and gate
    "ss2d": (2, 192, (64, 64), CROSS, False),
    "tri": (1, 96, (32, 64, 64), TRI, True),
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    rows = {name: measure(Case(*CASES[name]), args.repeats) for name in args.cases}
    for name, row in rows.items():
        print(f"{name:<6}" + "  ".join(f"{what} {value:.4g}" for what, value in row.items()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


class Case:
    """The tensors of one case in both forms, and the forms."""

    def __init__(
        self, batch: int, d_inner: int, spatial: tuple[int, ...], orders: Any, complete: bool
    ) -> None:
        n_directions, length = len(orders), math.prod(spatial)
        self.spatial, self.orders = spatial, [token_order(name) for name in orders]
        self.walks = [n for order in self.orders for n in order_walk(order, spatial)]
        self.raster = list(sequence_walk(length)) * n_directions
        directions = (n_directions, batch, length)

        def features() -> Tensor:
            return torch.randn(batch, *spatial, d_inner).movedim(-1, 1)

        self.u, self.upstream = features().requires_grad_(), features()
        self.gate = features().requires_grad_() if complete else None
        rows = torch.randn(*directions, DT_RANK + 2 * N_STATES)
        self.tokens = [0.3 * torch.randn(*directions, d_inner), *rows.split(N_STATES, -1)[:2]]
        self.rates = -torch.exp(0.3 * torch.randn(n_directions, d_inner, N_STATES))
        self.taps = 0.5 * torch.randn(n_directions, d_inner, N_TAPS) if complete else None
        self.bias = torch.randn(n_directions, d_inner) - 3
        inputs = [x.permute(1, 0, 3, 2) for x in self.tokens]
        self.inputs = [x.detach().requires_grad_() for x in inputs]
        self.walked = [
            [self.arrange(x[:, k], k).requires_grad_() for x in inputs] for k in range(n_directions)
        ]
        self.us, self.upstreams = (
            [self.arrange(x.flatten(2), k) for k in range(n_directions)]
            for x in (self.u, self.upstream)
        )
        self.gates = [x.clone() for x in self.us] if complete else []
        for x in (*self.us, *self.gates):
            x.requires_grad_()
        self.leaves = [self.u] if self.gate is None else [self.u, self.gate]

    def arrange(self, x: Tensor, k: int) -> Tensor:
        """Return a copy of x (B, C, L) in the order of direction k, token-major."""
        arranged = self.orders[k].arrange(x.detach().unflatten(-1, self.spatial))
        return arranged.transpose(1, 2).contiguous().transpose(1, 2)

    def gather(self, x: Tensor | None) -> list[Tensor]:
        return [] if x is None else [order.arrange(x) for order in self.orders]

    def merge(self, outs: list[Tensor]) -> Tensor:
        restored = [o.restore(x, self.spatial) for o, x in zip(self.orders, outs, strict=True)]
        return sum(restored[1:], restored[0])

    def scan(self, us: list[Tensor], gates: list[Tensor]) -> list[Tensor]:
        outs = []
        for k, (u, order) in enumerate(zip(us, self.orders, strict=True)):
            x = u
            if self.taps is not None:
                x = causal_conv1d_silu(u, self.taps[k], None, order.reverse)
            delta, B, C = self.walked[k]
            gate = gates[k] if gates else None
            options = {"delta_softplus": True, "reverse": order.reverse}
            rates, bias = self.rates[k], self.bias[k]
            outs.append(selective_scan(x, delta, rates, B, C, None, gate, bias, **options))
        return outs

    def first(self) -> Tensor:
        out = self.merge(self.scan(self.gather(self.u), self.gather(self.gate)))
        given = [x for each in self.walked for x in each]
        torch.autograd.grad(out, [*self.leaves, *given], self.upstream)
        return out

    def scans(self) -> None:
        outs = self.scan(self.us, self.gates)
        given = [x for each in self.walked for x in each]
        torch.autograd.grad(outs, [*self.us, *self.gates, *given], self.upstreams)

    def copies(self) -> None:
        gathered = [*self.gather(self.u), *self.gather(self.gate)]
        torch.autograd.grad(self.merge(self.us), self.us, self.upstream)
        gradients = self.upstreams * len(self.leaves)
        torch.autograd.grad(gathered, self.leaves, gradients)

    def place(self, walks: list[int] | None = None) -> Tensor:
        walks = self.walks if walks is None else walks
        x = self.u.flatten(2).unsqueeze(1)
        if self.taps is not None:
            x = conv_walks(x, self.taps, None, walks)
        delta, B, C = self.inputs
        gate = None if self.gate is None else self.gate.flatten(2).unsqueeze(1)
        tensors = (x, delta, self.rates, B.unsqueeze(2), C.unsqueeze(2), None, gate, self.bias)
        out, _ = scan_walks(*tensors, True, None, walks, merged=True)
        out = out.squeeze(1).unflatten(-1, self.spatial)
        torch.autograd.grad(out, [*self.leaves, *self.inputs], self.upstream)
        return out

    def parameters(self) -> list[DirectionParameters]:
        """Return those of the directions, with random projections."""
        width = self.u.shape[1]
        generator = torch.Generator().manual_seed(0)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator) / size[-1] ** 0.5

        return [
            DirectionParameters(
                None if self.taps is None else self.taps[k],
                None,
                normal(DT_RANK + 2 * N_STATES, width),
                normal(width, DT_RANK),
                torch.log(-self.rates[k]),
                None,
                self.bias[k],
            )
            for k in range(len(self.orders))
        ]

    def whole_first(self) -> Tensor:
        outs = []
        gates = self.gather(self.gate) or [None] * len(self.orders)
        for order, p, x, gate in zip(
            self.orders, self.parameters(), self.gather(self.u), gates, strict=True
        ):
            if p.conv_weight is not None:
                x = causal_conv1d_silu(x, p.conv_weight, None, order.reverse)
            rows = functional.linear(x.transpose(1, 2), p.x_proj_weight)
            dt, B, C = rows.split([DT_RANK, N_STATES, N_STATES], -1)
            delta = functional.linear(dt, p.dt_proj_weight).transpose(1, 2)
            B, C = B.transpose(1, 2), C.transpose(1, 2)
            options = {"delta_softplus": True, "reverse": order.reverse}
            rates = -torch.exp(p.A_log)
            outs.append(selective_scan(x, delta, rates, B, C, None, gate, p.delta_bias, **options))
        out = self.merge(outs)
        torch.autograd.grad(out, self.leaves, self.upstream)
        return out

    def whole(self) -> Tensor:
        names = [order.name for order in self.orders]
        out = scan_directions(self.u, names, self.parameters(), self.gate)
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, self.leaves, self.upstream)
        return out


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """The times of the forms and what they say; fails if the outputs differ."""
    if not torch.equal(case.first(), case.place()):
        raise SystemExit("the outputs of both forms differ: no figures")
    whole_first, whole = case.whole_first(), case.whole()
    if (whole_first - whole).abs().max() > 1e-5 * whole_first.abs().max():
        raise SystemExit("the outputs of both whole forms differ: no figures")
    names = ("first", "scans", "copies", "place", "whole_first", "whole")
    forms = {name: getattr(case, name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats + 1):
        for name, form in forms.items():
            start = time.process_time()
            form()
            times[name].append(1e3 * (time.process_time() - start))
    row: dict[str, Any] = {name: min(found[1:]) for name, found in times.items()}
    row["gone"] = (row["first"] - row["place"]) / row["copies"]
    row["whole gone"] = (row["whole_first"] - row["whole"]) / row["copies"]
    row["extra"] = allocated(case.place) - allocated(lambda: case.place(case.raster))
    return row


def allocated(call: Callable[[], object]) -> int:
    """The bytes of all tensors that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(max(0, e.nbytes()) for e in events)


if __name__ == "__main__":
    main()
