"""What an image file holds, in nnU-Net's axis order, whatever its format."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umamba.data.faults import UnreadableImageError

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tiff", ".tif")
NATURAL_ENDINGS = (".png", ".bmp", ".tif")
REPLACE = "replace it by a whole copy, or remove the case"
CHUNK, MOST_BINS = 1 << 22, 1 << 20  # voxels counted at once; values counted by bins


@dataclass(frozen=True)
class ImageContent:
    """An image in nnU-Net's axis order, before the NIfTI scaling (slope, intercept) is applied.

    array: (channels, z, y, x), 2D images with z = 1; spacing (z, y, x) in mm;
    affine: (4, 4) from (x, y, z) index to mm, None for formats that carry none;
    digest: of the decompressed file.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray | None
    digest: bytes
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[1:])

    def values(self) -> np.ndarray:
        """Return the array with the scaling applied."""
        if self.slope == 1.0 and self.intercept == 0.0:
            return self.array
        return self.array * self.slope + self.intercept


def split_ending(name: str) -> tuple[str, str] | None:
    """Return (stem, ending as written) of a file nnU-Net has a reader for, None for any other."""
    lower = name.lower()
    for ending in FILE_ENDINGS:
        if lower.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], name[-len(ending) :]
    return None


def label_counts(content: ImageContent) -> dict[float, int]:
    """Return voxels per value of a label map; NaN counts as one value."""
    values = content.values().reshape(-1)
    total: Counter[float] = Counter()
    for start in range(0, values.size, CHUNK):
        total.update(_count(values[start : start + CHUNK]))
    not_numbers = sum(n for value, n in total.items() if value != value)
    counts = {value: total[value] for value in sorted(v for v in total if v == v)}
    return {**counts, float("nan"): not_numbers} if not_numbers else counts


def _count(values: np.ndarray) -> dict[float, int]:
    if values.dtype.kind == "f":
        whole = np.isfinite(values).all() and (values == np.rint(values)).all()
        if not whole or np.abs(values).max() > MOST_BINS:
            found, times = np.unique(values, return_counts=True)
            return {float(v): int(n) for v, n in zip(found, times, strict=True)}
        values = values.astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if high - low > MOST_BINS:
        found, times = np.unique(values, return_counts=True)
        return {float(v): int(n) for v, n in zip(found, times, strict=True)}
    counts = np.bincount(values if low == 0 else values.astype(np.int64) - low)
    return {float(i + low): int(counts[i]) for i in np.flatnonzero(counts)}


def check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse empty and 4D images; `shape` in the file's order, (x, y, z, channels)."""
    if not shape or min(shape) == 0:
        raise UnreadableImageError(str(path), f"is empty: its shape is {shape}", REPLACE)
    if len(shape) > 3:
        raise UnreadableImageError(
            str(path),
            f"is {len(shape)}D with shape {tuple(shape)[::-1]} (channels, z, y, x)",
            "save one 3D file per channel, named <case>_0000, <case>_0001, ...",
        )


def digest_of(array: np.ndarray) -> bytes:
    """Return a digest of shape and values."""
    content = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16)
    content.update(str(array.shape).encode())
    return content.digest()


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, which names the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:160] if lines else type(error).__name__
