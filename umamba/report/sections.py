"""The sections of the report but the cases: result, training, plan, data and what to do next."""

import shlex
from collections.abc import Mapping
from typing import Any

from umamba.evaluation.tables import spread_of, values_per_case
from umamba.report import figures
from umamba.report.html import (
    Markup,
    details,
    dot,
    element,
    facts,
    joined,
    missing,
    note,
    section,
    table,
)
from umamba.report.runs import Fold, Run, pooled_summary
from umamba.report.wording import (
    METRICS,
    by,
    class_names,
    duration,
    plain,
    thousands,
    tolerance_text,
    words,
)


def result_section(run: Run) -> Markup:
    """Returns Dice, NSD and HD95 per class with their spread over the validation cases."""
    summary = pooled_summary(run.validated)
    if summary is None:
        return section(
            "Result", missing("There is no validation yet: it comes after the training.")
        )
    names = class_names(run, summary)
    n_cases = len(summary["metric_per_case"])
    parts: list[Any] = [note(_what_was_validated(run, n_cases))]
    strips = []
    for metric, title, bounded in METRICS:
        values = {n: list(values_per_case(summary, k, metric).values()) for k, n in names.items()}
        if any(values.values()):
            title = f"NSD at {tolerance_text(summary)}" if metric == "NSD" else title
            strips.append(Markup(figures.metric_strips(title, values, bounded)))
    parts.append(element("div", joined(strips), "charts"))
    parts.append(table(["class", "cases", *(m[1] for m in METRICS)], _class_rows(summary, names)))
    parts.append(details("How these figures are defined", _rules(summary)))
    mirrored = [f for f in run.folds if f.mirrored is not None and f.summary is not None]
    for fold in mirrored:
        parts.append(note(_mirrored_sentence(fold)))
    for entry in summary["failed"]:
        parts.append(missing(f"Not evaluated: {entry.get('error', entry)}"))
    return section("Result", *parts)


def training_section(run: Run) -> Markup:
    """Returns the curves of each fold and what training said of its cost."""
    parts: list[Any] = []
    names = list(class_names(run, None).values())
    for fold in run.folds:
        if len(run.folds) > 1:
            parts.append(element("h3", fold.title))
        if not fold.progress:
            parts.append(missing("There are no curves: no epoch has been completed here yet."))
        else:
            parts.append(note(_training_sentence(run, fold)))
            curves = [
                figures.loss_curves(fold.progress),
                figures.pseudo_dice_curves(fold.progress, names),
                figures.learning_rate_curve(fold.progress),
            ]
            parts.append(element("div", joined(map(Markup, curves)), "charts"))
        if fold.training:
            parts.append(details("Cost", facts({words(k): v for k, v in plain(fold.training)})))
    return section("Training", *parts)


def plan_section(run: Run) -> Markup:
    """Returns what was planned and why: reasons, network, patch, batch, recipe."""
    part = run.part
    if not part:
        return section(
            "Plan", missing("plans.json is missing or does not know this configuration.")
        )
    planning = part.get("planning", {})
    reasons = planning.get("reasons", []) if isinstance(planning, Mapping) else planning
    reasons = [reasons] if isinstance(reasons, str) else list(reasons)
    architecture = part.get("architecture", {})
    rows = {
        "network": f"{run.network} ({run.network_class})",
        "configuration": run.configuration,
        "patch size (z, y, x)": by(part.get("patch_size")),
        "batch size": part.get("batch_size"),
        "spacing (mm)": by(part.get("spacing")),
        "parameters": thousands(parameters_of(run)),
        "memory of a training step": _memory(planning),
        "normalization": ", ".join(part.get("normalization_schemes", [])),
        "preprocessed data": part.get("data_identifier"),
        "nnU-Net's own patch and batch": _stock_size(planning),
    }
    recipe = part.get("recipe", {})
    content: list[Any] = []
    if reasons:
        items = joined(element("li", reason) for reason in reasons)
        content.append(element("ul", items, "reasons"))
    content.append(facts(rows))
    arguments = architecture.get("arch_kwargs", {})
    content.append(details("Arguments of the network", facts(dict(plain(arguments)))))
    if recipe:
        content.append(details("Training recipe", facts({words(k): v for k, v in plain(recipe)})))
    else:
        content.append(note("The training recipe is nnU-Net's own."))
    return section("What was planned and why", *content)


def data_section(run: Run) -> Markup:
    """Returns what the network was trained on."""
    dataset = run.dataset_json
    if not dataset:
        return section("Data", missing("dataset.json is missing in the model folder."))
    channels = dataset.get("channel_names", dataset.get("modality", {}))
    labels = dataset.get("labels", {})
    shapes = run.fingerprint.get("shapes_after_crop", [])
    median = run.plans.get("original_median_shape_after_transp")
    rows = {
        "dataset": run.dataset_name,
        "cases for training": dataset.get("numTraining") or len(shapes) or None,
        "channels": ", ".join(map(str, channels.values())),
        "labels": ", ".join(f"{name} = {by(value)}" for name, value in labels.items()),
        "median shape (z, y, x)": by(median),
        "median spacing (mm)": by(run.plans.get("original_median_spacing_after_transp")),
        "file ending": dataset.get("file_ending"),
    }
    return section("Data", facts(rows))


def next_section(run: Run) -> Markup:
    """Returns the command that predicts new images with what was trained."""
    folds = " ".join(fold.name.removeprefix("fold_") for fold in run.folds)
    command = (
        f"umamba predict -m {shlex.quote(str(run.folder))} -f {folds} -i IMAGES -o PREDICTIONS"
    )
    return section(
        "Use it",
        note(
            "Segments new images: IMAGES is a folder named as nnU-Net wants it "
            f"(case_0000{run.file_ending}), or a single file."
        ),
        element("pre", element("code", command)),
    )


def parameters_of(run: Run) -> int | None:
    """Returns the number of parameters that training or planning counted."""
    planning = run.part.get("planning", {})
    found = [fold.training.get("parameters") for fold in run.folds]
    found.append(planning.get("parameters") if isinstance(planning, Mapping) else None)
    return next((int(value) for value in found if isinstance(value, int | float)), None)


def training_seconds(fold: Fold) -> float | None:
    """Returns the time that the epochs took, s."""
    elapsed = fold.progress[-1].get("elapsed_s") if fold.progress else None
    return float(elapsed) if isinstance(elapsed, int | float) else None


def asked_minutes(run: Run) -> float | None:
    """Returns the time that the user gave the whole command, minutes."""
    request = run.plans.get("umamba", {}).get("request", {})
    found = [request.get("minutes"), *(fold.training.get("minutes") for fold in run.folds)]
    return next((float(value) for value in found if isinstance(value, int | float)), None)


def _what_was_validated(run: Run, n_cases: int) -> str:
    folds = ", ".join(fold.title for fold in run.validated)
    sentence = f"Validation of {folds}: {n_cases} cases that the network did not see in training."
    if any(fold.name == "fold_all" for fold in run.validated):
        sentence = f"Validation of {folds}: {n_cases} cases, which were also used for training."
    return sentence + " A dot is a case, the bar the middle half, the line the median."


def _class_rows(summary: Mapping[str, Any], names: Mapping[str, str]) -> list[list[Any]]:
    rows = []
    for index, (key, name) in enumerate(names.items()):
        cells: list[Any] = [joined([dot(figures.colour_of(index)), name])]
        dice = spread_of(list(values_per_case(summary, key, "Dice").values()))
        cells.append(f"{dice['n']} of {len(summary['metric_per_case'])}")
        for metric, _, bounded in METRICS:
            spread = spread_of(list(values_per_case(summary, key, metric).values()))
            digits = 3 if bounded else 2
            if spread["mean"] is None:
                cells.append("undefined")
            else:
                std = "" if spread["std"] is None else f" ± {spread['std']:.{digits}f}"
                shown = f"{spread['mean']:.{digits}f}{std}"
                cells.append((shown, spread["mean"]) if bounded else shown)
        rows.append(cells)
    return rows


def _rules(summary: Mapping[str, Any]) -> Markup:
    rules = summary.get("rules", {})
    if not rules:
        return note("These figures are stock nnU-Net's, which knows neither NSD nor HD95.")
    rows = {
        "figures in the table": "mean ± standard deviation over the cases",
        "NSD": f"{rules.get('NSD')}; tolerance {tolerance_text(summary)}",
        "HD95": rules.get("HD95"),
        "class empty in both masks": rules.get("both_empty"),
        "class empty in one mask": rules.get("one_empty"),
        "mean over the classes": rules.get("foreground_mean"),
        "ignore label": rules.get("ignore_label"),
    }
    return facts(rows)


def _mirrored_sentence(fold: Fold) -> str:
    pair = [(s or {}).get("foreground_mean", {}).get("Dice") for s in (fold.mirrored, fold.summary)]
    if None in pair:
        return f"{fold.title}: the mirrored prediction was evaluated, but has no mean Dice."
    return f"{fold.title}: mean Dice {pair[0]:.4f} with mirroring, {pair[1]:.4f} without."


def _training_sentence(run: Run, fold: Fold) -> str:
    last = fold.progress[-1]
    seconds = training_seconds(fold)
    sentence = f"{len(fold.progress)} epochs"
    if last.get("iterations"):
        sentence += f", {last['iterations']:,} iterations"
    sentence += f" in {duration(seconds)}." if seconds is not None else "."
    asked = asked_minutes(run)
    if asked is not None:
        sentence += f" The whole command was given {asked:g} minutes."
    return sentence + " Pseudo Dice is nnU-Net's estimate on random patches, not the result."


def _memory(planning: Any) -> str | None:
    if not isinstance(planning, Mapping) or "training_bytes" not in planning:
        return None
    need = f"{planning['training_bytes'] / 2**30:.1f} GB"
    return f"{need} of {planning['memory_gb']:g} GB" if planning.get("memory_gb") else need


def _stock_size(planning: Any) -> str | None:
    if not isinstance(planning, Mapping) or "nnunet_patch_size" not in planning:
        return None
    return f"{by(planning['nnunet_patch_size'])}, {planning.get('nnunet_batch_size')}"
