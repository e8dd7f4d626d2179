"""nnU-Net's fingerprint and preprocessing, case by case in this process, resumable and stamped."""

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from umamba.planning.cases import Cases, case_facts, read_dataset, run_cases
from umamba.planning.plans import (
    digest,
    get_configuration,
    load_plans,
    plans_file,
    preprocessed_folder,
    preprocessing_part,
    read_json,
    write_json,
)

logger = logging.getLogger(__name__)

STOCK_PLANS = "nnUNetPlans"
SAMPLED_VOXELS = 10e7
"""Foreground voxels of all cases together that nnU-Net draws for the intensity statistics."""

SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")


def fingerprint_dataset(
    dataset_name: str, n_workers: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Writes nnU-Net's dataset_fingerprint.json and returns it; kept where the cases are the same.

    Values equal those of nnU-Net's extractor: the same function reads each case, the same numbers
    of foreground voxels are drawn with the same seed.

    Args:
        n_workers: processes; 1 works in this one, which is faster for small data.
    """
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )

    dataset_json, cases = read_dataset(dataset_name)
    target = preprocessed_folder(dataset_name) / "dataset_fingerprint.json"
    stamp = digest(case_facts(cases))
    if target.is_file():
        known = read_json(target)
        if known.get("cases_digest") == stamp:
            return known
    reader = _reader_class(dataset_json, cases)
    n_samples = int(SAMPLED_VOXELS // len(cases))
    jobs = {
        name: (case["images"], case["label"], reader, n_samples) for name, case in cases.items()
    }
    results = run_cases(
        DatasetFingerprintExtractor.analyze_case, jobs, n_workers, "Fingerprint", progress
    )
    fingerprint = _summarize([results[name] for name in cases])
    fingerprint["cases_digest"] = stamp
    write_json(fingerprint, target)
    return read_json(target)


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

    Raises:
        ValueError: a case cannot be preprocessed, or a folder of somebody else is in the way.
    """
    dataset_json, cases = read_dataset(dataset_name)
    home = preprocessed_folder(dataset_name)
    write_json(dataset_json, home / "dataset.json")
    plans = load_plans(plans_file(dataset_name, plans_name))
    folders: dict[str, Path] = {}
    for name in configurations:
        folder = home / get_configuration(plans, name)["data_identifier"]
        if folder not in folders.values():
            part = preprocessing_part(plans, name)
            _preprocess_configuration(
                plans, name, folder, part, dataset_json, cases, n_workers, progress
            )
        folders[name] = folder
    _copy_references(cases, home / "gt_segmentations", dataset_json["file_ending"])
    return folders


def folder_is_current(dataset_name: str, plans: Mapping[str, Any], configuration: str) -> bool:
    """Returns whether the configuration's preprocessed folder is whole and made for these plans."""
    dataset_json, cases = read_dataset(dataset_name)
    identifier = get_configuration(plans, configuration)["data_identifier"]
    folder = preprocessed_folder(dataset_name) / identifier
    stamp = _stamp(preprocessing_part(plans, configuration), dataset_json, cases)
    return _is_whole(folder, cases) and _read_stamp(folder) == stamp


def _reader_class(dataset_json: Mapping[str, Any], cases: Cases) -> type:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    example = next(iter(cases.values()))["images"][0]
    with contextlib.redirect_stdout(io.StringIO()):
        return determine_reader_writer_from_dataset_json(dict(dataset_json), example)


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


def _preprocess_configuration(
    plans: dict[str, Any],
    configuration: str,
    folder: Path,
    part: Mapping[str, Any],
    dataset_json: dict[str, Any],
    cases: Cases,
    n_workers: int,
    progress: bool,
) -> None:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    stamp = _stamp(part, dataset_json, cases)
    if folder.is_dir() and _may_be_used(folder, configuration, part, stamp, cases):
        logger.info("%s is there and matches the plans", folder)
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    manager = PlansManager(plans)
    settings = manager.get_configuration(configuration)
    preprocessor = settings.preprocessor_class(verbose=False)
    jobs = {
        name: (
            str(temporary / name),
            case["images"],
            case["label"],
            manager,
            settings,
            dataset_json,
        )
        for name, case in cases.items()
    }
    try:
        run_cases(
            preprocessor.run_case_save, jobs, n_workers, f"Preprocess {configuration}", progress
        )
        shutil.rmtree(folder, ignore_errors=True)
        write_json(stamp, _stamp_file(folder))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _may_be_used(
    folder: Path,
    configuration: str,
    part: Mapping[str, Any],
    stamp: Mapping[str, str],
    cases: Cases,
) -> bool:
    """Whether the folder serves as it is; ValueError where it is neither ours nor fitting."""
    found = _read_stamp(folder)
    if found is not None:
        return found == stamp and _is_whole(folder, cases)
    stock = folder.parent / f"{STOCK_PLANS}.json"
    if stock.is_file() and folder.name == f"{STOCK_PLANS}_{configuration}":
        plans = load_plans(stock)
        if configuration in plans["configurations"] and _is_whole(folder, cases):
            theirs = preprocessing_part(plans, configuration)
            if all(theirs[key] == part[key] for key in part if key != "intensities"):
                return True
    raise ValueError(
        f"{folder} was not made by umamba and does not match these plans and cases: move it away, "
        "or choose another folder with --workspace"
    )


def _stamp(
    part: Mapping[str, Any], dataset_json: Mapping[str, Any], cases: Cases
) -> dict[str, str]:
    labels = {key: dataset_json.get(key) for key in ("labels", "regions_class_order")}
    return {"plans": digest([part, labels]), "cases": digest(case_facts(cases))}


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
    images = {name for name in there if name.endswith(".b2nd")}
    return expected <= there and images <= expected


def _copy_references(cases: Cases, target: Path, ending: str) -> None:
    """Copies the label files that are missing or older, so that validation needs no raw data."""
    target.mkdir(parents=True, exist_ok=True)
    for name, case in cases.items():
        source, copy = Path(case["label"]), target / f"{name}{ending}"
        if copy.is_file() and copy.stat().st_mtime_ns >= source.stat().st_mtime_ns:
            continue
        temporary = copy.with_name(f".{copy.name}")
        shutil.copy2(source, temporary)
        os.replace(temporary, copy)
