"""Backend of the selective scan and of the causal convolution: the C library through ctypes.

B batch, K directions, E channels of a direction, L tokens, N states, G groups of channels that
share B and C. Tokens lie in raster order; the library addresses those of a direction by its walk,
seven integers (start, n0, s0, n1, s1, n2, s2), one direction after another. Every function accepts
any strides, float32, bfloat16 or float16, and computes in float32. Results lie direction by
direction and channel-last in memory ((K, B, L, E) under a (B, K, E, L) view) and are the same for
any number of threads.
"""

import ctypes
import functools
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umamba.ops.layout import CHUNK, empty_matrix, empty_walked
from umamba.ops.sources import digest_sources
from umamba.ops.walks import WALK

TAKES_WALKS = True
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
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
    walks: Sequence[int], merged: bool, save_states: bool, window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return out, last_state (B, K, E, N) and the states (K, B, n_chunks, NE) before each chunk.

    u and z (B, K or 1, E, L), one direction if all share it; delta (B, K, E, L); A (K, E, N); B, C
    (B, K, G, N, L); D, delta_bias (K, E); initial_state (B, K, E, N). out is (B, K, E, L), or
    (B, 1, E, L) if merged: the sum over the directions in their order. states is empty unless
    save_states. With a window, out is that of reference.local_scan along the walk; takes_window
    says which there are.
    """
    batch, n_directions, channels, length = delta.shape
    n_states, n_chunks = A.shape[2], math.ceil(length / CHUNK)
    out = _empty_tokens(u, n_directions, 1 if merged else n_directions)
    last_state = torch.empty(n_directions, batch, channels, n_states)
    shape = (n_directions, batch, n_chunks, n_states * channels) if save_states else (0,)
    states = torch.empty(shape)
    initial = None if initial_state is None else initial_state.transpose(0, 1)
    dense = [_dense(x) for x in (A, D, delta_bias, initial)]
    if not delta.numel():
        last_state = torch.zeros_like(last_state) if dense[3] is None else dense[3].clone()
    for k in range(n_directions if delta.numel() else 0):
        arguments = _ScanForward(
            *(batch, channels, length, n_states, B.shape[2]),
            *(delta_softplus, window, torch.get_num_threads()),
            *_walk(walks, k),
            *(_tensor(x, k) for x in (u, delta, z, B, C)),
            _result(out, k),
            *(_data(x, k) for x in (*dense, last_state, states if save_states else None)),
        )
        _call("umamba_scan_forward", arguments)
    return out.to(u.dtype), last_state.transpose(0, 1), states


def backward(
    dout: Tensor, dlast_state: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor,
    C: Tensor, D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
    initial_state: Tensor | None, states: Tensor, walks: Sequence[int], window: int = 0,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients in the order of reference.backward, None for absent inputs.

    dout is (B, 1, E, L) if the forward was merged, else (B, K, E, L). Every gradient has its
    input's shape: du and dz of an input that directions share are sums over them, in their order.
    du, ddelta, dz have the type of their input and lie as out does; dB and dC have the type of B
    and C and lie token-major ((K, B, G, L, N) in memory); the others are float32.
    """
    batch, n_directions, channels, length = delta.shape
    n_states, n_groups = A.shape[2], B.shape[2]
    du, dz = (None if x is None else _empty_tokens(x, n_directions, x.shape[1]) for x in (u, z))
    ddelta = _empty_tokens(delta, n_directions, n_directions)
    dB, dC = empty_matrix(B), empty_matrix(C)
    parts = (n_directions, batch, channels)  # of the sums over the samples
    dA, dinitial = torch.zeros(*parts, n_states), torch.empty(*parts, n_states)
    dD, dbias = (None if x is None else torch.zeros(parts) for x in (D, delta_bias))
    dlast = None if dlast_state is None else dlast_state.transpose(0, 1)
    dense = [_dense(x) for x in (A, D, delta_bias, states, dlast)]
    if not delta.numel():
        dinitial = torch.zeros_like(dinitial) if dense[4] is None else dense[4].clone()
    for k in range(n_directions if delta.numel() else 0):
        arguments = _ScanBackward(
            *(batch, channels, length, n_states, n_groups),
            *(delta_softplus, window, torch.get_num_threads()),
            *_walk(walks, k),
            *(_tensor(x, k) for x in (u, delta, z, B, C, dout)),
            *(_result(x, k) for x in (du, ddelta, dz, dB, dC)),
            *(_data(x, k) for x in (*dense, dA, dD, dbias, dinitial)),
        )
        _call("umamba_scan_backward", arguments)
    du, dz = (None if x is None else x.to(u.dtype) for x in (du, dz))
    total_D, total_bias = (None if x is None else _total(x) for x in (dD, dbias))
    dstate = None if initial_state is None else dinitial.transpose(0, 1)
    return (du, ddelta, _total(dA), dB, dC, total_D, dz, total_bias, dstate)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, walks: Sequence[int]) -> Tensor:
    """Return silu(causal depthwise convolution) of x along each walk, (B, K, E, L).

    x (B, K or 1, E, L); weight (K, E, taps), at most 8 taps, of which the last meets the current
    token and the others those walked before it; bias (K, E) or None.
    """
    batch, _, channels, length = x.shape
    n_directions, _, n_taps = weight.shape
    out = _empty_tokens(x, n_directions, n_directions)
    dense = [_dense(weight), _dense(bias)]
    for k in range(n_directions if x.numel() else 0):
        arguments = _Conv(
            *(batch, channels, length, n_taps, torch.get_num_threads()),
            *_walk(walks, k),
            *(_tensor(x, k), _result(out, k), _Tensor(), _Tensor()),
            *(_data(y, k) for y in (*dense, None, None)),
        )
        _call("umamba_conv_forward", arguments)
    return out


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, walks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (dx, dweight, dbias): dx in the shape and type of x, the others float32.

    dx of an x that directions share is the sum over them, in their order.
    """
    batch, _, channels, length = x.shape
    n_directions, _, n_taps = weight.shape
    parts = (n_directions, batch * math.ceil(length / _CONV_SEGMENT), channels)
    dx = _empty_tokens(x, n_directions, x.shape[1])
    dweight, dbias = torch.empty(*parts, n_taps), torch.empty(parts)
    dense = [_dense(weight), _dense(bias)]
    for k in range(n_directions if x.numel() else 0):
        arguments = _Conv(
            *(batch, channels, length, n_taps, torch.get_num_threads()),
            *_walk(walks, k),
            *(_tensor(x, k), _Tensor(), _tensor(dout, k), _result(dx, k)),
            *(_data(y, k) for y in (*dense, dweight, dbias)),
        )
        _call("umamba_conv_backward", arguments)
    return dx.to(x.dtype), _total(dweight), None if bias is None else _total(dbias)


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CONV_SEGMENT = 256  # tokens; equals CONV_SEGMENT in csrc/umamba.h


_FIELDS = ("batch", "group", "token", "channel", "dtype", "add")


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in _FIELDS),
    ]


def _structure(name: str, sizes: str, tensors: str, pointers: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, ctypes.c_int64) for field in sizes.split()]
    fields += [(field, _Tensor) for field in tensors.split()]
    fields += [(field, ctypes.c_void_p) for field in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# The field order is that of csrc/umamba.h.
_ScanForward = _structure(
    "_ScanForward",
    "B D L N G softplus local_window n_threads start n0 s0 n1 s1 n2 s2",
    "u delta z Bm Cm out",
    "A skip bias initial last states",
)
_ScanBackward = _structure(
    "_ScanBackward",
    "B D L N G softplus local_window n_threads start n0 s0 n1 s1 n2 s2",
    "u delta z Bm Cm dout du ddelta dz dBm dCm",
    "A skip bias states dlast dA dskip dbias dinitial",
)
_Conv = _structure(
    "_Conv",
    "B D L K n_threads start n0 s0 n1 s1 n2 s2",
    "x out dout dx",
    "weight bias dweight dbias",
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
    sources = LIBRARY.with_name("csrc")
    built_of = getattr(library, "umamba_sources", None)
    if built_of is not None:
        built_of.restype = ctypes.c_char_p
    if built_of is None or built_of().decode() != digest_sources(sources):
        cure = "run `pip install` on umamba again"
        return None, f"the C library was built of other sources than are there now: {cure}", None
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


def _walk(walks: Sequence[int], k: int) -> Sequence[int]:
    return walks[WALK * k : WALK * (k + 1)]


def _empty_tokens(x: Tensor, n_directions: int, n_kept: int) -> Tensor:
    """Return memory for n_kept results (B, n_kept, E, L) like x of so many directions.

    Float32 where one result is the sum of several directions.
    """
    return empty_walked(x, n_kept, x.dtype if n_kept == n_directions else torch.float32)


def _tensor(x: Tensor | None, k: int) -> _Tensor:
    """Describe direction k of a (B, K or 1, E, L) or (B, K, G, N, L) tensor."""
    if x is None:
        return _Tensor()
    batch, direction, *group, channel, token = x.stride()
    start = x.data_ptr()
    if k and x.shape[1] > 1:
        start += k * direction * x.element_size()
    return _Tensor(start, batch, *(group or [0]), token, channel, _DTYPES[x.dtype])


def _result(x: Tensor | None, k: int) -> _Tensor:
    """Describe x likewise, to be added to where an earlier direction has written."""
    described = _tensor(x, k)
    described.add = k > 0 and x is not None and x.shape[1] == 1
    return described


def _dense(x: Tensor | None) -> Tensor | None:
    """Return x as contiguous float32, which the caller keeps alive during the calls."""
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _data(x: Tensor | None, k: int) -> int | None:
    """Return the address of direction k of a contiguous float32 tensor (K, ...)."""
    return None if x is None else x.data_ptr() + (4 * k * x.stride(0) if k else 0)


def _total(parts: Tensor) -> Tensor:
    """Return the sums that the library left in the first of the parts (K, parts, ...)."""
    return parts[:, 0].contiguous() if parts.shape[1] else parts.sum(1)
