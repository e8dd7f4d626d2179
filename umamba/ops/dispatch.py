"""Chooses the backend of the scan: the first usable one, once per kind of tensor, and says which."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Iterator
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("mamba_ssm_scan", "cpu", "chunked", "reference")
SLOW = ("chunked", "reference")

_forced: str | None = None


def backend_names() -> tuple[str, ...]:
    """The names of the backends, the preferred one first."""
    return BACKENDS


def get_backend(name: str) -> ModuleType:
    """The backend module of a name; ValueError with the names for an unknown one."""
    if name not in BACKENDS:
        raise ValueError(f"no scan backend is called {name!r}; there are {', '.join(BACKENDS)}")
    return importlib.import_module(f"umamba.ops.{name}")


def choose(device: torch.device, dtype: torch.dtype, d_state: int) -> ModuleType:
    """The backend for tensors of this kind.

    The one of `use_backend` or of the variable UMAMBA_SCAN if given (ValueError where it cannot
    serve), else the first of BACKENDS that can.
    """
    name = _forced or _from_environment()
    if name is None:
        return _first_usable(device.type, dtype, d_state)
    backend = get_backend(name)
    reason = backend.why_unavailable() or backend.supports(device, dtype, d_state)
    if reason:
        raise ValueError(f"the scan backend {name} was asked for but cannot be used: {reason}")
    return backend


def why_not(name: str, device: torch.device, dtype: torch.dtype, d_state: int) -> str | None:
    """None where the backend can serve tensors of this kind, else the reason."""
    backend = get_backend(name)
    return backend.why_unavailable() or backend.supports(device, dtype, d_state)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every scan, forward and backward, uses this backend."""
    global _forced
    get_backend(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _from_environment() -> str | None:
    name = os.environ.get("UMAMBA_SCAN") or None
    if name is not None:
        get_backend(name)
    return name


@functools.cache
def _first_usable(device_type: str, dtype: torch.dtype, d_state: int) -> ModuleType:
    reasons = []
    for name in BACKENDS:
        reason = why_not(name, torch.device(device_type), dtype, d_state)
        if reason is None:
            _say(name, device_type, dtype, reasons)
            return get_backend(name)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference backend serves everything")


def _say(name: str, device_type: str, dtype: torch.dtype, reasons: list[str]) -> None:
    text = f"scan on {device_type} in {str(dtype).removeprefix('torch.')}: backend {name}"
    # float64 is for tests only, and there the slow path is the right one.
    if name in SLOW and dtype != torch.float64:
        logger.warning("%s, which is slow (%s)", text, "; ".join(reasons))
    else:
        logger.info("%s", text)
