"""Reads what training and evaluation left in a model folder, and what of it is missing."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umamba.evaluation.summary import labels_of_dataset
from umamba.evaluation.tables import spread_of, values_per_case

logger = logging.getLogger(__name__)

# key, title, and whether it is a share from 0 to 1
METRICS = (("Dice", "Dice", True), ("NSD", "NSD", True), ("HD95", "HD95 in mm", False))


@dataclass(frozen=True)
class Fold:
    """One trained fold; what it lacks is empty."""

    folder: Path
    number: str  # as `umamba predict -f` takes it: "0", "all"
    title: str  # "fold 0", "all cases"
    progress: list[dict[str, Any]]  # an entry per epoch
    summary: dict[str, Any]  # of the validation
    mirrored: dict[str, Any]  # the same with mirroring
    training: dict[str, Any]  # what training said of its cost

    @property
    def seconds(self) -> float | None:
        """Returns the time that the epochs took."""
        return self.progress[-1].get("elapsed_s") if self.progress else None


@dataclass(frozen=True)
class Run:
    """A model folder with the folds to report; what it lacks is empty or None."""

    folder: Path
    network: str  # the registered name if the plans know it, else the name of the class
    plans_name: str
    configuration: str
    dataset_name: str
    file_ending: str
    plans: dict[str, Any]
    part: dict[str, Any]  # the configuration of the plans with what it inherits
    dataset_json: dict[str, Any]
    label_names: dict[str, str]  # of the dataset's foreground labels, by their keys
    folds: list[Fold]
    validated: list[Fold]
    summary: dict[str, Any]  # of the cases of all validated folds, see _pooled
    parameters: int | None  # that training, else planning, counted
    seconds: float | None  # that the epochs of all folds took
    minutes: float | None  # that the user gave the whole command

    def mean(self, metric: str) -> float | None:
        """Returns the mean over the foreground labels of their means over the cases."""
        columns = self.summary.get("values", {}).get(metric, {}).values()
        return spread_of([spread_of(values)["mean"] for values in columns])["mean"]


def read_run(folder: Path) -> Run:
    """Reads a model folder, or one fold of it. Raises FileNotFoundError or ValueError."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a model folder or a fold of it")
    one_fold = folder.name.startswith("fold_")
    model_folder = folder.parent if one_fold else folder
    candidates = [folder] if one_fold else sorted(folder.glob("fold_*"))
    folds = [_read_fold(candidate) for candidate in candidates if candidate.is_dir()]
    if not folds:
        raise ValueError(
            f"{folder}: holds no fold_* folder; give a model folder "
            "(results/Dataset/TRAINER__PLANS__CONFIGURATION) or a fold of it"
        )
    _, plans_name, configuration = [*model_folder.name.split("__"), "", ""][:3]
    plans = _read_json(model_folder / "plans.json")
    part = _inherited(plans.get("configurations", {}), configuration)
    ours = plans.get("umamba", {})
    network_class = part.get("architecture", {}).get("network_class_name", "")
    counted = [*(fold.training for fold in folds), part.get("planning", {})]
    dataset_json = _read_json(model_folder / "dataset.json")
    try:
        labels = labels_of_dataset(dataset_json)[0]
    except ValueError:
        labels = {}
    label_names = {str(label): name for name, label in labels.items()}
    validated = [fold for fold in folds if fold.summary]
    return Run(
        folder=model_folder,
        network=ours.get("network") or network_class.rsplit(".", 1)[-1] or "unknown network",
        plans_name=plans.get("plans_name", plans_name),
        configuration=configuration,
        dataset_name=plans.get("dataset_name", model_folder.parent.name),
        file_ending=dataset_json.get("file_ending", ".nii.gz"),
        plans=plans,
        part=part,
        dataset_json=dataset_json,
        label_names=label_names,
        folds=folds,
        validated=validated,
        summary=_pooled([fold.summary for fold in validated], label_names) if validated else {},
        parameters=next((c["parameters"] for c in counted if "parameters" in c), None),
        seconds=sum(fold.seconds or 0 for fold in folds) or None,
        minutes=ours.get("request", {}).get("minutes"),
    )


def _inherited(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = dict(configurations.get(name, {}))
    parent = part.pop("inherits_from", None)
    return part if parent is None else {**_inherited(configurations, parent), **part}


def _pooled(summaries: Sequence[dict[str, Any]], named: Mapping[str, str]) -> dict[str, Any]:
    """Returns the cases of all summaries as one, with what the first says of labels and rules.

    label_names: label key -> name of every foreground label. values: metric -> label key -> the
    defined values of the cases.
    """
    first = summaries[0]
    named = {**named, **first.get("label_names", {})}
    pooled: dict[str, Any] = {
        "mean": first["mean"],
        "label_names": {k: named.get(k, f"label {k}") for k in first["mean"] if k != "0"},
        "rules": first.get("rules", {}),
        "metric_per_case": [entry for s in summaries for entry in s["metric_per_case"]],
        "failed": [entry for s in summaries for entry in s.get("failed", [])],
    }
    pooled["values"] = {
        metric: {
            label: list(values_per_case(pooled, label, metric).values())
            for label in pooled["label_names"]
        }
        for metric, _, _ in METRICS
    }
    tolerances = sorted(set(pooled["rules"].get("tolerance_mm", {}).values()))
    in_mm = " / ".join(f"{tolerance:g}" for tolerance in tolerances) + " mm"
    return {**pooled, "tolerance": in_mm if tolerances else "an unknown tolerance"}


def _read_fold(folder: Path) -> Fold:
    number = folder.name.removeprefix("fold_")
    return Fold(
        folder=folder,
        number=number,
        title="all cases" if number == "all" else f"fold {number}",
        progress=_read_progress(folder / "progress.jsonl"),
        summary=_read_summary(folder / "validation" / "summary.json"),
        mirrored=_read_summary(folder / "validation_mirrored" / "summary.json"),
        training=_read_json(folder / "training.json"),
    )


def _read_progress(file: Path) -> list[dict[str, Any]]:
    """Returns one entry per epoch; of an epoch that was trained again, the later one."""
    epochs: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
            epochs[int(entry["epoch"])] = entry
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: left out a broken line", file)
    return [epochs[epoch] for epoch in sorted(epochs)]


def _read_summary(file: Path) -> dict[str, Any]:
    summary = _read_json(file)
    return summary if summary.get("mean") and summary.get("metric_per_case") else {}


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the object of a JSON file, empty where the file is missing or broken."""
    try:
        # nnU-Net writes NaN for what is undefined, which JSON does not know
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s: is not JSON (%s)", file, error)
        return {}
    return content if isinstance(content, dict) else {}
