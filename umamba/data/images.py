"""Reads one image file of any of nnU-Net's formats, with the checks its readers leave out."""

from __future__ import annotations

import zlib
from pathlib import Path

from umamba.data.content import FILE_ENDINGS, REPLACE, ImageContent, last_line, split_ending
from umamba.data.faults import UnreadableImageError
from umamba.data.pictures import read_natural, read_tiff
from umamba.data.volumes import read_itk, read_nifti


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
            return read_nifti(path, nibabel_geometry or ending == ".nii")
        if ending in (".png", ".bmp"):
            return read_natural(path)
        if ending in (".tif", ".tiff"):
            return read_tiff(path, ending, is_label)
        return read_itk(path, ending)
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
        what = f"cannot be read ({last_line(error)})"
        raise UnreadableImageError(str(path), what, REPLACE) from error
