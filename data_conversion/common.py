"""What every converter needs: place files, write dataset.json and splits, check the pairs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from umamba.data.layout import list_files
from umamba.data.links import link_file
from umamba.files import replacing, write_json

GEOMETRY_TOLERANCE = 1e-3


def place_file(source: Path, target: Path, link: bool = False) -> None:
    """Copy `source` to `target`, or link it where the file system allows; folders are made."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; check the folder of the download")
    with replacing(target) as temporary:
        if link:
            link_file(source.resolve(), temporary)
        else:
            shutil.copyfile(source, temporary)


def write_dataset_json(
    folder: Path,
    channel_names: Sequence[str],
    labels: Mapping[str, int | Sequence[int]],
    file_ending: str = ".nii.gz",
    **extra: Any,
) -> None:
    """Write dataset.json for what lies in labelsTr; `extra` is kept (licence, regions_class_order).

    Raises ValueError when there are regions without regions_class_order.
    """
    has_regions = any(not isinstance(value, int) and len(value) > 1 for value in labels.values())
    if has_regions and "regions_class_order" not in extra:
        raise ValueError("Regions need regions_class_order: the label that each region writes")
    content = {
        "channel_names": {str(i): name for i, name in enumerate(channel_names)},
        "labels": {n: v if isinstance(v, int) else list(v) for n, v in labels.items()},
        "numTraining": len(list_files(folder / "labelsTr", file_ending)),
        "file_ending": file_ending,
        **extra,
    }
    write_json(folder / "dataset.json", content)


def write_splits(folder: Path, splits: Sequence[tuple[Sequence[str], Sequence[str]]]) -> None:
    """Write (train, val) identifiers as splits_official.json in the form of splits_final.json.

    Raises ValueError when a case is in both parts of a split.
    """
    for train, val in splits:
        if both := sorted(set(train) & set(val)):
            raise ValueError(f"The split has {both[0]} in train and val; take it from one of them")
    content = [{"train": sorted(train), "val": sorted(val)} for train, val in splits]
    write_json(folder / "splits_official.json", content)


def write_source(folder: Path, converter: str, sources: Mapping[str, Path]) -> None:
    """Write source.json: the converter and the SHA-256 of the file behind each identifier."""
    hashes = {}
    for name, path in sorted(sources.items()):
        with path.open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    write_json(folder / "source.json", {"converter": converter, "sha256": hashes})


def same_geometry(image: Path, label: Path) -> bool:
    """Whether spacing, origin and direction agree; ValueError when the sizes differ."""
    sizes, geometries = [], []
    for path in (image, label):
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        sizes.append(reader.GetSize())
        geometries.append([*reader.GetSpacing(), *reader.GetOrigin(), *reader.GetDirection()])
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{label} has size {sizes[1]} but {image} has {sizes[0]}; they cannot belong together"
        )
    return np.allclose(*geometries, rtol=0, atol=GEOMETRY_TOLERANCE)
