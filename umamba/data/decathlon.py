"""Medical Segmentation Decathlon (and nnU-Net v1) folders: dataset.json lists the files."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import nibabel

from umamba.data.content import split_ending
from umamba.data.convert import split_channel
from umamba.data.faults import Fault
from umamba.data.links import LinkedFolder

TASK = re.compile(r"Task(\d{2,3})_(.+)")


def is_decathlon(content: dict[str, Any]) -> bool:
    """Whether a dataset.json is of the kind that lists its files under "training"."""
    return isinstance(content.get("training"), list) and "channel_names" not in content


def preferred_name(folder: Path) -> tuple[int | None, str]:
    """Return the id and name of TaskNN_Name, as nnU-Net's own converter gives them."""
    match = TASK.fullmatch(folder.name)
    return (int(match[1]), match[2]) if match else (None, folder.name)


def link_decathlon(
    linked: LinkedFolder, content: dict[str, Any]
) -> tuple[dict[str, Any], list[str], list[Fault]]:
    """Plan links (4D images: one file per channel) and return dataset.json, notes, faults.

    Raises ValueError when dataset.json lacks what the format asks for.
    """
    folder = linked.source
    path = folder / "dataset.json"
    modality, labels = content.get("modality"), content.get("labels")
    if not isinstance(modality, dict) or not modality:
        raise ValueError(f'{path} has no modality; add for instance "modality": {{"0": "CT"}}')
    if not isinstance(labels, dict) or not labels:
        raise ValueError(
            f'{path} has no labels; add for instance "labels": {{"0": "background", "1": "liver"}}'
        )
    try:
        named = {str(name): int(value) for value, name in labels.items()}
    except ValueError:
        raise ValueError(
            f'{path}: write labels as number: name, for instance {{"0": "background"}}'
        ) from None
    named = {("background" if value == 0 else name): value for name, value in named.items()}
    faults: list[Fault] = []
    notes: list[str] = []
    n_split = n_cases = 0
    for entry in content["training"]:
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise ValueError(f'{path}: each entry of training needs "image" and "label"')
        image, label = folder / entry["image"], folder / entry["label"]
        missing = [Fault(str(label), "is missing", "restore it or remove its entry from training")]
        faults += [] if label.is_file() else missing
        n_split += _link_image(linked, image, "imagesTr", len(modality), faults)
        identifier, ending = _parts(image)
        if label.is_file():
            linked.link(f"labelsTr/{identifier}{ending}", label)
        n_cases += 1
    for entry in content.get("test", []):
        image = folder / (entry["image"] if isinstance(entry, dict) else entry)
        n_split += _link_image(linked, image, "imagesTs", len(modality), faults)
    if n_split:
        notes.append(f"{n_split} 4D images are split into one file per channel in the workspace.")
    endings = {_parts(Path(entry["image"]))[1] for entry in content["training"]}
    if len(endings) != 1:
        raise ValueError(f"{path}: training must list files of one ending, not {sorted(endings)}")
    kept = ("name", "description", "reference", "licence", "release")
    result = {
        "channel_names": {str(i): str(modality[key]) for i, key in enumerate(_ordered(modality))},
        "labels": dict(sorted(named.items(), key=lambda item: item[1])),
        "numTraining": n_cases,
        "file_ending": endings.pop(),
        **{key: content[key] for key in kept if key in content},
    }
    return result, notes, faults


def _link_image(
    linked: LinkedFolder, image: Path, where: str, n_channels: int, faults: list[Fault]
) -> int:
    """Plan one case's image; return 1 when it is split."""
    identifier, ending = _parts(image)
    if not image.is_file():
        files = [image.with_name(f"{identifier}_{i:04d}{ending}") for i in range(n_channels)]
        there = [(i, file) for i, file in enumerate(files) if file.is_file()]
        for i, file in there:
            linked.link(f"{where}/{identifier}_{i:04d}{ending}", file)
        absent = [file for file in files if not file.is_file()] if there else [image]
        cure = f"restore it or remove its entry from {linked.source / 'dataset.json'}"
        faults += [Fault(str(file), "is missing", cure) for file in absent]
        return 0
    if (n_volumes := count_volumes(image)) == 1:
        linked.link(f"{where}/{identifier}_0000{ending}", image)
        return 0
    if n_volumes != n_channels:
        what = f"holds {n_volumes} channels where dataset.json names {n_channels}"
        faults.append(Fault(str(image), what, "correct modality in dataset.json or the image"))
        return 0
    for i in range(n_channels):
        make = partial(split_channel, image, channel=i)
        linked.convert(f"{where}/{identifier}_{i:04d}{ending}", image, f"channel {i}", make)
    return 1


def count_volumes(path: Path) -> int:
    """Return the length of a NIfTI's fourth axis; 1 for any other file, and for a broken one."""
    parts = split_ending(path.name)
    if parts is None or parts[1].lower() not in (".nii", ".nii.gz"):
        return 1
    try:
        shape = nibabel.load(path).shape  # type: ignore[attr-defined]
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError):
        return 1  # linked as it is, for the audit to name
    return int(shape[3]) if len(shape) == 4 else 1


def _parts(image: Path) -> tuple[str, str]:
    parts = split_ending(image.name)
    if parts is None:
        raise ValueError(f"{image} has a file ending that nnU-Net cannot read; convert it")
    return parts


def _ordered(modality: dict[str, Any]) -> list[str]:
    return sorted(modality, key=lambda key: int(key) if str(key).isdigit() else 0)
