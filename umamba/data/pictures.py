"""Reads PNG, BMP and TIFF as nnU-Net does, and finds TIFF files that are cut short."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np

from umamba.data.content import REPLACE, ImageContent, check_shape, digest_of
from umamba.data.faults import UnreadableImageError


def read_natural(path: Path) -> ImageContent:
    """Read a 2D picture: gray is one channel, RGB(A) three (four)."""
    from skimage import io  # 0.2 s, and only 2D datasets need it

    return _from_pixels(path, np.asarray(io.imread(path)))


def _from_pixels(path: Path, array: np.ndarray) -> ImageContent:
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        array = array.transpose(2, 0, 1)
    elif array.ndim == 2:
        array = array[None]
    else:
        raise UnreadableImageError(
            str(path),
            f"has the shape {array.shape}, which is neither gray nor RGB(A)",
            "save it as a gray or RGB image",
        )
    check_shape(path, array.shape[1:])
    return ImageContent(array[:, None], (999.0, 1.0, 1.0), None, digest_of(array))


def read_tiff(path: Path, ending: str, is_label: bool) -> ImageContent:
    """Read a 2D .tif as a picture, any other TIFF as a volume with its spacing in a .json."""
    import tifffile

    _check_tiff_pages(path)
    array = np.asarray(tifffile.imread(path))
    if ending == ".tif" and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        return _from_pixels(path, array)
    if array.ndim != 3:
        cure = "rename it to .tif" if array.ndim == 2 else "save one 3D volume per file"
        raise UnreadableImageError(
            str(path), f"has {array.ndim} axes where nnU-Net reads 3D volumes from {ending}", cure
        )
    check_shape(path, array.shape)
    stem = path.name[: -len(ending)]
    aside = path.with_name((stem if is_label else stem[:-5]) + ".json")
    spacing = (1.0, 1.0, 1.0)
    if aside.is_file():
        spacing = _spacing_beside(aside)
    return ImageContent(array[None], spacing, None, digest_of(array))


def _spacing_beside(path: Path) -> tuple[float, float, float]:
    cure = 'write {"spacing": [z, y, x]} in mm'
    try:
        z, y, x = (float(s) for s in json.loads(path.read_text())["spacing"])
    except (ValueError, KeyError, TypeError):
        raise UnreadableImageError(str(path), "has no spacing of three numbers", cure) from None
    if not all(math.isfinite(s) and s > 0 for s in (z, y, x)):
        raise UnreadableImageError(str(path), "has a spacing that is not positive", cure)
    return z, y, x


def _check_tiff_pages(path: Path) -> None:
    """Walk the chain of pages: tifffile silently drops those behind the end of a cut file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            return
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        word, count_word, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
        width, count_width = struct.calcsize("=" + word), struct.calcsize("=" + count_word)
        position = struct.unpack(order + word, head[8:16] if big else head[4:8])[0]
        seen: set[int] = set()
        while position and position not in seen:
            seen.add(position)
            if position + count_width > size:
                raise UnreadableImageError(str(path), "is cut short: pages are missing", REPLACE)
            file.seek(position)
            n = struct.unpack(order + count_word, file.read(count_width))[0]
            file.seek(position + count_width + n * entry)
            rest = file.read(width)
            if len(rest) < width:
                raise UnreadableImageError(str(path), "is cut short: pages are missing", REPLACE)
            position = struct.unpack(order + word, rest)[0]
