"""Reads NIfTI, NRRD, MHA and GIPL whole.

SimpleITK reads a .nii, .nii.gz or .gipl file that is cut short without an error and turns NaN and
Inf of a float NIfTI into 0, so NIfTI is read here from its bytes, and SimpleITK is asked only for
the geometry (it refuses some headers, and nnU-Net would then fail).
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from umamba.data.content import REPLACE, ImageContent, check_shape, digest_of, last_line
from umamba.data.faults import UnreadableImageError


def read_nifti(path: Path, nibabel_geometry: bool) -> ImageContent:
    """Read .nii or .nii.gz; the geometry is nibabel's or SimpleITK's."""
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
        what = f"has a broken NIfTI header ({last_line(error)})"
        raise UnreadableImageError(str(path), what, REPLACE) from error
    shape = tuple(int(n) for n in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    count = math.prod(shape)
    check_shape(path, shape)
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
        message = last_line(error)
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


def read_itk(path: Path, ending: str) -> ImageContent:
    """Read a file of SimpleITK's formats."""
    image = SimpleITK.ReadImage(str(path))
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise UnreadableImageError(
            str(path), "holds vectors, not numbers", "save each component as an image of its own"
        )
    check_shape(path, image.GetSize())
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
    return ImageContent(array[None], spacing, affine, digest_of(array))
