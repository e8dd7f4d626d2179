"""Reads which values the masks of a bare folder hold, and what they are called."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from umamba.data.content import label_counts, split_ending
from umamba.data.convert import label_pixels, read_pixels
from umamba.data.faults import Fault, UnreadableImageError
from umamba.data.images import read_image
from umamba.data.links import LinkedFolder, stamp_of

MOST_LABELS = 128  # more values than this are instances or gray levels, not classes


@dataclass
class LabelTable:
    """names: name -> value for nnU-Net; mapping: value in the masks -> that value;
    values: what each mask holds, empty where the audit must name the file."""

    names: dict[str, int]
    mapping: dict[int, int]
    values: dict[str, list[int]]
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def read_labels(linked: LinkedFolder, paths: list[Path]) -> LabelTable:
    """Read the masks (those that are new or changed) and number their values 0, 1, 2, ...

    Names come from labels.json beside the folders. Raises ValueError when it is broken, or when
    the masks hold instances.
    """
    values = _values_per_file(linked, paths)
    seen = sorted({value for found in values.values() for value in found})
    file = linked.source / "labels.json"
    given = read_names(file)
    table = LabelTable({}, {}, values)
    if given.get(0, "background") != "background" or "background" in set(given.values()) - {
        given.get(0)
    }:
        raise ValueError(f"{file} must call the value 0, and only it, background")
    if given:
        for name, found in values.items():
            unknown = sorted(set(found) - given.keys() - {0})
            if unknown:
                listed = ", ".join(map(str, unknown))
                what = f"holds the value(s) {listed} that labels.json does not name"
                table.faults.append(Fault(name, what, "name them there or correct the mask"))
    elif len(seen) > MOST_LABELS:
        raise ValueError(
            f"The masks in {paths[0].parent} hold {len(seen)} different values; they look like "
            "instances or gray levels: save one value per class, or name the values in labels.json"
        )
    else:
        foreground = [value for value in seen if value > 0]
        only = {foreground[0]: "foreground"} if len(foreground) == 1 else {}
        given = only or {value: f"label_{value}" for value in foreground}
        table.notes.append(
            f"Labels read from the masks: {_few(list(given.values()))}; "
            f'name them in {file} as {{"1": "name"}}.'
        )
    # nnU-Net wants the ignore label last
    ordered = sorted((name == "ignore", value, name) for value, name in given.items() if value)
    table.mapping = {0: 0, **{value: i + 1 for i, (_, value, _) in enumerate(ordered)}}
    table.names = {"background": 0, **{name: table.mapping[v] for _, v, name in ordered}}
    changed = [f"{old} -> {new}" for old, new in table.mapping.items() if old != new]
    if changed:
        table.notes.append(f"Label values are renumbered in copies: {_few(changed)}.")
    return table


def _values_per_file(linked: LinkedFolder, paths: list[Path]) -> dict[str, list[int]]:
    known = linked.memory.get("label_values", {})
    stamps = {str(path): list(stamp_of(path)) for path in paths}
    todo = [path for path in paths if known.get(str(path), [None])[0] != stamps[str(path)]]
    with ThreadPoolExecutor(2) as pool:
        fresh = dict(zip(map(str, todo), pool.map(_values, todo), strict=True))
    values = {name: fresh[name] if name in fresh else known[name][1] for name in stamps}
    linked.memory["label_values"] = {name: [stamps[name], values[name]] for name in stamps}
    return values


def _values(path: Path) -> list[int]:
    """Return the whole, non-negative values of a mask; none when the audit must name it."""
    try:
        if _ending(path) in (".png", ".bmp", ".tif", ".tiff"):
            found = np.unique(label_pixels(read_pixels(path)))
        else:
            found = np.array(list(label_counts(read_image(path, True, is_label=True))))
    except (UnreadableImageError, OSError, ValueError, RuntimeError, SyntaxError):
        return []
    if found.dtype.kind == "f" and not (np.isfinite(found) & (found == np.rint(found))).all():
        return []
    return [int(v) for v in found] if found.size and found.min() >= 0 else []


def read_names(path: Path) -> dict[int, str]:
    """Return number -> name from {"1": "liver"} or {"liver": 1}; empty when there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        pairs = [
            (int(key), str(value)) if str(key).strip().isdigit() else (int(value), str(key))
            for key, value in content.items()
        ]
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f'{path} is not a table {{"1": "name"}} of numbers and names') from None
    if len({number for number, _ in pairs}) < len(pairs) or len({n for _, n in pairs}) < len(pairs):
        raise ValueError(f"{path} gives a number or a name twice; name each once")
    return dict(pairs)


def _ending(path: Path) -> str:
    parts = split_ending(path.name)
    return parts[1].lower() if parts else ""


def _few(words: list[str]) -> str:
    return ", ".join([*words[:8], "...", words[-1]] if len(words) > 10 else words) or "none"
