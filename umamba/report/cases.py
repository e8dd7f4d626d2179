"""The section of single cases: pictures of the best, median and worst, and a table of all."""

import io
import logging
from ast import literal_eval
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from umamba.evaluation.images import read_view
from umamba.evaluation.overlap import Label, label_mask, label_values
from umamba.evaluation.tables import case_of, mean_per_case, values_per_case
from umamba.report.figures import colour_of
from umamba.report.html import (
    Markup,
    details,
    dot,
    element,
    missing,
    note,
    png,
    rounded,
    section,
    table,
)
from umamba.report.runs import METRICS, Run

logger = logging.getLogger(__name__)
_ROWS = 1000  # cases that the table lists
_PIXELS = 440  # longer side of a picture
_DPI = 100
_OTHER_AXES = ((1, 2), (0, 2), (0, 1))
_ANATOMICAL = ("axial", "coronal", "sagittal")
_PLAIN = ("across the first axis", "across the second axis", "across the third axis")


def cases_section(run: Run, raw_folder: Path | None, reference_folder: Path | None) -> Markup:
    """Returns pictures of the best, the median and the worst case, and the table of all."""
    summary = run.summary
    if not summary:
        return Markup("")
    names = summary["label_names"].values()
    legend = [
        element("span", element("span", css="dash"), "reference (filled)"),
        element("span", element("span", css="solid"), "prediction"),
    ]
    if len(names) <= 12:
        legend += [element("span", dot(colour_of(i)), name) for i, name in enumerate(names)]
    else:
        legend.append(element("span", "colours as in the table of classes"))
    shown = []
    for what, case, dice in chosen_cases(summary):
        title = element("h3", f"{what}: {case}", element("span", f"mean Dice {dice:.3f}"))
        pictures = _pictures(run, case, raw_folder, reference_folder)
        shown.append(element("div", title, pictures, css="case"))
    return section(
        "Cases",
        note(
            "Every picture shows the slice in which reference and prediction disagree most, cut to "
            "the surroundings of the labels."
        ),
        element("div", *legend, css="legend"),
        element("div", *shown, css="cases"),
        details(f"All {len(summary['metric_per_case'])} cases", *_case_table(summary)),
    )


def _pictures(run: Run, case: str, raw: Path | None, references: Path | None) -> Markup:
    """Returns the planes of a case, or a sentence that says which file is missing or wrong."""
    name = f"{case}{run.file_ending}"
    listed = run.dataset_json.get("dataset", {}).get(case, {}).get("images", [])
    channel = f"imagesTr/{case}_0000{run.file_ending}"
    images = [] if raw is None else [raw / file for file in (*listed[:1], channel)]
    if not any(image.is_file() for image in images):
        return missing("No picture: the images of the dataset were not found.")
    entry = next(entry for entry in run.summary["metric_per_case"] if case_of(entry) == case)
    given = [] if references is None else [references / name]
    given.append(Path(entry.get("reference_file") or name))
    predictions = [fold.folder / "validation" / name for fold in run.validated]
    predictions.append(Path(entry.get("prediction_file") or name))
    labels = [literal_eval(key) for key in run.summary["label_names"]]
    files = _first_file(images), _first_file(given), _first_file(predictions)
    try:
        pictures = draw_case(*files, labels)
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s", error)
        return missing(f"No picture: {error}")
    shown = []
    for plane, content in pictures:
        picture = png(content, f"{case} {plane}: reference and prediction")
        caption = [element("figcaption", plane)] if plane else []
        shown.append(element("figure", picture, *caption))
    return element("div", *shown, css="planes")


def _first_file(candidates: Sequence[Path]) -> Path:
    return next((file for file in candidates if file.is_file()), candidates[-1])


def _case_table(summary: Mapping[str, Any]) -> list[Markup]:
    """Returns a row per case, the worst first."""
    dice, nsd, hd95 = (mean_per_case(summary, metric) for metric, _, _ in METRICS)
    names = summary["label_names"] if 1 < len(summary["label_names"]) <= 8 else {}
    columns = [values_per_case(summary, label, "Dice") for label in names]
    cases = sorted(map(case_of, summary["metric_per_case"]), key=lambda case: dice.get(case, 2))
    rows = [
        [
            case,
            (rounded(dice[case]), dice[case]) if case in dice else "undefined",
            *(rounded(column.get(case)) for column in [*columns, nsd]),
            rounded(hd95.get(case), 2),
        ]
        for case in cases[:_ROWS]
    ]
    head = ["case", "mean Dice", *(f"Dice {name}" for name in names.values()), "NSD", "HD95 mm"]
    parts = [table(head, rows)]
    if len(cases) > _ROWS:
        parts.append(note(f"The worst {_ROWS} of {len(cases)}; all of them are in summary.csv."))
    return parts


def chosen_cases(summary: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Returns (what it is, case, mean Dice) of the best, the median and the worst case."""
    ranked = sorted(mean_per_case(summary).items(), key=lambda item: (-item[1], item[0]))
    if len(ranked) < 2:
        return [("Only case", *item) for item in ranked]
    median = [("Median", *ranked[len(ranked) // 2])] if len(ranked) > 2 else []
    return [("Best", *ranked[0]), *median, ("Worst", *ranked[-1])]


def draw_case(
    image_file: Path, reference_file: Path, prediction_file: Path, labels: Sequence[Label]
) -> list[tuple[str, bytes]]:
    """Returns three planes of a volume, one of a 2D image, as (name, PNG).

    Each is cut to the surroundings of the labels and shows the slice in which reference and
    prediction disagree most. Raises FileNotFoundError or ValueError where a file is missing,
    unreadable or of another shape than the image.
    """
    image, reference, prediction = map(read_view, (image_file, reference_file, prediction_file))
    shape = image.array.shape[: len(image.spacing)]
    for file, view in ((reference_file, reference), (prediction_file, prediction)):
        if view.array.shape != shape:
            raise ValueError(
                f"{file}: shape {view.array.shape} is not the {shape} of {image_file}; "
                "give the image that was predicted"
            )
    volume, refs, preds = (
        view.array if len(shape) == 3 else view.array[None]
        for view in (image, reference, prediction)
    )
    spacing = image.spacing if len(shape) == 3 else (1.0, *image.spacing)
    flat = [axis for axis in range(3) if refs.shape[axis] == 1]
    values = [value for label in labels for value in label_values(label)]
    foreground = np.isin(refs, values) | np.isin(preds, values)
    window = _surroundings(foreground)
    volume, refs, preds, foreground = (p[window] for p in (volume, refs, preds, foreground))
    wrong = foreground & (refs != preds)
    limits = _grey_range(volume)
    names = _ANATOMICAL if image.anatomical else _PLAIN
    pictures = []
    for axis in flat[:1] or range(3):
        others = _OTHER_AXES[axis]
        # most wrong voxels; among equals most foreground
        share = foreground.sum(axis=others) / (foreground.size + 1)
        at = int((wrong.sum(axis=others) + share).argmax())
        planes = [np.take(part, at, axis=axis) for part in (volume, refs, preds)]
        if image.anatomical and axis > 0:
            planes = [plane[::-1] for plane in planes]  # the head is up
        pixel = [spacing[other] for other in others]
        pictures.append(("" if flat else names[axis], _draw(planes, pixel, labels, limits)))
    return pictures


def _surroundings(foreground: np.ndarray) -> tuple[slice, ...]:
    """Returns the box around the foreground, with a third of its extent on each side."""
    window: list[slice] = []
    for others in _OTHER_AXES:
        present = np.flatnonzero(foreground.any(axis=others))
        if present.size == 0:
            return (slice(None),) * 3
        margin = max(8, (present[-1] - present[0]) // 3)
        window.append(slice(max(0, present[0] - margin), present[-1] + margin + 1))
    return tuple(window)


def _grey_range(volume: np.ndarray) -> tuple[float, float]:
    if volume.ndim == 4 and volume.dtype == np.uint8:
        return 0.0, 255.0
    finite = volume[np.isfinite(volume)]
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 1.0)
    return float(low), float(high if high > low else low + 1)


def _draw(
    planes: Sequence[np.ndarray],
    pixel: Sequence[float],
    labels: Sequence[Label],
    limits: tuple[float, float],
) -> bytes:
    """Returns the PNG of one slice of image, reference and prediction.

    pixel: height and width in mm; limits: the values shown black and white.
    """
    image, reference, prediction = planes
    height, width = image.shape[0] * pixel[0], image.shape[1] * pixel[1]
    scale = _PIXELS / max(height, width) / _DPI
    least = _PIXELS / _DPI / 3  # a thinner sliver would be unreadable
    size = max(width * scale, least), max(height * scale, least)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="black")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    low, high = limits
    if image.ndim == 3:
        image = np.clip((image.astype(float) - low) / (high - low), 0, 1)
    axes.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="bilinear", aspect="auto")
    masks = [(label_mask(reference, label), label_mask(prediction, label)) for label in labels]
    for index, (wanted, _) in enumerate(masks):
        if wanted.any():
            fill = np.zeros((*wanted.shape, 4))
            fill[wanted] = to_rgba(colour_of(index), 0.22)
            axes.imshow(fill, interpolation="nearest", aspect="auto")
    for index, (wanted, found) in enumerate(masks):
        _contour(axes, wanted, "white", 1.0, "dashed")
        _contour(axes, found, colour_of(index), 1.8, "solid")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", facecolor="black", metadata={"Software": None})
    return stream.getvalue()


def _contour(axes: Axes, mask: np.ndarray, colour: str, width: float, style: str) -> None:
    # matplotlib warns where there is no line to draw
    if mask.any() and not mask.all() and min(mask.shape) > 1:
        axes.contour(mask, [0.5], colors=[colour], linewidths=[width], linestyles=[style])
