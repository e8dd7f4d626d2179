"""nnU-Net's raw dataset folder by its rules: dataset.json, the cases, the label values."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from umamba.data.faults import Faults
from umamba.data.images import FILE_ENDINGS, NATURAL_ENDINGS, split_ending

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
    except PermissionError:
        what = f"{path} may not be read by this user; change its permissions"
        raise PermissionError(what) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it there") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; write channel_names, labels, file_ending")
    return content


def check_dataset_json(content: dict[str, Any], path: Path) -> Faults:
    """Return everything nnU-Net would refuse or take wrongly; a wrong numTraining is harmless."""
    faults = Faults()
    fault = partial(faults.add, path)
    channels = channel_names(content)
    if not channels:
        fault("has no channel_names", 'add for instance "channel_names": {"0": "CT"}')
    elif sorted(channels) != sorted(str(i) for i in range(len(channels))):
        what = f"numbers its channel_names {', '.join(channels)}"
        fault(what, "number them 0, 1, 2, ... without gaps")
    ending = content.get("file_ending")
    reader = content.get("overwrite_image_reader_writer") or "None"
    if not isinstance(ending, str) or not ending:
        fault("has no file_ending", 'add for instance "file_ending": ".nii.gz"')
    elif reader == "None" and ending.lower() not in FILE_ENDINGS:
        what = f"has the file_ending {ending!r}, for which nnU-Net has no reader"
        fault(what, f"convert the files to one of {', '.join(FILE_ENDINGS)}")
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        fault("has no labels", 'add for instance "labels": {"background": 0, "tumor": 1}')
        return faults
    if wrong := [repr(name) for name, value in labels.items() if not is_label(value)]:
        fault(
            f"gives {', '.join(wrong)} no whole number in labels",
            'write each label as name: number, for instance {"background": 0, "tumor": 1}',
        )
        return faults
    if "background" not in labels:
        fault("declares no background", 'add "background": 0 to labels')
    elif labels["background"] != 0:
        fault(f"gives background the value {labels['background']}", "background must be 0")
    values, ignore = label_values(content)
    if gaps := sorted(set(range(values[0], values[-1])) - set(values)) if values else []:
        fault(
            f"skips the label value(s) {', '.join(map(str, gaps))}",
            "number the labels 0, 1, 2, ... in dataset.json and in the label files",
        )
    if len(values) < 2:
        fault("declares no label but background", "add the structures to labels")
    if ignore is not None and values and ignore != values[-1] + 1:
        fault(f"has the ignore label {ignore}", f"it must follow the last label: {values[-1] + 1}")
    # what writes a label: all but ignore and background, which may be written as 0 or [0]
    regions = [
        value
        for name, value in labels.items()
        if name != "ignore" and (set(value) if isinstance(value, list) else {value}) != {0}
    ]
    order = content.get("regions_class_order")
    has_order = isinstance(order, list) and len(order) == len(regions)
    if not has_order and any(isinstance(value, list) and len(value) > 1 for value in regions):
        fault(
            f"has {len(regions)} regions but no regions_class_order of that length",
            "add the label that each region writes, in the order of the regions",
        )
    return faults


def label_values(content: dict[str, Any]) -> tuple[list[int], int | None]:
    """Return the label values a label map may hold and the ignore label, which is not among them.

    Regions count with each label they are made of.
    """
    labels = dict(content["labels"])
    ignore = labels.pop("ignore", None)
    values = {
        int(v) for value in labels.values() for v in (value if isinstance(value, list) else [value])
    }
    return sorted(values), None if ignore is None else int(ignore)


def channel_names(content: dict[str, Any]) -> dict[str, Any]:
    """Return the channels that dataset.json declares by number; empty where it does not."""
    names = content.get("channel_names", content.get("modality"))
    return names if isinstance(names, dict) else {}


def list_cases(folder: Path, content: dict[str, Any]) -> tuple[dict[str, CaseFiles], Faults]:
    """Return the training cases by identifier, and the faults that the names alone show.

    Honours the "dataset" dictionary of explicit paths. Missing files stay out of the cases.
    """
    if "dataset" in content:
        return _explicit_cases(folder, content["dataset"])
    ending = content["file_ending"]
    images = list_files(folder / "imagesTr", ending)
    labels = {
        name[: -len(ending)]: path for name, path in list_files(folder / "labelsTr", ending).items()
    }
    faults = Faults()
    if not images:
        _add_no_images(folder / "imagesTr", ending, faults)
        return {}, faults
    channels: dict[str, dict[int, Path]] = {}
    for name, path in images.items():
        stem = name[: -len(ending)]
        if match := CHANNEL.fullmatch(stem):
            channels.setdefault(match[1], {})[int(match[2])] = path
        else:
            what = "has no channel number at the end of its name"
            faults.add(path, what, f"rename it to {stem}_0000{ending}")
    _check_channels(folder / "imagesTr", content, channels, faults)
    cases = {}
    for identifier, files in channels.items():
        if identifier not in labels:
            what = "is missing: the case has an image but no label"
            path = folder / "labelsTr" / f"{identifier}{ending}"
            faults.add(path, what, "add the label or remove the image")
        images_of_case = tuple(files[i] for i in sorted(files))
        cases[identifier] = CaseFiles(images_of_case, labels.get(identifier))
    add_lone_labels(labels, channels, faults)
    return cases, faults


def list_test_cases(folder: Path, content: dict[str, Any]) -> dict[str, CaseFiles]:
    """Return the cases of imagesTs by identifier; files without a channel number are left out."""
    ending = content["file_ending"]
    channels: dict[str, list[Path]] = {}
    for name, path in list_files(folder / "imagesTs", ending).items():
        if match := CHANNEL.fullmatch(name[: -len(ending)]):
            channels.setdefault(match[1], []).append(path)
    return {identifier: CaseFiles(tuple(paths), None) for identifier, paths in channels.items()}


def list_files(folder: Path, ending: str = "") -> dict[str, Path]:
    """Return the files of a folder by name, sorted; hidden ones (and macOS's ._ twins) left out.

    Raises PermissionError with the cure where the user may not list the folder.
    """
    try:
        if not folder.is_dir():
            return {}
        with os.scandir(folder) as entries:
            # isdir takes a link that leads in a circle for a file, the entry itself raises
            names = sorted(
                e.name for e in entries if e.name.endswith(ending) and not os.path.isdir(e)
            )
    except PermissionError:
        what = f"{folder} may not be read by this user; change its permissions"
        raise PermissionError(what) from None
    return {name: folder / name for name in names if not name.startswith(".")}


def add_lone_labels(labels: dict[str, Path], cases: dict[str, Any], faults: Faults) -> None:
    """Add a fault per label whose identifier is not among the cases."""
    as_shown = {unicodedata.normalize("NFC", identifier) for identifier in cases}
    for identifier, path in labels.items():
        if identifier not in cases:
            cure = "add the image or remove the label"
            if unicodedata.normalize("NFC", identifier) in as_shown:
                cure = (
                    "rename it: an image has the same name in other bytes (an accented letter as "
                    "one character or as two, which macOS does)"
                )
            faults.add(path, "is a label without an image", cure)


def add_missing_channel(path: Path, faults: Faults) -> None:
    """Add the fault of a channel that other cases have."""
    faults.add(path, "is missing: the case lacks this channel", "add the file or remove the case")


def is_label(value: Any) -> bool:
    """Whether a value of "labels" is a whole number from 0 up, or a list of such numbers."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(type(v) is int and v >= 0 for v in values)


def _check_channels(
    folder: Path, content: dict[str, Any], channels: dict[str, dict[int, Path]], faults: Faults
) -> None:
    """Add a fault per missing or surplus channel file."""
    ending = content["file_ending"]
    expected = set(range(len(channel_names(content))))
    if not expected or (ending.lower() in NATURAL_ENDINGS and len(expected) in (3, 4)):
        # one RGB(A) file may hold all channels, so the most frequent set of files counts
        usual = Counter(frozenset(files) for files in channels.values()).most_common(1)
        expected = set(usual[0][0]) if usual else expected
    surplus = f"is a channel that dataset.json does not name ({len(expected)} channel(s))"
    for identifier, files in channels.items():
        for i in sorted(expected - files.keys()):
            add_missing_channel(folder / f"{identifier}_{i:04d}{ending}", faults)
        for i in sorted(files.keys() - expected):
            faults.add(files[i], surplus, "name it in channel_names or remove it")


def _add_no_images(folder: Path, ending: str, faults: Faults) -> None:
    what, cure = f"has no {ending} file", "put the training images there"
    endings = Counter(parts[1] for name in list_files(folder) if (parts := split_ending(name)))
    if not folder.is_dir():
        what = "does not exist"
    elif endings:
        found, n = endings.most_common(1)[0]
        what = f"has no {ending} file but {n} {found} file(s)"
        cure = f'set "file_ending": "{found}" in dataset.json or convert the files'
    faults.add(folder, what, cure)


def _explicit_cases(folder: Path, entries: Any) -> tuple[dict[str, CaseFiles], Faults]:
    cases, faults = {}, Faults()
    by_case: dict[str, Any] = entries if isinstance(entries, dict) else {"any case": None}
    for identifier, entry in by_case.items():
        try:
            images = [_expand(folder, name) for name in entry["images"]]
            label = _expand(folder, entry["label"])
        except (TypeError, KeyError):
            cure = 'write "dataset": {"CASE": {"images": ["FILE", ...], "label": "FILE"}, ...}'
            faults.add(folder / "dataset.json", f"does not name the files of {identifier}", cure)
            continue
        for path in (*images, label):
            if not path.is_file():
                faults.add(path, "is missing", f"correct case {identifier} in dataset.json")
        if there := tuple(path for path in images if path.is_file()):
            cases[identifier] = CaseFiles(there, label if label.is_file() else None)
    return cases, faults


def _expand(folder: Path, name: str) -> Path:
    path = Path(os.path.expandvars(name))
    return path if path.is_absolute() else Path(os.path.normpath(folder / path))
