"""Reads checkpoint files as tensors, numbers and names only, so that no code in them can run."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from umamba.networks.state_dict import unwrap


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU.

    Raises FileNotFoundError, or ValueError for a truncated file or one of another kind, one that
    wants to run code, and one that holds no dictionary.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}; check the path")
    try:
        with (
            torch.serialization.safe_globals(_numpy_scalar_types()),
            warnings.catch_warnings(action="ignore", category=UserWarning),
        ):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is damaged or holds objects other than tensors and numbers, and is not read; "
            "copy it again, or use another checkpoint"
        ) from error
    except Exception as error:  # torch's reader of old files meets a text file with any of them
        raise ValueError(
            f"{file} cannot be read, it seems truncated or is no checkpoint; copy it again, or use "
            "another one"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no dictionary of weights; it is not a checkpoint")
    return content


def read_weights(file: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The content of a checkpoint file and the state dict in it.

    Raises as read_checkpoint does, and ValueError for a file without tensors.
    """
    content = read_checkpoint(file)
    try:
        return content, unwrap(content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


_NUMBERS = ("float64", "float32", "float16", "bool", "int64", "int32", "int16", "int8", "uint8")


def _numpy_scalar_types() -> list[Any]:
    """What nnU-Net's checkpoints hold beside tensors: numpy's numbers, from its training log."""
    arrays = [torch.zeros((), dtype=getattr(torch, name)).numpy() for name in _NUMBERS]
    scalar = arrays[0][()].__reduce__()[0]
    types: list[Any] = [type(array.dtype) for array in arrays]
    modules = ("numpy._core.multiarray", "numpy.core.multiarray")
    plain = type(arrays[0].dtype).__mro__[-2]  # numpy.dtype itself
    return [plain, *types, *((scalar, f"{module}.scalar") for module in modules)]
