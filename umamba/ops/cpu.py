"""Backend of the selective scan and of the causal convolution: the C library through ctypes.

B batch, D channels, L tokens, N states, G groups of channels that share B and C, K taps. Every
function accepts any strides, float32, bfloat16 or float16, and computes in float32. Results lie
channel-last in memory ((B, L, D) under a (B, D, L) view) and are the same for any number of
threads.
"""

import ctypes
import functools
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umamba.ops import reference
from umamba.ops.layout import CHUNK, empty_tokens

LIBRARY = Path(__file__).with_name("libumamba_cpu.so")
INSTRUCTION_SETS = ("v2", "v3", "v4")  # x86-64 levels: SSE4.2, AVX2 with FMA, AVX-512


def why_unavailable() -> str | None:
    """Return None where the library can be used, else one sentence with the cure."""
    return _load()[1]


def supports(device: torch.device, dtype: torch.dtype, d_state: int) -> str | None:
    """Return None if the backend can take such tensors, else the reason why not."""
    if device.type != "cpu":
        return f"the C library works on CPU tensors only, these are on {device.type}"
    if dtype not in _DTYPES:
        return f"the C library takes float32, bfloat16 and float16, not {dtype}"
    if not 1 <= d_state <= 64:
        return f"the C library takes 1 to 64 states, not {d_state}"
    return None


def takes_window(window: int) -> bool:
    """Return whether forward and backward do the locally bidirectional scan in such windows."""
    return CHUNK % window == 0


def instruction_set() -> str | None:
    """Return the name of the instruction set in use ("v2", "v3", "v4"; "base" off x86)."""
    return _load()[2]


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, reverse: bool,
    save_states: bool, window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, last_state and states as reference.forward does, and of the same shapes.

    With a window, out is that of reference.local_scan; takes_window says which there are.
    """
    if u.numel() == 0:
        plain = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reverse)
        return reference.forward(*plain, save_states)
    batch, channels, length = u.shape
    n_states = A.shape[1]
    n_chunks = math.ceil(length / CHUNK)
    out = empty_tokens(u)
    last_state = torch.empty(batch, channels, n_states)
    states = torch.empty((batch, n_chunks, n_states, channels) if save_states else (0,))
    dense = [_dense(x) for x in (A, D, delta_bias, initial_state)]
    arguments = _ScanForward(
        *(batch, channels, length, n_states, B.shape[1]),
        *(delta_softplus, reverse, window, torch.get_num_threads()),
        *map(_tensor, (u, delta, z, B, C, out)),
        *map(_data, (*dense, last_state, states if save_states else None)),
    )
    _call("umamba_scan_forward", arguments)
    return out, last_state, states


def backward(
    dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    initial_state: Tensor | None, states: Tensor, reverse: bool, window: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients in the order of reference.backward, None for absent inputs.

    du, ddelta, dz have the type of their input and lie channel-last; dB and dC have the type of B
    and C and lie token-major ((B, G, L, N) in memory); the others are float32.
    """
    if u.numel() == 0:
        plain = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, states)
        return reference.backward(dout, dlast_state, *plain, reverse)
    batch, channels, length = u.shape
    n_states, n_groups = A.shape[1], B.shape[1]
    du, ddelta = empty_tokens(u), empty_tokens(delta)
    dz = None if z is None else empty_tokens(z)
    dB, dC = (
        torch.empty(batch, n_groups, length, n_states, dtype=x.dtype).transpose(2, 3)
        for x in (B, C)
    )
    dA = torch.empty(batch, channels, n_states)
    dD = None if D is None else torch.empty(batch, channels)
    dbias = None if delta_bias is None else torch.empty(batch, channels)
    dinitial = None if initial_state is None else torch.empty(batch, channels, n_states)
    dense = [_dense(x) for x in (A, D, delta_bias, states, dlast_state)]
    arguments = _ScanBackward(
        *(batch, channels, length, n_states, n_groups),
        *(delta_softplus, reverse, window, torch.get_num_threads()),
        *map(_tensor, (u, delta, z, B, C, dout, du, ddelta, dz, dB, dC)),
        *map(_data, (*dense, dA, dD, dbias, dinitial)),
    )
    _call("umamba_scan_backward", arguments)
    total_A, total_D, total_bias = (None if x is None else _total(x) for x in (dA, dD, dbias))
    return (du, ddelta, total_A, dB, dC, total_D, dz, total_bias, dinitial)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """Return reference.conv_forward's result; at most 8 taps."""
    out = empty_tokens(x)
    if x.numel():
        dense = [_dense(weight), _dense(bias)]
        arguments = _Conv(
            *(*x.shape, weight.shape[1], reverse, torch.get_num_threads()),
            *map(_tensor, (x, out, None, None)),
            *map(_data, (*dense, None, None)),
        )
        _call("umamba_conv_forward", arguments)
    return out


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (dx, dweight, dbias): dx as x and channel-last, the others float32."""
    batch, channels, length = x.shape
    n_parts = batch * math.ceil(length / _CONV_SEGMENT)
    dx = empty_tokens(x)
    dweight = torch.empty(n_parts, channels, weight.shape[1])
    dbias = torch.empty(n_parts, channels)
    if x.numel():
        dense = [_dense(weight), _dense(bias)]
        arguments = _Conv(
            *(batch, channels, length, weight.shape[1], reverse, torch.get_num_threads()),
            *map(_tensor, (x, None, dout, dx)),
            *map(_data, (*dense, dweight, dbias)),
        )
        _call("umamba_conv_backward", arguments)
    return dx, _total(dweight), None if bias is None else _total(dbias)


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CONV_SEGMENT = 256  # tokens; equals CONV_SEGMENT in csrc/umamba.h


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "group", "token", "channel", "dtype")),
    ]


def _structure(name: str, sizes: str, tensors: str, pointers: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, ctypes.c_int64) for field in sizes.split()]
    fields += [(field, _Tensor) for field in tensors.split()]
    fields += [(field, ctypes.c_void_p) for field in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# The field order is that of csrc/umamba.h.
_ScanForward = _structure(
    "_ScanForward",
    "B D L N G softplus reverse local_window n_threads",
    "u delta z Bm Cm out",
    "A skip bias initial last states",
)
_ScanBackward = _structure(
    "_ScanBackward",
    "B D L N G softplus reverse local_window n_threads",
    "u delta z Bm Cm dout du ddelta dz dBm dCm",
    "A skip bias states dlast dA dskip dbias dinitial",
)
_Conv = _structure(
    "_Conv", "B D L K reverse n_threads", "x out dout dx", "weight bias dweight dbias"
)


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None, str | None]:
    """Return (library, None, instruction set) or (None, reason, None)."""
    if not LIBRARY.exists():
        cure = "install a C compiler (gcc or clang) and run `pip install` on umamba again"
        return None, f"the C library was not built when umamba was installed: {cure}", None
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        reason = f"{LIBRARY.name} cannot be loaded ({error}): install umamba again on this machine"
        return None, reason, None
    library.umamba_select.restype = ctypes.c_char_p
    wanted = os.environ.get("UMAMBA_CPU_ISA", "")
    chosen = library.umamba_select(wanted.encode())
    if chosen is not None:
        return library, None, chosen.decode()
    reason = (
        f"UMAMBA_CPU_ISA={wanted} is not one of {', '.join(INSTRUCTION_SETS)} or not offered "
        f"by this {platform.machine()} processor: unset it"
    )
    return None, reason, None


def _call(name: str, arguments: ctypes.Structure) -> None:
    library, reason, _ = _load()
    if library is None:
        raise RuntimeError(reason)
    status = getattr(library, name)(ctypes.byref(arguments))
    if status:
        raise MemoryError(f"{name} could not allocate its scratch memory (status {status})")


def _tensor(x: Tensor | None) -> _Tensor:
    """Describe a (B, D, L) or (B, G, N, L) tensor."""
    if x is None:
        return _Tensor()
    batch, *group, channel, token = x.stride()
    return _Tensor(x.data_ptr(), batch, *(group or [0]), token, channel, _DTYPES[x.dtype])


def _dense(x: Tensor | None) -> Tensor | None:
    """Return x as contiguous float32, which the caller keeps alive during the call."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _data(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _total(parts: Tensor) -> Tensor:
    """Return the sum that the library left in the first part, zeros if there is none."""
    return parts[0].clone() if len(parts) else parts.new_zeros(parts.shape[1:])
