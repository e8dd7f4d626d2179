"""Reads every file of a dataset once and lists every fault, each with its cure."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from umamba.data.dataset import RawDataset
from umamba.data.faults import Fault, UnreadableImageError, raise_if_faults
from umamba.data.images import ImageContent, label_counts, read_image
from umamba.data.layout import CaseFiles, check_dataset_json, label_values, list_cases, n_channels
from umamba.data.links import read_state

SPACING_TOLERANCE = 1e-3  # relative
FAULT_OFFSET, WARNING_OFFSET = 0.5, 1e-2  # of a voxel, at the worst corner


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


@dataclass
class _Findings:
    """What one case showed."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    digests: list[tuple[bytes, str]] = field(default_factory=list)
    counts: dict[float, int] | None = None
    without_spacing: str | None = None


def audit_dataset(raw: RawDataset, n_workers: int = 2, progress: bool = True) -> AuditReport:
    """Return every fault and warning of a dataset in nnU-Net's raw format.

    Files that were linked into the workspace are named as they are in the user's folder.
    """
    faults = list(raw.faults)
    if raw.source == raw.folder:
        faults += check_dataset_json(raw.dataset_json, raw.folder / "dataset.json")
    if not isinstance(raw.dataset_json.get("labels"), dict) or not all(
        isinstance(value, int | list) for value in raw.dataset_json["labels"].values()
    ):
        return AuditReport(0, _unique(faults), [], {}, raw.name)
    cases, by_name = list_cases(raw.folder, raw.dataset_json)
    if raw.source == raw.folder:
        faults += by_name
    values, ignore = label_values(raw.dataset_json)
    allowed = {*values, 0, *([] if ignore is None else [ignore])}
    shown = _shown_names(raw)
    use_nibabel = _reads_by_nibabel(raw.dataset_json)
    expected = n_channels(raw.dataset_json)

    def inspect(case: CaseFiles) -> _Findings:
        return _inspect(case, expected, allowed, use_nibabel, shown)

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

    def inspect(files: list[Path]) -> _Findings:
        return _inspect(CaseFiles(tuple(files), None), n_channels, None, use_nibabel, str)

    findings = _run(inspect, files_per_case.values(), n_workers, progress, "Checking the images")
    return {
        case: found.faults
        for case, found in zip(files_per_case, findings, strict=True)
        if found.faults
    }


def _run(
    inspect: Callable[[Any], _Findings],
    cases: Iterable[Any],
    n_workers: int,
    progress: bool,
    what: str,
) -> list[_Findings]:
    listed = list(cases)
    with ThreadPoolExecutor(max(1, n_workers)) as pool:
        results = pool.map(inspect, listed)
        return list(tqdm(results, what, len(listed), disable=not progress, unit="case"))


def _inspect(
    case: CaseFiles,
    expected_channels: int,
    allowed: set[int] | None,
    use_nibabel: bool,
    shown: Callable[[Path], str],
) -> _Findings:
    """Check one case; `allowed` None: there is no label to look for."""
    found = _Findings()
    first: ImageContent | None = None
    total = 0
    is_whole = True
    for path in case.images:
        content = _read(path, use_nibabel, False, found, shown)
        if content is None:
            is_whole = False
            continue
        name = shown(path)
        total += content.array.shape[0]
        found.digests.append((content.digest, name))
        _check_values(content, name, found)
        if first is None:
            first, first_name = content, name
            found.shape, found.spacing = content.shape, content.spacing
            is_volume = content.affine is None and content.spacing[0] != 999
            aside = path.with_name(path.name.rsplit(".", 1)[0][:-5] + ".json")
            found.without_spacing = name if is_volume and not aside.is_file() else None
        else:
            _check_geometry(first, first_name, content, name, found)
    if first is not None and is_whole and total != expected_channels:
        what = f"has {total} channel(s) where {expected_channels} are expected"
        cure = "give every case the same channels, those that dataset.json names"
        found.faults.append(Fault(first_name, what, cure))
    if case.label is None or allowed is None:
        return found
    label = _read(case.label, use_nibabel, True, found, shown)
    if label is None:
        return found
    name = shown(case.label)
    if label.array.shape[0] != 1:
        what = f"is a color picture with {label.array.shape[0]} channels"
        found.faults.append(Fault(name, what, "save the label as gray values 0, 1, 2, ..."))
        return found
    if first is not None:
        _check_geometry(first, first_name, label, name, found)
    found.counts = label_counts(label)
    _check_labels(found.counts, allowed, name, found)
    return found


def _read(
    path: Path,
    use_nibabel: bool,
    is_label: bool,
    found: _Findings,
    shown: Callable[[Path], str],
) -> ImageContent | None:
    try:
        return read_image(path, use_nibabel, is_label)
    except UnreadableImageError as error:
        fault = error.fault
        if fault.file == str(path):
            fault = dataclasses.replace(fault, file=shown(path))
        found.faults.append(fault)
        return None


def _check_values(content: ImageContent, name: str, found: _Findings) -> None:
    array = content.array
    if array.dtype.kind == "f":
        finite = np.isfinite(array)
        n_bad = array.size - int(np.count_nonzero(finite))
        if n_bad:
            n_nan = int(np.count_nonzero(np.isnan(array)))
            kinds = [
                f"{n} {kind}" for n, kind in ((n_nan, "NaN"), (n_bad - n_nan, "infinite")) if n
            ]
            what = f"holds {' and '.join(kinds)} of {array.size} voxels"
            cure = "replace them by a value that makes sense for the image, such as its minimum"
            found.faults.append(Fault(name, what, cure))
            return
    if array.min() == array.max():
        what = f"is constant: every voxel is {array.flat[0]:g}"
        found.warnings.append(Fault(name, what, "check that the image was exported whole"))


def _check_geometry(
    first: ImageContent, first_name: str, other: ImageContent, name: str, found: _Findings
) -> None:
    """Compare a channel or a label with the first channel: shape, spacing, place in space."""
    of = f"its image {Path(first_name).name}"
    if first.shape != other.shape:
        what = f"has shape {other.shape} but {of} has {first.shape} (z, y, x)"
        found.faults.append(Fault(name, what, "resample it to the image or replace the wrong file"))
        return
    spacings = np.array([first.spacing, other.spacing])
    if (np.abs(spacings[0] - spacings[1]) > SPACING_TOLERANCE * spacings[0]).any():
        mm = [", ".join(f"{s:.4g}" for s in row) for row in spacings]
        what = f"has spacing ({mm[1]}) mm but {of} has ({mm[0]}) (z, y, x)"
        cure = "copy the image's header into it if both show the same grid, else resample it"
        found.faults.append(Fault(name, what, cure))
        return
    if first.affine is None or other.affine is None:
        return
    offset_mm, offset = _corner_offset(first, other)
    if offset > WARNING_OFFSET:
        what = f"lies up to {offset_mm:.3g} mm ({offset:.2g} voxels) off {of} (origin or direction)"
        cure = "copy the image's header into it if the voxels belong together, else resample it"
        fault = Fault(name, what, cure)
        (found.faults if offset > FAULT_OFFSET else found.warnings).append(fault)


def _corner_offset(first: ImageContent, other: ImageContent) -> tuple[float, float]:
    """Return the largest distance of corresponding corners, in mm and in voxels."""
    assert first.affine is not None
    assert other.affine is not None
    z, y, x = (n - 1 for n in first.shape)
    corners = np.array([(i, j, k, 1) for i in (0, x) for j in (0, y) for k in (0, z)], float)
    shift = (corners @ (other.affine - first.affine).T)[:, :3]
    matrix = first.affine[:3, :3]
    mm = float(np.linalg.norm(shift, axis=1).max())
    if not np.isfinite(matrix).all() or abs(np.linalg.det(matrix)) < 1e-12:
        return mm, mm
    return mm, float(np.abs(np.linalg.solve(matrix, shift.T)).max())


def _check_labels(counts: dict[float, int], allowed: set[int], name: str, found: _Findings) -> None:
    values = list(counts)
    if not all(math.isfinite(v) for v in values):
        found.faults.append(Fault(name, "holds NaN or infinite labels", "save whole numbers"))
        values = [v for v in values if math.isfinite(v)]
    fractions = [v for v in values if v != math.floor(v)]
    if fractions:
        what = f"holds labels that are no whole numbers ({_listed(fractions)})"
        cure = "save the label map itself, not an interpolated or smoothed one"
        found.faults.append(Fault(name, what, cure))
    negative = [v for v in values if v < 0 and v == math.floor(v)]
    if negative:
        what = f"holds negative labels ({_listed(negative)})"
        found.faults.append(Fault(name, what, "number the labels 0, 1, 2, ..."))
    unknown = [v for v in values if v >= 0 and v == math.floor(v) and v not in allowed]
    if unknown:
        what = f"holds label value(s) {_listed(unknown)} that dataset.json does not name"
        found.faults.append(Fault(name, what, "name them in dataset.json or correct the label"))


def _duplicates(findings: list[_Findings]) -> list[Fault]:
    first: dict[bytes, str] = {}
    result = []
    for found in findings:
        for digest, name in found.digests:
            if digest in first:
                what = f"is the same image as {Path(first[digest]).name}"
                result.append(Fault(name, what, "remove one, or they may meet in both folds"))
            first.setdefault(digest, name)
    return result


def _missing_spacings(findings: list[_Findings]) -> list[Fault]:
    names = [found.without_spacing for found in findings if found.without_spacing]
    if not names:
        return []
    what = f"and {len(names) - 1} more have no spacing" if names[1:] else "has no spacing"
    cure = 'write {"spacing": [z, y, x]} in mm to <case>.json beside it, else 1 mm is taken'
    return [Fault(names[0], what, cure)]


def _label_findings(
    raw: RawDataset, findings: list[_Findings], values: list[int]
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
    raw: RawDataset, findings: list[_Findings], values: list[int], ignore: int | None
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
    folder = str(raw.folder) + "/"

    def shown(path: Path) -> str:
        entry = entries.get(str(path).removeprefix(folder))
        return str(entry[0]) if entry else str(path)

    return shown


def _reads_by_nibabel(content: dict[str, Any]) -> bool:
    reader = str(content.get("overwrite_image_reader_writer"))
    return reader.startswith("NibabelIO") or str(content.get("file_ending")).lower() == ".nii"


def _listed(values: list[float]) -> str:
    values = sorted(values)
    text = ", ".join(f"{value:g}" for value in values[:6])
    return f"{text}, ..." if len(values) > 6 else text


def _unique(faults: list[Fault]) -> list[Fault]:
    return list(dict.fromkeys(faults))
