"""Reads every file of a dataset once and lists every fault, each with its cure."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from umamba.data.dataset import RawDataset
from umamba.data.faults import Fault, Faults, UnreadableImageError, raise_if_faults
from umamba.data.images import ImageContent, label_counts, read_image
from umamba.data.layout import (
    CaseFiles,
    check_dataset_json,
    is_label,
    label_values,
    list_cases,
    n_channels,
)
from umamba.data.links import read_state

SPACING_TOLERANCE = 1e-3  # relative
FAULT_OFFSET, WARNING_OFFSET = 0.5, 1e-2  # of a voxel, at the worst corner


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    summary: cases, shapes and spacings (z, y, x; smallest, median, largest), voxels, and per
    label its share of all voxels and the cases it is found in; empty where dataset.json says too
    little to look at the files.
    """

    n_cases: int
    faults: list[Fault]
    warnings: list[Fault]
    summary: dict[str, Any]
    name: str

    def raise_if_faults(self) -> None:
        """Raise a ValueError that lists every fault, one line each."""
        raise_if_faults(self.faults, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self)


@dataclass
class _Findings:
    """What one case showed."""

    faults: Faults = field(default_factory=Faults)
    warnings: Faults = field(default_factory=Faults)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    digests: list[tuple[bytes, str]] = field(default_factory=list)
    counts: dict[float, int] | None = None
    without_spacing: str | None = None


OnCase = Callable[[str, list[ImageContent], ImageContent | None], None]


def audit_dataset(
    raw: RawDataset,
    n_workers: int = 2,
    progress: bool = True,
    *,
    on_case: OnCase | None = None,
) -> AuditReport:
    """Return every fault and warning of a dataset in nnU-Net's raw format.

    Files that were linked into the workspace are named as they are in the user's folder.
    on_case: called in the thread that read a case, if the case has no fault, with its identifier,
    its images in the order of the channels and its label; what it raises ends the audit.
    """
    content = raw.dataset_json
    faults, warnings = Faults(raw.faults), Faults()
    is_linked = raw.source != raw.folder
    if not is_linked:
        faults += check_dataset_json(content, raw.folder / "dataset.json")
    labels, ending = content.get("labels"), content.get("file_ending")
    has_labels = isinstance(labels, dict) and all(map(is_label, labels.values()))
    if not has_labels or not isinstance(ending, str) or not ending:
        return AuditReport(0, list(dict.fromkeys(faults)), warnings, {}, raw.name)
    cases, by_name = list_cases(raw.folder, content)
    if not is_linked:
        faults += by_name
    values, ignore = label_values(content)
    listed = [*values, *([] if ignore is None else [ignore])]
    reader = str(content.get("overwrite_image_reader_writer"))
    use_nibabel = reader.startswith("NibabelIO") or ending.lower() == ".nii"
    shown = _shown_names(raw)

    def inspect(identifier: str) -> _Findings:
        expected = n_channels(content)
        give = None if on_case is None else partial(on_case, identifier)
        return _inspect(cases[identifier], expected, {0, *listed}, use_nibabel, shown, give)

    with ThreadPoolExecutor(max(1, n_workers)) as pool:
        results, what = pool.map(inspect, cases), f"Checking {raw.name}"
        findings = list(tqdm(results, what, len(cases), disable=not progress, unit="case"))
    for found in findings:
        faults += found.faults
        warnings += found.warnings
    _check_duplicates(findings, warnings)
    _check_spacings(findings, warnings)
    _check_presence(raw, findings, values, faults, warnings)
    summary = _summary(raw, findings, listed)
    return AuditReport(len(cases), list(dict.fromkeys(faults)), warnings, summary, raw.name)


def check_images(
    files_per_case: dict[str, list[Path]], n_channels: int, *, reader_writer: str | None = None
) -> dict[str, list[Fault]]:
    """Return the faults of each case to predict, for the cases that have any.

    n_channels: what the network was trained on; reader_writer: the class in the plans.
    """
    use_nibabel = str(reader_writer).startswith("NibabelIO")

    def faults_of(files: list[Path]) -> Faults:
        return _inspect(CaseFiles(tuple(files), None), n_channels, set(), use_nibabel, str).faults

    with ThreadPoolExecutor(2) as pool:
        found = zip(files_per_case, pool.map(faults_of, files_per_case.values()), strict=True)
        return {case: faults for case, faults in found if faults}


def _inspect(
    case: CaseFiles,
    n_channels: int,
    allowed: set[int],
    use_nibabel: bool,
    shown: Callable[[Path], str],
    give: Callable[[list[ImageContent], ImageContent | None], None] | None = None,
) -> _Findings:
    """Check one case: images whole and finite, on one grid, the label with allowed values.

    n_channels: 0 where dataset.json does not say; shown: the name of a file as the user knows it;
    give: takes the images and the label of a case without a fault.
    """
    found = _Findings()
    images: list[ImageContent] = []

    def read(path: Path, is_label: bool = False) -> ImageContent | None:
        try:
            return read_image(path, use_nibabel, is_label)
        except UnreadableImageError as error:
            fault = error.fault
            file = shown(path) if fault.file == str(path) else fault.file
            found.faults.add(file, fault.what, fault.cure)
            return None

    first: ImageContent | None = None
    first_name, n_found, is_whole = "", 0, True
    for path in case.images:
        content, name = read(path), shown(path)
        if content is None:
            is_whole = False
            continue
        n_found += content.array.shape[0]
        if give is not None:
            images.append(content)
        found.digests.append((content.digest, name))
        _check_values(content, name, found)
        if first is not None:
            _check_geometry(first, first_name, content, name, found)
            continue
        first, first_name = content, name
        found.shape, found.spacing = content.shape, content.spacing
        found.without_spacing = None if content.has_spacing else name
    if first is not None and is_whole and n_channels not in (0, n_found):
        what = f"has {n_found} channel(s) where {n_channels} are expected"
        cure = "give every case the same channels, those that dataset.json names"
        found.faults.add(first_name, what, cure)
    label = None if case.label is None else read(case.label, is_label=True)
    if case.label is not None and label is not None:
        name = shown(case.label)
        if label.array.shape[0] != 1:
            what = f"is a color picture with {label.array.shape[0]} channels"
            found.faults.add(name, what, "save the label as gray values 0, 1, 2, ...")
            return found
        if first is not None:
            _check_geometry(first, first_name, label, name, found)
        found.counts = label_counts(label)
        _check_labels(list(found.counts), allowed, name, found.faults)
    if give is not None and images and not found.faults:
        give(images, label)
    return found


def _check_values(content: ImageContent, name: str, found: _Findings) -> None:
    array = content.array
    if array.dtype.kind == "f":
        n_bad = array.size - int(np.count_nonzero(np.isfinite(array)))
        if n_bad:
            n_nan = int(np.count_nonzero(np.isnan(array)))
            counts = {"NaN": n_nan, "infinite": n_bad - n_nan}
            kinds = " and ".join(f"{n} {kind}" for kind, n in counts.items() if n)
            cure = "replace them by a value that makes sense for the image, such as its minimum"
            found.faults.add(name, f"holds {kinds} of {array.size} voxels", cure)
            return
    if array.min() == array.max():
        what = f"is constant: every voxel is {array.flat[0]:g}"
        found.warnings.add(name, what, "check that the image was exported whole")


def _check_geometry(
    first: ImageContent, first_name: str, other: ImageContent, name: str, found: _Findings
) -> None:
    """Compare a channel or a label with the first channel: shape, spacing, place in space."""
    of = f"its image {Path(first_name).name}"
    if first.shape != other.shape:
        what = f"has shape {other.shape} but {of} has {first.shape} (z, y, x)"
        found.faults.add(name, what, "resample it to the image or replace the wrong file")
        return
    spacings = np.array([first.spacing, other.spacing])
    if (np.abs(spacings[0] - spacings[1]) > SPACING_TOLERANCE * spacings[0]).any():
        mm = [", ".join(f"{s:.4g}" for s in row) for row in spacings]
        what = f"has spacing ({mm[1]}) mm but {of} has ({mm[0]}) (z, y, x)"
        cure = "copy the image's header into it if both show the same grid, else resample it"
        found.faults.add(name, what, cure)
        return
    if first.affine is None or other.affine is None:
        return
    offset_mm, offset = _corner_offset(first.shape, first.affine, other.affine)
    if offset > WARNING_OFFSET:
        what = f"lies up to {offset_mm:.3g} mm ({offset:.2g} voxels) off {of} (origin or direction)"
        cure = "copy the image's header into it if the voxels belong together, else resample it"
        (found.faults if offset > FAULT_OFFSET else found.warnings).add(name, what, cure)


def _corner_offset(
    shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray
) -> tuple[float, float]:
    """Return the largest distance of corresponding corners, in mm and in voxels."""
    z, y, x = (n - 1 for n in shape)
    corners = np.array([(i, j, k, 1) for i in (0, x) for j in (0, y) for k in (0, z)], float)
    shift = (corners @ (other - affine).T)[:, :3]
    matrix = affine[:3, :3]
    mm = float(np.linalg.norm(shift, axis=1).max())
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        return mm, mm
    return mm, float(np.abs(np.linalg.solve(matrix, shift.T)).max())


def _check_labels(values: list[float], allowed: set[int], name: str, faults: Faults) -> None:
    whole = [v for v in values if math.isfinite(v) and v == math.floor(v)]
    if not all(map(math.isfinite, values)):
        faults.add(name, "holds NaN or infinite labels", "save whole numbers")
    if fractions := [v for v in values if math.isfinite(v) and v != math.floor(v)]:
        what = f"holds labels that are no whole numbers ({_listed(fractions)})"
        faults.add(name, what, "save the label map itself, not an interpolated or smoothed one")
    if negative := [v for v in whole if v < 0]:
        what = f"holds negative labels ({_listed(negative)})"
        faults.add(name, what, "number the labels 0, 1, 2, ...")
    if unknown := [v for v in whole if v >= 0 and v not in allowed]:
        what = f"holds label value(s) {_listed(unknown)} that dataset.json does not name"
        faults.add(name, what, "name them in dataset.json or correct the label")


def _listed(values: list[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values[:6])
    return f"{text}, ..." if len(values) > 6 else text


def _check_duplicates(findings: list[_Findings], warnings: Faults) -> None:
    first: dict[bytes, str] = {}
    for found in findings:
        for digest, name in found.digests:
            if digest in first:
                what = f"is the same image as {Path(first[digest]).name}"
                warnings.add(name, what, "remove one, or they may meet in both folds")
            first.setdefault(digest, name)


def _check_spacings(findings: list[_Findings], warnings: Faults) -> None:
    names = [found.without_spacing for found in findings if found.without_spacing]
    if names:
        what = f"and {len(names) - 1} more have no spacing" if names[1:] else "has no spacing"
        cure = 'write {"spacing": [z, y, x]} in mm to <case>.json beside it, else 1 mm is taken'
        warnings.add(names[0], what, cure)


def _check_presence(
    raw: RawDataset, findings: list[_Findings], values: list[int], faults: Faults, warnings: Faults
) -> None:
    """Add the fault of a dataset without any label, else warnings for labels never found."""
    counts = [found.counts for found in findings if found.counts is not None]
    missing = [v for v in values if v > 0 and not any(v in count for count in counts)]
    if not counts:
        return
    if len(missing) == sum(v > 0 for v in values):
        what = f"has no labeled voxel in any of its {len(counts)} labels"
        cure = "there is nothing to learn: check how the labels were made"
        faults.add(raw.source, what, cure)
        return
    for v in missing:
        what = f"names label {v} in dataset.json but no case shows it"
        warnings.add(raw.source, what, "remove it from dataset.json, or add cases that show it")


def _summary(raw: RawDataset, findings: list[_Findings], values: list[int]) -> dict[str, Any]:
    shapes = np.array([found.shape for found in findings if found.shape])
    spacings = np.array([found.spacing for found in findings if found.spacing])
    n_voxels: Counter[float] = Counter()
    n_cases: Counter[float] = Counter()
    for found in findings:
        n_voxels.update(found.counts or {})
        n_cases.update(list(found.counts or {}))
    total = max(1, n_voxels.total())
    labels = raw.dataset_json["labels"]
    names = {value: name for name, value in labels.items() if isinstance(value, int)}
    return {
        "name": raw.name,
        "channels": list(raw.dataset_json.get("channel_names", {}).values()),
        "n_cases": len(findings),
        "shape": _spread(shapes),
        "spacing_mm": _spread(spacings),
        "voxels": int(np.prod(shapes, axis=1).sum()) if shapes.size else 0,
        "labels": {
            str(v): {
                "name": names.get(v, str(v)),
                "share": n_voxels[v] / total,
                "n_cases": n_cases[v],
            }
            for v in values
        },
    }


def _spread(rows: np.ndarray) -> dict[str, list[float]]:
    if not rows.size:
        return {}
    spread = {"smallest": rows.min(0), "median": np.median(rows, 0), "largest": rows.max(0)}
    return {name: [round(float(v), 4) for v in row] for name, row in spread.items()}


def _shown_names(raw: RawDataset) -> Callable[[Path], str]:
    """Return a function from a file to the name the user knows it by."""
    entries = read_state(raw.folder).get("entries", {})
    folder = str(raw.folder) + os.sep

    def shown(path: Path) -> str:
        entry = entries.get(str(path).removeprefix(folder))
        return str(entry[0]) if entry else str(path)

    return shown
