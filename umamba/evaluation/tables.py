"""Aggregates per-case metrics into a summary, writes it as JSON and CSV and reads it back."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umamba.files import write_text

_SCORES = ("Dice", "IoU", "NSD", "NSD_voxel_count", "HD95", "ASSD")


def summarize(results: Sequence[dict[str, Any]], labels: Iterable[str]) -> dict[str, Any]:
    """Returns nnU-Net's foreground_mean, mean and metric_per_case, and spread and empty.

    results: entries of metric_per_case, at least one. labels: their keys ("1", "(1, 2)").
    """
    names = list(next(iter(results[0]["metrics"].values())))
    columns = {
        label: {name: [entry["metrics"][label][name] for entry in results] for name in names}
        for label in labels
    }
    mean = {label: {n: _mean(v) for n, v in values.items()} for label, values in columns.items()}
    foreground = [means for label, means in mean.items() if label != "0"]
    scores = [name for name in names if name in _SCORES]
    return {
        "foreground_mean": {name: _mean([means[name] for means in foreground]) for name in names},
        "mean": mean,
        "metric_per_case": results,
        "spread": {key: {n: spread_of(v[n]) for n in scores} for key, v in columns.items()},
        "empty": {key: _count_empty(v["n_ref"], v["n_pred"]) for key, v in columns.items()},
    }


def spread_of(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Returns n, mean, std (n - 1), median, quartiles and range of the defined values."""
    defined = np.array([value for value in values if value is not None], dtype=float)
    names = ("min", "q25", "median", "q75", "max")
    if defined.size == 0:
        return {"n": 0, **dict.fromkeys(("mean", "std", *names))}
    quartiles = np.percentile(defined, [0, 25, 50, 75, 100]).tolist()
    return {
        "n": int(defined.size),
        "mean": float(defined.mean()),
        "std": float(defined.std(ddof=1)) if defined.size > 1 else None,
        **dict(zip(names, quartiles, strict=True)),
    }


def write_summary(summary: Mapping[str, Any], output: Path) -> None:
    """Writes NAME.json and NAME.csv, each whole or not at all.

    output: the .json file, or a folder for summary.json.
    """
    file = output if output.suffix == ".json" else output / "summary.json"
    write_text(file, json.dumps(summary, indent=4, allow_nan=False) + "\n")
    write_text(file.with_suffix(".csv"), _csv(summary))


def read_summary(file: Path) -> dict[str, Any]:
    """Reads a summary.json of ours or of nnU-Net; nan becomes None.

    Raises FileNotFoundError or ValueError naming the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; umamba evaluate writes one")
    try:
        # nnU-Net writes NaN, which JSON does not know
        summary = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error}); evaluate again") from error
    if not isinstance(summary, dict) or not {"mean", "metric_per_case"} <= set(summary):
        raise ValueError(f"{file}: is not a summary (no mean, metric_per_case); evaluate again")
    return summary


def values_per_case(summary: Mapping[str, Any], label: str, metric: str) -> dict[str, float]:
    """Returns case -> value of a label ("1", "(1, 2)"), without the undefined ones."""
    entries = summary["metric_per_case"]
    found = {case_of(entry): entry["metrics"].get(label, {}).get(metric) for entry in entries}
    return {case: float(value) for case, value in found.items() if value is not None}


def mean_per_case(summary: Mapping[str, Any], metric: str = "Dice") -> dict[str, float]:
    """Returns case -> mean of the metric over the foreground labels that are defined in it."""
    means = {
        case_of(entry): _mean([m.get(metric) for key, m in entry["metrics"].items() if key != "0"])
        for entry in summary["metric_per_case"]
    }
    return {case: mean for case, mean in means.items() if mean is not None}


def case_of(entry: Mapping[str, Any]) -> str:
    """Returns the identifier of an entry of metric_per_case, ours or nnU-Net's."""
    if "case" in entry:
        return str(entry["case"])
    name = Path(entry["prediction_file"]).name
    return name[:-7] if name.endswith(".nii.gz") else name.rsplit(".", 1)[0]


def _count_empty(n_ref: Sequence[int], n_pred: Sequence[int]) -> dict[str, int]:
    held = [(ref > 0, pred > 0) for ref, pred in zip(n_ref, n_pred, strict=True)]
    return {
        "cases": len(held),
        "both_empty": held.count((False, False)),
        "only_prediction_empty": held.count((True, False)),
        "only_reference_empty": held.count((False, True)),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _csv(summary: Mapping[str, Any]) -> str:
    text = io.StringIO()
    names = list(summary["foreground_mean"])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "label", "name", *names])
    for entry in summary["metric_per_case"]:
        for label, values in entry["metrics"].items():
            cells = [values[name] for name in names]  # None becomes an empty cell
            writer.writerow([entry["case"], label, summary["label_names"][label], *cells])
    return text.getvalue()
