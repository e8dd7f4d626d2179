"""Whole Mamba layers on a GPU beside the same layers on mamba-ssm, and beside a convolution block.

    python -m benchmarks.gpu.layers [--extensions FOLDER] [--json FILE] [--device cpu --tiny]

Each layer of ours is also computed with the official operators and the copies that the official
networks make for their directions, from the same parameters; the results must agree. Mamba layers
compute in float32, as ours always do; the convolution block, of the same width, runs under float16
autocast on a GPU, as in training.

B batch, C channels, E d_inner, L tokens, N states, K directions, R dt_rank.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu import official
from benchmarks.gpu.common import Results, milliseconds, parse, peak_gib
from benchmarks.gpu.copies import copied_mixer_layer, copied_ss2d
from benchmarks.gpu.official import Official
from benchmarks.gpu.shapes import RASTER, tri_orientated
from umamba.blocks.conv import ResidualBlock
from umamba.blocks.mixer import MixerLayer
from umamba.blocks.ss2d import SS2D
from umamba.ops.dispatch import use_backend


class Case(NamedTuple):
    """A layer at a stage of a network. orders: of a MixerLayer; none for SS2D."""

    name: str
    batch: int
    channels: int
    spatial: tuple[int, ...]
    orders: tuple[str, ...] = ()


CASES = (
    Case("U-Mamba, stage 0", 2, 32, (128, 128, 128), RASTER),
    Case("SegMamba, stage 0", 2, 48, (64, 64, 64), tri_orientated(64)),
    Case("SS2D, stage 0", 32, 96, (64, 64)),
    Case("U-Mamba, stage 0, one patch", 1, 32, (128, 128, 128), RASTER),
    Case("SegMamba, stage 0, one patch", 1, 48, (64, 64, 64), tri_orientated(64)),
    Case("SS2D, stage 0, one image", 1, 96, (64, 64)),
    Case("U-Mamba, stage 1", 2, 64, (64, 64, 64), RASTER),
    Case("U-Mamba, stage 2", 2, 128, (32, 32, 32), RASTER),
    Case("SegMamba, stage 1", 2, 96, (32, 32, 32), tri_orientated(32)),
    Case("SegMamba, stage 2", 2, 192, (16, 16, 16), tri_orientated(16)),
    Case("SegMamba, stage 3", 2, 384, (8, 8, 8), tri_orientated(8)),
    Case("SS2D, stage 1", 32, 192, (32, 32)),
)
TINY_CASES = (
    Case("U-Mamba", 2, 4, (4, 3, 5), RASTER),
    Case("SegMamba", 1, 4, (2, 3, 4), tri_orientated(4)),
    Case("SS2D", 2, 4, (4, 6)),
)


def main() -> int:
    """Measures every layer; 1 where nothing could be measured."""

    def extra(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--extensions", type=Path, help="where mamba-ssm was built")

    args = parse(__doc__ or "", extra)
    results = Results("Whole layers", args, columns())
    if args.device.type == "cuda":
        compared, what = official.load(args.extensions)
    else:
        compared, what = official.stand_in()
    results.note(what)
    for case in TINY_CASES if args.tiny else CASES:
        size = "x".join(map(str, (case.batch, case.channels, *case.spatial)))
        head = {"layer": case.name, "size": size}
        results.add(head, functools.partial(measure, case, args.backend, args.device, compared))
    return int(results.failed)


def measure(
    case: Case, backend: str, device: torch.device, compared: Official | None
) -> dict[str, Any]:
    """Milliseconds and memory of our layer, the official one and a convolution block."""
    torch.manual_seed(0)
    dims = len(case.spatial)
    features = torch.randn(case.batch, case.channels, *case.spatial).to(device)
    if case.orders:
        residual = len(case.orders) > 1
        layer: nn.Module = MixerLayer(
            case.channels, spatial_dims=dims, orders=case.orders, residual=residual
        )
        copied: Callable[..., Tensor] = copied_mixer_layer
    else:
        features = features.movedim(1, -1).contiguous()  # (B, H, W, C)
        layer, copied = SS2D(case.channels), copied_ss2d
    layer = layer.to(device)
    row: dict[str, Any] = {}
    with use_backend(backend):
        row["ours"] = times(layer, layer, features)
    if compared is not None:
        theirs = functools.partial(copied, layer, compared)
        with torch.no_grad():
            with use_backend(backend):
                expected = layer(features)
            row["difference"] = float((theirs(features) - expected).abs().max() / expected.std())
            del expected
        row["official"] = times(theirs, layer, features)
        row["ratio"] = {key: row["official"][key] / row["ours"][key] for key in ("forward", "both")}
    features = torch.randn(case.batch, case.channels, *case.spatial).to(device)
    block = ResidualBlock(case.channels, case.channels, [3] * dims).to(device)

    def convolve(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
            return block(x)  # type: ignore[no-any-return]

    row["block"] = times(convolve, block, features)
    return row


def times(
    run: Callable[[Tensor], Tensor], module: nn.Module, features: Tensor
) -> dict[str, float | None]:
    """Milliseconds of forward without gradients and of both passes, and the peak of both, GiB."""
    device = features.device
    inputs = features.clone().requires_grad_()
    leaves = [inputs, *module.parameters()]
    upstream = torch.randn_like(features)

    def both() -> None:
        out = run(inputs)
        torch.autograd.grad(out, leaves, upstream.to(out.dtype))

    forward = milliseconds(lambda: torch.no_grad()(run)(features), device)
    return {
        "forward": forward,
        "both": milliseconds(both, device),
        "peak_gib": peak_gib(both, device),
    }


def columns() -> dict[str, Callable[[dict[str, Any]], str]]:
    """Heading -> what a row shows there."""

    def two(part: str, form: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: " / ".join(format(row[part][key], form) for key in ("forward", "both"))

    def peak(part: str) -> Callable[[dict[str, Any]], str]:
        return lambda row: f"{row[part]['peak_gib']:.2f}"

    return {
        "layer": lambda row: row["layer"],
        "BxCx...": lambda row: row["size"],
        "ours f / f+b, ms": two("ours", ".3f"),
        "mamba-ssm, ms": two("official", ".3f"),
        "times faster": two("ratio", ".2f"),
        "convolution block, ms": two("block", ".3f"),
        "GiB, ours": peak("ours"),
        "GiB, mamba-ssm": peak("official"),
        "GiB, block": peak("block"),
        "difference": lambda row: f"{row['difference']:.0e}",
    }


if __name__ == "__main__":
    sys.exit(main())
