"""The sliding window alone, with a pointwise network, beside MONAI's on the same tiles.

    python benchmarks/aggregation.py [--shape 144 192 192] [--patch 96 128 128] [--classes 15]
        [--json FILE]

Each runs in turn, `--repeats` times; CPU seconds of the process, the network's included in all.
"streamed" hands finished logits on piece by piece, as predictions do; "whole" gathers them in one
array, as MONAI does.  All take memory as umamba's commands do: in huge pages, and what is freed is
kept for the next array.  The error is against the network run on the whole volume.  Exit code 1
where streaming takes longer than MONAI, or is off by 1e-4 or more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as umamba's commands do

import torch
from monai.inferers import sliding_window_inference
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from umamba.cli.main import keep_freed_memory
from umamba.inference.blocks import BlockSums, WindowGrid
from umamba.inference.sliding_window import predict_mirrored, window_weight
from umamba.inference.streaming import Piece, mean_of_sums, stream_windows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[144, 192, 192])
    parser.add_argument("--patch", type=int, nargs=3, default=[96, 128, 128])
    parser.add_argument("--classes", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plain-memory", action="store_true", help="as Python takes it")
    args = parser.parse_args()
    if not args.plain_memory:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, args.classes, 1).requires_grad_(False)
    data = torch.randn(1, *args.shape)
    starts = compute_steps_for_sliding_window(args.shape, args.patch, 0.5)
    windows = [
        (slice(None), *(slice(s, s + p) for s, p in zip(corner, args.patch, strict=True)))
        for corner in itertools.product(*starts)
    ]

    def pieces() -> Iterator[Piece]:
        grid = WindowGrid(windows, args.shape, whole_rows=True)
        return stream_windows(
            lambda tiles: iter([(0, predict_mirrored(network, tiles, None))]),
            data, windows, window_weight(args.patch),
            lambda: BlockSums(grid, args.classes + 1), mean_of_sums, device=torch.device("cpu"),
        )  # fmt: skip

    def streamed() -> None:
        buffer = torch.empty(0)
        for piece in pieces():
            shape = (args.classes, *(s.stop - s.start for s in piece[:2]), args.shape[2])
            if buffer.numel() < math.prod(shape):
                buffer = torch.empty(math.prod(shape))
            piece.fill(buffer[: math.prod(shape)].view(shape))

    def whole() -> torch.Tensor:
        logits = torch.empty(args.classes, *args.shape)
        for piece in pieces():
            piece.fill(logits[:, piece.z, piece.y])
        return logits

    def monai() -> torch.Tensor:
        return sliding_window_inference(
            data[None], args.patch, 1, network, overlap=0.5, mode="gaussian", sigma_scale=0.125
        )[0]

    with torch.inference_mode():
        expected = network(data[None])[0]
        seconds: dict[str, list[float]] = {"streamed": [], "whole": [], "MONAI": []}
        errors = {"streamed": 0.0}
        for piece in pieces():
            exact = expected[:, piece.z, piece.y]
            found = torch.empty_like(exact)
            piece.fill(found)
            errors["streamed"] = max(errors["streamed"], float((found - exact).abs().max()))
        for _ in range(args.repeats + 1):
            for name, run in (("streamed", streamed), ("whole", whole), ("MONAI", monai)):
                spent, found = timed(run)
                seconds[name].append(spent)
                if found is not None:
                    errors[name] = float((found - expected).abs().max())
                del found
    best = {name: min(all_[1:]) for name, all_ in seconds.items()}
    print(f"{args.shape}, {len(windows)} tiles {args.patch}, {args.classes} classes\n")
    print("| | CPU-s, best | of MONAI's | median | of MONAI's | largest error |")
    print("|---|---|---|---|---|---|")
    middle = {name: statistics.median(all_[1:]) for name, all_ in seconds.items()}
    for name in seconds:
        cells = [f"{x[name]:.3f} | {x[name] / x['MONAI']:.2f}" for x in (best, middle)]
        print(f"| {name} | {' | '.join(cells)} | {errors[name]:.1e} |")
    if args.json:
        rows = {n: {"cpu_s": all_[1:], "error": errors[n]} for n, all_ in seconds.items()}
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(best["streamed"] > best["MONAI"] or errors["streamed"] >= 1e-4)


def timed(run: Callable[[], torch.Tensor | None]) -> tuple[float, torch.Tensor | None]:
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


if __name__ == "__main__":
    sys.exit(main())
