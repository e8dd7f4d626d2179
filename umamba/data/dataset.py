"""Finds a dataset by id, name or folder and gives it to nnU-Net as a raw dataset."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from umamba.data.decathlon import TASK, is_decathlon, link_decathlon
from umamba.data.faults import Fault, raise_if_faults
from umamba.data.folders import find_bare_folders, link_bare_folders
from umamba.data.images import TIFF
from umamba.data.layout import check_dataset_json, list_cases, list_files, read_dataset_json
from umamba.data.links import LinkedFolder, read_state
from umamba.data.workspace import Workspace, resolve_workspace

NAME = re.compile(r"Dataset(\d{3,})_(.+)")
FIRST_LOCAL_ID = 500


@dataclass(frozen=True)
class RawDataset:
    """A dataset in nnU-Net's raw format.

    folder: the raw dataset folder; source: the folder the user gave, which is `folder` where
    nothing had to be linked; notes: what was assumed, to be said once; faults: what preparing
    found wrong (empty unless prepared with strict=False).
    """

    folder: Path
    dataset_json: dict[str, Any]
    source: Path
    notes: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.name


def prepare_dataset(
    spec: str, workspace: str | Path | None = None, *, strict: bool = True
) -> tuple[RawDataset, Workspace]:
    """Return the dataset in nnU-Net's raw format and the workspace, which is then active.

    spec: an id (501), a name (Dataset501_X) of the workspace's raw folder, or the path of an
    nnU-Net raw folder, of a Medical Segmentation Decathlon folder, or of a folder with images/
    and labels/. Files outside the workspace are linked into it, one by one; a second call only
    renews what has changed. The given folder is not written to, but for <folder>/umamba-work.
    strict: raise ValueError with every missing file and every fault of dataset.json; else they
    stand in `faults`, so that `audit_dataset` can list them with its own findings.
    Raises ValueError or FileNotFoundError where nothing can be prepared at all.
    """
    text = str(spec).strip()
    folder = _as_folder(text)
    place = resolve_workspace(folder, workspace)
    if folder is None:
        folder = _find_by_name(text, place)
        if folder.parent == place.preprocessed:
            # only the preprocessed files are left; enough to train on
            missing = place.raw / folder.name
            note = f"There are no raw images in {missing}; only what is preprocessed can be used."
            content = read_dataset_json(folder / "dataset.json")
            return RawDataset(missing, content, missing, [note]), place.activate()
    raw = _prepare(folder, place)
    if strict:
        raise_if_faults(raw.faults, raw.name)
    return raw, place


def _as_folder(text: str) -> Path | None:
    """Return the folder that a spec names, None when it is an id or a name."""
    if not text:
        raise ValueError("No dataset is named; give an id, a name or a folder")
    if text.isdigit():
        return None
    path = Path(text).expanduser()
    if path.is_file():
        if path.name != "dataset.json":
            raise ValueError(f"{path} is a file; give the folder of the dataset")
        path = path.parent
    if path.is_dir():
        return path.resolve()
    if NAME.fullmatch(text):
        return None
    raise FileNotFoundError(
        f"There is no folder {path}; give an id (501), a name (Dataset501_Name) or the path of a "
        "folder with dataset.json or with images/ and labels/"
    )


def _find_by_name(text: str, place: Workspace) -> Path:
    """Return the raw folder of an id or a name, or the preprocessed one where it alone exists."""

    def hits(names: list[str]) -> list[str]:
        return [n for n in names if (_id(n) == int(text) if text.isdigit() else n == text)]

    present = _dataset_names(place.raw)
    found = hits(present)
    if len(found) > 1:
        raise ValueError(
            f"{place.raw} has {' and '.join(found)} under the id {int(text)}; rename one of them"
        )
    if found:
        return place.raw.resolve() / found[0]
    for name in hits(_dataset_names(place.preprocessed)):
        if (place.preprocessed / name / "dataset.json").is_file():
            return place.preprocessed / name
    if not present:
        raise ValueError(
            f"There is no dataset {text}: {place.raw} holds none ({place.chosen_by}); "
            "give the dataset's folder, or its workspace with --workspace DIR"
        )
    nearest = difflib.get_close_matches(text, present, n=3, cutoff=0.5) or present[:5]
    raise ValueError(f"There is no dataset {text} in {place.raw}; there is {', '.join(nearest)}")


def _prepare(folder: Path, place: Workspace) -> RawDataset:
    bare = find_bare_folders(folder)
    has_json = (folder / "dataset.json").is_file()
    if not bare and not has_json and not (folder / "imagesTr").is_dir():
        raise ValueError(
            f"{folder} is no dataset: it has neither dataset.json nor the folders images and "
            "labels; add them or give another folder"
        )
    content = None if bare and not has_json else read_dataset_json(folder / "dataset.json")
    decathlon = content is not None and is_decathlon(content)
    if folder.parent == place.raw.resolve() and NAME.fullmatch(folder.name) and not decathlon:
        source = read_state(folder).get("source")
        if source and Path(source).is_dir():
            return _prepare(Path(source), place)
        if content is not None:
            return _in_place(folder, content, place)
    name = _choose_name(folder, place, decathlon, is_raw=content is not None and not decathlon)
    place.activate()
    linked = LinkedFolder(place.raw / name, folder)
    if content is None:
        assert bare is not None
        result = link_bare_folders(linked, *bare)
    elif decathlon:
        result = link_decathlon(linked, content)
    else:
        result = _link_raw(linked, content)
    linked.finish(result)
    return RawDataset(linked.folder, result, folder, linked.notes, linked.faults)


def _in_place(folder: Path, content: dict[str, Any], place: Workspace) -> RawDataset:
    if others := _names_with_id(_id(folder.name), place) - {folder.name}:
        raise ValueError(
            f"The id {_id(folder.name)} belongs to {folder.name} and to "
            f"{', '.join(sorted(others))} in {place.root}; "
            "nnU-Net needs one name per id: rename or remove one"
        )
    place.activate()
    faults = check_dataset_json(content, folder / "dataset.json")
    return RawDataset(folder, content, folder, [], faults or list_cases(folder, content)[1])


def _link_raw(linked: LinkedFolder, content: dict[str, Any]) -> dict[str, Any]:
    """Plan the links of an nnU-Net raw folder; explicit paths become the usual layout."""
    folder = linked.source
    ending: Any = content.get("file_ending")
    linked.faults += check_dataset_json(content, folder / "dataset.json")
    if not (isinstance(ending, str) and ending and isinstance(content.get("labels"), dict)):
        raise_if_faults(linked.faults, folder.name)
    cases, faults = list_cases(folder, content)
    linked.faults += faults
    for identifier, case in cases.items():
        for i, path in enumerate(case.images):
            name = path.name if "dataset" not in content else f"{identifier}_{i:04d}{ending}"
            linked.link(f"imagesTr/{name}", path)
        if case.label is not None:
            linked.link(f"labelsTr/{identifier}{ending}", case.label)
    others = [("imagesTs", ending), ("labelsTs", ending)]
    if ending.lower() in TIFF:  # spacings stand beside the files
        others += [(name, ".json") for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs")]
    for where, kind in others:
        for name, path in list_files(folder / where, kind).items():
            linked.link(f"{where}/{name}", path)
    kept = {key: value for key, value in content.items() if key != "dataset"}
    return {**kept, "numTraining": len(cases)}


def _choose_name(folder: Path, place: Workspace, decathlon: bool, is_raw: bool) -> str:
    """Return the name under which the workspace knows this source, the same on every call."""
    sources = {n: read_state(place.raw / n).get("source") for n in _dataset_names(place.raw)}
    for name, source in sources.items():
        if source == str(folder):
            return name
    match = NAME.fullmatch(folder.name) or (TASK.fullmatch(folder.name) if decathlon else None)
    if match:
        name, dataset_id = _dataset_name(int(match[1]), match[2]), int(match[1])
        source = sources.get(name)
        is_taken = name in sources and not (source and not Path(source).is_dir())
        others = sorted(_names_with_id(dataset_id, place) - {name})
        if not is_taken and not others:
            return name
        if is_raw:
            taken = name if is_taken else ", ".join(others)
            raise ValueError(
                f"{folder} needs the id {dataset_id}, which {taken} has in {place.raw.parent}; "
                "name another place with --workspace DIR"
            )
    free = next(i for i in count(FIRST_LOCAL_ID) if not _names_with_id(i, place))
    return _dataset_name(free, match[2] if match else folder.name)


def _dataset_name(dataset_id: int, name: str) -> str:
    """Return nnU-Net's name for a dataset; characters that do not suit a folder become _."""
    return f"Dataset{dataset_id:03d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_') or 'data'}"


def _dataset_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if NAME.fullmatch(path.name))


def _names_with_id(dataset_id: int, place: Workspace) -> set[str]:
    folders = (place.raw, place.preprocessed, place.results)
    return {n for folder in folders for n in _dataset_names(folder) if _id(n) == dataset_id}


def _id(name: str) -> int:
    return int(name.split("_")[0].removeprefix("Dataset"))
