"""The weights and inputs of the parity cases, generated from names alone.

A case stores no tensors: each one follows from its official state-dict key by this rule.
"""

from __future__ import annotations

import math
import re
import zlib

import numpy as np


def fill(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the official state-dict tensor `key`."""
    shape = tuple(shape)
    noise = _stream(key).standard_normal(shape)
    leaf = key.split(".")[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    return np.asarray(_scaled(key, leaf, shape, noise), np.float32)


def image(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The input of the case `name`: standard normal, float32."""
    return _stream(f"input:{name}").standard_normal(tuple(shape)).astype(np.float32)


def _scaled(key: str, leaf: str, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(noise)
    if leaf == "running_mean":
        return 0.1 * noise
    # Logarithms of the decay: A_log, A_b_log, A_logs, ... with one column per state.
    if re.search(r"(^|[._])A(_[a-z]+)*_logs?$|(^|[._])A_logs?($|_)", key):
        return np.log(np.arange(1, shape[-1] + 1)) + 0.05 * noise
    if re.search(r"(^|\.)(Ds?|D_[a-z]+)$", key):
        return 1 + 0.1 * noise
    if re.search(r"dt_proj\w*[._]bias$|dt_bias$", key):
        return -2 + 0.5 * noise
    if len(shape) >= 2:
        # Stacked projections (K, out, in) count their last axis; kernels all but the first.
        stacked = len(shape) == 3 and "proj" in key
        fan_in = shape[-1] if stacked else math.prod(shape[1:])
        return noise / np.sqrt(max(fan_in, 1))
    if leaf == "weight" or "gamma" in leaf or leaf.endswith("scale"):
        return 1 + 0.1 * noise
    return 0.1 * noise


def _stream(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode())))
