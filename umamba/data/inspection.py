"""Checks one case: its images whole and finite, on one grid, its label with allowed values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from umamba.data.content import ImageContent, label_counts
from umamba.data.faults import Fault, UnreadableImageError
from umamba.data.images import read_image
from umamba.data.layout import CaseFiles

SPACING_TOLERANCE = 1e-3  # relative
FAULT_OFFSET, WARNING_OFFSET = 0.5, 1e-2  # of a voxel, at the worst corner


@dataclass
class Findings:
    """What one case showed."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[Fault] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    digests: list[tuple[bytes, str]] = field(default_factory=list)
    counts: dict[float, int] | None = None
    without_spacing: str | None = None


def inspect_case(
    case: CaseFiles,
    expected_channels: int,
    allowed: set[int] | None,
    use_nibabel: bool,
    shown: Callable[[Path], str],
) -> Findings:
    """Check one case.

    expected_channels: 0 where dataset.json does not say; allowed: label values, None where there
    is no label to look for; shown: the name of a file as the user knows it.
    """
    found = Findings()
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
    if first is not None and is_whole and expected_channels not in (0, total):
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
    found: Findings,
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


def _check_values(content: ImageContent, name: str, found: Findings) -> None:
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
    first: ImageContent, first_name: str, other: ImageContent, name: str, found: Findings
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


def _check_labels(counts: dict[float, int], allowed: set[int], name: str, found: Findings) -> None:
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


def _listed(values: list[float]) -> str:
    values = sorted(values)
    text = ", ".join(f"{value:g}" for value in values[:6])
    return f"{text}, ..." if len(values) > 6 else text
