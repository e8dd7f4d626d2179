"""Where the classes of a preprocessed case lie, and which patches hold a given voxel."""

from __future__ import annotations

import io
import pickle
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Extents = Sequence[int] | np.ndarray

LARGE_BLOCK = 32_768  # bytes; the voxels of a class, where they are worth leaving out
MARGIN = 8  # of the patch's extent stay clear on each side: an eighth


def count_locations(file: Path) -> dict[Hashable, int]:
    """Returns how many voxels nnU-Net's properties of a case list per class, none of them read.

    Raises ValueError where the file is damaged or knows no classes.
    """
    try:
        with _SkippingReader(io.FileIO(file)) as skimmed:
            located = pickle.load(skimmed)["class_locations"]
    except (EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} does not tell where the classes of its case lie: preprocess the case again"
        ) from error
    return {name: len(voxels) for name, voxels in located.items()}


class _SkippingReader(io.BufferedReader):
    """Passes over large blocks in place of reading them: their content is undefined."""

    def readinto(self, buffer: Any) -> int:
        if memoryview(buffer).nbytes < LARGE_BLOCK:
            return super().readinto(buffer)
        start = self.tell()
        end = self.seek(0, io.SEEK_END)
        n_bytes = min(memoryview(buffer).nbytes, end - start)
        self.seek(start + n_bytes)
        return n_bytes


def corner_bounds(
    shape: Extents, patch: Extents, padding: Extents
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest corner of nnU-Net's random patches of an image.

    padding: voxels per axis, both sides together, by which patches may leave the image.
    """
    sizes, patch = np.asarray(shape), np.asarray(patch)
    outside = (np.maximum(padding, patch - sizes) + 1) // 2
    return -outside, sizes + outside - patch


def jittered_bounds(
    voxel: np.ndarray,
    shape: Extents,
    patch: Extents,
    seen: Extents,
    padding: Extents,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest corner of the patches that hold a voxel off their border.

    voxel: (..., axes). seen: extent of the middle of the patch that augmentation leaves for the
    network. A patch keeps the voxel an eighth of `seen` away from the border of `seen`, save where
    the voxel lies so near to the border of the image that no patch within `corner_bounds` does.
    """
    patch, seen = np.asarray(patch), np.asarray(seen)
    first = (patch - seen) // 2 + seen // MARGIN
    last = (patch - seen) // 2 + seen - 1 - seen // MARGIN
    lowest, highest = corner_bounds(shape, patch, padding)
    return np.clip(voxel - last, lowest, highest), np.clip(voxel - first, lowest, highest)
