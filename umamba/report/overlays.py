"""Pictures of single cases: image slices with the contours of reference and prediction, as PNG."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from umamba.evaluation.images import View, read_view
from umamba.evaluation.overlap import Label, label_mask, label_values
from umamba.evaluation.tables import mean_per_case
from umamba.report.figures import colour_of

_PIXELS = 440  # longer side of a picture
_DPI = 100
_ANATOMICAL = ("axial", "coronal", "sagittal")
_PLAIN = ("across the first axis", "across the second axis", "across the third axis")


@dataclass(frozen=True)
class Picture:
    """A plane of a case as PNG."""

    plane: str
    png: bytes


def chosen_cases(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Returns (what it is, case, mean Dice) of the best, the median and the worst case."""
    ranked = sorted(mean_per_case(summary).items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) < 2:
        return [("Only case", *item) for item in ranked]
    chosen = [("Best", *ranked[0]), ("Worst", *ranked[-1])]
    if len(ranked) > 2:
        chosen.insert(1, ("Median", *ranked[len(ranked) // 2]))
    return chosen


def draw_case(
    image_file: Path, reference_file: Path, prediction_file: Path, labels: Sequence[Label]
) -> list[Picture]:
    """Returns three planes of a volume, one of a 2D image, cut to the surroundings of the labels.

    Each shows the slice in which reference and prediction disagree most. Raises FileNotFoundError
    or ValueError where a file is missing, unreadable or of another shape than the image.
    """
    image, reference, prediction = map(read_view, (image_file, reference_file, prediction_file))
    shape = image.array.shape[: len(image.spacing)]
    for file, view in ((reference_file, reference), (prediction_file, prediction)):
        if view.array.shape != shape:
            raise ValueError(
                f"{file}: shape {view.array.shape} is not the {shape} of {image_file}; "
                "give the image that was predicted"
            )
    volume, refs, preds = map(_as_volume, (image, reference, prediction))
    spacing = (1.0,) * (3 - len(shape)) + tuple(image.spacing)
    flat = [axis for axis in range(3) if refs.shape[axis] == 1]
    values = [value for label in labels for value in label_values(label)]
    foreground = np.isin(refs, values) | np.isin(preds, values)
    window = _surroundings(foreground)
    volume, refs, preds, foreground = (p[window] for p in (volume, refs, preds, foreground))
    wrong = foreground & (refs != preds)
    grey_range = _grey_range(volume)
    names = _ANATOMICAL if image.anatomical else _PLAIN
    pictures = []
    for axis in flat[:1] or range(3):
        at = _slice_to_show(wrong, foreground, axis)
        planes = [np.take(part, at, axis=axis) for part in (volume, refs, preds)]
        if image.anatomical and axis > 0:
            planes = [plane[::-1] for plane in planes]  # the head is up
        pixel = tuple(spacing[other] for other in range(3) if other != axis)
        name = "" if flat else names[axis]
        pictures.append(
            Picture(name, _draw(planes[0], planes[1], planes[2], pixel, labels, grey_range))
        )
    return pictures


def _as_volume(view: View) -> np.ndarray:
    return view.array if len(view.spacing) == 3 else view.array[None]


def _surroundings(foreground: np.ndarray) -> tuple[slice, ...]:
    """Returns the box around the foreground, with a third of its extent on each side."""
    window: list[slice] = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        present = np.flatnonzero(foreground.any(axis=others))
        if present.size == 0:
            return (slice(None),) * 3
        margin = max(8, (present[-1] - present[0]) // 3)
        window.append(slice(max(0, present[0] - margin), present[-1] + margin + 1))
    return tuple(window)


def _grey_range(volume: np.ndarray) -> tuple[float, float]:
    finite = volume[np.isfinite(volume)] if volume.dtype.kind == "f" else volume
    if volume.ndim == 4 and volume.dtype == np.uint8:
        return 0.0, 255.0
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 1.0)
    return float(low), float(high if high > low else low + 1)


def _slice_to_show(wrong: np.ndarray, foreground: np.ndarray, axis: int) -> int:
    """Returns the slice with most wrong voxels; among equals the one with most foreground."""
    others = tuple(other for other in range(3) if other != axis)
    share = foreground.sum(axis=others) / (foreground.size + 1)
    return int((wrong.sum(axis=others) + share).argmax())


def _draw(
    image: np.ndarray,
    reference: np.ndarray,
    prediction: np.ndarray,
    pixel: Sequence[float],
    labels: Sequence[Label],
    grey_range: tuple[float, float],
) -> bytes:
    """Returns the PNG of one slice; pixel: height and width of a pixel in mm."""
    height, width = image.shape[0] * pixel[0], image.shape[1] * pixel[1]
    scale = _PIXELS / max(height, width) / _DPI
    # a sliver would be unreadable: never thinner than a third
    size = max(width * scale, _PIXELS / _DPI / 3), max(height * scale, _PIXELS / _DPI / 3)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    low, high = grey_range
    if image.ndim == 3:
        image = np.clip((image.astype(float) - low) / (high - low), 0, 1)
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear", aspect="auto")
    for index, label in enumerate(labels):
        mask = label_mask(reference, label)
        if mask.any():
            fill = np.zeros((*mask.shape, 4))
            fill[mask] = to_rgba(colour_of(index), 0.22)
            axes.imshow(fill, interpolation="nearest", aspect="auto")
    for index, label in enumerate(labels):
        _contour(axes, label_mask(reference, label), "white", 1.0, "dashed")
        _contour(axes, label_mask(prediction, label), colour_of(index), 1.8, "solid")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="black", metadata={"Software": None})
    return stream.getvalue()


def _contour(axes: Axes, mask: np.ndarray, colour: str, width: float, style: str) -> None:
    # matplotlib warns where there is no line to draw
    if mask.any() and not mask.all() and min(mask.shape) > 1:
        axes.contour(mask, [0.5], colors=[colour], linewidths=[width], linestyles=[style])
