"""Reads every file of a dataset once and lists every fault, each with its cure."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from umamba.data.dataset import RawDataset
from umamba.data.faults import Fault, raise_if_faults
from umamba.data.inspection import Findings, inspect_case
from umamba.data.layout import CaseFiles, check_dataset_json, label_values, list_cases, n_channels
from umamba.data.links import read_state


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    summary: cases, shapes and spacings (z, y, x; smallest, median, largest), voxels, and per
    label its share of all voxels and the cases it is found in.
    """

    n_cases: int
    faults: list[Fault]
    warnings: list[Fault]
    summary: dict[str, Any]
    name: str = "The dataset"

    def raise_if_faults(self) -> None:
        """Raise a ValueError that lists every fault, one line each."""
        raise_if_faults(self.faults, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self)


def audit_dataset(raw: RawDataset, n_workers: int = 2, progress: bool = True) -> AuditReport:
    """Return every fault and warning of a dataset in nnU-Net's raw format.

    Files that were linked into the workspace are named as they are in the user's folder.
    """
    faults = list(raw.faults)
    if raw.source == raw.folder:
        faults += check_dataset_json(raw.dataset_json, raw.folder / "dataset.json")
    if not _is_readable(raw.dataset_json):
        return AuditReport(0, _unique(faults), [], {}, raw.name)
    cases, by_name = list_cases(raw.folder, raw.dataset_json)
    if raw.source == raw.folder:
        faults += by_name
    values, ignore = label_values(raw.dataset_json)
    allowed = {*values, 0, *([] if ignore is None else [ignore])}
    shown = _shown_names(raw)
    use_nibabel = _reads_by_nibabel(raw.dataset_json)
    expected = n_channels(raw.dataset_json)

    def inspect(case: CaseFiles) -> Findings:
        return inspect_case(case, expected, allowed, use_nibabel, shown)

    findings = _run(inspect, cases.values(), n_workers, progress, f"Checking {raw.name}")
    warnings: list[Fault] = []
    for found in findings:
        faults += found.faults
        warnings += found.warnings
    warnings += _duplicates(findings) + _missing_spacings(findings)
    empty, unused = _label_findings(raw, findings, values)
    summary = _summary(raw, findings, values, ignore)
    return AuditReport(len(cases), _unique(faults + empty), warnings + unused, summary, raw.name)


def check_images(
    files_per_case: dict[str, list[Path]],
    n_channels: int,
    *,
    reader_writer: str | None = None,
    n_workers: int = 2,
    progress: bool = False,
) -> dict[str, list[Fault]]:
    """Return the faults of each case to predict, for the cases that have any.

    n_channels: what the network was trained on; reader_writer: the class in the plans.
    """
    use_nibabel = bool(reader_writer) and str(reader_writer).startswith("NibabelIO")

    def inspect(files: list[Path]) -> Findings:
        return inspect_case(CaseFiles(tuple(files), None), n_channels, None, use_nibabel, str)

    findings = _run(inspect, files_per_case.values(), n_workers, progress, "Checking the images")
    return {
        case: found.faults
        for case, found in zip(files_per_case, findings, strict=True)
        if found.faults
    }


def _run(
    inspect: Callable[[Any], Findings],
    cases: Iterable[Any],
    n_workers: int,
    progress: bool,
    what: str,
) -> list[Findings]:
    listed = list(cases)
    with ThreadPoolExecutor(max(1, n_workers)) as pool:
        results = pool.map(inspect, listed)
        return list(tqdm(results, what, len(listed), disable=not progress, unit="case"))


def _duplicates(findings: list[Findings]) -> list[Fault]:
    first: dict[bytes, str] = {}
    result = []
    for found in findings:
        for digest, name in found.digests:
            if digest in first:
                what = f"is the same image as {Path(first[digest]).name}"
                result.append(Fault(name, what, "remove one, or they may meet in both folds"))
            first.setdefault(digest, name)
    return result


def _missing_spacings(findings: list[Findings]) -> list[Fault]:
    names = [found.without_spacing for found in findings if found.without_spacing]
    if not names:
        return []
    what = f"and {len(names) - 1} more have no spacing" if names[1:] else "has no spacing"
    cure = 'write {"spacing": [z, y, x]} in mm to <case>.json beside it, else 1 mm is taken'
    return [Fault(names[0], what, cure)]


def _label_findings(
    raw: RawDataset, findings: list[Findings], values: list[int]
) -> tuple[list[Fault], list[Fault]]:
    """Return the fault of a dataset without any label, else warnings for labels never found."""
    seen: set[float] = set().union(*(found.counts or {} for found in findings))
    n_read = sum(found.counts is not None for found in findings)
    place = str(raw.source)
    if n_read and not seen & {v for v in values if v > 0}:
        what = f"has no labeled voxel in any of its {n_read} labels"
        return [Fault(place, what, "there is nothing to learn: check how the labels were made")], []
    cure = "remove it from dataset.json, or add cases that show it"
    return [], [
        Fault(place, f"names label {v} in dataset.json but no case shows it", cure)
        for v in values
        if n_read and v > 0 and v not in seen
    ]


def _summary(
    raw: RawDataset, findings: list[Findings], values: list[int], ignore: int | None
) -> dict[str, Any]:
    shapes = np.array([found.shape for found in findings if found.shape])
    spacings = np.array([found.spacing for found in findings if found.spacing])
    counts: Counter[float] = Counter()
    cases: defaultdict[float, int] = defaultdict(int)
    for found in findings:
        counts.update(found.counts or {})
        for value in found.counts or {}:
            cases[value] += 1
    total = sum(counts.values())
    names = {
        value: name for name, value in raw.dataset_json["labels"].items() if isinstance(value, int)
    }
    listed = [*values, *([] if ignore is None else [ignore])]
    return {
        "name": raw.name,
        "channels": list(raw.dataset_json.get("channel_names", {}).values()),
        "n_cases": len(findings),
        "shape": _spread(shapes),
        "spacing_mm": _spread(spacings),
        "voxels": int(np.prod(shapes, axis=1).sum()) if shapes.size else 0,
        "labels": {
            str(value): {
                "name": names.get(value, str(value)),
                "share": counts[value] / total if total else 0.0,
                "n_cases": cases[value],
            }
            for value in listed
        },
    }


def _spread(rows: np.ndarray) -> dict[str, list[float]]:
    if not rows.size:
        return {}
    functions = {"smallest": np.min, "median": np.median, "largest": np.max}
    return {
        name: [round(float(v), 4) for v in f(rows, axis=0)]  # type: ignore[operator]
        for name, f in functions.items()
    }


def _shown_names(raw: RawDataset) -> Callable[[Path], str]:
    """Return a function from a file to the name the user knows it by."""
    entries = read_state(raw.folder).get("entries", {})
    folder = str(raw.folder) + os.sep

    def shown(path: Path) -> str:
        entry = entries.get(str(path).removeprefix(folder))
        return str(entry[0]) if entry else str(path)

    return shown


def _is_readable(content: dict[str, Any]) -> bool:
    """Whether dataset.json says enough to look at the files at all."""
    labels, ending = content.get("labels"), content.get("file_ending")
    if not isinstance(labels, dict) or not (isinstance(ending, str) and ending):
        return False
    return all(isinstance(value, int | list) for value in labels.values())


def _reads_by_nibabel(content: dict[str, Any]) -> bool:
    reader = str(content.get("overwrite_image_reader_writer"))
    return reader.startswith("NibabelIO") or str(content.get("file_ending")).lower() == ".nii"


def _unique(faults: list[Fault]) -> list[Fault]:
    return list(dict.fromkeys(faults))
