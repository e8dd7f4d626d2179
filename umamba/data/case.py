"""Checks one case: its images whole, finite and on one grid, its label with allowed values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from umamba.data.components import component_sizes
from umamba.data.faults import Fault, Faults, Repair, UnreadableImageError
from umamba.data.images import (
    PIXELS,
    ImageContent,
    ending_of,
    label_counts,
    read_image,
)
from umamba.data.layout import CaseFiles
from umamba.files import printable

SPACING_TOLERANCE = 1e-3  # relative
FAULT_OFFSET, WARNING_OFFSET = 0.5, 1e-2  # of a voxel, at the worst corner
NEAR_WHOLE = 1e-2  # labels this close to whole numbers mean them: 8 bits with a slope are
SAMPLES = 1 << 18  # voxels of an image whose percentiles are taken
BY_FIX = "`umamba audit DATASET --fix FOLDER` does it in a copy"

Give = Callable[[list[ImageContent], ImageContent | None], None]


@dataclass(frozen=True)
class Setup:
    """What a dataset asks of each case.

    n_channels: 0 where dataset.json does not say; labels: the values that a label may hold;
    use_nibabel: nnU-Net reads the dataset with NibabelIO.
    """

    n_channels: int
    labels: tuple[int, ...]
    use_nibabel: bool


@dataclass
class Findings:
    """What one case showed; plain values only, none of its voxels.

    digests: (hash, file) per image; counts: voxels per label value, components: per value above 0
    the components per size; intensities: per channel (file, lowest, 0.5 and 99.5 percentile,
    highest), (z, y, x) shape and spacing of the first channel; without_spacing: a file that has
    none.
    """

    faults: Faults = field(default_factory=Faults)
    warnings: Faults = field(default_factory=Faults)
    repairs: list[Repair] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    spacing: tuple[float, ...] | None = None
    digests: list[tuple[str, str]] = field(default_factory=list)
    intensities: dict[int, tuple[str, float, float, float, float]] = field(default_factory=dict)
    counts: dict[float, int] | None = None
    components: dict[int, dict[int, int]] = field(default_factory=dict)
    without_spacing: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; only for a case without faults."""
        content = dataclasses.asdict(self)
        del content["faults"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Findings:
        """Return what `to_json` was called on. Raises KeyError or TypeError for anything else."""
        counts = content["counts"]
        return cls(
            Faults(),
            Faults(Fault(**warning) for warning in content["warnings"]),
            [Repair(**repair) for repair in content["repairs"]],
            content["shape"] and tuple(content["shape"]),
            content["spacing"] and tuple(content["spacing"]),
            [(digest, name) for digest, name in content["digests"]],
            {
                int(channel): (name, float(smallest), float(low), float(high), float(largest))
                for channel, (name, smallest, low, high, largest) in content["intensities"].items()
            },
            None if counts is None else {float(value): n for value, n in counts.items()},
            {
                int(value): {int(size): n for size, n in sizes.items()}
                for value, sizes in content["components"].items()
            },
            content["without_spacing"],
        )


def inspect_case(
    case: CaseFiles,
    setup: Setup,
    shown: Callable[[Path], str] = str,
    give: Give | None = None,
) -> Findings:
    """Read the files of one case once and return what they show.

    shown: the name of a file as the user knows it; give: takes the images and the label of a case
    without a fault.
    """
    found = Findings()
    images: list[ImageContent] = []

    def read(path: Path, is_label: bool = False) -> ImageContent | None:
        try:
            return read_image(path, setup.use_nibabel, is_label)
        except UnreadableImageError as error:
            fault = error.fault
            file = shown(path) if fault.file == printable(path) else fault.file
            found.faults.add(file, fault.what, fault.cure)
            return None

    first: ImageContent | None = None
    first_path = case.images[0]
    n_found, is_whole = 0, True
    for path in case.images:
        content, name = read(path), shown(path)
        if content is None:
            n_found, is_whole = n_found + 1, False
            continue
        if give is not None:
            images.append(content)
        _check_values(content, n_found, name, found)
        n_found += content.array.shape[0]
        if first is not None:
            _check_geometry(first, first_path, content, path, shown, found)
            continue
        first, first_path = content, path
        found.shape, found.spacing = content.shape, content.spacing
        found.without_spacing = None if content.has_spacing else name
    if first is not None and is_whole and setup.n_channels not in (0, n_found):
        what = f"has {n_found} channel(s) where {setup.n_channels} are expected"
        cure = "give every case the same channels, those that dataset.json names"
        found.faults.add(shown(first_path), what, cure)
    label = None if case.label is None else read(case.label, is_label=True)
    if case.label is not None and label is not None:
        name = shown(case.label)
        if label.array.shape[0] != 1:
            what = f"is a color picture with {label.array.shape[0]} channels"
            found.faults.add(name, what, "save the label as gray values 0, 1, 2, ...")
            return found
        if first is not None:
            _check_geometry(first, first_path, label, case.label, shown, found)
        _check_label(label, case.label, setup.labels, name, found)
    if give is not None and images and not found.faults:
        give(images, label)
    return found


def _check_values(content: ImageContent, first: int, name: str, found: Findings) -> None:
    """Add NaN and infinite voxels and a constant image, else note its hash and channels' ranges.

    first: the number of the file's first channel.
    """
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
        value = array.flat[0] * content.slope + content.intercept
        what = f"is constant: every voxel is {value:g}"
        found.warnings.add(name, what, "check that the image was exported whole")
        return
    found.digests.append((content.digest(), name))
    for i, channel in enumerate(array, first):
        # an odd step meets every column, whatever the shape
        step = channel.size // SAMPLES | 1
        low, high = np.percentile(channel.reshape(-1)[::step], (0.5, 99.5))
        four = np.array([channel.min(), low, high, channel.max()], float)
        four = np.sort(four * content.slope + content.intercept)
        smallest, low, high, largest = (float(f"{value:.6g}") for value in four)
        found.intensities[i] = (name, smallest, low, high, largest)


def _check_geometry(
    first: ImageContent,
    first_path: Path,
    other: ImageContent,
    path: Path,
    shown: Callable[[Path], str],
    found: Findings,
) -> None:
    """Compare a channel or a label with the first channel: shape, spacing, place in space."""
    of, name = f"its image {Path(shown(first_path)).name}", shown(path)
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
    if offset <= WARNING_OFFSET:
        return
    what = f"lies up to {offset_mm:.3g} mm ({offset:.2g} voxels) off {of} (origin or direction)"
    turned = np.einsum("ij,ij->j", first.affine[:3, :3], other.affine[:3, :3]) < 0
    if turned.any():
        axes = ", ".join(axis for axis, is_turned in zip("xyz", turned, strict=True) if is_turned)
        what = f"is flipped against {of}: its {axes} direction is reversed"
    cure = "copy the image's header into it if the voxels belong together, else resample it"
    if offset > FAULT_OFFSET:
        found.faults.add(name, what, cure)
    else:
        found.warnings.add(name, what, f"copy the image's header into it: {BY_FIX}")
        found.repairs.append(Repair(str(path), "header", str(first_path)))


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


def _check_label(
    label: ImageContent, path: Path, allowed: tuple[int, ...], name: str, found: Findings
) -> None:
    """Count the values of a label map, add what is wrong with them, and count its components."""
    found.counts = label_counts(label)
    values, n_before = list(found.counts), len(found.faults)
    faults = found.faults
    whole = [v for v in values if math.isfinite(v) and v == math.floor(v)]
    fractions = [v for v in values if math.isfinite(v) and v != math.floor(v)]
    if len(whole) + len(fractions) < len(values):
        faults.add(name, "holds NaN or infinite labels", "save whole numbers")
    can_repair = ending_of(path) not in PIXELS
    if fractions and can_repair and all(abs(v - round(v)) <= NEAR_WHOLE for v in fractions):
        what = f"holds labels a hair off whole numbers ({_listed(fractions)})"
        faults.add(name, what, f"round them, nnU-Net cuts them off: {BY_FIX}")
        found.repairs.append(Repair(str(path), "integers", None))
    elif fractions:
        what = f"holds labels that are no whole numbers ({_listed(fractions)})"
        faults.add(name, what, "save the label map itself, not an interpolated or smoothed one")
    if negative := [v for v in whole if v < 0]:
        what = f"holds negative labels ({_listed(negative)})"
        faults.add(name, what, "number the labels 0, 1, 2, ...")
    if unknown := [v for v in whole if v >= 0 and v not in allowed]:
        what = f"holds label value(s) {_listed(unknown)} that dataset.json does not name"
        faults.add(name, what, "name them in dataset.json or correct the label")
    if len(faults) > n_before:
        return
    stored = label.array.dtype
    if can_repair and (stored.kind == "f" or (label.slope, label.intercept) != (1.0, 0.0)):
        kind = stored.name if stored.kind == "f" else f"scaled {stored.name}"
        what = f"holds whole numbers, but stored as {kind}"
        found.warnings.add(name, what, f"nnU-Net reads it; to store integers: {BY_FIX}")
        found.repairs.append(Repair(str(path), "integers", None))
    found.components = component_sizes(label.values()[0])


def _listed(values: list[float]) -> str:
    text = ", ".join(f"{value:g}" for value in values[:6])
    return f"{text}, ..." if len(values) > 6 else text
