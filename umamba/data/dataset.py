"""Finds a dataset by id, name or folder and gives it to nnU-Net as a raw dataset."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umamba.data.decathlon import is_decathlon, link_decathlon, preferred_name
from umamba.data.faults import Fault, raise_if_faults
from umamba.data.folders import find_bare_folders, link_bare_folders
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

    dataset_id: int
    name: str
    folder: Path
    dataset_json: dict[str, Any]
    source: Path
    notes: list[str]
    faults: list[Fault] = field(default_factory=list)


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
    folder = _as_folder(spec)
    if folder is None:
        place = resolve_workspace(None, workspace)
        folder = _find_by_name(spec, place)
        if folder.parent == place.preprocessed:
            return _without_raw(folder, place), place.activate()
    else:
        place = resolve_workspace(folder, workspace)
    raw = _prepare(folder, place)
    if strict:
        raise_if_faults(raw.faults, raw.name)
    return raw, place


def _prepare(folder: Path, place: Workspace) -> RawDataset:
    bare = find_bare_folders(folder)
    content: dict[str, Any] | None = None
    if (folder / "dataset.json").is_file() or bare is None:
        content = _read_content(folder)
    decathlon = content is not None and is_decathlon(content)
    if folder.parent == place.raw.resolve() and NAME.fullmatch(folder.name) and not decathlon:
        source = read_state(folder).get("source")
        if source and Path(source).is_dir():
            return _prepare(Path(source), place)
        if content is not None:
            _refuse_second_name(folder.name, place)
            place.activate()
            return _in_place(folder, content)
    preferred = _preferred(folder, decathlon)
    name = _choose_name(folder, place, preferred, is_nnunet=content is not None and not decathlon)
    place.activate()
    linked = LinkedFolder(place.raw / name, folder)
    if content is None:
        assert bare is not None
        result, notes, faults = link_bare_folders(linked, *bare)
    elif decathlon:
        result, notes, faults = link_decathlon(linked, content)
    else:
        result, notes, faults = _link_raw(linked, content)
    linked.finish(result)
    return RawDataset(_id(name), name, place.raw / name, result, folder, notes, faults)


def dataset_name(dataset_id: int, name: str) -> str:
    """Return nnU-Net's name for a dataset; characters that do not suit a folder become _."""
    return f"Dataset{dataset_id:03d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name).strip('_') or 'data'}"


def _as_folder(spec: str) -> Path | None:
    """Return the folder that a spec names, None when it is an id or a name."""
    text = str(spec).strip()
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


def _find_by_name(spec: str, place: Workspace) -> Path:
    text = str(spec).strip()
    present = sorted(_dataset_names(place.raw))
    if text.isdigit():
        hits = [name for name in present if _id(name) == int(text)]
        if len(hits) > 1:
            raise ValueError(
                f"{place.raw} has {' and '.join(hits)} under the id {int(text)}; rename one of them"
            )
    else:
        hits = [name for name in present if name == text]
    if hits:
        return place.raw.resolve() / hits[0]
    for name in sorted(_dataset_names(place.preprocessed)):
        is_it = _id(name) == int(text) if text.isdigit() else name == text
        if is_it and (place.preprocessed / name / "dataset.json").is_file():
            return place.preprocessed / name
    if not present:
        raise ValueError(
            f"There is no dataset {text}: {place.raw} holds none ({place.chosen_by}); "
            "give the dataset's folder, or its workspace with --workspace DIR"
        )
    nearest = difflib.get_close_matches(text, present, n=3, cutoff=0.5) or present[:5]
    raise ValueError(f"There is no dataset {text} in {place.raw}; there is {', '.join(nearest)}")


def _dataset_names(folder: Path) -> set[str]:
    if not folder.is_dir():
        return set()
    return {path.name for path in folder.iterdir() if NAME.fullmatch(path.name)}


def _id(name: str) -> int:
    match = NAME.fullmatch(name)
    assert match is not None
    return int(match[1])


def _read_content(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file() and not (folder / "imagesTr").is_dir():
        raise ValueError(
            f"{folder} is no dataset: it has neither dataset.json nor the folders images and "
            "labels; add them or give another folder"
        )
    return read_dataset_json(path)


def _without_raw(folder: Path, place: Workspace) -> RawDataset:
    """Return a dataset of which only the preprocessed files are left; enough to train on."""
    raw = place.raw / folder.name
    notes = [f"There are no raw images in {raw}; only what is preprocessed can be used."]
    content = read_dataset_json(folder / "dataset.json")
    return RawDataset(_id(folder.name), folder.name, raw, content, raw, notes)


def _in_place(folder: Path, content: dict[str, Any]) -> RawDataset:
    faults = check_dataset_json(content, folder / "dataset.json")
    if not faults:
        faults = list_cases(folder, content)[1]
    return RawDataset(_id(folder.name), folder.name, folder, content, folder, [], faults)


def _link_raw(
    linked: LinkedFolder, content: dict[str, Any]
) -> tuple[dict[str, Any], list[str], list[Fault]]:
    """Plan the links of an nnU-Net raw folder; explicit paths become the usual layout."""
    folder = linked.source
    faults = check_dataset_json(content, folder / "dataset.json")
    result = {key: value for key, value in content.items() if key != "dataset"}
    ending = content.get("file_ending")
    if faults and not (
        isinstance(ending, str) and ending and isinstance(content.get("labels"), dict)
    ):
        raise_if_faults(faults, folder.name)
    assert isinstance(ending, str)
    cases, more = list_cases(folder, content)
    for identifier, case in cases.items():
        for i, path in enumerate(case.images):
            name = path.name if "dataset" not in content else f"{identifier}_{i:04d}{ending}"
            linked.link(f"imagesTr/{name}", path)
        if case.label is not None:
            linked.link(f"labelsTr/{identifier}{ending}", case.label)
    for where in ("imagesTs", "labelsTs"):
        for name, path in list_files(folder / where, ending).items():
            linked.link(f"{where}/{name}", path)
    if ending.lower() in (".tif", ".tiff"):
        for where in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            for name, path in list_files(folder / where, ".json").items():
                linked.link(f"{where}/{name}", path)
    result["numTraining"] = len(cases)
    return result, [], faults + more


def _preferred(folder: Path, decathlon: bool) -> tuple[int | None, str]:
    match = NAME.fullmatch(folder.name)
    if match:
        return int(match[1]), match[2]
    return preferred_name(folder) if decathlon else (None, folder.name)


def _choose_name(
    folder: Path, place: Workspace, preferred: tuple[int | None, str], is_nnunet: bool
) -> str:
    """Return the name under which the workspace knows this source, the same on every call."""
    ours = {name: read_state(place.raw / name).get("source") for name in _dataset_names(place.raw)}
    for name in sorted(ours):
        if ours[name] == str(folder):
            return name
    dataset_id, base = preferred
    if dataset_id is not None:
        name = dataset_name(dataset_id, base)
        is_free = name not in ours or (ours[name] and not Path(str(ours[name])).is_dir())
        others = _names_with_id(dataset_id, place) - {name}
        if is_free and not others:
            return name
        if is_nnunet:
            taken = name if not is_free else ", ".join(sorted(others))
            raise ValueError(
                f"{folder} needs the id {dataset_id}, which {taken} has in {place.raw.parent}; "
                "name another place with --workspace DIR"
            )
    taken_ids = {_id(name) for name in _all_names(place)}
    dataset_id = FIRST_LOCAL_ID
    while dataset_id in taken_ids:
        dataset_id += 1
    return dataset_name(dataset_id, base)


def _refuse_second_name(name: str, place: Workspace) -> None:
    others = _names_with_id(_id(name), place) - {name}
    if others:
        raise ValueError(
            f"The id {_id(name)} belongs to {name} and to {', '.join(sorted(others))} in "
            f"{place.root}; nnU-Net needs one name per id: rename or remove one"
        )


def _all_names(place: Workspace) -> set[str]:
    return set().union(*map(_dataset_names, (place.raw, place.preprocessed, place.results)))


def _names_with_id(dataset_id: int, place: Workspace) -> set[str]:
    return {name for name in _all_names(place) if _id(name) == dataset_id}
