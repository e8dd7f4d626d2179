"""Evaluates a folder of predicted label maps against references: summary.json and summary.csv."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from umamba.evaluation.images import read_geometry, read_label_map
from umamba.evaluation.overlap import Label, compare_labels, label_values
from umamba.evaluation.surface import surface_metrics
from umamba.evaluation.tables import summarize, write_summary
from umamba.processes import count_cores, worker_pool

logger = logging.getLogger(__name__)

DEFAULT_TOLERANCE_MM = 2.0
_SMALL = 40_000_000  # voxels x labels below which starting workers costs more than it saves
_ONE_EMPTY = {
    "exclude": "undefined, left out of their means and counted",
    "diagonal": "the image's diagonal",
}
_Case = tuple[str, Path, Path]  # identifier, reference, prediction


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
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Compares predictions with references case by case, writes and returns the summary.

    labels: values or regions (tuples of values); a mapping gives them names. tolerance_mm: of NSD,
    one number or one per label (keys are names or the label as text, "default" for the others).
    cases: identifiers, default every reference; `chill` leaves out what was not predicted, as in
    nnU-Net. one_empty_hd95: HD95 and ASSD where one mask is empty, "exclude" (undefined) or
    "diagonal" (that of the image). output: folder or .json file, default `predictions`.

    The summary holds nnU-Net's keys and spread, empty, rules, label_names, failed; undefined values
    are None. A case whose files cannot be read is listed under "failed". Raises ValueError, listing
    every file, for missing files and differing geometry, and when no case could be read.
    """
    named = _named_labels(labels)
    tolerances = _tolerances(named, tolerance_mm)
    if one_empty_hd95 not in _ONE_EMPTY:
        raise ValueError(f"one_empty_hd95 is {one_empty_hd95!r}; use 'exclude' or 'diagonal'")
    listed = _list_cases(predictions, references, file_ending, cases, chill)
    n_voxels = _check_grids(listed, check_geometry)
    diagonal = one_empty_hd95 == "diagonal"
    evaluate = partial(_evaluate_case, tolerances, ignore_label, diagonal, voxel_count_nsd)
    if n_voxels * len(tolerances) < _SMALL:
        n_workers = 1
    outcomes = []
    for outcome in _run_all(evaluate, listed, n_workers):
        outcomes.append(outcome)
        if progress is not None:
            progress(len(outcomes), len(listed))
    results = [outcome for outcome in outcomes if "error" not in outcome]
    failed = [outcome for outcome in outcomes if "error" in outcome]
    if not results:
        raise ValueError("no case could be evaluated:\n" + "\n".join(f["error"] for f in failed))
    rules = {
        "tolerance_mm": {str(label): mm for label, mm in tolerances.items()},
        "ignore_label": ignore_label,
        "both_empty": "undefined, left out of every mean",
        "one_empty": f"Dice 0, IoU 0, NSD 0; HD95 and ASSD {_ONE_EMPTY[one_empty_hd95]}",
        "NSD": "share of both surfaces within the tolerance, weighted by area (length in 2D)",
        "HD95": "larger of the two directed 95th percentiles in mm, weighted by area",
        "ASSD": "mean distance over both surfaces in mm, weighted by area",
        "foreground_mean": "mean over the labels that are defined in at least one case",
    }
    if ignore_label is not None:
        rules["ignored_voxels"] = "belong to no mask, neither in overlap nor in surfaces"
    summary = summarize(results, list(map(str, tolerances))) | {
        "rules": rules,
        "label_names": {str(label): name for name, label in named.items()},
        "failed": failed,
    }
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
        values = tuple(map(int, value)) if isinstance(value, list) else (int(value),)
        if name != "ignore" and set(values) != {0}:
            named[name] = values if regions and isinstance(value, list) else values[0]
    if not named:
        raise ValueError("dataset.json names no label but the background; add those to evaluate")
    return named, None if ignore is None else int(ignore)


def _run_all(
    evaluate: Callable[[_Case], dict[str, Any]], listed: list[_Case], n_workers: int | None
) -> Iterator[dict[str, Any]]:
    if n_workers is None:
        n_workers = min(count_cores(), 8)
    n_workers = min(n_workers, len(listed))
    if n_workers <= 1:
        yield from map(evaluate, listed)
        return
    with worker_pool(n_workers) as pool:
        yield from pool.map(evaluate, listed)


def _evaluate_case(
    tolerances: Mapping[Label, float],
    ignore_label: int | None,
    diagonal: bool,
    voxel_count: bool,
    files: _Case,
) -> dict[str, Any]:
    """Returns the entry of metric_per_case, or the case and its error where a file is bad."""
    case, reference_file, prediction_file = files
    try:
        reference, spacing = read_label_map(reference_file)
        prediction, _ = read_label_map(prediction_file)
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s", error)
        return {"case": case, "error": str(error)}
    extent = float(np.linalg.norm(np.multiply(reference.shape, spacing)))
    metrics: dict[str, dict[str, float | None]] = {}
    compared = compare_labels(reference, prediction, tolerances, ignore_label)
    for label, values, ref, pred in compared:
        values |= surface_metrics(ref, pred, spacing, tolerances[label], voxel_count)
        if diagonal and math.isinf(values["HD95"]):
            values["HD95"] = values["ASSD"] = extent
        metrics[str(label)] = {n: v if math.isfinite(v) else None for n, v in values.items()}
    return {
        "case": case,
        "reference_file": str(reference_file),
        "prediction_file": str(prediction_file),
        "metrics": metrics,
    }


def _check_grids(listed: list[_Case], check_geometry: bool) -> int:
    """Returns the number of voxels to compare; raises ValueError listing every mismatch."""
    mismatches, n_voxels = [], 0
    for _, reference_file, prediction_file in listed:
        try:
            reference, prediction = read_geometry(reference_file), read_geometry(prediction_file)
        except (ValueError, FileNotFoundError):
            continue  # the evaluation of the case names the file
        difference = prediction.difference(reference)
        if difference and (check_geometry or reference.shape != prediction.shape):
            mismatches.append(f"{prediction_file}: {difference} of {reference_file}")
        n_voxels += math.prod(reference.shape)
    if mismatches:
        raise ValueError(
            f"{len(mismatches)} predictions do not lie on the grid of their reference "
            "(predict again from the images of these references):\n" + "\n".join(mismatches)
        )
    return n_voxels


def _list_cases(
    predictions: Path, references: Path, ending: str, cases: Sequence[str] | None, chill: bool
) -> list[_Case]:
    """Returns the cases to evaluate; raises ValueError listing every file that is missing."""
    predicted, referenced = _cases_in(predictions, ending), _cases_in(references, ending)
    wanted = set(cases) if cases is not None else referenced
    if chill:
        wanted = wanted & predicted
    without_reference = (predicted if cases is None else wanted) - referenced
    missing = [predictions / f"{case}{ending}" for case in sorted(wanted - predicted)]
    missing += [references / f"{case}{ending}" for case in sorted(without_reference)]
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
    names = {case: f"{case}{ending}" for case in sorted(wanted)}
    return [(case, references / name, predictions / name) for case, name in names.items()]


def _cases_in(folder: Path, ending: str) -> set[str]:
    names = (file.name for file in folder.iterdir() if not file.name.startswith("."))
    return {name.removesuffix(ending) for name in names if name.endswith(ending)}


def _named_labels(labels: Sequence[Label] | Mapping[str, Label]) -> Mapping[str, Label]:
    named = labels if isinstance(labels, Mapping) else {str(label): label for label in labels}
    if not named or any(v < 0 for value in named.values() for v in label_values(value)):
        raise ValueError(f"labels {labels}: give at least one label, whole numbers from 0 up")
    return named


def _tolerances(
    named: Mapping[str, Label], given: float | Mapping[str, float]
) -> dict[Label, float]:
    """Returns the tolerance of NSD by label, mm."""
    if not isinstance(given, Mapping):
        given = {"default": given}
    known = ["default", *named, *map(str, named.values())]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(
            f"tolerance for {', '.join(unknown)}: no such label; known: {sorted(known)}"
        )
    default = given.get("default", DEFAULT_TOLERANCE_MM)
    chosen = {v: float(given.get(n, given.get(str(v), default))) for n, v in named.items()}
    if any(not math.isfinite(tolerance) or tolerance < 0 for tolerance in chosen.values()):
        raise ValueError(f"tolerance {given}: must be a length of 0 mm or more")
    return chosen
