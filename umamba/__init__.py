"""Medical image segmentation with U-shaped Mamba networks, in the nnU-Net style."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["__version__", "create_network", "list_networks", "predict_volume"]

# Where each name lives; loaded on first use, so that importing umamba imports no torch.
_HOMES = {
    "create_network": "umamba.networks",
    "list_networks": "umamba.networks",
    "predict_volume": "umamba.inference.volume",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'umamba' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    # importlib.metadata costs half of the time in which `umamba --help` answers.
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("umamba")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0"
