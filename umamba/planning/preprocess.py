"""Preprocessing of a dataset: nnU-Net's folders, made case by case, resumable and stamped.

A folder is made under a hidden name and gets its own when it is whole. Its stamp, a file beside it,
says for which plans and which files of which cases it is made; a killed run is gone on with.
"""

import functools
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umamba.files import replacing, write_json
from umamba.planning.cases import (
    Cases,
    Store,
    case_digests,
    count_threads,
    run_cases,
)
from umamba.planning.cases import read_dataset as read_dataset
from umamba.planning.plans import (
    STOCK_PLANS,
    Plans,
    digest,
    get_configuration,
    load_plans,
    plans_file,
    preprocessed_folder,
    preprocessing_part,
    read_json,
)
from umamba.preprocessing.case import CaseSettings
from umamba.preprocessing.saving import SUFFIXES as SUFFIXES
from umamba.preprocessing.saving import preprocess_and_save

OURS, STOCK = "umamba", "nnunetv2"  # whose code made a folder


def preprocess_dataset(
    dataset_name: str,
    plans_name: str,
    configurations: Sequence[str],
    n_workers: int = 1,
    progress: bool = True,
    *,
    stock: bool = False,
    store: Store | None = None,
    device: str | None = None,
) -> dict[str, Path]:
    """Preprocesses the cases of all configurations at once; returns the folder per configuration.

    A folder that is whole and stamped with the same plans and cases is kept. Of one of ours that
    is not, or that a killed run left, the cases that are whole and unchanged are kept. One that
    stock nnU-Net made is used if its plans agree and it is whole.
    stock: nnU-Net's own code makes everything; else it makes only what is not known here.
    store: cases that have been read already, for one worker.
    device: of torch, on which this process resamples images; labels stay on the CPU.
    Raises ValueError where a case cannot be preprocessed or somebody else's folder is in the way.
    """
    dataset_json, cases = read_dataset(dataset_name)
    home = preprocessed_folder(dataset_name)
    write_json(home / "dataset.json", dataset_json)
    plans = load_plans(plans_file(dataset_name, plans_name))
    folders: dict[str, Path] = {}
    tasks: list[_Task] = []
    for name in configurations:
        configuration = get_configuration(plans, name)
        folders[name] = folder = home / configuration["data_identifier"]
        if any(task.folder == folder for task in tasks):
            continue
        settings = None if stock else CaseSettings.from_plans(plans, configuration)
        stamp = _stamp(plans, name, dataset_json, cases, STOCK if settings is None else OURS)
        if not _may_be_used(folder, plans, name, stamp, strict=stock):
            task = _Task(name, folder, settings, _begin(folder, stamp))
            tasks.append(task)
    _run(tasks, plans, dataset_json, cases, 1 if device else n_workers, progress, store, device)
    for task in tasks:
        _finish(task.folder, cases)
    _copy_references(cases, home / "gt_segmentations", dataset_json["file_ending"])
    return folders


def folder_is_current(dataset_name: str, plans: Plans, configuration: str) -> bool:
    """Returns whether the configuration's preprocessed folder is whole and made for these plans."""
    return why_not_current(dataset_name, plans, configuration) is None


def why_not_current(dataset_name: str, plans: Plans, configuration: str) -> str | None:
    """Returns None where the configuration's folder is whole and made for these plans and cases.

    Else one sentence that says what is wrong with it, and the cure. Reads no case; where the raw
    dataset is not there (any more), the cases are taken to be those of the stamp.
    """
    home = preprocessed_folder(dataset_name)
    folder = home / get_configuration(plans, configuration)["data_identifier"]
    cure = "run `umamba plan` (with the same options) once more"
    found = _read_stamp(folder)
    if not folder.is_dir():
        half = _partial(folder)
        if found is None or not half.is_dir():
            return f"{folder} is not there: {cure}"
        n_whole = len(_whole_cases(half) & found["cases"].keys())
        return f"{folder} is half made ({n_whole} of {len(found['cases'])} cases): {cure}"
    try:
        dataset_json, cases = read_dataset(dataset_name)
    except FileNotFoundError:
        dataset_json, cases = read_json(home / "dataset.json"), {}
    stamp = _stamp(plans, configuration, dataset_json, cases, OURS)
    if found is None:
        try:
            _may_be_used(folder, plans, configuration, stamp, strict=False)
        except ValueError as error:
            return str(error)
        return None
    if found["plans"] != stamp["plans"]:
        return f"{folder} was made for other plans: {cure}"
    now = stamp["cases"] if cases else found["cases"]
    if changed := sorted({n for n, _ in now.items() ^ found["cases"].items()}):
        return f"{folder} was made of other files than there are now ({_few(changed)}): {cure}"
    if torn := sorted(found["cases"].keys() - _whole_cases(folder, found.get("sizes"))):
        return f"{folder} lacks files of {len(torn)} cases, or they are cut short: {cure}"
    return None


@dataclass(frozen=True)
class _Task:
    """A folder to be made; settings is None where nnU-Net's code does it; done: its cases."""

    configuration: str
    folder: Path
    settings: CaseSettings | None
    done: set[str]


def _run(
    tasks: Sequence[_Task],
    plans: Plans,
    dataset_json: dict[str, Any],
    cases: Cases,
    n_workers: int,
    progress: bool,
    store: Store | None,
    device: str | None,
) -> None:
    """Preprocesses what is not done: by our code for all configurations at once, by nnU-Net's."""
    if not tasks:
        return
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    labels = manager.get_label_manager(dataset_json)
    classes = location_classes(labels)
    known = {
        0,
        *map(int, labels.all_labels),
        *([labels.ignore_label] if labels.has_ignore_label else []),
    }
    kept = store.get if store is not None and n_workers <= 1 else lambda name: None
    jobs = {}
    for name, case in cases.items():
        todo = [task for task in tasks if task.settings is not None and name not in task.done]
        if todo:
            settings = [task.settings for task in todo if task.settings is not None]
            targets = [str(_partial(task.folder) / name) for task in todo]
            files = (case["images"], case["label"])
            jobs[name] = (*files, settings, classes, targets, kept(name))
    if jobs:
        names = ", ".join(task.configuration for task in tasks if task.settings is not None)
        n_threads = count_threads(cases)
        function = functools.partial(preprocess_and_save, known=known, device=device)
        run_cases(function, jobs, n_workers, f"Preprocess {names}", progress, n_threads)
    for task in tasks:
        if task.settings is None:
            own = manager.get_configuration(task.configuration)
            stock = own.preprocessor_class(verbose=False)
            stock_jobs = {
                name: (
                    *(stock, str(_partial(task.folder)), name, case["images"], case["label"]),
                    *(manager, own, dataset_json),
                )
                for name, case in cases.items()
                if name not in task.done
            }
            title = f"Preprocess {task.configuration} (nnU-Net's code)"
            run_cases(_run_stock, stock_jobs, n_workers, title, progress)


def _run_stock(preprocessor: Any, folder: str, name: str, *arguments: Any) -> None:
    """Runs nnU-Net's preprocessor under a hidden name, then gives the files theirs."""
    hidden = os.path.join(folder, f".{name}")
    preprocessor.run_case_save(hidden, *arguments)
    for suffix in SUFFIXES:
        os.replace(hidden + suffix, os.path.join(folder, name + suffix))


def location_classes(label_manager: Any) -> list[int | tuple[int, ...]]:
    """Returns of what nnU-Net draws foreground locations."""
    regions = label_manager.foreground_regions if label_manager.has_regions else None
    classes = list(regions if regions is not None else label_manager.foreground_labels)
    if label_manager.has_ignore_label:
        classes.append([-1, *label_manager.all_labels])
    return [tuple(map(int, c)) if isinstance(c, list | tuple) else int(c) for c in classes]


def _begin(folder: Path, stamp: dict[str, Any]) -> set[str]:
    """Makes the hidden folder, with the cases in it that need not be made; returns those.

    Killed at any point, the stamp says the truth of what lies in the hidden folder.
    """
    half, found = _partial(folder), _read_stamp(folder)
    for left_over in folder.parent.glob(f".{_stamp_file(folder).name}.*"):
        left_over.unlink()
    same = found is not None and all(found[key] == stamp[key] for key in ("plans", "made_by"))
    if folder.is_dir():
        shutil.rmtree(half, ignore_errors=True)
        os.replace(folder, half)
    done = set()
    if found is not None and same and half.is_dir():
        unchanged = {n for n, d in stamp["cases"].items() if found["cases"].get(n) == d}
        done = _whole_cases(half, found.get("sizes")) & unchanged
        expected = {name + suffix for name in done for suffix in SUFFIXES}
        for entry in list(os.scandir(half)):
            if entry.name not in expected:
                os.unlink(entry.path)
    else:
        shutil.rmtree(half, ignore_errors=True)
    write_json(_stamp_file(folder), stamp)
    half.mkdir(parents=True, exist_ok=True)
    return done


def _finish(folder: Path, cases: Iterable[str]) -> None:
    """Gives a folder that is whole its name; the sizes of its files go into the stamp before."""
    half, stamp = _partial(folder), _read_stamp(folder)
    sizes = _sizes(half)
    assert stamp is not None and _whole_cases(half) == set(cases)
    write_json(_stamp_file(folder), stamp | {"sizes": sizes})
    os.replace(half, folder)


def _may_be_used(
    folder: Path, plans: Plans, name: str, stamp: Mapping[str, Any], *, strict: bool
) -> bool:
    """Whether the folder serves as it is; ValueError where it is neither ours nor fitting.

    strict: only one that the same code made.
    """
    if not folder.is_dir():
        return False
    found = _read_stamp(folder)
    if found is not None:
        keys = ("plans", "cases", "made_by") if strict else ("plans", "cases")
        fits = all(found[key] == stamp[key] for key in keys)
        return fits and stamp["cases"].keys() <= _whole_cases(folder, found.get("sizes"))
    theirs = folder.parent / f"{STOCK_PLANS}.json"
    if folder.name == f"{STOCK_PLANS}_{name}" and theirs.is_file():
        stock_plans = load_plans(theirs)
        if (
            name in stock_plans["configurations"]
            and _whole_cases(folder) == set(stamp["cases"])
            and preprocessing_part(plans, name) == preprocessing_part(stock_plans, name)
        ):
            return True
    raise ValueError(
        f"{folder} was not made by umamba and does not match these plans and cases: move it away, "
        "or choose another folder with --workspace"
    )


def _stamp(
    plans: Plans, name: str, dataset_json: Mapping[str, Any], cases: Cases, made_by: str
) -> dict[str, Any]:
    labels = {key: dataset_json.get(key) for key in ("labels", "regions_class_order")}
    decisive = [preprocessing_part(plans, name), labels]
    return {"plans": digest(decisive), "made_by": made_by, "cases": case_digests(cases)}


def _stamp_file(folder: Path) -> Path:
    # Beside the folder: nnU-Net infers the file format from all the files inside it.
    return folder.with_name(f"{folder.name}.stamp.json")


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _read_stamp(folder: Path) -> dict[str, Any] | None:
    """The stamp, None where there is none of this form."""
    path = _stamp_file(folder)
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found.get("cases"), dict) else None


def _sizes(folder: Path) -> dict[str, int]:
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder)}


def _whole_cases(folder: Path, sizes: Mapping[str, int] | None = None) -> set[str]:
    """The cases of which all files are there: of the given sizes, else not empty."""
    there = _sizes(folder)
    good = {name for name, size in there.items() if size > 0}
    if sizes is not None:
        good = {name for name in good if there[name] == sizes.get(name)}
    cases = {name.removesuffix(SUFFIXES[-1]) for name in good if name.endswith(SUFFIXES[-1])}
    return {name for name in cases if all(name + suffix in good for suffix in SUFFIXES)}


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _copy_references(cases: Cases, target: Path, ending: str) -> None:
    """Copies the label files that are missing or others, so that validation needs no raw data."""
    target.mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        source, copied = Path(case["label"]), target / f"{name}{ending}"
        if copied.is_file() and copied.stat().st_mtime_ns == source.stat().st_mtime_ns:
            continue
        with replacing(copied) as temporary:
            shutil.copy2(source, temporary)
