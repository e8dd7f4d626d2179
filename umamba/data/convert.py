"""Makes the few copies that links cannot replace: other formats, channels, label values."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from umamba.data.content import split_ending
from umamba.data.images import read_image

NIFTI = (".nii", ".nii.gz")
PIXELS = (".png", ".bmp", ".tif", ".tiff")


def can_convert(source_ending: str, target_ending: str) -> bool:
    """Whether a file can be written in the other format with its geometry."""
    return (source_ending.lower() in PIXELS) == (target_ending.lower() in PIXELS)


def convert_format(source: Path, target: Path) -> None:
    """Write the same image in the format that the target's name asks for."""
    endings = {_ending(source), _ending(target)}
    if endings <= set(NIFTI):
        data = source.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        target.write_bytes(data if _ending(target) == ".nii" else gzip.compress(data, 1, mtime=0))
    elif endings <= set(PIXELS):
        write_pixels(read_pixels(source), target)
    else:
        SimpleITK.WriteImage(SimpleITK.ReadImage(str(source)), str(target), True)


def split_channel(source: Path, target: Path, channel: int) -> None:
    """Write one channel (last axis) of a 4D NIfTI as 3D NIfTI; NaN and Inf stay as they are."""
    image = nibabel.load(source)
    assert isinstance(image, nibabel.Nifti1Image | nibabel.Nifti2Image)
    piece = image.slicer[..., channel]
    if np.asanyarray(piece.dataobj).dtype.kind == "f":  # scaled integers would be rounded again
        piece.set_data_dtype(np.float32)
    nibabel.save(piece, target)


def match_color(source: Path, target: Path, n_colors: int) -> None:
    """Write a 2D image with 1 (gray) or 3 (RGB) colors; alpha is dropped."""
    pixels = read_pixels(source)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    pixels = pixels[..., : 1 if pixels.shape[-1] == 2 else 3]
    if pixels.shape[-1] < n_colors:
        pixels = np.repeat(pixels[..., :1], n_colors, axis=-1)
    write_pixels(pixels[..., 0] if n_colors == 1 else pixels, target)


def map_labels(source: Path, target: Path, mapping: dict[int, int]) -> None:
    """Write a label map with its values replaced, keeping the geometry.

    A 2D mask saved with several colors must be gray (all colors equal); the first is taken.
    """
    dtype = np.uint8 if max(mapping.values()) < 255 else np.uint16
    if _ending(source) in PIXELS:
        values = label_pixels(read_pixels(source))
    elif _ending(source) in NIFTI:
        values = read_image(source, nibabel_geometry=True, is_label=True).values()[0]
    else:
        values = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(source)))
    mapped = np.zeros(values.shape, dtype)
    for old, new in mapping.items():
        if new:
            mapped[values == old] = new
    if _ending(target) in PIXELS:
        write_pixels(mapped, target)
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


def read_pixels(path: Path) -> np.ndarray:
    """Return the pixels of a PNG, BMP or TIFF as the decoder gives them, colors last."""
    if _ending(path) in (".tif", ".tiff"):
        import tifffile

        return np.asarray(tifffile.imread(path))
    from skimage import io

    return np.asarray(io.imread(path))


def write_pixels(pixels: np.ndarray, path: Path) -> None:
    """Write PNG, BMP or (2D or 3D) TIFF without loss."""
    if _ending(path) in (".tif", ".tiff"):
        import tifffile

        tifffile.imwrite(path, pixels, compression="zlib")
        return
    from skimage import io

    io.imsave(str(path), pixels, check_contrast=False)


def _ending(path: Path) -> str:
    parts = split_ending(path.name)
    return parts[1].lower() if parts else path.suffix.lower()
