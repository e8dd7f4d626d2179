"""Medical Segmentation Decathlon (and nnU-Net v1) folders: dataset.json lists the files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from umamba.data.convert import count_volumes, split_volumes
from umamba.data.images import split_ending
from umamba.data.links import LinkedFolder

TASK = re.compile(r"Task(\d{2,3})_(.+)")  # nnU-Net's own converter keeps this id and name


def is_decathlon(content: dict[str, Any]) -> bool:
    """Whether a dataset.json is of the kind that lists its files under "training"."""
    return isinstance(content.get("training"), list) and "channel_names" not in content


def link_decathlon(linked: LinkedFolder, content: dict[str, Any]) -> dict[str, Any]:
    """Plan links (4D images: one file per channel) and return dataset.json.

    Raises ValueError when dataset.json lacks what the format asks for.
    """
    path = linked.source / "dataset.json"
    modality, labels = content.get("modality"), content.get("labels")
    if not isinstance(modality, dict) or not modality:
        raise ValueError(f'{path} has no modality; add for instance "modality": {{"0": "CT"}}')
    if not isinstance(labels, dict) or not labels:
        raise ValueError(
            f'{path} has no labels; add for instance "labels": {{"0": "background", "1": "liver"}}'
        )
    try:
        named = {int(value): str(name) for value, name in labels.items()}
    except ValueError:
        raise ValueError(
            f'{path}: write labels as number: name, for instance {{"0": "background"}}'
        ) from None
    n_split = 0
    endings = set()
    for entry in content["training"]:
        if not isinstance(entry, dict) or not {"image", "label"} <= entry.keys():
            raise ValueError(f'{path}: each entry of training needs "image" and "label"')
        image, label = linked.source / entry["image"], linked.source / entry["label"]
        identifier, ending = _parts(image)
        endings.add(ending)
        if label.is_file():
            linked.link(f"labelsTr/{identifier}{ending}", label)
        else:
            linked.faults.add(label, "is missing", "restore it or remove its entry from training")
        n_split += _link_image(linked, image, "imagesTr", len(modality))
    for entry in content.get("test", []):
        image = linked.source / (entry["image"] if isinstance(entry, dict) else entry)
        n_split += _link_image(linked, image, "imagesTs", len(modality))
    if n_split:
        linked.notes.append(
            f"{n_split} 4D images are split into one file per channel in the workspace."
        )
    if len(endings) != 1:
        raise ValueError(f"{path}: training must list files of one ending, not {sorted(endings)}")
    order = sorted(modality, key=lambda key: int(key) if key.isdigit() else 0)
    kept = ("name", "description", "reference", "licence", "release")
    return {
        "channel_names": {str(i): str(modality[key]) for i, key in enumerate(order)},
        "labels": {name if value else "background": value for value, name in sorted(named.items())},
        "numTraining": len(content["training"]),
        "file_ending": endings.pop(),
        **{key: content[key] for key in kept if key in content},
    }


def _link_image(linked: LinkedFolder, image: Path, where: str, n_channels: int) -> bool:
    """Plan one case's image; return whether it is split."""
    identifier, ending = _parts(image)
    if not image.is_file():
        files = [image.with_name(f"{identifier}_{i:04d}{ending}") for i in range(n_channels)]
        there = [file for file in files if file.is_file()]
        for file in there:
            linked.link(f"{where}/{file.name}", file)
        cure = f"restore it or remove its entry from {linked.source / 'dataset.json'}"
        for file in [f for f in files if f not in there] if there else [image]:
            linked.faults.add(file, "is missing", cure)
        return False
    n_volumes = count_volumes(image)
    if n_volumes == 1:
        linked.link(f"{where}/{identifier}_0000{ending}", image)
        return False
    if n_volumes != n_channels:
        what = f"holds {n_volumes} channels where dataset.json names {n_channels}"
        linked.faults.add(image, what, "correct modality in dataset.json or the image")
        return False
    split_volumes(linked, f"{where}/{identifier}", ending, image, n_channels)
    return True


def _parts(image: Path) -> tuple[str, str]:
    parts = split_ending(image.name)
    if parts is None:
        raise ValueError(f"{image} has a file ending that nnU-Net cannot read; convert it")
    return parts
