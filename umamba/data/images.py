"""Reads one image file of any of nnU-Net's formats, with the checks its readers leave out.

SimpleITK reads a .nii, .nii.gz or .gipl file that is cut short without an error and turns NaN and
Inf of a float NIfTI into 0, so NIfTI is read here from its bytes, and SimpleITK is asked only for
the geometry (it refuses some headers, and nnU-Net would then fail).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from umamba.data.faults import UnreadableImageError
from umamba.files import printable

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tiff", ".tif")
NATURAL_ENDINGS = (".png", ".bmp", ".tif")
NIFTI = (".nii", ".nii.gz")
TIFF = (".tif", ".tiff")
PIXELS = (".png", ".bmp", *TIFF)
# the decoders' own exceptions all derive from these
READ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, SyntaxError, OverflowError, zlib.error)
CHUNK, MOST_BINS = 1 << 22, 1 << 20  # voxels counted at once; values counted by bins
MOST_VALUES = 10_000  # an array with more is no label map
APART = "save each component as an image of its own"


@dataclass(frozen=True)
class ImageContent:
    """An image in nnU-Net's axis order, before the NIfTI scaling (slope, intercept) is applied.

    array: (channels, z, y, x), 2D images with z = 1; spacing (z, y, x) in mm, has_spacing: False
    where 1 mm is assumed; affine: (4, 4) from (x, y, z) index to mm, None for formats that carry
    none.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray | None
    slope: float = 1.0
    intercept: float = 0.0
    has_spacing: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[1:])

    def values(self) -> np.ndarray:
        """Return the array with the scaling applied."""
        if self.slope == 1.0 and self.intercept == 0.0:
            return self.array
        return self.array * self.slope + self.intercept

    def digest(self) -> str:
        """Return a hash of the voxels, their type, scaling and shape, as hexadecimal digits."""
        content = hashlib.blake2b(np.ascontiguousarray(self.array).data, digest_size=16)
        kind = self.array.dtype.str, self.array.shape, self.slope, self.intercept
        content.update(str(kind).encode())
        return content.hexdigest()


def split_ending(name: str) -> tuple[str, str] | None:
    """Return (stem, ending as written) of a file nnU-Net has a reader for, None for any other."""
    for ending in FILE_ENDINGS:
        if name.lower().endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], name[-len(ending) :]
    return None


def ending_of(path: Path) -> str:
    """Return the ending in lower case; empty where nnU-Net has no reader."""
    parts = split_ending(path.name)
    return parts[1].lower() if parts else ""


def read_image(path: Path, nibabel_geometry: bool = False, is_label: bool = False) -> ImageContent:
    """Read one file of any format of nnU-Net's.

    nibabel_geometry: the dataset is read by nnU-Net's NibabelIO, not by SimpleITK.
    is_label: the file's name carries no channel suffix (matters for the spacing of 3D TIFF).
    Raises UnreadableImageError, which names the file, the fault and the cure.
    """
    ending = ending_of(path)
    if not ending:
        cure = f"convert it to {', '.join(FILE_ENDINGS)}"
        raise UnreadableImageError(path, "has a file ending that nnU-Net cannot read", cure)
    if printable(path) != str(path):  # of which SimpleITK ends the process
        what = "has a name, or lies in a folder with a name, that is not UTF-8"
        raise UnreadableImageError(path, what, "rename it, for instance with convmv")
    try:
        if path.stat().st_size == 0:
            raise UnreadableImageError(path, "is empty (0 bytes)")
        if ending in NIFTI:
            content = _read_nifti(path, nibabel_geometry or ending == ".nii")
        elif ending in PIXELS:
            content = _read_picture(path, ending, is_label)
        else:
            content = _read_itk(path, ending)
        _check_place(path, content)
        return content
    except UnreadableImageError:
        raise
    except FileNotFoundError:
        what, cure = "does not exist or is a broken link", "restore the file"
        raise UnreadableImageError(path, what, cure) from None
    except PermissionError:
        what, cure = "may not be read by this user", "change its permissions"
        raise UnreadableImageError(path, what, cure) from None
    except MemoryError:
        what = "does not fit in memory"
        raise UnreadableImageError(path, what, "check its header, or use more memory") from None
    except Exception as error:  # a decoder raises anything on bytes it does not understand
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            what, cure = "is a link that leads in a circle", "restore the file"
            raise UnreadableImageError(path, what, cure) from None
        raise UnreadableImageError(path, f"cannot be read ({last_line(error)})") from error


def read_pixels(path: Path) -> np.ndarray:
    """Return the pixels of a PNG, BMP or TIFF as the decoder gives them, colors last."""
    if ending_of(path) in TIFF:
        import tifffile

        return np.asarray(tifffile.imread(path))
    from skimage import io  # 0.2 s, and only 2D datasets need it

    return np.asarray(io.imread(path))


def label_counts(content: ImageContent) -> dict[float, int]:
    """Return voxels per value of a label map, values ascending; NaN counts as one, the last.

    Counting ends once there are more than MOST_VALUES values.
    """
    values = content.values().reshape(-1)
    total: Counter[float] = Counter()
    for start in range(0, values.size, CHUNK):
        total.update(_count(values[start : start + CHUNK]))
        if len(total) > MOST_VALUES:
            break
    return dict(sorted(total.items(), key=lambda item: (math.isnan(item[0]), item[0])))


def _count(values: np.ndarray) -> dict[float, int]:
    if (
        values.dtype.kind == "f"
        and np.isfinite(values).all()
        and (values == np.rint(values)).all()
        and np.abs(values).max() <= MOST_BINS
    ):
        values = values.astype(np.int32)
    if values.dtype.kind != "f":
        low = int(values.min())
        if int(values.max()) - low <= MOST_BINS:
            counts = np.bincount(values.astype(np.int64) - low)
            return {float(i + low): int(counts[i]) for i in np.flatnonzero(counts)}
    found, times = (part[: MOST_VALUES + 1] for part in np.unique(values, return_counts=True))
    # one NaN object, so that those of several chunks are one key
    keys = [math.nan if math.isnan(v) else float(v) for v in found]
    return {key: int(n) for key, n in zip(keys, times, strict=True)}


def _read_nifti(path: Path, nibabel_geometry: bool) -> ImageContent:
    data = gunzip(path, path.read_bytes())
    is_v2 = data[:4] in (struct.pack("<i", 540), struct.pack(">i", 540))
    header_class: Any = nibabel.Nifti2Header if is_v2 else nibabel.Nifti1Header
    n_header = 540 if is_v2 else 348
    if len(data) < n_header + 4:
        raise UnreadableImageError(path, "is cut short within its header")
    try:
        header = header_class(data[:n_header])
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # nibabel's own types share no base class but Exception
        what = f"has a broken NIfTI header ({last_line(error)})"
        raise UnreadableImageError(path, what) from error
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    _check_shape(path, shape)
    count = math.prod(shape)
    missing = offset + count * dtype.itemsize - len(data)
    if missing > 0:
        what = f"is cut short: {missing} bytes of its voxels are missing"
        raise UnreadableImageError(path, what)
    if dtype.names is not None or dtype.kind not in "iufb":
        kind = dtype.name if dtype.names is None else "RGB"
        raise UnreadableImageError(path, f"holds voxels of type {kind}", APART)
    array = np.frombuffer(data, dtype, count, offset).reshape(shape[::-1])
    if nibabel_geometry:
        affine = np.asarray(header.get_best_affine(), float)
        spacing = tuple(float(zoom) for zoom in header.get_zooms()[: len(shape)])[::-1]
    else:
        spacing, affine = _itk_geometry(path)
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    return ImageContent(*_as_3d(array, spacing), affine, slope, intercept)


def gunzip(path: Path, data: bytes) -> bytes:
    """Return the bytes of a file, decompressed if they are gzip's.

    Insists on the end mark and checksum of every member, which SimpleITK ignores.
    """
    if data[:2] != b"\x1f\x8b":
        return data
    pieces = []
    while data[:2] == b"\x1f\x8b":
        member = zlib.decompressobj(wbits=31)
        try:
            pieces.append(member.decompress(data))
        except zlib.error as error:
            what = f"is damaged: its gzip stream does not decompress ({error})"
            raise UnreadableImageError(path, what) from error
        if not member.eof:
            raise UnreadableImageError(path, "is cut short: its gzip stream has no end")
        data = member.unused_data
    return b"".join(pieces)


def _itk_geometry(path: Path) -> tuple[tuple[float, ...], np.ndarray]:
    """Return spacing and affine as SimpleITK, nnU-Net's reader, understands the header."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        what, cure = last_line(error), "save it again with a valid header"
        if "orthonormal" in str(error):
            what = "its direction vectors are not orthonormal"
            cure = (
                "resample it to a grid without shear, or set overwrite_image_reader_writer to "
                "NibabelIO in dataset.json"
            )
        raise UnreadableImageError(path, f"is refused by SimpleITK ({what})", cure) from error
    return _geometry(reader)


def _geometry(image: Any) -> tuple[tuple[float, ...], np.ndarray]:
    n = image.GetDimension()
    spacing = np.asarray(image.GetSpacing(), float)
    affine = np.eye(4)
    k = min(n, 3)
    affine[:k, :k] = (np.asarray(image.GetDirection(), float).reshape(n, n) * spacing)[:k, :k]
    affine[:k, 3] = image.GetOrigin()[:k]
    return tuple(float(s) for s in spacing[:3])[::-1], affine


def _read_itk(path: Path, ending: str) -> ImageContent:
    image = SimpleITK.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise UnreadableImageError(path, "holds vectors, not numbers", APART)
    _check_shape(path, image.GetSize())
    array = SimpleITK.GetArrayFromImage(image)
    if ending == ".gipl" and path.stat().st_size < 256 + array.nbytes:
        with path.open("rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
        if not is_compressed:
            raise UnreadableImageError(path, "is cut short: bytes of its voxels are missing")
    spacing, affine = _geometry(image)
    return ImageContent(*_as_3d(array, spacing), affine)


def _as_3d(array: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return (channels, z, y, x) and its spacing; a 2D image gets nnU-Net's z axis."""
    if array.ndim == 2:
        array = array[None]
        spacing = (999 * max(spacing), *spacing) if len(spacing) == 2 else spacing
    return array[None], spacing


def _read_picture(path: Path, ending: str, is_label: bool) -> ImageContent:
    """Read a 2D picture (gray is one channel, RGB(A) three or four) or a 3D TIFF.

    nnU-Net reads .tiff as volumes only, whose spacing stands in a .json beside the file.
    """
    if ending in TIFF:
        _check_tiff_pages(path)
    array = read_pixels(path)
    is_color = array.ndim == 3 and array.shape[-1] in (3, 4)
    if ending in NATURAL_ENDINGS and (array.ndim == 2 or is_color):
        array = array.transpose(2, 0, 1) if is_color else array[None]
        _check_shape(path, array.shape[1:])
        return ImageContent(array[:, None], (999.0, 1.0, 1.0), None)
    if ending not in TIFF:
        what = f"has the shape {array.shape}, which is neither gray nor RGB(A)"
        raise UnreadableImageError(path, what, "save it as a gray or RGB image")
    if array.ndim != 3:
        what = f"has {array.ndim} axes where nnU-Net reads 3D volumes from {ending}"
        cure = "rename it to .tif" if array.ndim == 2 else "save one 3D volume per file"
        raise UnreadableImageError(path, what, cure)
    _check_shape(path, array.shape)
    stem = path.name[: -len(ending)]
    aside = path.with_name((stem if is_label else stem[:-5]) + ".json")
    has_spacing = aside.is_file()
    spacing = _spacing_beside(aside) if has_spacing else (1.0, 1.0, 1.0)
    return ImageContent(array[None], spacing, None, has_spacing=has_spacing)


def _spacing_beside(path: Path) -> tuple[float, float, float]:
    cure = 'write {"spacing": [z, y, x]} in mm'
    try:
        z, y, x = (float(s) for s in json.loads(path.read_text())["spacing"])
    except (ValueError, KeyError, TypeError):
        raise UnreadableImageError(path, "has no spacing of three numbers", cure) from None
    if not all(math.isfinite(s) and s > 0 for s in (z, y, x)):
        raise UnreadableImageError(path, "has a spacing that is not positive", cure)
    return z, y, x


def _check_tiff_pages(path: Path) -> None:
    """Walk the chain of pages: tifffile silently drops those behind the end of a cut file."""
    with path.open("rb") as file:
        head = file.read(4)
        order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        if not order or len(head) < 4:
            return

        def number(kind: str) -> int:
            data = file.read(struct.calcsize(order + kind))
            if len(data) < struct.calcsize(order + kind):
                raise UnreadableImageError(path, "is cut short: pages are missing")
            return int(struct.unpack(order + kind, data)[0])

        is_big = struct.unpack(order + "H", head[2:])[0] == 43
        offset_kind, count_kind, entry_size = ("Q", "Q", 20) if is_big else ("I", "H", 12)
        file.seek(8 if is_big else 4)
        position = number(offset_kind)
        seen: set[int] = set()
        while position and position not in seen:
            seen.add(position)
            file.seek(position)
            file.seek(number(count_kind) * entry_size, os.SEEK_CUR)
            position = number(offset_kind)


def _check_place(path: Path, content: ImageContent) -> None:
    """Refuse what no voxel can be placed with; the readers pass it on."""
    cure = "correct its header, or save it again from the original"
    if not all(0 < s < math.inf for s in content.spacing):
        mm = ", ".join(f"{s:.4g}" for s in content.spacing)
        raise UnreadableImageError(path, f"has the impossible spacing ({mm}) mm (z, y, x)", cure)
    if content.affine is not None and not np.isfinite(content.affine).all():
        what = "has an origin or direction that is NaN or infinite"
        raise UnreadableImageError(path, what, cure)


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse empty, 1D and 4D images; `shape` in the file's order, (x, y, z, channels)."""
    if not shape or min(shape) <= 0:
        raise UnreadableImageError(path, f"is empty: its shape is {shape}")
    if len(shape) == 1:
        cure = "save an image of two or three axes"
        raise UnreadableImageError(path, f"is a single line of {shape[0]} voxels", cure)
    if len(shape) > 3:
        what = f"is {len(shape)}D with shape {tuple(shape)[::-1]} (channels, z, y, x)"
        cure = "save one 3D file per channel, named <case>_0000, <case>_0001, ..."
        raise UnreadableImageError(path, what, cure)


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, which names the cause."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:160] if lines else type(error).__name__
