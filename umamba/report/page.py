"""Builds the report of one or several runs: a single HTML file that needs nothing else."""

import contextlib
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from umamba.evaluation.statistics import compare_summaries
from umamba.evaluation.tables import mean_per_case, spread_of
from umamba.files import write_text
from umamba.report import figures
from umamba.report.cases import cases_section
from umamba.report.html import (
    Markup,
    by,
    details,
    document,
    dot,
    duration,
    element,
    facts,
    joined,
    missing,
    note,
    rounded,
    section,
    spaced,
    table,
)
from umamba.report.runs import METRICS, Fold, Run, read_run
from umamba.report.sampling import EXPLAINED, sampling_rows

_PACKAGES = ("umamba", "torch", "nnunetv2", "numpy", "scipy", "SimpleITK")


def build_report(
    run_folders: Sequence[Path],
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
    runs = [read_run(folder) for folder in run_folders]
    if not runs:
        raise ValueError("no run given; name a model folder or a fold of it")
    # Dataset511_Spheres -> Spheres
    dataset = re.sub("^Dataset[^_]*_", "", runs[0].dataset_name).replace("_", " ")
    lead = _lead(runs[0]) if len(runs) == 1 else f"{len(runs)} runs side by side."
    eyebrow = element("p", "Segmentation report", css="eyebrow")
    head = (eyebrow, element("h1", dataset), element("p", lead, css="lead"))
    parts = [element("header", *head, css="top")]
    if len(runs) > 1:
        parts.append(_comparison(runs))
    for run in runs:
        body = [
            _tiles(run),
            _result(run),
            cases_section(run, raw_folder, reference_folder),
            _training(run),
            _plan(run),
            _data(run),
            _next_step(run),
        ]
        if len(runs) > 1:
            eyebrow = element("p", run.plans_name, css="eyebrow")
            title = element("h1", f"{run.network} · {run.configuration}")
            body = [element("div", eyebrow, title, *body, css="run")]
        parts += body
    parts.append(_versions())
    page_title = f"{dataset}: {', '.join(run.network for run in runs)}"
    write_text(output, document(page_title, joined(*parts)))
    return output


def _lead(run: Run) -> Markup:
    parts: list[Any] = [element("strong", run.network), f", configuration {run.configuration}"]
    if run.seconds is not None:
        parts.append(f", trained for {duration(run.seconds)}")
    dice = run.mean("Dice")
    if dice is None:
        parts.append(". It has no validation yet.")
    else:
        n_cases = len(run.summary["metric_per_case"])
        result = element("strong", f"mean Dice of {dice:.3f}")
        parts += [", reaches a ", result, f" on {n_cases} validation cases."]
    return Markup("".join(element("span", part) for part in parts))


def _comparison(runs: Sequence[Run]) -> Markup:
    """Returns a row per run, and the paired statistics of each against the first."""
    rows = []
    for run in runs:
        means = [rounded(run.mean(metric)) for metric, _, _ in METRICS]
        name = f"{run.network} · {run.plans_name} · {run.configuration}"
        rows.append([name, *means, duration(run.seconds)])
    paired = [part for run in runs[1:] for part in _paired(runs[0], run)]
    head = ["run", "Dice", "NSD", "HD95 mm", "training"]
    return section("Comparison", table(head, rows), *paired)


def _paired(base: Run, run: Run) -> list[Markup]:
    """Returns the paired comparison of two runs on the cases that both validated."""
    heading = element("h3", f"{run.plans_name} minus {base.plans_name}: Dice, case by case")
    if not base.summary or not run.summary:
        return [heading, note("One of the two has no validation.")]
    try:
        compared = compare_summaries(base.summary, run.summary)
    except ValueError:
        return [heading, note("The two were validated on different cases.")]
    names = {"mean": "mean over classes", **base.summary["label_names"]}
    rows = []
    for row in compared:
        low, high = row.interval
        effect = (f"{row.difference:+.4f}", f"{low:+.4f} to {high:+.4f}", f"{row.p_holm:.3g}")
        counts = f"{row.wins} / {row.ties} / {row.losses}"
        rows.append([names.get(row.name, row.name), row.n, *effect, counts])
    head = ["class", "cases", "difference", "95 % interval", "p", "better / equal / worse"]
    explained = (
        "Interval: bootstrap over cases. p: Wilcoxon's signed-rank test, zeros by Pratt's rule, "
        "adjusted over the classes by Holm. One training each: the spread over seeds is not in it."
    )
    return [heading, table(head, rows), note(explained)]


def _tiles(run: Run) -> Markup:
    tiles = []
    if run.summary:
        more = {"NSD": f"at {run.summary['tolerance']}"}
        std = spread_of(list(mean_per_case(run.summary).values()))["std"]
        if std is not None:
            more["Dice"] = f"± {std:.3f} over {len(run.summary['metric_per_case'])} cases"
        for metric, _, bounded in METRICS:
            mean = run.mean(metric)
            if mean is not None:
                shown = f"{mean:.3f}" if bounded else f"{mean:.2f} mm"
                tiles.append((f"mean {metric}", shown, more.get(metric, "")))
    if run.seconds is not None:
        asked = "" if run.minutes is None else f"of {run.minutes:g} min for everything"
        tiles.append(("training", duration(run.seconds), asked))
    if run.parameters is not None:
        tiles.append(("parameters", f"{run.parameters / 1e6:.1f} M", f"{run.parameters:,}"))
    drawn = []
    for name, value, explained in tiles:
        lines = (("value", value), ("name", name), ("more", explained))
        spans = [element("span", text, css=css) for css, text in lines if text]
        drawn.append(element("div", *spans, css="tile"))
    return element("div", *drawn, css="tiles") if drawn else Markup("")


def _result(run: Run) -> Markup:
    """Returns Dice, NSD and HD95 per class with their spread over the validation cases."""
    summary = run.summary
    if not summary:
        sentence = "There is no validation yet: it comes after the training."
        return section("Result", missing(sentence))
    values, n_cases = summary["values"], len(summary["metric_per_case"])
    folds = ", ".join(fold.title for fold in run.validated)
    seen = any(fold.number == "all" for fold in run.validated)
    how = ", which were also used for" if seen else " that the network did not see in"
    strips = []
    for metric, title, bounded in METRICS:
        if any(values[metric].values()):
            title = f"NSD at {summary['tolerance']}" if metric == "NSD" else title
            named = dict(zip(summary["label_names"].values(), values[metric].values(), strict=True))
            strips.append(figures.metric_strips(title, named, bounded))
    rows = []
    for index, (label, name) in enumerate(summary["label_names"].items()):
        cells = [_mean_and_std(values[metric][label], bounded) for metric, _, bounded in METRICS]
        n_defined = f"{len(values['Dice'][label])} of {n_cases}"
        rows.append([joined(dot(figures.colour_of(index)), name), n_defined, *cells])
    return section(
        "Result",
        note(
            f"Validation of {folds}: {n_cases} cases{how} training. "
            "A dot is a case, the bar the middle half, the line the median."
        ),
        element("div", *strips, css="charts"),
        table(["class", "cases", *(title for _, title, _ in METRICS)], rows),
        details("How these figures are defined", _rules(summary)),
        *(note(_mirrored(fold)) for fold in run.validated if fold.mirrored),
        *(missing(f"Not evaluated: {e.get('error', e)}") for e in summary["failed"]),
    )


def _mean_and_std(values: Sequence[float], bounded: bool) -> str | tuple[str, float]:
    """Returns a cell of the table, that of a share with its bar."""
    spread, digits = spread_of(values), 3 if bounded else 2
    mean, std = spread["mean"], spread["std"]
    if mean is None:
        return "undefined"
    shown = rounded(mean, digits) + ("" if std is None else f" ± {std:.{digits}f}")
    return (shown, mean) if bounded else shown


def _rules(summary: Mapping[str, Any]) -> Markup:
    rules = summary["rules"]
    if not rules:
        return note("These figures are stock nnU-Net's, which knows neither NSD nor HD95.")
    return facts(
        {
            "figures in the table": "mean ± standard deviation over the cases",
            "NSD": f"{rules.get('NSD')}; tolerance {summary['tolerance']}",
            "HD95": rules.get("HD95"),
            "class empty in both masks": rules.get("both_empty"),
            "class empty in one mask": rules.get("one_empty"),
            "mean over the classes": rules.get("foreground_mean"),
            "ignore label": rules.get("ignore_label"),
        }
    )


def _mirrored(fold: Fold) -> str:
    pair = [s.get("foreground_mean", {}).get("Dice") for s in (fold.mirrored, fold.summary)]
    if None in pair:
        return f"{fold.title}: the mirrored prediction was evaluated, but has no mean Dice."
    return f"{fold.title}: mean Dice {pair[0]:.4f} with mirroring, {pair[1]:.4f} without."


def _training(run: Run) -> Markup:
    """Returns the curves of each fold and what training said of its cost."""
    asked = "" if run.minutes is None else f" The whole command was given {run.minutes:g} minutes."
    parts = []
    for fold in run.folds:
        if len(run.folds) > 1:
            parts.append(element("h3", fold.title))
        if fold.progress:
            iterations = fold.progress[-1].get("iterations")
            counted = f", {iterations:,} iterations" if iterations else ""
            taken = "" if fold.seconds is None else f" in {duration(fold.seconds)}"
            parts.append(
                note(
                    f"{len(fold.progress)} epochs{counted}{taken}.{asked} "
                    "Pseudo Dice is nnU-Net's estimate on random patches, not the result."
                )
            )
            curves = figures.training_curves(fold.progress, list(run.label_names.values()))
            parts.append(element("div", *curves, css="charts"))
        else:
            parts.append(missing("There are no curves: no epoch has been completed here yet."))
        if fold.training:
            parts.append(details("Cost", facts(spaced(fold.training))))
    return section("Training", *parts)


def _plan(run: Run) -> Markup:
    """Returns what was planned and why: reasons, network, patch, batch, recipe."""
    part = run.part
    if not part:
        sentence = "plans.json is missing or does not know this configuration."
        return section("Plan", missing(sentence))
    planning, architecture = part.get("planning", {}), part.get("architecture", {})
    memory = stock = ""
    if "training_bytes" in planning:
        need = planning["training_bytes"] / 2**30
        memory = f"{need:.1f} GB of {planning['memory_gb']:g} GB"
        stock = f"{by(planning['nnunet_patch_size'])}, {planning['nnunet_batch_size']}"
    rows = {
        "network": f"{run.network} ({architecture.get('network_class_name', '')})",
        "configuration": run.configuration,
        "patch size (z, y, x)": by(part.get("patch_size")),
        "batch size": part.get("batch_size"),
        "spacing (mm)": by(part.get("spacing")),
        "parameters": "" if run.parameters is None else f"{run.parameters:,}",
        "memory of a training step": memory,
        "normalization": ", ".join(part.get("normalization_schemes", [])),
        "preprocessed data": part.get("data_identifier"),
        "nnU-Net's own patch and batch": stock,
    }
    reasons = [element("li", reason) for reason in planning.get("reasons", [])]
    parts = [element("ul", *reasons, css="reasons")] if reasons else []
    parts.append(facts(rows))
    if classes := sampling_rows(planning):
        parts.append(element("h3", "How often a training patch holds each class"))
        parts += [table(classes[0], classes[1:]), note(EXPLAINED)]
    parts.append(details("Arguments of the network", facts(architecture.get("arch_kwargs", {}))))
    if recipe := part.get("recipe"):
        parts.append(details("Training recipe", facts(spaced(recipe))))
    else:
        parts.append(note("The training recipe is nnU-Net's own."))
    return section("What was planned and why", *parts)


def _data(run: Run) -> Markup:
    dataset, plans = run.dataset_json, run.plans
    if not dataset:
        return section("Data", missing("dataset.json is missing in the model folder."))
    channels = dataset.get("channel_names", dataset.get("modality", {}))
    rows = {
        "dataset": run.dataset_name,
        "cases for training": dataset.get("numTraining"),
        "channels": ", ".join(map(str, channels.values())),
        "labels": ", ".join(f"{name} = {v}" for name, v in dataset.get("labels", {}).items()),
        "median shape (z, y, x)": by(plans.get("original_median_shape_after_transp")),
        "median spacing (mm)": by(plans.get("original_median_spacing_after_transp")),
        "file ending": dataset.get("file_ending"),
    }
    return section("Data", facts(rows))


def _next_step(run: Run) -> Markup:
    """Returns the command that predicts new images with what was trained."""
    model = shlex.quote(str(run.folder))
    folds = " ".join(fold.number for fold in run.folds)
    command = f"umamba predict -m {model} -f {folds} -i IMAGES -o PREDICTIONS"
    explained = (
        "Segments new images: IMAGES is a folder named as nnU-Net wants it "
        f"(case_0000{run.file_ending}), or a single file."
    )
    return section("Use it", note(explained), element("pre", element("code", command)))


def _versions() -> Markup:
    shown = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            shown.append(f"{package} {version(package)}")
    return element("footer", f"Written with {', '.join(shown)}.")
