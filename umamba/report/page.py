"""Builds the report of one or several runs: a single HTML file that needs nothing else."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from umamba.evaluation.statistics import compare_summaries
from umamba.evaluation.tables import mean_per_case, spread_of, values_per_case
from umamba.report import sections
from umamba.report.cases import cases_section
from umamba.report.html import Markup, document, element, joined, note, section, table, tile
from umamba.report.runs import Run, pooled_summary, read_run
from umamba.report.wording import class_names, duration, tolerance_text

_PACKAGES = ("umamba", "torch", "nnunetv2", "numpy", "scipy", "SimpleITK")


def build_report(
    run_folders: list[Path],
    output: Path,
    raw_folder: Path | None = None,
    reference_folder: Path | None = None,
) -> Path:
    """Writes the page about the runs to `output` and returns its path.

    run_folders: model folders or folds of them. raw_folder: the dataset's raw folder (imagesTr),
    reference_folder: its gt_segmentations; without them there are no pictures of cases. What a run
    lacks (curves, validation) is said in a sentence. Raises FileNotFoundError or ValueError for a
    folder that is no run.
    """
    runs = [read_run(Path(folder)) for folder in run_folders]
    if not runs:
        raise ValueError("no run given; name a model folder or a fold of it")
    parts = [_head(runs)]
    if len(runs) > 1:
        parts.append(_comparison(runs))
    for run in runs:
        body = _run_body(run, raw_folder, reference_folder)
        if len(runs) > 1:
            title = element("h1", f"{run.network} · {run.configuration}")
            body = element(
                "div", joined([element("p", run.plans_name, "eyebrow"), title, body]), "run"
            )
        parts.append(body)
    parts.append(_versions())
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        page_title = f"{_dataset_title(runs[0])}: {', '.join(run.network for run in runs)}"
        temporary.write_text(document(page_title, joined(parts)), encoding="utf-8")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return output


def _run_body(run: Run, raw_folder: Path | None, reference_folder: Path | None) -> Markup:
    return joined(
        [
            _tiles(run),
            sections.result_section(run),
            cases_section(run, raw_folder, reference_folder),
            sections.training_section(run),
            sections.plan_section(run),
            sections.data_section(run),
            sections.next_section(run),
        ]
    )


def _head(runs: Sequence[Run]) -> Markup:
    title = element("h1", _dataset_title(runs[0]))
    lead = _lead(runs[0]) if len(runs) == 1 else f"{len(runs)} runs side by side."
    eyebrow = element("p", "Segmentation report", "eyebrow")
    return element("header", joined([eyebrow, title, element("p", lead, "lead")]), "top")


def _lead(run: Run) -> Markup:
    """Returns the run in one sentence."""
    parts: list[Any] = [element("strong", run.network), f", configuration {run.configuration}"]
    seconds = [s for s in map(sections.training_seconds, run.folds) if s is not None]
    if seconds:
        parts.append(f", trained for {duration(sum(seconds))}")
    summary = pooled_summary(run.validated)
    dice = _mean(run, "Dice")
    if summary is not None and dice is not None:
        n_cases = len(summary["metric_per_case"])
        result = element("strong", f"mean Dice of {dice:.3f}")
        parts += [", reaches a ", result, f" on {n_cases} validation cases."]
    else:
        parts.append(". It has no validation yet.")
    return Markup("".join(element("span", part) for part in parts))


def _tiles(run: Run) -> Markup:
    """Returns the figures that one looks for first."""
    tiles = []
    summary = pooled_summary(run.validated)
    if summary is not None:
        spread = spread_of(list(mean_per_case(summary).values()))
        n_cases = len(summary["metric_per_case"])
        std = "" if spread["std"] is None else f"± {spread['std']:.3f} over {n_cases} cases"
        shown = [(_mean(run, m), m) for m in ("Dice", "NSD", "HD95")]
        for value, metric in shown:
            if value is None:
                continue
            more = std if metric == "Dice" else ""
            more = f"at {tolerance_text(summary)}" if metric == "NSD" else more
            text = f"{value:.2f} mm" if metric == "HD95" else f"{value:.3f}"
            tiles.append(tile(f"mean {metric}", text, more))
    seconds = [s for s in map(sections.training_seconds, run.folds) if s is not None]
    if seconds:
        asked = sections.asked_minutes(run)
        more = f"of {asked:g} min for everything" if asked is not None else ""
        tiles.append(tile("training", duration(sum(seconds)), more))
    parameters = sections.parameters_of(run)
    if parameters is not None:
        tiles.append(tile("parameters", f"{parameters / 1e6:.1f} M", f"{parameters:,}"))
    return element("div", joined(tiles), "tiles") if tiles else Markup("")


def _comparison(runs: Sequence[Run]) -> Markup:
    """Returns a row per run, and the paired statistics of each against the first."""
    rows = []
    for run in runs:
        values = [_mean(run, metric) for metric in ("Dice", "NSD", "HD95")]
        seconds = [s for s in map(sections.training_seconds, run.folds) if s is not None]
        cells: list[Any] = [f"{run.network} · {run.plans_name} · {run.configuration}"]
        cells += ["–" if v is None else f"{v:.3f}" for v in values]
        cells.append(duration(sum(seconds)) if seconds else "–")
        rows.append(cells)
    content: list[Any] = [table(["run", "Dice", "NSD", "HD95 mm", "training"], rows)]
    first = pooled_summary(runs[0].validated)
    for run in runs[1:]:
        content += _paired(runs[0], first, run)
    return section("Comparison", *content)


def _paired(base: Run, first: dict[str, Any] | None, run: Run) -> list[Any]:
    """Returns the paired comparison of two runs on the cases that both validated."""
    second = pooled_summary(run.validated)
    heading = element("h3", f"{run.plans_name} minus {base.plans_name}: Dice, case by case")
    if first is None or second is None:
        return [heading, note("One of the two has no validation.")]
    try:
        compared = compare_summaries(first, second)
    except ValueError:
        return [heading, note("The two were validated on different cases.")]
    names = {"mean": "mean over classes", **class_names(base, first)}
    rows = [
        [
            names.get(row.name, row.name),
            row.n,
            f"{row.difference:+.4f}",
            f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}",
            f"{row.p_holm:.3g}",
            f"{row.wins} / {row.ties} / {row.losses}",
        ]
        for row in compared
    ]
    head = ["class", "cases", "difference", "95 % interval", "p", "better / equal / worse"]
    explained = (
        "Interval: bootstrap over cases. p: Wilcoxon's signed-rank test, zeros by Pratt's rule, "
        "adjusted over the classes by Holm. One training each: the spread over seeds is not in it."
    )
    return [heading, table(head, rows), note(explained)]


def _mean(run: Run, metric: str) -> float | None:
    """Returns the foreground mean of a single fold, or the mean over the pooled folds' classes."""
    validated = run.validated
    if len(validated) == 1:
        value = validated[0].summary["foreground_mean"].get(metric)  # type: ignore[index]
        return None if value is None else float(value)
    summary = pooled_summary(validated)
    if summary is None:
        return None
    keys = class_names(run, summary)
    means = [
        spread_of(list(values_per_case(summary, key, metric).values()))["mean"] for key in keys
    ]
    defined = [mean for mean in means if mean is not None]
    return sum(defined) / len(defined) if defined else None


def _dataset_title(run: Run) -> str:
    name = run.dataset_name
    if name.startswith("Dataset") and "_" in name:
        name = name.split("_", 1)[1]
    return name.replace("_", " ")


def _versions() -> Markup:
    shown = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            shown.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return element("footer", "Written with " + ", ".join(shown) + ".")
