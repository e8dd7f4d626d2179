"""Finds the windows of a volume that cannot hold foreground: constant air, or far from the body."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy import ndimage
from skimage.filters import threshold_otsu

from umamba.inference.blocks import Window, WindowGrid, common

# A window is looked at in about so many cells along each axis.
CELLS = 16
# Air is told from tissue if its standard deviation is below this share of their distance: for
# halves of a normal distribution it is 0.38, of a uniform one 0.29.
CLEAR = 0.2
# Logits of what is not computed.
CERTAIN = 10.0


def find_empty_windows(
    data: torch.Tensor, windows: Sequence[Window], inside: Sequence[slice], n_channels: int
) -> frozenset[int]:
    """Numbers of the windows that are air throughout, or a quarter of a window off the body.

    The body is what is brighter than air in the first channel, with all that it encloses in any
    plane. Where air and tissue are not clearly apart, or the edges of the volume are not air, only
    windows at the lowest value throughout are empty.

    Args:
        data: (C, z, y, x), preprocessed; channels after the first `n_channels` are the label map
            of the previous stage of a cascade, whose foreground is never skipped.
        windows: nnU-Net's slicers into `data`.
        inside: (z, y, x) of `data` without its padding.
    """
    boxes = WindowGrid(windows, data.shape[1:]).boxes
    sides = [s.stop - s.start for s in boxes[0]]
    cell = [max(1, n // CELLS) for n in sides]
    content = np.zeros(
        [-(-(s.stop - s.start) // c) for s, c in zip(inside, cell, strict=True)], bool
    )
    body: np.ndarray | None = None
    for i, channel in enumerate(data[(slice(None), *inside)]):
        pooled = torch.nn.functional.max_pool3d(channel[None], cell, ceil_mode=True)[0]  # type: ignore[arg-type]
        highest = pooled.cpu().numpy()
        if i >= n_channels:
            content |= highest > 0
            body = None if body is None else body | (highest > 0)
            continue
        low, high = np.quantile(highest, (0.01, 0.99))
        content |= highest - float(channel.min()) > 1e-4 * (high - low)
        if i == 0:
            body = find_body(np.minimum(highest, high))

    def holds(mask: np.ndarray, box: Sequence[slice], margin: Sequence[int]) -> bool:
        part = []
        for b, s, c, m in zip(box, inside, cell, margin, strict=True):
            near = common(slice(b.start - m, b.stop + m), s)
            part.append(slice((near.start - s.start) // c, -((s.start - near.stop) // c)))
        return bool(mask[tuple(part)].any())

    quarter = [n // 4 for n in sides]
    return frozenset(
        i
        for i, box in enumerate(boxes)
        if not holds(content, box, (0, 0, 0))
        or (body is not None and not holds(body, box, quarter))
    )


def find_body(values: np.ndarray) -> np.ndarray | None:
    """Mask of the large bright parts of a volume, filled; None where they are not clearly there."""
    bright = values > threshold_otsu(values)
    if not bright.any():
        return None
    air, tissue = values[~bright], values[bright]
    at_border = sum(
        np.isin(index, (0, n - 1)).astype(int)
        for index, n in zip(np.ogrid[tuple(map(slice, values.shape))], values.shape, strict=True)
        if n > 1
    )
    edges = at_border >= max(1, sum(n > 1 for n in values.shape) - 1)
    if air.std() > CLEAR * (tissue.mean() - air.mean()) or bright[edges].mean() > 0.1:
        return None
    parts, _ = ndimage.label(bright, np.ones((3, 3, 3)))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    large = (sizes > 0.01 * sizes.max())[parts]
    body: np.ndarray = large.copy()
    for axis in range(3):
        for plane, filled in zip(
            np.moveaxis(large, axis, 0), np.moveaxis(body, axis, 0), strict=True
        ):
            filled |= ndimage.binary_fill_holes(plane)
    return body if body.mean() < 0.9 else None


def background_logits(label_manager: LabelManager) -> list[float]:
    """Logits (K,) that decide background; for regions all are off."""
    first = -CERTAIN if label_manager.has_regions else CERTAIN
    return [first] + [-CERTAIN] * (label_manager.num_segmentation_heads - 1)
