"""Sets what an audit found in columns for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from umamba.data.faults import Fault


def format_summary(summary: dict[str, Any]) -> str:
    """Return cases, shapes and spacings, and a table of the labels and their components."""
    n_tests = summary["n_test_cases"]
    tests = f" and {count(n_tests, 'test case')}" if n_tests else ""
    cases, channels = count(summary["n_cases"], "case"), ", ".join(summary["channels"])
    lines = [f"{summary['name']}: {cases}{tests}, channels: {channels}"]
    for key, title in (("shape", "shape (z, y, x)"), ("spacing_mm", "spacing (z, y, x), mm")):
        texts = {name: "x".join(f"{v:.4g}" for v in row) for name, row in summary[key].items()}
        if len(set(texts.values())) == 1:
            lines.append(f"  {title}: {texts['median']} in all")
        elif texts:
            lines.append(f"  {title}: {', '.join(map(' '.join, texts.items()))}")
    rows = [["label", "name", "cases", "share", "components per case"]]
    rows[0] += ["smallest", "median", "largest", "median mm3"]
    for value, label in summary["labels"].items():
        row = [value, label["name"], f"{label['n_cases']}", f"{100 * label['share']:.4g} %"]
        if parts := label.get("components"):
            row += [f"{parts['per_case_median']:g}"]
            row += [f"{parts[f'{which}_voxels']}" for which in ("smallest", "median", "largest")]
            mm3 = parts["median_mm3"]
            row += [f"{mm3:.0f}" if mm3 >= 100 else f"{mm3:.3g}"]
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    lines += ["", *_align(rows)]
    text = "components: touching voxels of a label; per case: median of the cases that show it;"
    lines += [f"  {text}", "  smallest, median, largest: their sizes over all cases, in voxels"]
    return "\n".join(lines)


def format_findings(
    kind: str, findings: Iterable[Fault], folder: Path, most: int | None = None
) -> str:
    """Return faults or warnings as a table, those with one cure together; empty for none.

    kind: "fault" or "warning"; folder: the dataset's, from which files are named; most: rows per
    cure, None for all.
    """
    groups: dict[str, list[Fault]] = {}
    for fault in findings:
        groups.setdefault(fault.cure, []).append(fault)
    n = sum(map(len, groups.values()))
    lines = [f"{count(n, kind)} in {folder}:"] if n else []
    for cure, faults in groups.items():
        lines += _align([[_within(fault.file, folder), fault.what] for fault in faults[:most]])
        if most is not None and len(faults) > most:
            lines.append(f"  ... and {len(faults) - most} more (umamba audit --json FILE has all)")
        lines.append(f"      cure: {cure}")
    return "\n".join(lines)


def count(n: int, noun: str) -> str:
    """Return the number and the noun, in the plural where it is not one."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _within(file: str, folder: Path) -> str:
    path = Path(file)
    if path == folder:
        return folder.name
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else file


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines with columns of equal width; from the third on they are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"  {'  '.join(cells)}".rstrip())
    return lines
