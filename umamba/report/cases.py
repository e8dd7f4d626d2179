"""The section of single cases: pictures of the best, median and worst, and a table of all."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from umamba.evaluation.tables import case_of, label_of_key, mean_per_case, values_per_case
from umamba.report import figures, overlays
from umamba.report.html import (
    Markup,
    details,
    dot,
    element,
    joined,
    missing,
    note,
    png,
    section,
    table,
    text,
)
from umamba.report.runs import Run, pooled_summary
from umamba.report.wording import METRICS, class_names

logger = logging.getLogger(__name__)
_ROWS = 1000  # cases that the table lists


def cases_section(run: Run, raw_folder: Path | None, reference_folder: Path | None) -> Markup:
    """Returns pictures of the best, the median and the worst case, and the table of all."""
    summary = pooled_summary(run.validated)
    if summary is None:
        return Markup("")
    names = class_names(run, summary)
    legend = [
        joined([element("span", "", "dash"), "reference (filled)"]),
        joined([element("span", "", "solid"), "prediction"]),
    ]
    if len(names) <= 12:
        coloured = enumerate(names.values())
        legend += [joined([dot(figures.colour_of(i)), name]) for i, name in coloured]
    else:
        legend.append(text("colours as in the table of classes"))
    shown = []
    for what, case, dice in overlays.chosen_cases(summary):
        title = element("h3", joined([f"{what}: {case}", element("span", f"mean Dice {dice:.3f}")]))
        pictures = _pictures(run, case, summary, list(names), raw_folder, reference_folder)
        shown.append(element("div", joined([title, pictures]), "case"))
    return section(
        "Cases",
        note(
            "Every picture shows the slice in which reference and prediction disagree most, cut to "
            "the surroundings of the labels."
        ),
        element("div", joined(element("span", entry) for entry in legend), "legend"),
        element("div", joined(shown), "cases"),
        details(f"All {len(summary['metric_per_case'])} cases", _case_table(summary, names)),
    )


def _pictures(
    run: Run,
    case: str,
    summary: Mapping[str, Any],
    keys: Sequence[str],
    raw_folder: Path | None,
    reference_folder: Path | None,
) -> Markup:
    entry = next(e for e in summary["metric_per_case"] if case_of(e) == case)
    name = f"{case}{run.file_ending}"
    image = _image_file(run, case, raw_folder)
    if image is None:
        return missing("No picture: the images of the dataset were not found.")
    references = [] if reference_folder is None else [reference_folder / name]
    references.append(Path(entry.get("reference_file") or name))
    predictions = [fold.folder / "validation" / name for fold in run.validated]
    predictions.append(Path(entry.get("prediction_file") or name))
    reference, prediction = _first_file(references), _first_file(predictions)
    try:
        pictures = overlays.draw_case(image, reference, prediction, [*map(label_of_key, keys)])
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s", error)
        return missing(f"No picture: {error}")
    shown = []
    for picture in pictures:
        description = f"{case} {picture.plane}: reference and prediction"
        parts = [png(picture.png, description)]
        if picture.plane:
            parts.append(element("figcaption", picture.plane))
        shown.append(element("figure", joined(parts)))
    return element("div", joined(shown), "planes")


def _first_file(candidates: Sequence[Path]) -> Path:
    return next((file for file in candidates if file.is_file()), candidates[-1])


def _image_file(run: Run, case: str, raw_folder: Path | None) -> Path | None:
    """Returns the first channel of a case's image."""
    if raw_folder is None:
        return None
    listed = run.dataset_json.get("dataset", {}).get(case, {}).get("images", [])
    candidates = [raw_folder / listed[0]] if listed else []
    candidates.append(raw_folder / "imagesTr" / f"{case}_0000{run.file_ending}")
    return next((file for file in candidates if file.is_file()), None)


def _case_table(summary: Mapping[str, Any], names: Mapping[str, str]) -> Markup:
    """Returns a row per case, the worst first."""
    means = {metric: mean_per_case(summary, metric) for metric, _, _ in METRICS}
    per_class = {key: values_per_case(summary, key, "Dice") for key in names}
    columns = list(names) if 1 < len(names) <= 8 else []
    cases = sorted(map(case_of, summary["metric_per_case"]), key=lambda c: means["Dice"].get(c, 2))
    rows = []
    for case in cases[:_ROWS]:
        dice = means["Dice"].get(case)
        row: list[Any] = [case, "undefined" if dice is None else (f"{dice:.3f}", dice)]
        row += [_or_dash(per_class[key].get(case)) for key in columns]
        row += [_or_dash(means["NSD"].get(case)), _or_dash(means["HD95"].get(case), 2)]
        rows.append(row)
    head = ["case", "mean Dice", *(f"Dice {names[k]}" for k in columns), "NSD", "HD95 mm"]
    parts: list[Any] = [table(head, rows)]
    if len(cases) > _ROWS:
        parts.append(note(f"The worst {_ROWS} of {len(cases)}; all of them are in summary.csv."))
    return joined(parts)


def _or_dash(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
