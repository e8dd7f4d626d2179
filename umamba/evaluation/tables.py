"""Aggregates per-case metrics into a summary, writes it as JSON and CSV and reads it back."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umamba.evaluation.overlap import Label

SCORES = ("Dice", "IoU", "NSD", "NSD_voxel_count", "HD95", "ASSD")


def summarize(
    results: Sequence[dict[str, Any]],
    failed: Sequence[dict[str, Any]],
    named: Mapping[str, Label],
    rules: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the summary: nnU-Net's keys, and spread, empty, rules, label_names, failed."""
    mean: dict[str, dict[str, float | None]] = {}
    spread: dict[str, dict[str, Any]] = {}
    empty: dict[str, dict[str, int]] = {}
    for label in map(label_key, named.values()):
        rows = [result["metrics"][label] for result in results]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        mean[label] = {name: _mean(values) for name, values in columns.items()}
        spread[label] = {name: spread_of(columns[name]) for name in columns if name in SCORES}
        empty[label] = {
            "cases": len(rows),
            "both_empty": sum(not r["n_ref"] and not r["n_pred"] for r in rows),
            "only_prediction_empty": sum(bool(r["n_ref"]) and not r["n_pred"] for r in rows),
            "only_reference_empty": sum(not r["n_ref"] and bool(r["n_pred"]) for r in rows),
        }
    foreground = [values for label, values in mean.items() if label != "0"]
    return {
        "foreground_mean": {
            name: _mean([values[name] for values in foreground])
            for name in next(iter(mean.values()))
        },
        "mean": mean,
        "metric_per_case": list(results),
        "spread": spread,
        "empty": empty,
        "rules": dict(rules),
        "label_names": {label_key(label): name for name, label in named.items()},
        "failed": list(failed),
    }


def spread_of(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Returns n, mean, std (n - 1), median, quartiles and range of the defined values."""
    defined = np.array([value for value in values if value is not None], dtype=float)
    if defined.size == 0:
        return {"n": 0, **dict.fromkeys(("mean", "std", "min", "q25", "median", "q75", "max"))}
    low, q25, median, q75, high = np.percentile(defined, [0, 25, 50, 75, 100]).tolist()
    return {
        "n": int(defined.size),
        "mean": float(defined.mean()),
        "std": float(defined.std(ddof=1)) if defined.size > 1 else None,
        "min": low,
        "q25": q25,
        "median": median,
        "q75": q75,
        "max": high,
    }


def write_summary(summary: Mapping[str, Any], output: Path) -> tuple[Path, Path]:
    """Writes NAME.json and NAME.csv, each whole or not at all; returns both paths.

    output: the .json file, or a folder for summary.json.
    """
    file = output if output.suffix == ".json" else output / "summary.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(file, json.dumps(summary, indent=4, allow_nan=False) + "\n")
    table = file.with_suffix(".csv")
    _write_whole(table, _csv(summary))
    return file, table


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
    values = {}
    for entry in summary["metric_per_case"]:
        value = entry["metrics"].get(label, {}).get(metric)
        if value is not None:
            values[case_of(entry)] = float(value)
    return values


def mean_per_case(summary: Mapping[str, Any], metric: str = "Dice") -> dict[str, float]:
    """Returns case -> mean of the metric over the foreground labels that are defined in it."""
    values = {}
    for entry in summary["metric_per_case"]:
        mean = _mean([m.get(metric) for label, m in entry["metrics"].items() if label != "0"])
        if mean is not None:
            values[case_of(entry)] = mean
    return values


def case_of(entry: Mapping[str, Any]) -> str:
    """Returns the identifier of an entry of metric_per_case, ours or nnU-Net's."""
    if "case" in entry:
        return str(entry["case"])
    name = Path(entry["prediction_file"]).name
    return name[:-7] if name.endswith(".nii.gz") else name.rsplit(".", 1)[0]


def label_key(label: Label) -> str:
    """Returns the label as nnU-Net's summary spells it: "1", "(1, 2)"."""
    return str(label)


def label_of_key(key: str) -> Label:
    """Returns the label that `label_key` spelled."""
    if key.startswith("("):
        return tuple(int(part) for part in key.strip("()").split(",") if part.strip())
    return int(key)


def case_values(values: Mapping[str, float]) -> dict[str, float | None]:
    """Returns the values with None for what is undefined (nan, inf)."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _csv(summary: Mapping[str, Any]) -> str:
    text = io.StringIO()
    names = list(next(iter(summary["mean"].values())))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "label", "name", *names])
    for entry in summary["metric_per_case"]:
        for label, values in entry["metrics"].items():
            cells = ["" if values[name] is None else values[name] for name in names]
            writer.writerow([entry["case"], label, summary["label_names"][label], *cells])
    return text.getvalue()


def _write_whole(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
