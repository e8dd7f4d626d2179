"""Reads label maps and images from files as (z, y, x) arrays with their geometry, by SimpleITK."""

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK

NATURAL_ENDINGS = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a file lie; shape and spacing as (z, y, x), origin as in the file."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    n_components: int = 1

    def difference(self, other: "Geometry") -> str | None:
        """Returns in words how the other geometry differs beyond round-off, None if it does not."""
        if self.shape != other.shape:
            return f"shape {_words(self.shape)} against {_words(other.shape)}"
        if not np.allclose(self.spacing, other.spacing, rtol=1e-3, atol=1e-5):
            return f"spacing {_words(self.spacing)} against {_words(other.spacing)}"
        # a hundredth of a voxel: writers of NIfTI round through float32 quaternions
        if not np.allclose(self.origin, other.origin, rtol=1e-4, atol=0.01 * max(self.spacing)):
            return f"origin {_words(self.origin)} against {_words(other.origin)}"
        if not np.allclose(self.direction, other.direction, atol=1e-2):
            return f"direction {_words(self.direction)} against {_words(other.direction)}"
        return None


def read_geometry(file: Path) -> Geometry:
    """Reads the header alone. Raises FileNotFoundError or ValueError naming the file."""
    _check_presence(file)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(file))
    with _errors_of(file):
        reader.ReadImageInformation()
    shape = tuple(reader.GetSize()[::-1])
    n_components = reader.GetNumberOfComponents()
    if is_natural(file):
        # what such files say of spacing is the printer's, nnU-Net counts in pixels as well
        return Geometry(shape, _pixel_spacing(file, len(shape)), (), (), n_components)
    return Geometry(
        shape,
        tuple(reader.GetSpacing()[::-1]),
        tuple(reader.GetOrigin()),
        tuple(reader.GetDirection()),
        n_components,
    )


def read_label_map(file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Returns the integer label map (z, y, x) or (y, x) and its spacing in the same order, mm.

    Raises ValueError for a file that is unreadable, cut off, has several components per voxel or
    values that are not whole numbers.
    """
    geometry = read_geometry(file)
    if geometry.n_components != 1:
        raise ValueError(
            f"{file}: has {geometry.n_components} values per voxel (a colour image?); "
            "store the label map with one whole number per voxel"
        )
    labels = SimpleITK.GetArrayFromImage(_read(file))
    if labels.dtype.kind == "f":
        whole = np.rint(labels)
        if not np.array_equal(whole, labels):
            raise ValueError(f"{file}: holds values that are not whole numbers; is it a label map?")
        labels = whole.astype(np.int32)
    return labels, geometry.spacing


@dataclass(frozen=True)
class View:
    """An image turned for looking at it.

    array: (z, y, x) or (y, x), with a last axis of 3 for colour; spacing: of the spatial axes, mm.
    anatomical: the axes run to superior, posterior and left, else they are the file's own.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    anatomical: bool


def read_view(file: Path) -> View:
    """Returns an image or label map for display; files with a patient's axes are turned to LPS.

    Raises FileNotFoundError or ValueError naming the file.
    """
    geometry = read_geometry(file)
    image = _read(file)
    anatomical = image.GetDimension() == 3 and not is_natural(file) and min(image.GetSize()) > 1
    if anatomical:
        image = SimpleITK.DICOMOrient(image, "LPS")
    array = SimpleITK.GetArrayFromImage(image)
    spacing = tuple(image.GetSpacing()[::-1]) if not is_natural(file) else geometry.spacing
    if geometry.n_components > 1:
        array = array[..., :3] if geometry.n_components > 2 else array[..., 0]
    return View(array, spacing, anatomical)


def is_natural(file: Path) -> bool:
    """Returns whether the file is of a kind that knows pixels but no patient (PNG, TIFF, ...)."""
    return file.name.lower().endswith(NATURAL_ENDINGS)


def _read(file: Path) -> SimpleITK.Image:
    if file.name.endswith(".gz"):
        _check_gzip(file)
    with _errors_of(file):
        return SimpleITK.ReadImage(str(file))


def _check_presence(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; check the name and the folder")
    if file.stat().st_size == 0:
        raise ValueError(f"{file}: is empty (0 bytes); write or copy it again")


def _check_gzip(file: Path) -> None:
    """Reads the stream to its end, because SimpleITK fills what a cut file lacks without a word."""
    try:
        with gzip.open(file) as stream:
            while stream.read(1 << 22):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{file}: is cut off or damaged ({error}); write or copy it again"
        ) from error


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{file}: cannot be read as an image ({last})") from error


def _pixel_spacing(file: Path, ndim: int) -> tuple[float, ...]:
    """Returns the spacing of nnU-Net's file beside a TIFF (NAME.json, "spacing"), else ones."""
    beside = file.with_suffix(".json")
    if file.suffix.lower() in (".tif", ".tiff") and beside.is_file():
        try:
            spacing = json.loads(beside.read_text(encoding="utf-8"))["spacing"]
            return tuple(float(value) for value in spacing)[-ndim:]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{beside}: must read {{"spacing": [z, y, x]}}; correct or remove it'
            ) from error
    return (1.0,) * ndim


def _words(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
