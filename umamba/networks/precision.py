"""The precision in which networks run: the recipe's on a GPU, or the one asked for."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
import torch._functorch.config as compiler

AUTOCAST_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}

Precision = Literal["float32", "bfloat16"]
"""What can be asked of a prediction, whatever the recipe of its network."""


def autocast_type(precision: str = "auto") -> torch.dtype | None:
    """Returns the type of autocast on this GPU, None for float32 throughout.

    precision: "fp16", "bf16", "fp32", or "auto": bf16 where the GPU computes with it, else fp16.
    """
    if precision == "auto":
        precision = "bf16" if computes_bfloat16(torch.device("cuda")) else "fp16"
    return AUTOCAST_TYPES[precision]


def autocast(
    device: torch.device, precision: str = "auto", asked: Precision | None = None
) -> AbstractContextManager[object]:
    """Returns the region in which a network runs.

    precision: the recipe's, for CUDA alone. asked: in its place, for any device.
    """
    if asked is not None:
        precision = "bf16" if asked == "bfloat16" else "fp32"
    elif device.type != "cuda":
        return nullcontext()
    dtype = autocast_type(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the device computes with bfloat16; torch emulates it elsewhere, slower than float32.

    Of CPUs those with AVX512_BF16 (of which AMX is a part) or the BF16 instructions of ARM.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if platform.machine() in ("arm64", "aarch64"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    # torch has no public name for it
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def check_precision(asked: Precision | None, device: torch.device, nnunet_exact: bool) -> None:
    """ValueError where the device, or nnU-Net's own arithmetic, is without the precision asked."""
    if asked is None:
        return
    if nnunet_exact and (asked == "bfloat16" or device.type == "cuda"):
        where = "float16 on a GPU and float32 elsewhere"
        raise ValueError(f"--nnunet-exact computes in {where}; leave out --precision {asked}")
    if asked == "bfloat16" and not computes_bfloat16(device):
        kind = {"cpu": "processor", "cuda": "GPU"}.get(device.type, "device")
        raise ValueError(
            f"this {kind} does not compute bfloat16, and to emulate it is slower than float32; "
            "leave out --precision bfloat16"
        )


def compile_backward_without_autocast() -> None:
    """Makes torch.compile compute gradients outside autocast, as training does without it.

    By default it compiles backward under the autocast of the forward pass: also that of mixers,
    which leave autocast to compute in float32.
    """
    if hasattr(compiler, "backward_pass_autocast"):  # not in older versions of torch
        compiler.backward_pass_autocast = "off"
