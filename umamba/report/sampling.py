"""The classes of a plan and how often training patches hold each: rows for a page or a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EXPLAINED = (
    "random, stock and the chosen sampling: the share of training patches that hold the class if "
    "no patch is forced to hold foreground, with nnU-Net's sampling, and with this plan's. "
    "Voxels, parts and the median part are those of the label files."
)


def sampling_rows(planning: Mapping[str, Any]) -> list[list[str]]:
    """Returns head and rows of the plans' table of classes, empty where there is none.

    planning: the entry of that name of a configuration. A dash is unknown.
    """
    table = planning.get("sampling", {})
    if not table.get("classes"):
        return []
    kinds = {"random": "random", "stock": "stock"}
    if table["chosen"] != "stock":
        kinds["chosen"] = table["chosen"]
    rows = [["class", "cases", "voxels", "parts per case", "median part", *kinds.values()]]
    for entry in table["classes"]:
        share, parts, median = (entry[k] for k in ("share", "parts_per_case", "median_voxels"))
        rows.append(
            [
                entry["name"],
                f"{entry['n_cases']} of {table['n_cases']}",
                "–" if share is None else f"{100 * share:.2g} %",
                "–" if parts is None else f"{parts:g}",
                "–" if median is None else f"{median:g} voxels",
                *(f"{100 * entry[kind]:.3g} %" for kind in kinds),
            ]
        )
    return rows


def describe_sampling(planning: Mapping[str, Any]) -> str:
    """Returns the table and the reason for the sampling as lines of text."""
    rows = sampling_rows(planning)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        figures = (text.rjust(width) for text, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *figures]))
    reasons = [line for line in planning["reasons"] if line.startswith("Sampling: ")]
    return "\n  ".join([*lines, *reasons])
