"""Reads the image and label of a case as nnU-Net's readers do, in less memory, or from memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from umamba.preprocessing.gzip_end import refuse_cut_short


class Content(Protocol):
    """A file as the audit decoded it: (channels, z, y, x), before slope and intercept."""

    @property
    def array(self) -> np.ndarray: ...
    @property
    def slope(self) -> float: ...
    @property
    def intercept(self) -> float: ...


class Kept(NamedTuple):
    """What the audit has read of a case: its channels, and its label where it has one."""

    images: Sequence[Content]
    label: Content | None


class ReadCase(NamedTuple):
    """image (C, z, y, x) float32, the case's own; labels (z, y, x) or None; nnU-Net's record."""

    image: np.ndarray
    labels: np.ndarray | None
    properties: dict[str, Any]


def read_case(
    images: Sequence[str], label: str | None, reader: str, kept: Kept | None = None
) -> ReadCase:
    """Read a case as nnU-Net's class named `reader` does; voxels in `kept` are not read again.

    Labels come in the file's own type where the reader is SimpleITKIO, else in float32.
    Raises what the reader raises, ValueError for a label of another shape than the image and for
    a file that is cut short.
    """
    if kept is None:
        for file in images if label is None else (*images, label):
            refuse_cut_short(file)
    if reader == "SimpleITKIO":
        image, properties = _read_itk(images, kept and kept.images)
        labels = None if label is None else _read_itk_label(label, kept and kept.label)
    else:
        from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

        read = recursive_find_reader_writer_by_name(reader)()
        image, properties = read.read_images(list(images))
        labels = None if label is None else read.read_seg(label)[0][0]
    if labels is not None and labels.shape != image.shape[1:]:
        raise ValueError(
            f"the label is {_times(labels.shape)} voxels, the image {_times(image.shape[1:])}"
        )
    return ReadCase(image, labels, properties)


def as_labels(labels: np.ndarray) -> np.ndarray:
    """Return int16 labels of the same values, a copy; ValueError where they are not whole."""
    whole = labels.astype(np.int16)
    if labels.dtype not in (np.uint8, np.int16) and not np.array_equal(whole, labels):
        wrong = labels[whole != labels][0]
        raise ValueError(f"the label holds {wrong:g}, and labels are whole numbers up to 32767")
    return whole


def refuse_unknown_labels(labels: np.ndarray, known: Collection[int]) -> None:
    """ValueError for labels (z, y, x) that are not whole numbers or not among the known ones."""
    is_known = np.zeros(2**16, bool)
    is_known[list(known)] = True  # the second half, counted from the end, is that of labels < 0
    for plane in labels:
        whole = as_labels(plane)
        there = is_known[whole]
        if not there.all():
            raise ValueError(
                f"the label holds {whole[~there][0]}, and dataset.json lists "
                f"{', '.join(map(str, sorted(known)))}"
            )


def _read_itk(
    files: Sequence[str], contents: Sequence[Content] | None
) -> tuple[np.ndarray, dict[str, Any]]:
    import SimpleITK

    images: list[Any] = []
    if contents is None:
        images = [SimpleITK.ReadImage(file) for file in files]
        facts = [_geometry(image) for image in images]
    else:
        facts = [_read_geometry(file, os.stat(file).st_mtime_ns) for file in files]
    if len(facts[0][0]) > 3 or any(f != facts[0] for f in facts[1:]):
        # several channels in a file, and channels that do not fit: nnU-Net's to judge
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

        return SimpleITKIO().read_images(list(files))
    spacing, origin, direction, size = facts[0]
    direction = tuple(cosine + 0.0 for cosine in direction)  # a header may hold -0.0
    for_nnunet = list(np.abs(list(spacing[::-1])))
    if len(size) == 2:
        for_nnunet = list(np.abs([max(spacing) * 999, *spacing[::-1]]))
    properties = {
        "sitk_stuff": {"spacing": spacing, "origin": origin, "direction": direction},
        "spacing": for_nnunet,
    }
    image = np.empty((len(files), *(1,) * (3 - len(size)), *size[::-1]), np.float32)
    for index, channel in enumerate(image):
        if contents is not None:
            fill_scaled(channel, contents[index])
        else:
            whole = SimpleITK.GetArrayViewFromImage(images[index])
            channel[...] = whole.reshape(channel.shape)
            del whole
            images[index] = None
    return image, properties


@functools.lru_cache(maxsize=2**13)
def _read_geometry(file: str, _changed: int) -> tuple[tuple[Any, ...], ...]:
    """What the header of a file says; the fingerprint and the preprocessing ask for the same."""
    import SimpleITK

    header = SimpleITK.ImageFileReader()
    header.SetFileName(file)
    header.ReadImageInformation()
    return _geometry(header)


def _geometry(of: Any) -> tuple[tuple[Any, ...], ...]:
    return of.GetSpacing(), of.GetOrigin(), of.GetDirection(), of.GetSize()


def _read_itk_label(file: str, content: Content | None) -> np.ndarray:
    if content is not None:
        if content.slope == 1 and content.intercept == 0:
            return content.array[0]
        scaled = np.empty(content.array.shape[1:], np.float32)
        fill_scaled(scaled, content)
        return scaled
    import SimpleITK

    labels: np.ndarray = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(file))
    return labels if labels.ndim == 3 else labels[(None,) * (3 - labels.ndim)]


def fill_scaled(target: np.ndarray, content: Content) -> None:
    """Write a content's only channel to target (z, y, x) float32, scaled as ITK does."""
    if content.slope == 1 and content.intercept == 0:
        target[...] = content.array[0]
        return
    for plane, source in zip(target, content.array[0], strict=True):
        plane[...] = source.astype(np.float64) * content.slope + content.intercept


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
