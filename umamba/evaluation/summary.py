"""Evaluates a folder of predicted label maps against references: summary.json and summary.csv."""

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from umamba.evaluation.images import Geometry, read_geometry, read_label_map
from umamba.evaluation.overlap import Label, label_mask, label_values, overlap_metrics
from umamba.evaluation.surface import nsd_voxel_count, surface_distances
from umamba.evaluation.tables import case_values, label_key, summarize, write_summary

logger = logging.getLogger(__name__)

DEFAULT_TOLERANCE_MM = 2.0
_SMALL = 40_000_000  # voxels x labels below which starting workers costs more than it saves


def evaluate_folder(
    predictions: Path,
    references: Path,
    labels: Sequence[Label] | Mapping[str, Label],
    *,
    ignore_label: int | None = None,
    file_ending: str = ".nii.gz",
    tolerance_mm: float | Mapping[str, float] = DEFAULT_TOLERANCE_MM,
    n_workers: int | None = None,
    cases: Sequence[str] | None = None,
    output: Path | None = None,
    chill: bool = False,
    one_empty_hd95: str = "exclude",
    voxel_count_nsd: bool = False,
    check_geometry: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compares predictions with references case by case, writes and returns the summary.

    labels: values or regions (tuples of values); a mapping gives them names. tolerance_mm: of NSD,
    one number or one per label (keys are names or the label as text, "default" for the others).
    cases: identifiers to evaluate, default every reference; `chill` leaves out what was not
    predicted, as in nnU-Net. one_empty_hd95: "exclude" leaves HD95 and ASSD undefined where one of
    the masks is empty (and counts these cases), "diagonal" puts the image's diagonal there.
    output: folder or .json file, default the folder of the predictions. progress(done, total).

    The returned summary holds nnU-Net's keys (foreground_mean, mean, metric_per_case) and also
    spread, empty, rules, failed; undefined values are None. A case whose files cannot be read is
    listed under "failed" while the others go on. Raises ValueError, listing every file, for missing
    predictions or references and for differing geometry; and when no case at all could be read.
    """
    named = _named_labels(labels)
    tolerances = _tolerances(named, tolerance_mm)
    if one_empty_hd95 not in ("exclude", "diagonal"):
        raise ValueError(f"one_empty_hd95 is {one_empty_hd95!r}; use 'exclude' or 'diagonal'")
    identifiers = _identifiers(predictions, references, file_ending, cases, chill)
    jobs = [
        _Job(
            case,
            references / f"{case}{file_ending}",
            predictions / f"{case}{file_ending}",
            tuple(named.values()),
            tuple(tolerances),
            ignore_label,
            one_empty_hd95 == "diagonal",
            voxel_count_nsd,
        )
        for case in identifiers
    ]
    jobs, failed, n_voxels = _check_headers(jobs, check_geometry)
    results: list[dict[str, Any]] = []
    work = n_voxels * len(named)
    for done, outcome in enumerate(_evaluate_all(jobs, n_workers, work), start=1):
        (failed if "error" in outcome else results).append(outcome)
        if progress is not None:
            progress(done, len(jobs))
    if not results:
        raise ValueError("no case could be evaluated:\n" + "\n".join(f["error"] for f in failed))
    rules = {
        "tolerance_mm": dict(zip(map(label_key, named.values()), tolerances, strict=True)),
        "ignore_label": ignore_label,
        "both_empty": "undefined, left out of every mean",
        "one_empty": "Dice 0, IoU 0, NSD 0; HD95 and ASSD "
        + (
            "undefined, left out of their means and counted"
            if one_empty_hd95 == "exclude"
            else "the image's diagonal"
        ),
        "NSD": "share of both surfaces within the tolerance, weighted by area (length in 2D)",
        "HD95": "larger of the two directed 95th percentiles in mm, weighted by area",
        "ASSD": "mean distance over both surfaces in mm, weighted by area",
        "foreground_mean": "mean over the labels that are defined in at least one case",
    }
    if ignore_label is not None:
        rules["ignored_voxels"] = "belong to no mask, neither in overlap nor in surfaces"
    summary = summarize(results, failed, named, rules)
    write_summary(summary, output if output is not None else predictions)
    return summary


def labels_of_dataset(dataset_json: Mapping[str, Any]) -> tuple[dict[str, Label], int | None]:
    """Returns the foreground labels or regions by name, and the ignore label.

    Raises ValueError when dataset.json names no foreground label.
    """
    entries = dataset_json.get("labels")
    if not isinstance(entries, Mapping):
        raise ValueError('dataset.json has no "labels"; add {"background": 0, "NAME": 1, ...}')
    ignore = entries.get("ignore")
    regions = any(isinstance(value, list) and len(value) > 1 for value in entries.values())
    named: dict[str, Label] = {}
    for name, value in entries.items():
        values = tuple(int(v) for v in value) if isinstance(value, list) else (int(value),)
        if name == "ignore" or set(values) == {0}:
            continue
        named[name] = values if regions and isinstance(value, list) else values[0]
    if not named:
        raise ValueError("dataset.json names no label but the background; add those to evaluate")
    return named, None if ignore is None else int(ignore)


@dataclass(frozen=True)
class _Job:
    """One case to compare; everything a worker needs."""

    case: str
    reference: Path
    prediction: Path
    labels: tuple[Label, ...]
    tolerances: tuple[float, ...]
    ignore_label: int | None
    diagonal: bool
    voxel_count: bool


def _evaluate_all(jobs: list[_Job], n_workers: int | None, work: int) -> Iterator[dict[str, Any]]:
    if n_workers is None:
        n_workers = min(len(os.sched_getaffinity(0)), 8) if hasattr(os, "sched_getaffinity") else 2
    n_workers = min(n_workers, len(jobs))
    if n_workers <= 1 or work < _SMALL:
        yield from map(_evaluate_case, jobs)
        return
    # spawn: a fork of a process that has run torch or a GPU may hang
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=context) as pool:
        yield from pool.map(_evaluate_case, jobs)


def _evaluate_case(job: _Job) -> dict[str, Any]:
    """Returns the entry of metric_per_case, or the case and its error where a file is bad."""
    try:
        reference, spacing = read_label_map(job.reference)
        prediction, _ = read_label_map(job.prediction)
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s", error)
        return {"case": job.case, "error": str(error)}
    metrics: dict[str, dict[str, float | None]] = {}
    overlaps = overlap_metrics(reference, prediction, job.labels, job.ignore_label)
    boxes = _boxes(job.labels, reference, prediction)
    diagonal = float(np.linalg.norm([n * s for n, s in zip(reference.shape, spacing, strict=True)]))
    for label, tolerance in zip(job.labels, job.tolerances, strict=True):
        window = boxes(label)
        masks = [label_mask(part[window], label) for part in (reference, prediction)]
        if job.ignore_label is not None:
            counted = reference[window] != job.ignore_label
            masks = [mask & counted for mask in masks]
        distances = surface_distances(masks[0], masks[1], spacing)
        values = dict(overlaps[label])
        values["NSD"] = distances.nsd(tolerance)
        if job.voxel_count:
            values["NSD_voxel_count"] = nsd_voxel_count(masks[0], masks[1], spacing, tolerance)
        values["HD95"], values["ASSD"] = distances.hausdorff(95.0), distances.average()
        if job.diagonal:
            for name in ("HD95", "ASSD"):
                values[name] = diagonal if np.isinf(values[name]) else values[name]
        metrics[label_key(label)] = case_values(values)
    return {
        "case": job.case,
        "reference_file": str(job.reference),
        "prediction_file": str(job.prediction),
        "metrics": metrics,
    }


def _boxes(
    labels: Sequence[Label], reference: np.ndarray, prediction: np.ndarray
) -> Callable[[Label], tuple[slice, ...]]:
    """Returns a function from a label to the box that holds it in both maps, found in one pass."""
    largest = max(value for label in labels for value in label_values(label))
    found = [ndimage.find_objects(part, max(largest, 1)) for part in (reference, prediction)]

    def box(label: Label) -> tuple[slice, ...]:
        if 0 in label_values(label):
            return (slice(None),) * reference.ndim
        parts = [objects[value - 1] for objects in found for value in label_values(label)]
        present = [part for part in parts if part is not None]
        if not present:
            return (slice(0, 2),) * reference.ndim
        # one voxel of margin, so that a structure of one slice stays a body of that thickness
        return tuple(
            slice(max(min(s.start for s in axis) - 1, 0), max(s.stop for s in axis) + 1)
            for axis in zip(*present, strict=True)
        )

    return box


def _check_headers(
    jobs: list[_Job], check_geometry: bool
) -> tuple[list[_Job], list[dict[str, Any]], int]:
    """Returns the readable jobs, the failed ones and the voxels to compare."""
    readable, failed, mismatches, n_voxels = [], [], [], 0
    for job in jobs:
        try:
            reference, prediction = read_geometry(job.reference), read_geometry(job.prediction)
        except (ValueError, FileNotFoundError) as error:
            logger.warning("%s", error)
            failed.append({"case": job.case, "error": str(error)})
            continue
        difference = _difference(reference, prediction, check_geometry)
        if difference is not None:
            mismatches.append(f"{job.prediction}: {difference} of {job.reference}")
        readable.append(job)
        n_voxels += int(np.prod(reference.shape))
    if mismatches:
        raise ValueError(
            f"{len(mismatches)} predictions do not lie on the grid of their reference "
            "(predict again from the images of these references):\n" + "\n".join(mismatches)
        )
    return readable, failed, n_voxels


def _difference(reference: Geometry, prediction: Geometry, check_geometry: bool) -> str | None:
    if reference.shape == prediction.shape and not check_geometry:
        return None
    return prediction.difference(reference)


def _identifiers(
    predictions: Path, references: Path, ending: str, cases: Sequence[str] | None, chill: bool
) -> list[str]:
    """Returns the cases to evaluate; raises ValueError listing every file that is missing."""
    predicted, referenced = _cases_in(predictions, ending), _cases_in(references, ending)
    wanted = set(cases) if cases is not None else referenced
    if chill:
        wanted = wanted & predicted
    missing = [references / f"{case}{ending}" for case in sorted(wanted - referenced)]
    missing += [predictions / f"{case}{ending}" for case in sorted(wanted - predicted)]
    if cases is None:
        missing += [references / f"{case}{ending}" for case in sorted(predicted - referenced)]
    if missing:
        raise ValueError(
            f"{len(missing)} files are missing for the comparison (evaluate only what is predicted "
            "with --chill):\n" + "\n".join(map(str, missing))
        )
    if not wanted:
        raise ValueError(
            f"{references}: no reference *{ending} with a prediction in {predictions}; "
            "check the folders and the file ending"
        )
    return sorted(wanted)


def _cases_in(folder: Path, ending: str) -> set[str]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    return {
        file.name[: -len(ending)]
        for file in folder.iterdir()
        if file.name.endswith(ending) and not file.name.startswith(".")
    }


def _named_labels(labels: Sequence[Label] | Mapping[str, Label]) -> dict[str, Label]:
    items = labels.items() if isinstance(labels, Mapping) else ((None, label) for label in labels)
    named: dict[str, Label] = {}
    for name, label in items:
        value = int(label) if np.isscalar(label) else tuple(int(v) for v in label)  # type: ignore
        named[name if name is not None else label_key(value)] = value
    if not named or any(v < 0 for value in named.values() for v in label_values(value)):
        raise ValueError(f"labels {labels}: give at least one label, whole numbers from 0 up")
    return named


def _tolerances(named: Mapping[str, Label], given: float | Mapping[str, float]) -> list[float]:
    if not isinstance(given, Mapping):
        given = {"default": given}
    known = ["default", *named, *map(label_key, named.values())]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"tolerance for {', '.join(unknown)}: no such label; known: {sorted(known)}"
        )
    default = given.get("default", DEFAULT_TOLERANCE_MM)
    chosen = [given.get(n, given.get(label_key(v), default)) for n, v in named.items()]
    if any(not np.isfinite(tolerance) or tolerance < 0 for tolerance in chosen):
        raise ValueError(f"tolerance {given}: must be a length of 0 mm or more")
    return [float(tolerance) for tolerance in chosen]
