"""Bare folders images/ + labels/: pairs by file stem, labels read from the masks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from umamba.data.content import NATURAL_ENDINGS, split_ending
from umamba.data.convert import (
    can_convert,
    convert_format,
    map_labels,
    match_color,
    read_pixels,
    split_channel,
)
from umamba.data.decathlon import count_volumes
from umamba.data.faults import Fault
from umamba.data.layout import CHANNEL, list_files
from umamba.data.links import LinkedFolder
from umamba.data.masks import LabelTable, read_labels, read_names

IMAGE_FOLDERS, LABEL_FOLDERS = ("images", "imagesTr"), ("labels", "labelsTr", "masks")


@dataclass
class _Plan:
    """What was found: images by case and channel, labels by case, and what to say about it."""

    images: dict[str, dict[int, Path]]
    labels: dict[str, Path]
    ending: str
    n_colors: int = 1
    n_volumes: int = 1
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def find_bare_folders(folder: Path) -> tuple[Path, Path] | None:
    """Return the image and the label folder, None when the folder is of another kind."""
    images = [folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()]
    labels = [folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()]
    return (images[0], labels[0]) if images and labels else None


def link_bare_folders(
    linked: LinkedFolder, images: Path, labels: Path
) -> tuple[dict[str, Any], list[str], list[Fault]]:
    """Plan the links and copies and return dataset.json, notes and faults.

    Raises ValueError when there is nothing to pair, or labels.json or channels.json is broken.
    """
    plan = _pair(images, labels)
    if plan.ending in NATURAL_ENDINGS:
        _count_colors(plan)
    else:
        _count_volumes(plan)
    channels = sorted({i for files in plan.images.values() for i in files})
    for case, files in plan.images.items():
        for i, path in files.items():
            _link_image(linked, plan, f"imagesTr/{case}", channels.index(i), path)
    test_folder = linked.source / "imagesTs"
    for path in list_files(test_folder).values():
        parts = split_ending(path.name)
        if parts is not None:
            match = CHANNEL.fullmatch(parts[0])
            suffixed = match is not None and (len(channels) > 1 or channels != [0])
            case, i = (match[1], int(match[2])) if match and suffixed else (parts[0], channels[0])
            if i in channels:
                _link_image(linked, plan, f"imagesTs/{case}", channels.index(i), path)
    table = read_labels(linked, [plan.labels[c] for c in plan.images if c in plan.labels])
    plan.notes += table.notes
    plan.faults += table.faults
    _link_labels(linked, plan, table)
    n_channels = max(len(channels), plan.n_colors, plan.n_volumes)
    dataset_json = {
        "channel_names": _channel_names(linked.source, n_channels, plan),
        "labels": table.names,
        "numTraining": len(plan.images),
        "file_ending": plan.ending,
    }
    if any(old != new for old, new in table.mapping.items()):
        dataset_json["label_values_in_source"] = {str(v): n for v, n in table.mapping.items()}
    return dataset_json, plan.notes, plan.faults


def _pair(images: Path, labels: Path) -> _Plan:
    found = {folder: _by_stem(folder) for folder in (images, labels)}
    for folder in (images, labels):
        if not found[folder]:
            raise ValueError(
                f"{folder} holds no image that nnU-Net can read; "
                "convert the files to .nii.gz, .nrrd, .mha, .png, .bmp or .tif"
            )
    stems, label_stems = found[images], found[labels]
    matches = {stem: CHANNEL.fullmatch(stem) for stem in stems}
    n_whole = len(stems.keys() & label_stems.keys())
    n_stripped = sum(m is not None and m[1] in label_stems for m in matches.values())
    by_case: dict[str, dict[int, Path]] = {}
    for stem, path in stems.items():
        match = matches[stem]
        if match is not None and n_stripped > n_whole:
            by_case.setdefault(match[1], {})[int(match[2])] = path
        else:
            by_case.setdefault(stem, {})[0] = path
    endings = Counter(_ending(path) for path in stems.values())
    ending = endings.most_common(1)[0][0]
    if ending == ".tiff" and read_pixels(next(iter(stems.values()))).ndim == 2:
        ending = ".tif"  # nnU-Net reads .tiff as volumes only
    plan = _Plan(by_case, label_stems, ending)
    usual = {i for files in by_case.values() for i in files}
    for case, files in by_case.items():
        some = next(iter(files.values()))
        plan.faults += [
            Fault(
                str(some.with_name(f"{case}_{i:04d}{ending}")),
                "is missing: the case lacks this channel",
                "add the file or remove the case",
            )
            for i in sorted(usual - files.keys())
        ]
        if case not in label_stems:
            what = f"has no label: no file named {case} in {labels}"
            plan.faults.append(Fault(str(some), what, "add the label or remove the image"))
    plan.faults += [
        Fault(str(path), "is a label without an image", "add the image or remove the label")
        for stem, path in label_stems.items()
        if stem not in by_case
    ]
    plan.notes.append(
        f"{len(by_case)} images in {images} are paired with {labels} by the stems of their names."
    )
    return plan


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
    return stems


def _count_colors(plan: _Plan) -> None:
    """Set the number of colors that all 2D images share; differing ones are matched in copies."""
    counts = {}
    for files in plan.images.values():
        for path in files.values():
            counts[path] = _colors(path)
    found = {n for n in counts.values() if n}
    if found <= {1, 3, 4} and len(found) == 1:
        plan.n_colors = found.pop()
        return
    plan.n_colors = 3 if found & {3, 4} else 1
    n = sum(count not in (0, plan.n_colors) for count in counts.values())
    kind = "RGB" if plan.n_colors == 3 else "gray"
    plan.notes.append(f"{n} images are saved as {kind} in the workspace, as the others are.")
    plan.faults += [
        Fault(str(path), "has both colors and a channel number", "use one file per case")
        for files in plan.images.values()
        for path in files.values()
        if len(files) > 1 and plan.n_colors > 1
    ]


def _colors(path: Path) -> int:
    """Return the color channels as nnU-Net would read them, from the header; 0 when unreadable."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode == "P":
                return 4 if "transparency" in image.info else 3
            return len(image.getbands())
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return 0


def _count_volumes(plan: _Plan) -> None:
    counts = {count_volumes(path) for files in plan.images.values() for path in files.values()}
    if len(counts) == 1 and all(len(files) == 1 for files in plan.images.values()):
        plan.n_volumes = counts.pop()
    if plan.n_volumes > 1:
        plan.notes.append(
            f"The 4D images are split into {plan.n_volumes} channels in the workspace."
        )


def _link_image(linked: LinkedFolder, plan: _Plan, stem: str, channel: int, path: Path) -> None:
    name = f"{stem}_{channel:04d}{plan.ending}"
    ending = _ending(path)
    if plan.n_volumes > 1 and count_volumes(path) == plan.n_volumes:
        for i in range(plan.n_volumes):
            make = partial(split_channel, path, channel=i)
            linked.convert(f"{stem}_{i:04d}{plan.ending}", path, f"channel {i}", make)
    elif plan.ending in NATURAL_ENDINGS and _colors(path) not in (0, plan.n_colors):
        make = partial(match_color, path, n_colors=plan.n_colors)
        linked.convert(name, path, f"{plan.n_colors} colors", make)
    elif ending == plan.ending or {ending, plan.ending} == {".tif", ".tiff"}:
        linked.link(name, path)
        aside = path.with_name(f"{path.name[: -len(ending)]}.json")
        if ending in (".tif", ".tiff") and aside.is_file():
            linked.link(f"{stem}.json", aside)
    elif can_convert(ending, plan.ending):
        linked.convert(name, path, "format", partial(convert_format, path))
    else:
        what = f"is a {ending} file among {plan.ending} files"
        plan.faults.append(Fault(str(path), what, "use one format for all images"))


def _link_labels(linked: LinkedFolder, plan: _Plan, table: LabelTable) -> None:
    for case in plan.images:
        path = plan.labels.get(case)
        if path is None:
            continue
        name, ending = f"labelsTr/{case}{plan.ending}", _ending(path)
        values = table.values[str(path)]
        needs_gray = ending in NATURAL_ENDINGS and values and _colors(path) != 1
        mapping = {value: table.mapping.get(value, value) for value in values}
        needs_map = any(old != new for old, new in mapping.items())
        same = ending == plan.ending or {ending, plan.ending} == {".tif", ".tiff"}
        if not same and not can_convert(ending, plan.ending):
            what = f"is a {ending} label for {plan.ending} images"
            plan.faults.append(Fault(str(path), what, "use one kind of format for both"))
        elif values and (needs_gray or needs_map or not same):
            make = partial(map_labels, path, mapping=mapping)
            linked.convert(name, path, f"labels {mapping}", make)
        elif same:
            linked.link(name, path)
        else:
            linked.convert(name, path, "format", partial(convert_format, path))
        aside = path.with_name(f"{path.name[: -len(ending)]}.json")
        if ending in (".tif", ".tiff") and aside.is_file():
            linked.link(f"labelsTr/{case}.json", aside)


def _channel_names(source: Path, n: int, plan: _Plan) -> dict[str, str]:
    path = source / "channels.json"
    given = read_names(path)
    if given and sorted(given) != list(range(n)):
        raise ValueError(f"{path} must name the channels 0 to {n - 1}; the images have {n}")
    if not given:
        plan.notes.append(
            f"Channels are named channel_0 to channel_{n - 1}, normalized by their own mean and "
            f'spread; for CT write {{"0": "CT"}} to {path}.'
            if n > 1
            else "The channel is named channel_0, normalized by its own mean and spread; "
            f'for CT write {{"0": "CT"}} to {path}.'
        )
    return {str(i): given.get(i, f"channel_{i}") for i in range(n)}


def _ending(path: Path) -> str:
    parts = split_ending(path.name)
    return parts[1].lower() if parts else ""
