"""The selective scan on a GPU: its time beside the floor and beside mamba-ssm, and its memory.

    python -m benchmarks.gpu.scan [--extensions FOLDER] [--json FILE] [--device cpu --tiny]

All options of the scan are on, 16 states. Ours reads tokens that lie in raster order and sums the
directions. mamba-ssm gets its tensors in the order walked, as many launches as the official network
makes (SegMamba one a direction, VM-UNet one for all), and neither copies nor sums are counted;
what they cost is in layers.py. Forward is timed without gradients, where ours keeps no states and
mamba-ssm keeps its own, backward over a graph that stays, both as one call after the other.

B batch, K directions, E channels of a direction, L tokens, N states.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import official
from benchmarks.gpu.common import Results, device_facts, milliseconds, parse, peak_gib
from benchmarks.gpu.official import Official
from benchmarks.gpu.shapes import N_STATES, SHAPES, TINY_SHAPES, Shape, floors
from umamba.ops.dispatch import use_backend
from umamba.ops.selective_scan import scan_walks
from umamba.ops.token_orders import token_order
from umamba.ops.walks import order_walk, walk_positions

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PASSES = ("forward", "backward", "both")
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def main() -> int:
    """Measures every shape in both types; 1 where nothing could be measured."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--extensions", type=Path, help="where mamba-ssm was built")

    args = parse(__doc__ or "", extra)
    facts = device_facts(args.device)
    results = Results("The selective scan", args, columns())
    if args.device.type == "cuda":
        compared, what = official.load(args.extensions)
    else:
        compared, what = official.stand_in()
    clock = "nominal" if facts.get("nominal") else facts["clock_is"]
    results.note(
        f"Floors for {facts['multiprocessors']} multiprocessors at {facts['clock_ghz']:.2f} GHz "
        f"({clock}) and {facts['copy_bytes_per_second'] / 1e12:.2f} TB/s of copies. {what}"
    )
    for shape, name in itertools.product(TINY_SHAPES if args.tiny else SHAPES, TYPES):
        head = {"shape": shape.name, "size": shape.size, "type": name}
        measure_row = functools.partial(
            measure, shape, TYPES[name], args.backend, args.device, compared, facts
        )
        results.add(head, measure_row)
    return int(results.failed)


def measure(
    shape: Shape,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
    compared: Official | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Milliseconds of each pass, ours and the official, and what follows from them."""
    tensors = make_inputs(shape, dtype, device)
    walks = [n for order in shape.orders for n in order_walk(token_order(order), shape.spatial)]

    def ours() -> list[Tensor]:
        given: Any = [*(tensors.get(name) for name in NAMES), True, None, walks]
        return [scan_walks(*given, merged=True)[0]]

    row: dict[str, Any] = {
        "floor": dict(zip(PASSES, pass_floors(shape, dtype, facts), strict=True))
    }
    with use_backend(backend):
        outs = [out.detach() for out in ours()]
        row["ours"] = times(ours, tensors, device)
    row["of_floor"] = {key: row["floor"][key] / row["ours"][key] for key in PASSES}
    if compared is not None:
        given = official_inputs(shape, tensors, walks)
        tensors.clear()
        theirs = functools.partial(official_scan, compared, given)
        row["difference"] = difference(outs[0], shape, walks, theirs())
        del outs
        row["official"] = times(theirs, flat(given), device)
        row["ratio"] = {key: row["official"][key] / row["ours"][key] for key in PASSES}
    return row


def pass_floors(
    shape: Shape, dtype: torch.dtype, facts: Mapping[str, Any]
) -> tuple[float, float, float]:
    forward, backward = floors(shape, dtype.itemsize, facts)
    return forward, backward, forward + backward


def times(
    scan: Callable[[], list[Tensor]], tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, float | None]:
    """Milliseconds of the passes, and the peak memory of both in GiB."""
    leaves = list(tensors.values())
    forward = milliseconds(torch.no_grad()(scan), device)
    for leaf in leaves:
        leaf.requires_grad_()
    outs = scan()
    upstream = [torch.randn_like(out) for out in outs]
    gradients = functools.partial(torch.autograd.grad, outs, leaves, upstream, retain_graph=True)
    backward = milliseconds(gradients, device)
    del gradients, outs

    def both() -> None:
        torch.autograd.grad(scan(), leaves, upstream)

    found = {"forward": forward, "backward": backward, "both": milliseconds(both, device)}
    peak = peak_gib(both, device)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return {**found, "peak_gib": peak}


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random arguments of scan_walks without initial state, channels innermost in memory."""
    generator = torch.Generator(device).manual_seed(0)
    batch, k, e, length = shape.batch, shape.n_directions, shape.channels, shape.n_tokens

    def normal(*size: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=kind)

    def tokens(n: int) -> Tensor:  # (B, n, E, L) in memory (n, B, L, E)
        return normal(n, batch, length, e, kind=dtype).permute(1, 0, 3, 2)

    def matrix() -> Tensor:  # (B, K, 1, N, L) in memory (K, B, L, N)
        return normal(k, batch, length, N_STATES, kind=dtype).permute(1, 0, 3, 2).unsqueeze(2)

    inputs = {
        "u": tokens(1),
        "delta": tokens(k),
        "A": -torch.exp(0.5 * normal(k, e, N_STATES)),
        "B": matrix(),
        "C": matrix(),
        "D": normal(k, e),
        "delta_bias": normal(k, e) - 3,
    }
    return inputs | ({"z": tokens(1)} if shape.gated else {})


def official_inputs(
    shape: Shape, tensors: Mapping[str, Tensor], walks: list[int]
) -> list[dict[str, Tensor]]:
    """The same arguments for each of the official launches: copied in walk order, (B, E, L)."""
    launches = []
    for k, index in enumerate(walk_indices(walks, tensors["u"].device)):
        one: dict[str, Tensor] = {}
        for name, x in tensors.items():
            if name in ("u", "z", "delta", "B", "C"):
                part = x[:, min(k, x.shape[1] - 1)]
                one[name] = part.contiguous() if index is None else part[..., index].contiguous()
            else:
                one[name] = x[k].contiguous()
        launches.append(one)
    if shape.gated:
        return launches
    joined = {}  # VMamba: the directions are groups of channels
    for name in launches[0]:
        axis = 0 if name in ("A", "D", "delta_bias") else 1
        joined[name] = torch.cat([launch[name] for launch in launches], axis)
    return [joined]


def walk_indices(walks: list[int], device: torch.device) -> list[Tensor | None]:
    """The tokens of each walk in the order visited; None for the order in memory."""
    indices: list[Tensor | None] = []
    for k in range(0, len(walks), 7):
        index = walk_positions(walks[k : k + 7], device)
        in_memory = torch.equal(index, torch.arange(len(index), device=device))
        indices.append(None if in_memory else index)
    return indices


def official_scan(compared: Official, launches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The results of the launches, (B, E, L) or (B, KE, L)."""
    return [compared.scan(*(launch.get(name) for name in NAMES)) for launch in launches]


def flat(launches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All tensors of all launches."""
    return {f"{name} {i}": x for i, launch in enumerate(launches) for name, x in launch.items()}


def difference(out: Tensor, shape: Shape, walks: list[int], theirs: list[Tensor]) -> float:
    """How far our sum is from that of the official results, relative to its largest value."""
    parts = theirs if shape.gated else list(theirs[0].chunk(shape.n_directions, 1))
    total = torch.zeros(parts[0].shape, device=out.device)
    for part, index in zip(parts, walk_indices(walks, out.device), strict=True):
        if index is None:
            total += part
        else:
            total.index_add_(2, index, part.float())
    return float((out[:, 0].float() - total).abs().max() / total.abs().max())


def columns() -> dict[str, Callable[[dict[str, Any]], str]]:
    """Heading -> what a row shows there."""

    def passes(show: Callable[[dict[str, Any], str], str]) -> Callable[[dict[str, Any]], str]:
        return lambda row: " / ".join(show(row, key) for key in PASSES)

    return {
        "shape": lambda row: row["shape"],
        "BxKxExL": lambda row: row["size"],
        "type": lambda row: row["type"],
        "floor f / b / f+b, ms": passes(lambda row, key: f"{row['floor'][key]:.3f}"),
        "ours, ms": passes(lambda row, key: f"{row['ours'][key]:.3f}"),
        "share of floor": passes(lambda row, key: f"{row['of_floor'][key]:.0%}"),
        "mamba-ssm, ms": passes(lambda row, key: f"{row['official'][key]:.3f}"),
        "times faster": passes(lambda row, key: f"{row['ratio'][key]:.2f}"),
        "GiB, ours": lambda row: f"{row['ours']['peak_gib']:.2f}",
        "GiB, mamba-ssm": lambda row: f"{row['official']['peak_gib']:.2f}",
        "difference": lambda row: f"{row['difference']:.0e}",
    }


if __name__ == "__main__":
    sys.exit(main())
