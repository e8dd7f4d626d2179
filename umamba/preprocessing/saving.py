"""Writes preprocessed cases in nnU-Net's format, each file whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

# Else it starts and ends threads for each chunk of a file: 40 times the CPU time of writing it.
os.environ.setdefault("BLOSC_NTHREADS", "1")

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params

from umamba.files import replacing
from umamba.preprocessing.case import CaseSettings, PreprocessedCase, preprocess_case
from umamba.preprocessing.locations import ClassOrRegion
from umamba.preprocessing.reading import Kept, read_case, refuse_unknown_labels

SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
"""Of the files of a case, in the order in which they are written: with the last it is whole."""

LEVEL, CODEC = 1, blosc2.Codec.ZSTD
TRIAL = 2**13  # voxels of the middle of an image that choose its filter


def preprocess_and_save(
    images: Sequence[str],
    label: str,
    settings: Sequence[CaseSettings],
    classes: Sequence[ClassOrRegion],
    targets: Sequence[str],
    kept: Kept | None = None,
    *,
    known: Collection[int],
    device: str | None = None,
) -> None:
    """Read a case, preprocess it for each configuration and save it under its target.

    targets: per configuration the path of the files without their suffix. kept: what has been
    read of the case already. known: the labels that dataset.json lists; ValueError for others.
    device: see `preprocess_case`. Runs in a worker process too, which then imports no torch.
    """
    case = read_case(images, label, settings[0].reader, kept)
    assert case.labels is not None
    refuse_unknown_labels(case.labels, known)
    save_cases(preprocess_case(case, settings, classes, device), settings, targets)


def save_cases(
    results: Sequence[PreprocessedCase],
    settings: Sequence[CaseSettings],
    targets: Sequence[str],
) -> None:
    """Save a case per configuration as nnU-Net does; what is the same bytes is written once."""
    filters: dict[int, blosc2.Filter] = {}
    written: dict[Any, Path] = {}
    for result, own, target in zip(results, settings, targets, strict=True):
        assert result.labels is not None
        for array, suffix in ((result.data, SUFFIXES[0]), (result.labels, SUFFIXES[1])):
            path = Path(target + suffix)
            whole = array if array.ndim == 4 else array[None]
            blocks, chunks = comp_blosc2_params(whole.shape, own.patch_size, whole.itemsize)
            key = (id(array), blocks, chunks)
            with replacing(path) as temporary:
                if key not in written or not _link(written[key], temporary):
                    if id(array) not in filters:
                        filters[id(array)] = choose_filter(whole)
                    content = _compress(whole, blocks, chunks, filters[id(array)])
                    temporary.write_bytes(content.to_cframe())
            written.setdefault(key, path)
        with replacing(Path(target + SUFFIXES[2])) as temporary:
            temporary.write_bytes(pickle.dumps(result.properties))


def choose_filter(array: np.ndarray) -> blosc2.Filter:
    """Return which of nnU-Net's two filters makes the middle of (C, z, y, x) smaller."""
    middle = array[len(array) // 2]
    start, depth = middle.shape[0] // 2, max(1, TRIAL // (middle.shape[1] * middle.shape[2]))
    part = np.ascontiguousarray(middle[start : start + depth]).reshape(-1)[:TRIAL]
    sizes = {
        each: len(blosc2.compress2(part, **_parameters(each), typesize=part.itemsize))
        for each in (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE)
    }
    return min(sizes, key=lambda each: sizes[each])


def _compress(
    array: np.ndarray, blocks: Sequence[int], chunks: Sequence[int], chosen: blosc2.Filter
) -> blosc2.NDArray:
    whole = np.ascontiguousarray(array)
    shapes = {"chunks": tuple(chunks), "blocks": tuple(blocks)}
    return blosc2.asarray(whole, **shapes, cparams=_parameters(chosen))


def _parameters(chosen: blosc2.Filter) -> dict[str, Any]:
    return {"codec": CODEC, "clevel": LEVEL, "filters": [chosen], "nthreads": 1}


def _link(existing: Path, new: Path) -> bool:
    """Whether a hard link could be made."""
    with contextlib.suppress(OSError):
        os.link(existing, new)
        return True
    return False
