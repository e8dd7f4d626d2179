"""One training step of whole networks on a GPU: its time and its peak memory.

    python -m benchmarks.gpu.steps [--json FILE] [--device cpu --tiny]

Each network of ours beside itself without its scan (`_noscan`) and with a gated convolution of as
many parameters in its place (`_convmix`), and nnU-Net's residual encoders M and L as nnU-Net's
planner builds them for 3D images of 200^3 voxels of 1 mm. A step is what nnU-Net's trainer does:
autocast as the recipe's "auto" has it, bfloat16 where the GPU computes with it, else float16 with a
scaled loss (the mixers leave it), loss over the outputs of deep supervision, gradients clipped at
12, SGD with Nesterov momentum; the loss is the cross-entropy alone, and nothing is compiled. Rows
that end in "channels-last" have network and images in that memory format.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.common import FLUSH_BYTES, Results, milliseconds, parse
from umamba.networks import create_network
from umamba.networks.precision import autocast_type
from umamba.ops.dispatch import use_backend

N_CLASSES = 4


class Plan(NamedTuple):
    """What a network trains on, and its arguments beside those that all have."""

    batch: int
    patch: tuple[int, ...]
    arguments: dict[str, Any]


def u_net(patch: int, widths: tuple[int, ...], batch: int = 2) -> Plan:
    strides = [[1, 1, 1], *[[2, 2, 2]] * (len(widths) - 1)]
    return Plan(batch, (patch,) * 3, {"strides": strides, "features_per_stage": widths})


def enc(plan: Plan) -> Plan:
    return plan._replace(arguments=plan.arguments | {"patch_size": list(plan.patch)})


BASE = u_net(128, (32, 64, 128, 256, 320, 320))
PLANS = {
    "umamba_bot": BASE,
    "umamba_enc": enc(BASE),
    "segmamba": Plan(2, (128,) * 3, {}),
    "vm_unet": Plan(32, (256, 256), {}),
    "swin_umamba": Plan(32, (256, 256), {}),
}
RESENC_PLANS = {"nnU-Net ResEnc M": BASE, "nnU-Net ResEnc L": BASE._replace(patch=(192,) * 3)}
RESENC_BLOCKS = (1, 3, 4, 6, 6, 6)
TINY_BASE = u_net(16, (4, 8, 8))
SHALLOW = {"depths": (1,) * 4}
TINY_PLANS = {
    "umamba_bot": TINY_BASE,
    "umamba_enc": enc(TINY_BASE),
    "segmamba": Plan(1, (32,) * 3, {"features_per_stage": (4,) * 5} | SHALLOW),
    "vm_unet": Plan(
        1, (32, 32), {"features_per_stage": (2, 8, 8, 8, 8), "depths_decoder": (1,) * 4} | SHALLOW
    ),
    "swin_umamba": Plan(1, (32, 32), {"features_per_stage": (4,) * 5} | SHALLOW),
}
# Where time runs out, the last ones are missing.
LAST = " channels-last"
ORDER = (
    "umamba_bot", "umamba_bot_noscan", "umamba_enc", "umamba_enc_noscan",
    "umamba_enc" + LAST, "umamba_enc_noscan" + LAST, "segmamba",
    "segmamba_noscan", "nnU-Net ResEnc M", "vm_unet", "vm_unet_noscan", "swin_umamba",
    "swin_umamba_noscan", "nnU-Net ResEnc L", *(f"{name}_convmix" for name in PLANS),
)  # fmt: skip


def main() -> int:
    """Measures every network; 1 where nothing could be measured."""
    args = parse(__doc__ or "")
    torch.backends.cudnn.benchmark = True  # as nnU-Net's trainer
    results = Results("Training steps", args, columns())
    for name in ORDER:
        plans = TINY_PLANS if args.tiny else PLANS
        resenc = dict.fromkeys(RESENC_PLANS, TINY_BASE) if args.tiny else RESENC_PLANS
        plan = resenc[name] if name in resenc else plans[base_name(name)]
        size = "x".join(map(str, (plan.batch, *plan.patch)))
        head = {"network": name, "batch and patch": size}
        results.add(head, functools.partial(measure, name, plan, args.backend, args.device))
    add_ratios(results)
    return int(results.failed)


def base_name(name: str) -> str:
    return name.removesuffix(LAST).removesuffix("_noscan").removesuffix("_convmix")


def measure(name: str, plan: Plan, backend: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds of a step, its voxels per second, its peak memory."""
    torch.manual_seed(0)
    network = build(name.removesuffix(LAST), plan).to(device).train()
    images = torch.randn(plan.batch, 1, *plan.patch).to(device)
    if name.endswith(LAST):
        network = network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last_3d)
    labels = torch.randint(N_CLASSES, (plan.batch, *plan.patch)).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with use_backend(backend):
        step = training_step(network, images, labels)
        started = time.perf_counter()
        losses = [step(), step()]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            first = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        warm_up = time.perf_counter() - started
        took = milliseconds(step, device, seconds=1.5)
    row: dict[str, Any] = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "milliseconds": took,
        "voxels_per_second": images.numel() / took * 1e3,
        "warm_up_seconds": warm_up,
        "finite": all(bool(loss.isfinite()) for loss in losses),
    }
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - FLUSH_BYTES  # which the timing keeps
        row["peak_gib"] = peak / 2**30
        row["first_peak_gib"] = first / 2**30
    return row


def build(name: str, plan: Plan) -> nn.Module:
    """The network with deep supervision where it has it, for one channel."""
    if name in RESENC_PLANS:
        return build_resenc(plan)
    return create_network(name, 1, N_CLASSES, **plan.arguments, deep_supervision=True)


def build_resenc(plan: Plan) -> nn.Module:
    """nnU-Net's residual encoder U-Net; ImportError where its package is missing."""
    if importlib.util.find_spec("dynamic_network_architectures") is None:
        raise ImportError("the package dynamic-network-architectures is not installed")
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    widths = plan.arguments["features_per_stage"]
    n_stages = len(widths)
    return ResidualEncoderUNet(  # type: ignore[no-any-return]
        1,
        n_stages,
        list(widths),
        nn.Conv3d,
        [[3, 3, 3]] * n_stages,
        plan.arguments["strides"],
        list(RESENC_BLOCKS[:n_stages]),
        N_CLASSES,
        [1] * (n_stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """A function that does one step and gives the loss."""
    on_gpu = images.is_cuda
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-2, momentum=0.99, nesterov=True, weight_decay=3e-5
    )
    dtype = autocast_type("auto") if on_gpu else None
    scaler = torch.amp.GradScaler(images.device.type, enabled=dtype == torch.float16)
    targets: dict[torch.Size, Tensor] = {}

    def target_of(output: Tensor) -> Tensor:
        shape = output.shape[2:]
        if shape not in targets:
            small = functional.interpolate(labels[:, None].float(), shape, mode="nearest")
            targets[shape] = small[:, 0].long()
        return targets[shape]

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype, enabled=on_gpu):
            found = network(images)
            outputs = found if isinstance(found, list | tuple) else [found]
            loss = torch.zeros((), device=images.device)
            for i, output in enumerate(outputs):
                loss = loss + functional.cross_entropy(output.float(), target_of(output)) / 2**i
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 12)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def add_ratios(results: Results) -> None:
    """Says what the scan costs, every network beside its controls, and what channels-last gives."""
    times = {row["network"]: row["milliseconds"] for row in results.rows if "error" not in row}
    for name in times:
        if name + LAST in times:
            ratio = times[name + LAST] / times[name]
            results.note(f"Channels-last, a step of {name} takes {ratio:.2f} of the time.")
    for name in PLANS:
        ratios = [
            f"{times[name] / times[name + suffix]:.2f} times {name}{suffix}"
            for suffix in ("_noscan", "_convmix")
            if name in times and name + suffix in times
        ]
        if ratios:
            results.note(f"A step of {name} takes {' and '.join(ratios)}.")


def columns() -> dict[str, Callable[[dict[str, Any]], str]]:
    """Heading -> what a row shows there."""
    return {
        "network": lambda row: row["network"],
        "batch and patch": lambda row: row["batch and patch"],
        "parameters": lambda row: f"{row['parameters'] / 1e6:.1f} M",
        "step, ms": lambda row: f"{row['milliseconds']:.1f}",
        "million voxels/s": lambda row: f"{row['voxels_per_second'] / 1e6:.1f}",
        "peak GiB": lambda row: f"{row['peak_gib']:.2f}",
        "warm-up, s": lambda row: f"{row['warm_up_seconds']:.1f}",
        "finite": lambda row: str(row["finite"]),
    }


if __name__ == "__main__":
    sys.exit(main())
