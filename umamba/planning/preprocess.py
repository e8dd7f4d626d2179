"""nnU-Net's fingerprint and preprocessing, case by case in this process, resumable and stamped."""

import contextlib
import copy
import functools
import io
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from umamba.files import replacing, write_json
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

Cases = dict[str, dict[str, Any]]

SAMPLED_VOXELS = 10e7  # foreground of all cases together, drawn for the intensity statistics
SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
CASE_ERRORS = (RuntimeError, ValueError, OSError, AssertionError, IndexError)


def fingerprint_dataset(
    dataset_name: str, n_workers: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Writes nnU-Net's dataset_fingerprint.json and returns it; kept where the cases are the same.

    Values equal those of nnU-Net's extractor: the same function reads each case, the same numbers
    of foreground voxels are drawn with the same seed. One worker is this process itself, which is
    faster for small data.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    dataset_json, cases = read_dataset(dataset_name)
    target = preprocessed_folder(dataset_name) / "dataset_fingerprint.json"
    stamp = digest(case_facts(cases))
    if target.is_file():
        known = read_json(target)
        if known.get("cases_digest") == stamp:
            return known
    example = next(iter(cases.values()))["images"][0]
    with contextlib.redirect_stdout(io.StringIO()):
        reader = determine_reader_writer_from_dataset_json(dataset_json, example)
    n_samples = int(SAMPLED_VOXELS // len(cases))
    jobs = {n: (case["images"], case["label"], reader, n_samples) for n, case in cases.items()}
    analyze = DatasetFingerprintExtractor.analyze_case
    results = run_cases(analyze, jobs, n_workers, "Fingerprint", progress)
    fingerprint = _summarize([results[name] for name in cases]) | {"cases_digest": stamp}
    write_json(target, fingerprint)
    return fingerprint


def preprocess_dataset(
    dataset_name: str,
    plans_name: str,
    configurations: Sequence[str],
    n_workers: int = 1,
    progress: bool = True,
) -> dict[str, Path]:
    """Preprocesses the cases with nnU-Net's own preprocessor; returns the folder per configuration.

    Each folder is written under a temporary name and renamed when it is whole. A folder that is
    whole and stamped with the same plan and the same cases is kept; one of ours that does not
    match is made anew; one that stock nnU-Net made is used if its plans agree and it is whole.
    Raises ValueError where a case cannot be preprocessed or somebody else's folder is in the way.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    dataset_json, cases = read_dataset(dataset_name)
    home = preprocessed_folder(dataset_name)
    write_json(home / "dataset.json", dataset_json)
    plans = load_plans(plans_file(dataset_name, plans_name))
    manager = PlansManager(plans)
    folders: dict[str, Path] = {}
    for name in configurations:
        folder = home / get_configuration(plans, name)["data_identifier"]
        stamp = _stamp(plans, name, dataset_json, cases)
        if folder not in folders.values() and not _may_be_used(folder, plans, name, stamp, cases):
            settings = manager.get_configuration(name)
            preprocess = settings.preprocessor_class(verbose=False).run_case_save
            with _replacing(folder, stamp) as new:
                jobs = {
                    n: (str(new / n), c["images"], c["label"], manager, settings, dataset_json)
                    for n, c in cases.items()
                }
                run_cases(preprocess, jobs, n_workers, f"Preprocess {name}", progress)
        folders[name] = folder
    _copy_references(cases, home / "gt_segmentations", dataset_json["file_ending"])
    return folders


def folder_is_current(dataset_name: str, plans: Plans, configuration: str) -> bool:
    """Returns whether the configuration's preprocessed folder is whole and made for these plans."""
    dataset_json, cases = read_dataset(dataset_name)
    identifier = get_configuration(plans, configuration)["data_identifier"]
    folder = preprocessed_folder(dataset_name) / identifier
    stamp = _stamp(plans, configuration, dataset_json, cases)
    return _is_whole(folder, cases) and _read_stamp(folder) == stamp


def default_workers(dataset_name: str) -> int:
    """Returns 1 for data that one process reads in about a minute, else up to the cores."""
    _, cases = read_dataset(dataset_name)
    n_bytes = sum(size for facts in case_facts(cases).values() for _, size, _ in facts)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8, n_bytes // 200_000_000))


def read_dataset(dataset_name: str) -> tuple[dict[str, Any], Cases]:
    """Returns dataset.json and the cases of a dataset under nnUNet_raw."""
    from nnunetv2.paths import nnUNet_raw

    folder = Path(nnUNet_raw) / dataset_name
    path = folder / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: nnU-Net's description of the dataset")
    dataset_json = read_json(path)
    return dataset_json, list_cases(folder, dataset_json)


def list_cases(raw_folder: Path, dataset_json: Mapping[str, Any]) -> Cases:
    """Returns per identifier its image files (one per channel) and its label file, as strings.

    The same as nnU-Net's own listing, which forks a pool and compares each case with every file.
    """
    if "dataset" in dataset_json:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        return get_filenames_of_train_images_and_targets(
            str(raw_folder), copy.deepcopy(dict(dataset_json))
        )
    ending = dataset_json["file_ending"]
    image_name = re.compile(rf"(.*)_\d{{4}}{re.escape(ending)}")
    images: dict[str, list[str]] = {}
    for path in sorted((raw_folder / "imagesTr").iterdir()):
        if match := image_name.fullmatch(path.name):
            images.setdefault(match[1], []).append(str(path))
    if not images:
        raise ValueError(
            f"{raw_folder / 'imagesTr'} holds no image called <case>_0000{ending}: check the "
            "names and the file_ending in dataset.json"
        )
    return {
        case: {"images": files, "label": str(raw_folder / "labelsTr" / f"{case}{ending}")}
        for case, files in sorted(images.items())
    }


def case_facts(cases: Cases) -> dict[str, list[tuple[str, int, int]]]:
    """Returns name, size and time of change of every file of every case."""
    facts = {}
    for name, case in cases.items():
        files = [Path(file) for file in (*case["images"], case["label"])]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"case {name} has no file {file}: add it or drop the case")
        facts[name] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return facts


def run_cases(
    function: Callable[..., Any],
    jobs: Mapping[str, Sequence[Any]],
    n_workers: int,
    title: str,
    progress: bool,
) -> dict[str, Any]:
    """Returns function(*job) per case; a case that fails raises ValueError with its name."""
    results = _results(function, jobs, n_workers)
    hidden = None if progress else True
    return dict(tqdm(results, title, len(jobs), unit="case", disable=hidden))


def _results(
    function: Callable[..., Any], jobs: Mapping[str, Sequence[Any]], n_workers: int
) -> Iterator[tuple[str, Any]]:
    if n_workers <= 1:
        for name, job in jobs.items():
            yield name, _result(name, functools.partial(function, *job))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=context) as pool:
        futures = {pool.submit(function, *job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], _result(futures[future], future.result)
        except ValueError:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _result(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, most likely for want of memory: use fewer (-np 1)"
        ) from error
    except CASE_ERRORS as error:
        raise ValueError(
            f"case {name} cannot be read and preprocessed ({type(error).__name__}: {error}): "
            "`umamba audit` lists the faults of all files"
        ) from error


def _summarize(results: Sequence[tuple]) -> dict[str, Any]:
    """Puts the cases' results together as nnU-Net's extractor does."""
    shapes, spacings, intensities, _, relative_sizes = zip(*results, strict=True)
    properties: dict[str, dict[str, float]] = {}
    for channel in range(len(intensities[0])):
        # Taken out of the cases: the samples of all cases are large, twice them is too much.
        values = np.concatenate([case.pop(0) for case in intensities])
        if values.size == 0:
            raise ValueError("no case has a labelled voxel: there is nothing to learn")
        mean, std = float(np.mean(values)), float(np.std(values))
        low, median, high = np.percentile(values, (0.5, 50.0, 99.5), overwrite_input=True)
        properties[str(channel)] = {
            "mean": mean,
            "median": float(median),
            "std": std,
            "min": float(np.min(values)),
            "max": float(np.max(values)),
            "percentile_99_5": float(high),
            "percentile_00_5": float(low),
        }
    return {
        "spacings": [[float(mm) for mm in spacing] for spacing in spacings],
        "shapes_after_crop": [[int(n) for n in shape] for shape in shapes],
        "foreground_intensity_properties_per_channel": properties,
        "median_relative_size_after_cropping": float(np.median(relative_sizes)),
    }


@contextlib.contextmanager
def _replacing(folder: Path, stamp: Mapping[str, str]) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder`, with its stamp, when all went well."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        write_json(_stamp_file(folder), stamp)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _may_be_used(
    folder: Path, plans: Plans, name: str, stamp: Mapping[str, str], cases: Cases
) -> bool:
    """Whether the folder serves as it is; ValueError where it is neither ours nor fitting."""
    if not folder.is_dir():
        return False
    found = _read_stamp(folder)
    if found is not None:
        return found == stamp and _is_whole(folder, cases)
    stock = folder.parent / f"{STOCK_PLANS}.json"
    if folder.name == f"{STOCK_PLANS}_{name}" and stock.is_file() and _is_whole(folder, cases):
        theirs = load_plans(stock)
        if name in theirs["configurations"]:
            parts = [preprocessing_part(each, name) for each in (plans, theirs)]
            if all(parts[0][key] == parts[1][key] for key in parts[0] if key != "intensities"):
                return True
    raise ValueError(
        f"{folder} was not made by umamba and does not match these plans and cases: move it away, "
        "or choose another folder with --workspace"
    )


def _stamp(
    plans: Plans, name: str, dataset_json: Mapping[str, Any], cases: Cases
) -> dict[str, str]:
    labels = {key: dataset_json.get(key) for key in ("labels", "regions_class_order")}
    decisive = [preprocessing_part(plans, name), labels]
    return {"plans": digest(decisive), "cases": digest(case_facts(cases))}


def _stamp_file(folder: Path) -> Path:
    # Beside the folder: nnU-Net infers the file format from all the files inside it.
    return folder.with_name(f"{folder.name}.stamp.json")


def _read_stamp(folder: Path) -> dict[str, str] | None:
    path = _stamp_file(folder)
    return read_json(path) if path.is_file() else None


def _is_whole(folder: Path, cases: Iterable[str]) -> bool:
    if not folder.is_dir():
        return False
    there = {entry.name for entry in os.scandir(folder) if entry.stat().st_size > 0}
    expected = {name + suffix for name in cases for suffix in SUFFIXES}
    return expected <= there and {name for name in there if name.endswith(".b2nd")} <= expected


def _copy_references(cases: Cases, target: Path, ending: str) -> None:
    """Copies the label files that are missing or older, so that validation needs no raw data."""
    target.mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        source, copied = Path(case["label"]), target / f"{name}{ending}"
        if copied.is_file() and copied.stat().st_mtime_ns >= source.stat().st_mtime_ns:
            continue
        with replacing(copied) as temporary:
            shutil.copy2(source, temporary)
