"""Reads one image file whole, with the checks that nnU-Net's readers leave out.

SimpleITK reads a .nii, .nii.gz or .gipl file that is cut short without an error and turns NaN and
Inf of a float NIfTI into 0, so NIfTI is read here from its bytes, and SimpleITK is asked only for
the geometry (it refuses some headers, and nnU-Net would then fail).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from umamba.data.faults import UnreadableImageError

FILE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tiff", ".tif")
NATURAL_ENDINGS = (".png", ".bmp", ".tif")
REPLACE = "replace it by a whole copy, or remove the case"


@dataclass(frozen=True)
class ImageContent:
    """An image in nnU-Net's axis order, before the NIfTI scaling (slope, intercept) is applied.

    array: (channels, z, y, x), 2D images with z = 1; spacing (z, y, x) in mm;
    affine: (4, 4) from (x, y, z) index to mm, None for formats that carry none;
    digest: of the decompressed file.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    affine: np.ndarray | None
    digest: bytes
    slope: float = 1.0
    intercept: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape[1:])

    def values(self) -> np.ndarray:
        """Return the array with the scaling applied."""
        if self.slope == 1.0 and self.intercept == 0.0:
            return self.array
        return self.array * self.slope + self.intercept


def split_ending(name: str) -> tuple[str, str] | None:
    """Return (stem, ending as written) of a file nnU-Net has a reader for, None for any other."""
    lower = name.lower()
    for ending in FILE_ENDINGS:
        if lower.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)], name[-len(ending) :]
    return None


def read_image(path: Path, nibabel_geometry: bool = False, is_label: bool = False) -> ImageContent:
    """Read one file of any format of nnU-Net's.

    nibabel_geometry: the dataset is read by nnU-Net's NibabelIO, not by SimpleITK.
    is_label: the file's name carries no channel suffix (matters for the spacing of 3D TIFF).
    Raises UnreadableImageError, which names the file, the fault and the cure.
    """
    parts = split_ending(path.name)
    if parts is None:
        allowed = ", ".join(FILE_ENDINGS)
        raise UnreadableImageError(
            str(path), "has a file ending that nnU-Net cannot read", f"convert it to {allowed}"
        )
    ending = parts[1].lower()
    try:
        if path.stat().st_size == 0:
            raise UnreadableImageError(str(path), "is empty (0 bytes)", REPLACE)
        if ending in (".nii.gz", ".nii"):
            return _read_nifti(path, nibabel_geometry or ending == ".nii")
        if ending in (".png", ".bmp"):
            return _read_natural(path)
        if ending in (".tif", ".tiff"):
            return _read_tiff(path, ending, is_label)
        return _read_itk(path, ending)
    except UnreadableImageError:
        raise
    except FileNotFoundError:
        raise UnreadableImageError(
            str(path), "does not exist or is a broken link", "restore the file"
        ) from None
    except PermissionError:
        raise UnreadableImageError(
            str(path), "may not be read by this user", "change its permissions"
        ) from None
    except (OSError, EOFError, ValueError, RuntimeError, SyntaxError, zlib.error) as error:
        # the decoders' own exceptions all derive from these
        what = f"cannot be read ({_last_line(error)})"
        raise UnreadableImageError(str(path), what, REPLACE) from error


def label_counts(content: ImageContent) -> dict[float, int]:
    """Return voxels per value of a label map; NaN counts as one value."""
    values = content.values().ravel()
    if values.size == 0:
        return {}
    if values.dtype == np.bool_:
        values = values.view(np.uint8)
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if high - low < 1 << 20:
            if low:
                values = values.astype(np.int64) - low
            counts = np.bincount(values)
            return {float(i + low): int(counts[i]) for i in np.flatnonzero(counts)}
    found, times = np.unique(values, return_counts=True)
    return {float(v): int(n) for v, n in zip(found, times, strict=True)}


def _read_nifti(path: Path, nibabel_geometry: bool) -> ImageContent:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(path, data)
    is_v2 = len(data) >= 4 and 540 in struct.unpack("<i", data[:4]) + struct.unpack(">i", data[:4])
    header_class: Any = nibabel.Nifti2Header if is_v2 else nibabel.Nifti1Header
    if len(data) < (544 if is_v2 else 352):
        raise UnreadableImageError(str(path), "is cut short within its header", REPLACE)
    try:
        header = header_class(data[: 540 if is_v2 else 348])
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
        slope, intercept = header.get_slope_inter()
    except Exception as error:  # nibabel's own types share no base class but Exception
        what = f"has a broken NIfTI header ({_last_line(error)})"
        raise UnreadableImageError(str(path), what, REPLACE) from error
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    count = math.prod(shape)
    _check_shape(path, shape)
    missing = offset + count * dtype.itemsize - len(data)
    if missing > 0:
        raise UnreadableImageError(
            str(path), f"is cut short: {missing} bytes of its voxels are missing", REPLACE
        )
    if dtype.names is not None or dtype.kind not in "iufb":
        raise UnreadableImageError(
            str(path),
            f"holds voxels of type {dtype.name if dtype.names is None else 'RGB'}",
            "save each component as an image of its own",
        )
    array = np.frombuffer(data, dtype, count, offset).reshape(shape[::-1])
    if nibabel_geometry:
        affine = np.asarray(header.get_best_affine(), float)
        spacing = tuple(float(zoom) for zoom in header.get_zooms()[: len(shape)])[::-1]
    else:
        spacing, affine = _itk_geometry(path)
    if array.ndim == 2:
        array = array[None]
        spacing = (999 * max(spacing), *spacing) if len(spacing) == 2 else spacing
    return ImageContent(
        array[None],
        spacing,
        affine,
        hashlib.blake2b(data, digest_size=16).digest(),
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _gunzip(path: Path, data: bytes) -> bytes:
    """Decompress every member and insist on the end mark and checksum that SimpleITK ignores."""
    whole = b""
    while data[:2] == b"\x1f\x8b":
        member = zlib.decompressobj(wbits=31)
        try:
            piece = member.decompress(data)
        except zlib.error as error:
            raise UnreadableImageError(
                str(path), f"is damaged: its gzip stream does not decompress ({error})", REPLACE
            ) from error
        if not member.eof:
            raise UnreadableImageError(
                str(path), "is cut short: its gzip stream has no end", REPLACE
            )
        whole = piece if not whole else whole + piece
        data = member.unused_data
    return whole


def _itk_geometry(path: Path) -> tuple[tuple[float, ...], np.ndarray]:
    """Return spacing and affine as SimpleITK, nnU-Net's reader, understands the header."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        message = _last_line(error)
        cure = "save it again with a valid header"
        if "orthonormal" in str(error):
            message = "its direction vectors are not orthonormal"
            cure = (
                "resample it to a grid without shear, or set overwrite_image_reader_writer to "
                "NibabelIO in dataset.json"
            )
        raise UnreadableImageError(
            str(path), f"is refused by SimpleITK ({message})", cure
        ) from error
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
        raise UnreadableImageError(
            str(path), "holds vectors, not numbers", "save each component as an image of its own"
        )
    _check_shape(path, image.GetSize())
    array = SimpleITK.GetArrayFromImage(image)
    if ending == ".gipl" and path.stat().st_size < 256 + array.nbytes:
        with path.open("rb") as file:
            is_compressed = file.read(2) == b"\x1f\x8b"
        if not is_compressed:
            raise UnreadableImageError(
                str(path), "is cut short: bytes of its voxels are missing", REPLACE
            )
    spacing, affine = _geometry(image)
    if array.ndim == 2:
        array, spacing = array[None], (999 * max(spacing), *spacing)
    return ImageContent(array[None], spacing, affine, _digest(array))


def _read_natural(path: Path) -> ImageContent:
    from skimage import io  # 0.2 s, and only 2D datasets need it

    return _from_pixels(path, np.asarray(io.imread(path)))


def _from_pixels(path: Path, array: np.ndarray) -> ImageContent:
    if array.ndim == 3 and array.shape[-1] in (3, 4):
        array = array.transpose(2, 0, 1)
    elif array.ndim == 2:
        array = array[None]
    else:
        raise UnreadableImageError(
            str(path),
            f"has the shape {array.shape}, which is neither gray nor RGB(A)",
            "save it as a gray or RGB image",
        )
    _check_shape(path, array.shape[1:])
    return ImageContent(array[:, None], (999.0, 1.0, 1.0), None, _digest(array))


def _read_tiff(path: Path, ending: str, is_label: bool) -> ImageContent:
    import tifffile

    _check_tiff_pages(path)
    array = np.asarray(tifffile.imread(path))
    if ending == ".tif" and (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        return _from_pixels(path, array)
    if array.ndim != 3:
        cure = "rename it to .tif" if array.ndim == 2 else "save one 3D volume per file"
        raise UnreadableImageError(
            str(path), f"has {array.ndim} axes where nnU-Net reads 3D volumes from {ending}", cure
        )
    _check_shape(path, array.shape)
    stem = path.name[: -len(ending)]
    aside = path.with_name((stem if is_label else stem[:-5]) + ".json")
    spacing = (1.0, 1.0, 1.0)
    if aside.is_file():
        spacing = _spacing_beside(aside)
    return ImageContent(array[None], spacing, None, _digest(array))


def _spacing_beside(path: Path) -> tuple[float, float, float]:
    cure = 'write {"spacing": [z, y, x]} in mm'
    try:
        z, y, x = (float(s) for s in json.loads(path.read_text())["spacing"])
    except (ValueError, KeyError, TypeError):
        raise UnreadableImageError(str(path), "has no spacing of three numbers", cure) from None
    if not all(math.isfinite(s) and s > 0 for s in (z, y, x)):
        raise UnreadableImageError(str(path), "has a spacing that is not positive", cure)
    return z, y, x


def _check_tiff_pages(path: Path) -> None:
    """Walk the chain of pages: tifffile silently drops those behind the end of a cut file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(16)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        if order is None or len(head) < 8:
            return
        big = struct.unpack(order + "H", head[2:4])[0] == 43
        word, count_word, entry = ("Q", "Q", 20) if big else ("I", "H", 12)
        width, count_width = struct.calcsize("=" + word), struct.calcsize("=" + count_word)
        position = struct.unpack(order + word, head[8:16] if big else head[4:8])[0]
        seen: set[int] = set()
        while position and position not in seen:
            seen.add(position)
            if position + count_width > size:
                raise UnreadableImageError(str(path), "is cut short: pages are missing", REPLACE)
            file.seek(position)
            n = struct.unpack(order + count_word, file.read(count_width))[0]
            file.seek(position + count_width + n * entry)
            rest = file.read(width)
            if len(rest) < width:
                raise UnreadableImageError(str(path), "is cut short: pages are missing", REPLACE)
            position = struct.unpack(order + word, rest)[0]


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    if not shape or min(shape) == 0:
        raise UnreadableImageError(str(path), f"is empty: its shape is {shape}", REPLACE)
    if len(shape) > 3:
        raise UnreadableImageError(
            str(path),
            f"is {len(shape)}D with shape {tuple(shape)[::-1]}",
            "save one 3D file per channel, named <case>_0000, <case>_0001, ...",
        )


def _digest(array: np.ndarray) -> bytes:
    content = hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16)
    content.update(str(array.shape).encode())
    return content.digest()


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:160] if lines else type(error).__name__
