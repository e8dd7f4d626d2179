"""Reads label maps and images from files as (z, y, x) arrays with their geometry, by SimpleITK."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK

from umamba.files import printable, replacing, write_text

_NATURAL_ENDINGS = (".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff")


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a file lie; shape and spacing as (z, y, x), the others as in the file.

    origin and direction are empty for a file that knows pixels but no patient (PNG, TIFF, ...).
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    n_components: int

    def difference(self, other: "Geometry") -> str | None:
        """Returns in words how the other geometry differs beyond round-off, None if it does not."""
        # relative, absolute; a hundredth of a voxel: NIfTI is rounded through float32 quaternions
        tolerances = {
            "shape": (0.0, 0.0),
            "spacing": (1e-3, 1e-5),
            "origin": (1e-4, 0.01 * max(self.spacing)),
            "direction": (1e-5, 1e-2),
        }
        for name, (relative, absolute) in tolerances.items():
            a, b = getattr(self, name), getattr(other, name)
            if len(a) != len(b) or not np.allclose(a, b, relative, absolute):
                words = [", ".join(f"{value:g}" for value in values) for values in (a, b)]
                return f"{name} ({words[0]}) against ({words[1]})"
        return None


def read_geometry(file: Path) -> Geometry:
    """Reads the header alone. Raises FileNotFoundError or ValueError naming the file."""
    reader = SimpleITK.ImageFileReader()
    with _errors_of(file):
        reader.SetFileName(str(file))
        reader.ReadImageInformation()
    shape, n_components = tuple(reader.GetSize()[::-1]), reader.GetNumberOfComponents()
    if file.suffix.lower() in _NATURAL_ENDINGS:
        return Geometry(shape, _pixel_spacing(file, len(shape)), (), (), n_components)
    spacing, origin = tuple(reader.GetSpacing()[::-1]), tuple(reader.GetOrigin())
    return Geometry(shape, spacing, origin, tuple(reader.GetDirection()), n_components)


def read_label_map(file: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """Returns the integer label map (z, y, x) or (y, x) and its spacing in the same order, mm.

    Raises ValueError for a file that is unreadable, cut off, has several components per voxel or
    values that are not whole numbers.
    """
    geometry = read_geometry(file)
    return _whole_numbers(_read(file), file), geometry.spacing


def rewrite_label_map(
    source: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Writes a changed label map in the geometry of its file, whole or not at all.

    The .json beside a TIFF, in which nnU-Net keeps the spacing, comes along. Raises as
    read_label_map does.
    """
    image = _read(source)
    changed = SimpleITK.GetImageFromArray(change(_whole_numbers(image, source)))
    changed.CopyInformation(image)
    beside = source.with_suffix(".json")
    if source.suffix.lower() in (".tif", ".tiff") and beside.is_file():
        write_text(target.with_suffix(".json"), beside.read_text(encoding="utf-8"))
    with replacing(target) as temporary:
        SimpleITK.WriteImage(changed, str(temporary), useCompression=True)


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
    image, spacing = _read(file), geometry.spacing
    anatomical = len(spacing) == 3 and bool(geometry.origin) and min(geometry.shape) > 1
    if anatomical:
        image = SimpleITK.DICOMOrient(image, "LPS")
        spacing = tuple(image.GetSpacing()[::-1])
    array = SimpleITK.GetArrayFromImage(image)
    if geometry.n_components > 1:
        array = array[..., :3] if geometry.n_components > 2 else array[..., 0]
    return View(array, spacing, anatomical)


def _whole_numbers(image: SimpleITK.Image, file: Path) -> np.ndarray:
    if (n_components := image.GetNumberOfComponentsPerPixel()) != 1:
        raise ValueError(
            f"{file}: has {n_components} values per voxel (a colour image?); "
            "store the label map with one whole number per voxel"
        )
    labels = SimpleITK.GetArrayFromImage(image)
    if labels.dtype.kind != "f":
        return labels
    whole = np.rint(labels)
    if not np.array_equal(whole, labels):
        raise ValueError(f"{file}: holds values that are not whole numbers; is it a label map?")
    return whole.astype(np.int32)


def _read(file: Path) -> SimpleITK.Image:
    # SimpleITK fills what a cut file lacks without a word, in .gz, .nii and .gipl
    with _errors_of(file):
        with file.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        if is_gzip:
            with gzip.open(file) as stream:
                while stream.read(1 << 22):
                    pass
        image = SimpleITK.ReadImage(str(file))
        if not is_gzip and file.suffix.lower() in (".nii", ".gipl"):
            n_header, n_bits = 256, 8 * image.GetSizeOfPixelComponent()
            if image.HasMetaDataKey("bitpix"):  # of a NIfTI, whose scaled voxels become floats
                n_header = int(float(image.GetMetaData("vox_offset")))
                n_bits = int(image.GetMetaData("bitpix"))
            if file.stat().st_size < n_header + image.GetNumberOfPixels() * n_bits // 8:
                raise EOFError("bytes of its voxels are missing")
        return image


@contextmanager
def _errors_of(file: Path) -> Iterator[None]:
    """Puts the file's name and the cure into what goes wrong with it."""
    if printable(file) != str(file):  # of which SimpleITK ends the process
        raise ValueError(f"{printable(file)}: is not a name in UTF-8; rename it")
    try:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; check the name and the folder")
        if file.stat().st_size == 0:
            raise ValueError(f"{file}: is empty (0 bytes); write or copy it again")
        yield
    except PermissionError as error:
        message = f"{file}: may not be read by this user; change its permissions"
        raise ValueError(message) from error
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"{file}: cannot be read as an image ({last})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = f"{file}: is cut off or damaged ({error}); write or copy it again"
        raise ValueError(message) from error


def _pixel_spacing(file: Path, ndim: int) -> tuple[float, ...]:
    """Returns the spacing of nnU-Net's file beside a TIFF (NAME.json, "spacing"), else ones.

    What such files themselves say is the printer's; nnU-Net counts in pixels as well.
    """
    beside = file.with_suffix(".json")
    if file.suffix.lower() not in (".tif", ".tiff") or not beside.is_file():
        return (1.0,) * ndim
    try:
        return tuple(map(float, json.loads(beside.read_text(encoding="utf-8"))["spacing"]))[-ndim:]
    except (ValueError, KeyError, TypeError) as error:
        message = f'{beside}: must read {{"spacing": [z, y, x]}}; correct or remove it'
        raise ValueError(message) from error
