"""One training step of U-Mamba on a CPU beside its control, nnU-Net's U-Net and the chunked scan.

A further row is the same network with mixers that are recomputed in backward.

    python benchmarks/network.py [--patch small large] [--threads 1 2] [--json FILE]

Every row is measured in one process, the networks in turn (A B C A B C ...); the ratio is the
median of the ratios within a turn, of CPU time with one thread and of wall time with several.  The
share of the scan is the profiler's time in the two scan operators over the time of the step.
Freed memory is kept, as in the commands.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from umamba.blocks.recompute import recompute_mixers
from umamba.cli.main import keep_freed_memory
from umamba.networks import create_network
from umamba.ops.dispatch import use_backend

PLANS = {
    "small": {"patch": (40, 56, 40), "features": (32, 64, 128, 256)},
    "large": {"patch": (64, 96, 96), "features": (32, 64, 128, 256, 320)},
}
RECOMPUTED = ", recomputed"


def build(kind: str, patch: tuple[int, ...], features: tuple[int, ...]) -> nn.Module:
    """A network with deep supervision for 1 channel and 3 classes; two convolutions a stage."""
    strides = [[1, 1, 1]] + [[2, 2, 2]] * (len(features) - 1)
    kernels = [[3, 3, 3]] * len(features)
    torch.manual_seed(0)
    if kind == "PlainConvUNet":
        from dynamic_network_architectures.architectures.unet import PlainConvUNet

        return PlainConvUNet(
            1,
            len(features),
            list(features),
            nn.Conv3d,
            kernels,
            strides,
            2,
            3,
            2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=True,
        )
    arguments = {
        "strides": strides,
        "features_per_stage": list(features),
        "kernel_sizes": kernels,
        "deep_supervision": True,
    }
    if kind.startswith("umamba_enc"):
        arguments["patch_size"] = list(patch)
    network = create_network(kind.removesuffix(RECOMPUTED), 1, 3, **arguments)
    recompute_mixers(network, kind.endswith(RECOMPUTED))
    return network


def one_step(network: nn.Module, image: torch.Tensor) -> tuple[float, float]:
    """CPU and wall seconds of forward, backward and an SGD update."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.99, nesterov=True)
    cpu, wall = time.process_time(), time.perf_counter()
    loss = sum(output.square().mean() for output in network(image))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - cpu, time.perf_counter() - wall


def scan_share(network: nn.Module, image: torch.Tensor) -> float:
    """The share of one step that is spent in the scan operators."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        cpu, _ = one_step(network, image)
    names = ("umamba::selective_scan_fwd", "umamba::selective_scan_bwd")
    events = recorded.key_averages()
    scan = sum(event.self_cpu_time_total for event in events if event.key in names) / 1e6
    return scan / cpu


def measure(name: str, plan: str, n_threads: int, n_turns: int, chunked: bool) -> list[dict]:
    """The rows of one network at one patch and number of threads."""
    torch.set_num_threads(n_threads)
    patch, features = PLANS[plan]["patch"], PLANS[plan]["features"]
    image = torch.randn(2, 1, *patch)
    kinds = [name, name + RECOMPUTED, f"{name}_noscan", "PlainConvUNet"]
    networks = {kind: build(kind, patch, features) for kind in kinds}
    for network in networks.values():
        one_step(network, image)
    turns = [{k: one_step(n, image) for k, n in networks.items()} for _ in range(n_turns)]
    share = scan_share(networks[name], image) if n_threads == 1 else None
    rows = []
    for kind in kinds:
        clock = 0 if n_threads == 1 else 1  # CPU seconds say more on a shared machine
        ratios = [turn[name][clock] / turn[kind][clock] for turn in turns]
        row = {
            "network": name,
            "peer": kind,
            "patch": "x".join(map(str, patch)),
            "threads": n_threads,
            "cpu_seconds": statistics.median(turn[kind][0] for turn in turns),
            "wall_seconds": statistics.median(turn[kind][1] for turn in turns),
            "ratio_to_peer": statistics.median(ratios),
        }
        if kind == name:
            row["scan_share"] = share
        rows.append(row)
    if chunked:
        with use_backend("chunked"):
            cpu, wall = one_step(networks[name], image)
        row = dict(rows[0], peer=f"{name} on the chunked path", cpu_seconds=cpu, wall_seconds=wall)
        row.pop("scan_share")
        rows.append(row | {"ratio_to_peer": rows[0]["cpu_seconds"] / cpu})
    return rows


def main() -> None:
    """Prints the table; writes it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=["umamba_bot", "umamba_enc"])
    parser.add_argument("--patch", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--no-chunked", action="store_true", help="leave the slow path out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_freed_memory()
    rows = []
    print(f"{'network':<11} {'patch':<9} thr  {'peer':<32} {'CPU s':>7} {'wall s':>7} {'ratio':>6}")
    for plan in args.patch:
        for threads in args.threads:
            for name in args.network:
                slow = not args.no_chunked and threads == 1
                for row in measure(name, plan, threads, args.turns, slow):
                    rows.append(row)
                    share = row.get("scan_share")
                    note = f"  scan {share:.1%} of the step" if share is not None else ""
                    print(
                        f"{row['network']:<11} {row['patch']:<9} {row['threads']:>3}  "
                        f"{row['peer']:<32} {row['cpu_seconds']:>7.2f} {row['wall_seconds']:>7.2f} "
                        f"{row['ratio_to_peer']:>6.3f}{note}",
                        flush=True,
                    )
    if args.json:
        facts = {"torch": torch.__version__, "machine": platform.machine(), "rows": rows}
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
