"""Makes the few copies that links cannot replace: other formats, channels, label values."""

from __future__ import annotations

import gzip
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from umamba.data.images import (
    NIFTI,
    PIXELS,
    READ_ERRORS,
    TIFF,
    ending_of,
    gunzip,
    read_image,
    read_pixels,
)
from umamba.data.links import LinkedFolder


def can_convert(source_ending: str, target_ending: str) -> bool:
    """Whether a file can be written in the other format with its geometry."""
    return (source_ending in PIXELS) == (target_ending in PIXELS)


def is_same_format(ending: str, other: str) -> bool:
    """Whether files with these endings can stand for each other."""
    return ending == other or {ending, other} == set(TIFF)


def convert_format(source: Path, target: Path) -> None:
    """Write the same image in the format that the target's name asks for."""
    endings = {ending_of(source), ending_of(target)}
    if endings <= set(NIFTI):
        data = source.read_bytes()
        data = gunzip(source, data)
        is_plain = ending_of(target) == ".nii"
        target.write_bytes(data if is_plain else gzip.compress(data, 1, mtime=0))
    elif endings <= set(PIXELS):
        _write_pixels(read_pixels(source), target)
    else:
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(source)), str(target), True)


def count_volumes(path: Path) -> int:
    """Return the length of a NIfTI's fourth axis; 1 for any other file, and for a broken one."""
    if ending_of(path) not in NIFTI:
        return 1
    try:
        shape = nibabel.load(path).shape  # type: ignore[attr-defined]
    except (nibabel.filebasedimages.ImageFileError, *READ_ERRORS):
        return 1  # linked as it is, for the audit to name
    return int(shape[3]) if len(shape) == 4 else 1


def split_volumes(linked: LinkedFolder, stem: str, ending: str, source: Path, n: int) -> None:
    """Plan one file per channel, `stem`_0000 and so on, of a 4D NIfTI with `n` of them."""
    for i in range(n):
        make = partial(_split_channel, source, channel=i)
        linked.convert(f"{stem}_{i:04d}{ending}", source, f"channel {i}", make)


def _split_channel(source: Path, target: Path, channel: int) -> None:
    """Write one channel (last axis) of a 4D NIfTI as 3D NIfTI; NaN and Inf stay as they are."""
    image = nibabel.load(source)
    assert isinstance(image, nibabel.Nifti1Image | nibabel.Nifti2Image)
    # whole, since nibabel itself reads neither to the end nor the checksum
    image = type(image).from_bytes(gunzip(source, source.read_bytes()))
    piece = image.slicer[..., channel]
    if np.asanyarray(piece.dataobj).dtype.kind == "f":  # scaled integers would be rounded again
        piece.set_data_dtype(np.float32)
    nibabel.save(piece, target)


def count_colors(path: Path) -> int:
    """Return the color channels as nnU-Net would read them, from the header; 0 when unreadable."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode == "P":
                return 4 if "transparency" in image.info else 3
            return len(image.getbands())
    except READ_ERRORS:
        return 0


def match_color(source: Path, target: Path, n_colors: int) -> None:
    """Write a 2D image with 1 (gray) or 3 (RGB) colors; alpha is dropped."""
    pixels = read_pixels(source)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = pixels[..., : 1 if pixels.shape[-1] == 2 else 3]
    if pixels.shape[-1] < n_colors:
        pixels = np.repeat(pixels[..., :1], n_colors, axis=-1)
    _write_pixels(pixels[..., 0] if n_colors == 1 else pixels, target)


def map_labels(source: Path, target: Path, mapping: dict[int, int]) -> None:
    """Write a label map with its values replaced, keeping the geometry.

    A 2D mask saved with several colors must be gray (all colors equal); the first is taken.
    """
    if ending_of(source) in PIXELS:
        values = label_pixels(read_pixels(source))
    else:
        values = read_image(source, nibabel_geometry=True, is_label=True).values()[0]
    mapped = np.zeros(values.shape, np.uint8 if max(mapping.values()) < 255 else np.uint16)
    for old, new in mapping.items():
        mapped[values == old] = new
    if ending_of(target) in PIXELS:
        _write_pixels(mapped, target)
        return
    image = SimpleITK.GetImageFromArray(mapped)
    reference = SimpleITK.ReadImage(str(source))
    if reference.GetDimension() == 2 and mapped.ndim == 3:
        image = image[:, :, 0]
    image.CopyInformation(reference)
    SimpleITK.WriteImage(image, str(target), True)


def label_pixels(pixels: np.ndarray) -> np.ndarray:
    """Return the values of a mask; of a gray one that was saved as RGB(A), the first color."""
    if pixels.ndim != 3 or pixels.shape[-1] not in (2, 3, 4):
        return pixels
    colors = pixels[..., :3] if pixels.shape[-1] > 2 else pixels[..., :1]
    if (colors != colors[..., :1]).any():
        raise ValueError("the mask is a color picture")
    return np.ascontiguousarray(pixels[..., 0])


def _write_pixels(pixels: np.ndarray, path: Path) -> None:
    """Write PNG, BMP or (2D or 3D) TIFF without loss."""
    if ending_of(path) in TIFF:
        import tifffile

        tifffile.imwrite(path, pixels, compression="zlib")
        return
    from skimage import io

    io.imsave(str(path), pixels, check_contrast=False)
