"""nnU-Net's raw dataset folder by its rules: dataset.json, the cases, the label values."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umamba.data.content import FILE_ENDINGS, NATURAL_ENDINGS, split_ending
from umamba.data.faults import Fault

CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class CaseFiles:
    """The files of one training case, channels in order; the label may be missing."""

    images: tuple[Path, ...]
    label: Path | None


def read_dataset_json(path: Path) -> dict[str, Any]:
    """Return the content of a dataset.json; ValueError or FileNotFoundError names it."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; write it with channel_names, labels, numTraining and "
            "file_ending, or give a folder with images/ and labels/"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it there") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; write channel_names, labels, file_ending")
    return content


def check_dataset_json(content: dict[str, Any], path: Path) -> list[Fault]:
    """Return everything nnU-Net would refuse or take wrongly; a wrong numTraining is harmless."""
    faults = []

    def fault(what: str, cure: str) -> None:
        faults.append(Fault(str(path), what, cure))

    channels = content.get("channel_names", content.get("modality"))
    if not isinstance(channels, dict) or not channels:
        fault("has no channel_names", 'add for instance "channel_names": {"0": "CT"}')
    elif sorted(channels) != sorted(str(i) for i in range(len(channels))):
        fault(
            f"numbers its channel_names {', '.join(map(str, channels))}",
            "number them 0, 1, 2, ... without gaps",
        )
    ending = content.get("file_ending")
    reader = content.get("overwrite_image_reader_writer") or "None"
    if not isinstance(ending, str) or not ending:
        fault("has no file_ending", 'add for instance "file_ending": ".nii.gz"')
    elif reader == "None" and ending.lower() not in FILE_ENDINGS:
        fault(
            f"has the file_ending {ending!r}, for which nnU-Net has no reader",
            f"convert the files to one of {', '.join(FILE_ENDINGS)}",
        )
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        fault("has no labels", 'add for instance "labels": {"background": 0, "tumor": 1}')
        return faults
    wrong = [name for name, value in labels.items() if not _is_label(value)]
    if wrong:
        fault(
            f"gives {', '.join(map(repr, wrong))} no whole number in labels",
            'write each label as name: number, for instance {"background": 0, "tumor": 1}',
        )
        return faults
    _check_labels(content, labels, fault)
    return faults


def label_values(content: dict[str, Any]) -> tuple[list[int], int | None]:
    """Return the label values a label map may hold and the ignore label, which is not among them.

    Regions count with each label they are made of.
    """
    values: set[int] = set()
    for name, value in content["labels"].items():
        if name != "ignore":
            values.update(int(v) for v in (value if isinstance(value, list | tuple) else [value]))
    ignore = content["labels"].get("ignore")
    return sorted(values), None if ignore is None else int(ignore)


def n_channels(content: dict[str, Any]) -> int:
    """Return the number of channels that dataset.json declares."""
    return len(content.get("channel_names", content.get("modality", {})))


def list_cases(folder: Path, content: dict[str, Any]) -> tuple[dict[str, CaseFiles], list[Fault]]:
    """Return the training cases by identifier, and the faults that the names alone show.

    Honours the "dataset" dictionary of explicit paths. Missing files stay out of the cases.
    """
    if "dataset" in content:
        return _explicit_cases(folder, content["dataset"])
    ending = content["file_ending"]
    faults: list[Fault] = []
    images = list_files(folder / "imagesTr", ending)
    labels = {
        name[: -len(ending)]: path for name, path in list_files(folder / "labelsTr", ending).items()
    }
    if not images:
        return {}, [_no_images(folder / "imagesTr", ending)]
    channels: dict[str, dict[int, Path]] = {}
    for name, path in images.items():
        match = CHANNEL.fullmatch(name[: -len(ending)])
        if match is None:
            faults.append(
                Fault(
                    str(path),
                    "has no channel number at the end of its name",
                    f"rename it to {name[: -len(ending)]}_0000{ending}",
                )
            )
        else:
            channels.setdefault(match[1], {})[int(match[2])] = path
    faults += _check_channels(folder, content, channels)
    cases = {}
    for identifier, files in channels.items():
        if identifier not in labels:
            faults.append(
                Fault(
                    str(folder / "labelsTr" / f"{identifier}{ending}"),
                    "is missing: the case has an image but no label",
                    "add the label or remove the image",
                )
            )
        cases[identifier] = CaseFiles(
            tuple(files[i] for i in sorted(files)), labels.get(identifier)
        )
    faults += [
        Fault(str(path), "is a label without an image", "add the image or remove the label")
        for identifier, path in labels.items()
        if identifier not in channels
    ]
    return cases, faults


def list_files(folder: Path, ending: str = "") -> dict[str, Path]:
    """Return the files of a folder by name, sorted; hidden ones (and macOS's ._ twins) left out."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.name.endswith(ending) and not entry.is_dir()
        )
    return {name: folder / name for name in names}


def _check_labels(content: dict[str, Any], labels: dict[str, Any], fault: Any) -> None:
    if "background" not in labels:
        fault("declares no background", 'add "background": 0 to labels')
    elif labels["background"] != 0:
        fault(f"gives background the value {labels['background']}", "background must be 0")
    values, ignore = label_values(content)
    if values and values != list(range(values[0], values[0] + len(values))):
        gaps = sorted(set(range(values[0], values[-1])) - set(values))
        fault(
            f"skips the label value(s) {', '.join(map(str, gaps))}",
            "number the labels 0, 1, 2, ... in dataset.json and in the label files",
        )
    if len(values) < 2:
        fault("declares no label but background", "add the structures to labels")
    if ignore is not None and values and ignore != values[-1] + 1:
        fault(f"has the ignore label {ignore}", f"it must follow the last label: {values[-1] + 1}")
    regions = [
        value
        for name, value in labels.items()
        if name != "ignore" and value != 0 and not (isinstance(value, list) and set(value) == {0})
    ]
    if any(isinstance(value, list | tuple) and len(value) > 1 for value in regions):
        order = content.get("regions_class_order")
        if not isinstance(order, list) or len(order) != len(regions):
            fault(
                f"has {len(regions)} regions but no regions_class_order of that length",
                "add the label that each region writes, in the order of the regions",
            )


def _is_label(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_is_label(v) and not isinstance(v, list) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_channels(
    folder: Path, content: dict[str, Any], channels: dict[str, dict[int, Path]]
) -> list[Fault]:
    """Return a fault per missing or surplus channel file."""
    ending = content["file_ending"]
    expected = set(range(n_channels(content)))
    if not expected or (ending.lower() in NATURAL_ENDINGS and len(expected) in (3, 4)):
        # one RGB(A) file may hold all channels, so the most frequent set of files counts
        usual = Counter(frozenset(files) for files in channels.values()).most_common(1)
        expected = set(usual[0][0]) if usual else expected
    faults = []
    for identifier, files in channels.items():
        faults += [
            Fault(
                str(folder / "imagesTr" / f"{identifier}_{i:04d}{ending}"),
                "is missing: the case lacks this channel",
                "add the file or remove the case",
            )
            for i in sorted(expected - files.keys())
        ]
        faults += [
            Fault(
                str(files[i]),
                f"is a channel that dataset.json does not name ({len(expected)} channel(s))",
                "name it in channel_names or remove it",
            )
            for i in sorted(files.keys() - expected)
        ]
    return faults


def _no_images(folder: Path, ending: str) -> Fault:
    if not folder.is_dir():
        return Fault(str(folder), "does not exist", "put the training images there")
    others = Counter(
        parts[1] for name in list_files(folder) if (parts := split_ending(name)) is not None
    ).most_common(1)
    if others:
        found, n = others[0]
        return Fault(
            str(folder),
            f"has no {ending} file but {n} {found} file(s)",
            f'set "file_ending": "{found}" in dataset.json or convert the files',
        )
    return Fault(str(folder), f"has no {ending} file", "put the training images there")


def _explicit_cases(
    folder: Path, entries: dict[str, Any]
) -> tuple[dict[str, CaseFiles], list[Fault]]:
    cases, faults = {}, []
    for identifier, entry in entries.items():
        images = [_expand(folder, name) for name in entry["images"]]
        label = _expand(folder, entry["label"])
        for path in (*images, label):
            if not path.is_file():
                faults.append(
                    Fault(str(path), "is missing", f"correct case {identifier} in dataset.json")
                )
        there = tuple(path for path in images if path.is_file())
        if there:
            cases[identifier] = CaseFiles(there, label if label.is_file() else None)
    return cases, faults


def _expand(folder: Path, name: str) -> Path:
    path = Path(os.path.expandvars(name))
    return path if path.is_absolute() else Path(os.path.normpath(folder / path))
