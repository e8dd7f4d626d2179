"""Chooses the scan backend: the first of BACKENDS that can serve, or the one asked for."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from umamba.ops import chunked, cpu, mamba_ssm_scan, reference

# The priority list. Each is a module with why_unavailable, supports, forward, backward,
# conv_forward and conv_backward; where it has takes_window, forward and backward accept a window.
BACKENDS: tuple[ModuleType, ...] = (mamba_ssm_scan, cpu, chunked, reference)

VARIABLE = "UMAMBA_SCAN"
SLOW = ("chunked", "reference")

_log = logging.getLogger(__name__)
_asked_for: list[str] = []  # by use_backend, the innermost last


def choose(device: torch.device, dtype: torch.dtype, d_state: int) -> ModuleType:
    """Return the backend for tensors of this device and type with this many states.

    A choice is logged when it is first made. A backend that was asked for by use_backend or by the
    environment variable UMAMBA_SCAN is never replaced: ValueError if it cannot serve.
    """
    wanted = _asked_for[-1] if _asked_for else _from_environment()
    return _choose(wanted, device.type, dtype, d_state)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes every scan inside the `with`, forward or backward, run on the named backend.

    Raises ValueError for an unknown name or a backend that cannot be used on this machine.
    """
    backend = find_backend(name, "use_backend")
    reason = backend.why_unavailable()
    if reason is not None:
        raise ValueError(f"the scan backend {backend_name(backend)} cannot be used: {reason}")
    _asked_for.append(backend_name(backend))
    try:
        yield
    finally:
        _asked_for.pop()


def takes_window(device: torch.device, dtype: torch.dtype, d_state: int, window: int) -> bool:
    """Return whether the backend for such tensors does the locally bidirectional scan itself."""
    # Under torch.compile a size may be a symbol, of which the range makes a number.
    return _takes_window(device, dtype, len(range(d_state)), len(range(window)))


def _takes_window(device: torch.device, dtype: torch.dtype, d_state: int, window: int) -> bool:
    asked = getattr(choose(device, dtype, d_state), "takes_window", None)
    return asked is not None and bool(asked(window))


# A traced graph holds the answer, not the search for it: what torch.compiler.assume_constant_result
# sets, which itself would load torch's compiler, and Triton with it, on import.
_takes_window._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backend_name(backend: ModuleType) -> str:
    """Return the name by which a backend is asked for: its file's, less "_scan"."""
    return backend.__name__.rpartition(".")[2].removesuffix("_scan")


def find_backend(name: str, source: str = "find_backend") -> ModuleType:
    """Return the backend of this name; ValueError with all names for an unknown one."""
    backends = {backend_name(backend): backend for backend in BACKENDS}
    normal = name.strip().lower().replace("-", "_").removesuffix("_scan")
    if normal not in backends:
        raise ValueError(
            f"{source} names the scan backend {name!r}; choose one of {', '.join(backends)}"
        )
    return backends[normal]


def explain(device: torch.device, dtype: torch.dtype, d_state: int) -> dict[str, str | None]:
    """Return for each backend None if it can take such tensors, else the reason why not."""
    return {
        backend_name(backend): backend.supports(device, dtype, d_state) or backend.why_unavailable()
        for backend in BACKENDS
    }


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a region without autocast on this kind of device, of backends and mixers."""
    if not is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def in_float32(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Makes a module's method run outside autocast, on its features in at least float32."""

    @functools.wraps(method)
    def run(module: Any, features: Tensor) -> Tensor:
        with without_autocast(features.device):
            return method(module, features.float() if features.dtype.itemsize < 4 else features)

    return run


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get(VARIABLE, "").strip()
    if not name:
        return None
    return backend_name(find_backend(name, f"the environment variable {VARIABLE}"))


@functools.cache
def _choose(wanted: str | None, kind: str, dtype: torch.dtype, d_state: int) -> ModuleType:
    reasons = explain(torch.device(kind), dtype, d_state)
    if wanted is not None and reasons[wanted] is not None:
        raise ValueError(
            f"the scan backend {wanted} was asked for and cannot be used: {reasons[wanted]}"
        )
    chosen = wanted or next(name for name, reason in reasons.items() if reason is None)
    _announce(chosen, kind, dtype, wanted is not None)
    return find_backend(chosen)


@functools.cache
def _announce(chosen: str, kind: str, dtype: torch.dtype, asked_for: bool) -> None:
    """Logs a choice once; loudly if it is a slow backend that nobody asked for."""
    what = f"selective scan on {kind} in {str(dtype).removeprefix('torch.')}: backend {chosen}"
    if asked_for:
        _log.info("%s, as asked for", what)
    elif chosen not in SLOW or dtype == torch.float64:  # float64 is for checks, slow or not
        _log.info("%s", what)
    else:
        reasons = explain(torch.device(kind), dtype, 16)
        rest = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why is not None)
        _log.warning("%s, which is slow (%s)", what, rest)
