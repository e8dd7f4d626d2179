"""Bare folders images/ + labels/: pairs by file stem, labels read from the masks."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from umamba.data import convert
from umamba.data.images import (
    NATURAL_ENDINGS,
    PIXELS,
    READ_ERRORS,
    TIFF,
    ending_of,
    label_counts,
    read_image,
    read_pixels,
    split_ending,
)
from umamba.data.layout import CHANNEL, add_lone_labels, add_missing_channel, list_files
from umamba.data.links import LinkedFolder, stamp_of

IMAGE_FOLDERS, LABEL_FOLDERS = ("images", "imagesTr"), ("labels", "labelsTr", "masks")
MOST_LABELS = 128  # more values than this are instances or gray levels, not classes


@dataclass
class _Pairs:
    """What was found: images by case and channel, and the labels of these cases."""

    images: dict[str, dict[int, Path]]
    labels: dict[str, Path]
    has_suffixes: bool  # the image names end in a channel number that the labels' names lack
    ending: str
    n_colors: int = 1
    n_volumes: int = 1

    @property
    def files(self) -> list[Path]:
        return [path for files in self.images.values() for path in files.values()]


def find_bare_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the image and the label folder, None when the folder is of another kind."""
    images = [folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()]
    labels = [folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()]
    return (images[0], labels[0]) if images and labels else None


def link_bare_folders(linked: LinkedFolder, images: Path, labels: Path) -> dict[str, Any]:
    """Plan the links and copies and return dataset.json.

    Raises ValueError when there is nothing to pair, or labels.json or channels.json is broken.
    """
    pairs = _pair(linked, images, labels)
    if pairs.ending in NATURAL_ENDINGS:
        _choose_colors(linked, pairs)
    elif len(pairs.files) == len(pairs.images):
        n_volumes = set(map(convert.count_volumes, pairs.files))
        pairs.n_volumes = n_volumes.pop() if len(n_volumes) == 1 else 1
    if pairs.n_volumes > 1:
        linked.notes.append(
            f"The 4D images are split into {pairs.n_volumes} channels in the workspace."
        )
    channels = sorted({i for files in pairs.images.values() for i in files})
    for case, files in pairs.images.items():
        for i, path in files.items():
            _link_image(linked, pairs, f"imagesTr/{case}", channels.index(i), path)
    for name, path in list_files(linked.source / "imagesTs").items():
        if parts := split_ending(name):
            case, i = _case_and_channel(parts[0], pairs.has_suffixes)
            if i in channels:
                _link_image(linked, pairs, f"imagesTs/{case}", channels.index(i), path)
    values = _values_per_file(linked, list(pairs.labels.values()))
    names, mapping = _number_labels(linked, labels, values)
    _link_labels(linked, pairs, values, mapping)
    n_channels = max(len(channels), pairs.n_colors, pairs.n_volumes)
    dataset_json = {
        "channel_names": _channel_names(linked, n_channels),
        "labels": names,
        "numTraining": len(pairs.images),
        "file_ending": pairs.ending,
    }
    if any(old != new for old, new in mapping.items()):
        dataset_json["label_values_in_source"] = {str(old): new for old, new in mapping.items()}
    return dataset_json


def _pair(linked: LinkedFolder, images: Path, labels: Path) -> _Pairs:
    stems, label_stems = _by_stem(images), _by_stem(labels)
    n_whole = len(stems.keys() & label_stems.keys())
    matches = [match for stem in stems if (match := CHANNEL.fullmatch(stem))]
    has_suffixes = sum(match[1] in label_stems for match in matches) > n_whole
    by_case: dict[str, dict[int, Path]] = {}
    for stem, path in stems.items():
        case, i = _case_and_channel(stem, has_suffixes)
        by_case.setdefault(case, {})[i] = path
    ending = Counter(map(ending_of, stems.values())).most_common(1)[0][0]
    if ending == ".tiff" and read_pixels(next(iter(stems.values()))).ndim == 2:
        ending = ".tif"  # nnU-Net reads .tiff as volumes only
    usual = {i for files in by_case.values() for i in files}
    for case, files in by_case.items():
        some = next(iter(files.values()))
        for i in sorted(usual - files.keys()):
            add_missing_channel(some.with_name(f"{case}_{i:04d}{ending}"), linked.faults)
        if case not in label_stems:
            what = f"has no label: no file named {case} in {labels}"
            linked.faults.add(some, what, "add the label or remove the image")
    add_lone_labels(label_stems, by_case, linked.faults)
    linked.notes.append(
        f"{len(by_case)} images in {images} are paired with {labels} by the stems of their names."
    )
    in_use = {case: label_stems[case] for case in by_case if case in label_stems}
    return _Pairs(by_case, in_use, has_suffixes, ending)


def _case_and_channel(stem: str, has_suffixes: bool) -> tuple[str, int]:
    match = CHANNEL.fullmatch(stem) if has_suffixes else None
    return (match[1], int(match[2])) if match else (stem, 0)


def _by_stem(folder: Path) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    for name, path in list_files(folder).items():
        parts = split_ending(name)
        if parts is None:
            continue
        if parts[0] in stems:
            raise ValueError(
                f"{stems[parts[0]]} and {path} have the same stem; remove or rename one of them"
            )
        stems[parts[0]] = path
    if not stems:
        raise ValueError(
            f"{folder} holds no image that nnU-Net can read; "
            "convert the files to .nii.gz, .nrrd, .mha, .png, .bmp or .tif"
        )
    return stems


def _choose_colors(linked: LinkedFolder, pairs: _Pairs) -> None:
    """Set the number of colors that all 2D images share; differing ones are matched in copies."""
    counts = Counter(map(convert.count_colors, pairs.files))
    found = counts.keys() - {0}
    if len(found) < 2 and found <= {1, 3, 4}:
        pairs.n_colors = max(found, default=1)
        return
    pairs.n_colors = 3 if found & {3, 4} else 1
    n = sum(counts[n_colors] for n_colors in found - {pairs.n_colors})
    kind = "RGB" if pairs.n_colors == 3 else "gray"
    linked.notes.append(f"{n} images are saved as {kind} in the workspace, as the others are.")
    for files in pairs.images.values():
        for path in files.values():
            if len(files) > 1 and pairs.n_colors > 1:
                what = "has both colors and a channel number"
                linked.faults.add(path, what, "use one file per case")


def _link_image(linked: LinkedFolder, pairs: _Pairs, stem: str, channel: int, path: Path) -> None:
    name, ending = f"{stem}_{channel:04d}{pairs.ending}", ending_of(path)
    if pairs.n_volumes > 1 and convert.count_volumes(path) == pairs.n_volumes:
        convert.split_volumes(linked, stem, pairs.ending, path, pairs.n_volumes)
    elif pairs.ending in NATURAL_ENDINGS and convert.count_colors(path) not in (0, pairs.n_colors):
        make = partial(convert.match_color, path, n_colors=pairs.n_colors)
        linked.convert(name, path, f"{pairs.n_colors} colors", make)
    elif convert.is_same_format(ending, pairs.ending):
        linked.link(name, path)
        _link_spacing(linked, stem, path)
    elif convert.can_convert(ending, pairs.ending):
        linked.convert(name, path, "format", partial(convert.convert_format, path))
    else:
        what = f"is a {ending} file among {pairs.ending} files"
        linked.faults.add(path, what, "use one format for all images")


def _link_labels(
    linked: LinkedFolder, pairs: _Pairs, values: dict[str, list[int]], numbers: dict[int, int]
) -> None:
    for case, path in pairs.labels.items():
        name, ending = f"labelsTr/{case}{pairs.ending}", ending_of(path)
        mapping = {value: numbers.get(value, value) for value in values[str(path)]}
        needs_map = any(old != new for old, new in mapping.items())
        needs_gray = ending in NATURAL_ENDINGS and convert.count_colors(path) != 1
        is_same = convert.is_same_format(ending, pairs.ending)
        if not convert.can_convert(ending, pairs.ending):
            what = f"is a {ending} label for {pairs.ending} images"
            linked.faults.add(path, what, "use one kind of format for both")
        elif mapping and (needs_gray or needs_map or not is_same):
            make = partial(convert.map_labels, path, mapping=mapping)
            linked.convert(name, path, f"labels {mapping}", make)
        elif is_same:
            linked.link(name, path)
        else:
            linked.convert(name, path, "format", partial(convert.convert_format, path))
        _link_spacing(linked, f"labelsTr/{case}", path)


def _link_spacing(linked: LinkedFolder, stem: str, path: Path) -> None:
    """Link the .json in which a TIFF's spacing stands."""
    ending = ending_of(path)
    aside = path.with_name(f"{path.name[: -len(ending)]}.json")
    if ending in TIFF and aside.is_file():
        linked.link(f"{stem}.json", aside)


def _number_labels(
    linked: LinkedFolder, folder: Path, values: dict[str, list[int]]
) -> tuple[dict[str, int], dict[int, int]]:
    """Return name -> value for nnU-Net, and value in the masks -> that value.

    Names come from labels.json beside the folders. Raises ValueError when it is broken, or when
    the masks hold instances.
    """
    seen = {value for found in values.values() for value in found}
    file = linked.source / "labels.json"
    given = _read_names(file)
    if any((value == 0) != (name == "background") for value, name in given.items()):
        raise ValueError(f"{file} must call the value 0, and only it, background")
    if given:
        for path, found in values.items():
            if unknown := sorted(set(found) - given.keys() - {0}):
                listed = ", ".join(map(str, unknown))
                what = f"holds the value(s) {listed} that labels.json does not name"
                linked.faults.add(path, what, "name them there or correct the mask")
    elif len(seen) > MOST_LABELS:
        raise ValueError(
            f"The masks in {folder} hold {len(seen)} different values; they look like "
            "instances or gray levels: save one value per class, or name the values in labels.json"
        )
    else:
        foreground = sorted(seen - {0})
        is_only = len(foreground) == 1
        given = {value: "foreground" if is_only else f"label_{value}" for value in foreground}
        linked.notes.append(
            f"Labels read from the masks: {_few(list(given.values()))}; "
            f'name them in {file} as {{"1": "name"}}.'
        )
    # nnU-Net wants the ignore label last
    ordered = sorted((name == "ignore", value, name) for value, name in given.items() if value)
    mapping = {0: 0, **{value: i + 1 for i, (_, value, _) in enumerate(ordered)}}
    changed = [f"{old} -> {new}" for old, new in mapping.items() if old != new]
    if changed:
        linked.notes.append(f"Label values are renumbered in copies: {_few(changed)}.")
    names = {"background": 0, **{name: mapping[value] for _, value, name in ordered}}
    return names, mapping


def _values_per_file(linked: LinkedFolder, paths: list[Path]) -> dict[str, list[int]]:
    """Return `_values` of each mask, read anew where it has changed."""
    known = linked.memory.get("label_values", {})
    stamps = {str(path): list(stamp_of(path)) for path in paths}
    todo = [path for path in paths if known.get(str(path), [None])[0] != stamps[str(path)]]
    with ThreadPoolExecutor(2) as pool:
        fresh = dict(zip(map(str, todo), pool.map(_values, todo), strict=True))
    values = {name: fresh[name] if name in fresh else known[name][1] for name in stamps}
    linked.memory["label_values"] = {name: [stamps[name], values[name]] for name in stamps}
    return values


def _values(path: Path) -> list[int]:
    """Return the whole, non-negative values of a mask; none when the audit must name it."""
    try:
        if ending_of(path) in PIXELS:
            found = np.unique(convert.label_pixels(read_pixels(path)))
        else:
            found = np.array(list(label_counts(read_image(path, True, is_label=True))))
    except READ_ERRORS:
        return []
    if found.dtype.kind == "f" and not (np.isfinite(found) & (found == np.rint(found))).all():
        return []
    return [int(v) for v in found] if found.size and found.min() >= 0 else []


def _read_names(path: Path) -> dict[int, str]:
    """Return number -> name from {"1": "liver"} or {"liver": 1}; empty when there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        pairs = [
            (int(key), str(value)) if key.strip().isdigit() else (int(value), key)
            for key, value in content.items()
        ]
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f'{path} is not a table {{"1": "name"}} of numbers and names') from None
    if len({number for number, _ in pairs}) < len(pairs) or len({n for _, n in pairs}) < len(pairs):
        raise ValueError(f"{path} gives a number or a name twice; name each once")
    return dict(pairs)


def _channel_names(linked: LinkedFolder, n: int) -> dict[str, str]:
    path = linked.source / "channels.json"
    given = _read_names(path)
    if given and sorted(given) != list(range(n)):
        raise ValueError(f"{path} must name the channels 0 to {n - 1}; the images have {n}")
    if not given:
        named, whose = "The channel is named channel_0", "its"
        if n > 1:
            named, whose = f"Channels are named channel_0 to channel_{n - 1}", "their"
        linked.notes.append(
            f"{named}, normalized by {whose} own mean and spread; "
            f'for CT write {{"0": "CT"}} to {path}.'
        )
    return {str(i): given.get(i, f"channel_{i}") for i in range(n)}


def _few(words: list[str]) -> str:
    return ", ".join([*words[:8], "...", words[-1]] if len(words) > 10 else words) or "none"
