"""nnU-Net's normalization schemes, in place and without a copy of the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

SMALLEST_STD = 1e-8
SLAB = 2**22  # voxels


def normalize(
    channel: np.ndarray, scheme: str, inside: np.ndarray | None, intensities: Mapping[str, Any]
) -> None:
    """Normalize one channel (z, y, x) float32 in place, as nnU-Net's class named `scheme`.

    inside: where to normalize and to take mean and deviation (None: everywhere); only
    ZScoreNormalization looks at it. intensities: the fingerprint's of the channel.
    """
    SCHEMES[scheme](channel, inside, intensities)


def _zscore(channel: np.ndarray, inside: np.ndarray | None, _: Mapping[str, Any]) -> None:
    values = channel if inside is None else channel[inside]
    if not values.size:  # an image of zeros alone: all of it is outside
        return
    mean, n_values = values.mean(), values.size
    total = 0.0
    for part in _slabs(values):
        total += float(np.sum(np.square(part - mean), dtype=np.float64))
    std = np.float32(max((total / n_values) ** 0.5, SMALLEST_STD))
    del values
    if inside is None:
        channel -= mean
        channel /= std
        return
    for part, chosen in zip(_slabs(channel), _slabs(inside), strict=True):
        part[chosen] = (part[chosen] - mean) / std


def _ct(channel: np.ndarray, _: np.ndarray | None, intensities: Mapping[str, Any]) -> None:
    low, high = intensities["percentile_00_5"], intensities["percentile_99_5"]
    np.clip(channel, low, high, out=channel)
    channel -= intensities["mean"]
    channel /= max(intensities["std"], SMALLEST_STD)


def _keep(channel: np.ndarray, _: np.ndarray | None, __: Mapping[str, Any]) -> None:
    pass


def _rescale(channel: np.ndarray, _: np.ndarray | None, __: Mapping[str, Any]) -> None:
    channel -= channel.min()
    channel /= max(channel.max(), np.float32(SMALLEST_STD))


def _rgb(channel: np.ndarray, _: np.ndarray | None, __: Mapping[str, Any]) -> None:
    low, high = channel.min(), channel.max()
    if low < 0 or high > 255:
        raise ValueError(
            f"the image holds values from {low:g} to {high:g}, and RGBTo01Normalization takes 0 "
            "to 255: name its channel otherwise than rgb_to_0_1 in dataset.json"
        )
    channel /= 255.0


SCHEMES: dict[str, Callable[[np.ndarray, np.ndarray | None, Mapping[str, Any]], None]] = {
    "ZScoreNormalization": _zscore,
    "CTNormalization": _ct,
    "NoNormalization": _keep,
    "RescaleTo01Normalization": _rescale,
    "RGBTo01Normalization": _rgb,
}
"""What is done here, by the names of nnU-Net's classes."""


def _slabs(values: np.ndarray) -> list[np.ndarray]:
    """Views of `values` along its first axis, of about `SLAB` voxels each."""
    step = max(1, SLAB * len(values) // max(1, values.size))
    return [values[start : start + step] for start in range(0, len(values), step)]
