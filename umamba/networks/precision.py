"""The precision in which networks run on a GPU, as the recipe in the plans names it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch._functorch.config as compiler

AUTOCAST_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}


def autocast_type(precision: str = "auto") -> torch.dtype | None:
    """Returns the type of autocast on this GPU, None for float32 throughout.

    precision: "fp16", "bf16", "fp32", or "auto": bf16 where the GPU computes with it, else fp16.
    """
    if precision == "auto":
        # torch counts GPUs that emulate it, too; there it is slower than float32.
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16" if supported else "fp16"
    return AUTOCAST_TYPES[precision]


def autocast(device: torch.device, precision: str = "auto") -> AbstractContextManager[object]:
    """Returns the region in which a network of this precision runs: autocast on CUDA alone."""
    if device.type != "cuda":
        return nullcontext()
    dtype = autocast_type(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def compile_backward_without_autocast() -> None:
    """Makes torch.compile compute gradients outside autocast, as training does without it.

    By default it compiles backward under the autocast of the forward pass: also that of mixers,
    which leave autocast to compute in float32.
    """
    if hasattr(compiler, "backward_pass_autocast"):  # not in older versions of torch
        compiler.backward_pass_autocast = "off"
