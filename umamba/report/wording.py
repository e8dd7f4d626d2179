"""Figures, times and names of the report in words."""

from collections.abc import Mapping
from typing import Any

from umamba.evaluation.summary import labels_of_dataset
from umamba.evaluation.tables import label_key
from umamba.report.runs import Run

# key, title, and whether it is a share from 0 to 1
METRICS = (("Dice", "Dice", True), ("NSD", "NSD", True), ("HD95", "HD95 in mm", False))


def class_names(run: Run, summary: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns label key -> name of the foreground labels, in the order of the summary."""
    try:
        named = {label_key(v): n for n, v in labels_of_dataset(run.dataset_json)[0].items()}
    except ValueError:
        named = {}
    if summary is None:
        return named
    named = {**named, **summary.get("label_names", {})}
    return {key: named.get(key, f"label {key}") for key in summary["mean"] if key != "0"}


def tolerance_text(summary: Mapping[str, Any]) -> str:
    """Returns the tolerance of NSD in words."""
    given = sorted(set(summary.get("rules", {}).get("tolerance_mm", {}).values()))
    return " / ".join(f"{value:g}" for value in given) + " mm" if given else "an unknown tolerance"


def duration(seconds: float) -> str:
    """Returns a time in words: 48 s, 12.3 min, 5.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def thousands(value: int | None) -> str | None:
    """Returns 12,345,678."""
    return None if value is None else f"{value:,}"


def by(values: Any) -> str | None:
    """Returns 40 × 56 × 40 for a list, the value for itself."""
    if isinstance(values, list | tuple):
        return " × ".join(f"{v:g}" if isinstance(v, int | float) else str(v) for v in values)
    return None if values is None else str(values)


def words(key: str) -> str:
    """Returns a key of a JSON file as words."""
    return key.replace("_", " ")


def plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the entries as text, without what is undefined."""
    shown = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, float):
            value = f"{value:.6g}"
        elif isinstance(value, Mapping):
            value = ", ".join(f"{words(str(k))} {v}" for k, v in value.items())
        shown.append((str(key), str(value)))
    return shown
