"""What every converter needs: place files, write dataset.json and splits, check the pairs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import SimpleITK

GEOMETRY_TOLERANCE = 1e-3


def place_file(source: Path, target: Path, link: bool = False) -> None:
    """Copy `source` to `target`, or link it where the file system allows; folders are made."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; check the folder of the download")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}")
    temporary.unlink(missing_ok=True)
    if link:
        try:
            temporary.symlink_to(source.resolve())
        except OSError:
            shutil.copyfile(source, temporary)
    else:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


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
        "labels": {
            name: value if isinstance(value, int) else list(value) for name, value in labels.items()
        },
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
    hashes = {name: _sha256(path) for name, path in sorted(sources.items())}
    write_json(folder / "source.json", {"converter": converter, "sha256": hashes})


def same_geometry(image: Path, label: Path) -> bool:
    """Whether spacing, origin and direction agree; ValueError when the sizes differ."""
    headers = []
    for path in (image, label):
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        headers.append(reader)
    first, second = headers
    if first.GetSize() != second.GetSize():
        raise ValueError(
            f"{label} has size {second.GetSize()} but {image} has {first.GetSize()}; "
            "they cannot belong together"
        )
    pairs = [
        pair
        for get in ("GetSpacing", "GetOrigin", "GetDirection")
        for pair in zip(getattr(first, get)(), getattr(second, get)(), strict=True)
    ]
    return all(abs(a - b) <= GEOMETRY_TOLERANCE for a, b in pairs)


def list_files(folder: Path, ending: str) -> list[Path]:
    """Return the files with this ending (in any case), sorted; hidden ones left out."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name.lower().endswith(ending)
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
