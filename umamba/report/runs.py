"""Reads what training and evaluation left in a model folder, and what of it is missing."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umamba.evaluation.tables import read_summary

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fold:
    """One trained fold: its epochs, its validation and what training said of itself."""

    name: str
    folder: Path
    progress: list[dict[str, Any]]
    summary: dict[str, Any] | None
    mirrored: dict[str, Any] | None
    training: dict[str, Any]

    @property
    def title(self) -> str:
        """Returns the fold in words: "fold 0", "all cases"."""
        number = self.name.removeprefix("fold_")
        return "all cases" if number == "all" else f"fold {number}"


@dataclass(frozen=True)
class Run:
    """A model folder (trainer, plans, configuration) with the folds to report."""

    folder: Path
    trainer: str
    plans_name: str
    configuration: str
    dataset_name: str
    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    fingerprint: dict[str, Any]
    folds: list[Fold] = field(default_factory=list)

    @property
    def part(self) -> dict[str, Any]:
        """Returns the configuration of the plans, with what it inherits."""
        return inherited(self.plans.get("configurations", {}), self.configuration)

    @property
    def network(self) -> str:
        """Returns the registered name if the plans know it, else the name of the class."""
        named = self.plans.get("umamba", {}).get("network")
        return str(named or self.network_class.rsplit(".", 1)[-1] or "unknown network")

    @property
    def network_class(self) -> str:
        """Returns the class path that the plans name."""
        return str(self.part.get("architecture", {}).get("network_class_name", ""))

    @property
    def file_ending(self) -> str:
        """Returns the ending of images and label maps."""
        return str(self.dataset_json.get("file_ending", ".nii.gz"))

    @property
    def validated(self) -> list[Fold]:
        """Returns the folds that have a validation."""
        return [fold for fold in self.folds if fold.summary is not None]


def read_run(folder: Path) -> Run:
    """Reads a model folder, or one fold of it. Raises FileNotFoundError or ValueError."""
    folder = folder.absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give a model folder or a fold of it")
    one_fold = folder.name.startswith("fold_")
    model_folder = folder.parent if one_fold else folder
    fold_folders = [folder] if one_fold else sorted(folder.glob("fold_*"))
    if not any(fold.is_dir() for fold in fold_folders):
        raise ValueError(
            f"{folder}: holds no fold_* folder; give a model folder "
            "(results/Dataset/TRAINER__PLANS__CONFIGURATION) or a fold of it"
        )
    trainer, plans_name, configuration = [*model_folder.name.split("__"), "", "", ""][:3]
    plans = _read_json(model_folder / "plans.json")
    return Run(
        folder=model_folder,
        trainer=trainer,
        plans_name=str(plans.get("plans_name", plans_name)),
        configuration=configuration,
        dataset_name=str(plans.get("dataset_name", model_folder.parent.name)),
        plans=plans,
        dataset_json=_read_json(model_folder / "dataset.json"),
        fingerprint=_read_json(model_folder / "dataset_fingerprint.json"),
        folds=[_read_fold(fold) for fold in fold_folders if fold.is_dir()],
    )


def inherited(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a configuration with everything that it inherits."""
    part = dict(configurations.get(name, {}))
    parent = part.pop("inherits_from", None)
    seen = {name}
    while parent is not None and parent not in seen:
        seen.add(parent)
        above = dict(configurations.get(parent, {}))
        part = {**above, **part}
        part.pop("inherits_from", None)
        parent = above.get("inherits_from")
    return part


def pooled_summary(folds: Sequence[Fold]) -> dict[str, Any] | None:
    """Returns the cases of all validated folds as one summary, None without any.

    Only the keys that the page reads: metric_per_case, label_names, rules, failed.
    """
    summaries = [fold.summary for fold in folds if fold.summary is not None]
    if not summaries:
        return None
    return {
        "metric_per_case": [entry for s in summaries for entry in s["metric_per_case"]],
        "mean": summaries[0]["mean"],
        "label_names": summaries[0].get("label_names", {}),
        "rules": summaries[0].get("rules", {}),
        "failed": [entry for s in summaries for entry in s.get("failed", [])],
    }


def _read_fold(folder: Path) -> Fold:
    return Fold(
        name=folder.name,
        folder=folder,
        progress=_read_progress(folder / "progress.jsonl"),
        summary=_read_summary(folder / "validation" / "summary.json"),
        mirrored=_read_summary(folder / "validation_mirrored" / "summary.json"),
        training=_read_json(folder / "training.json"),
    )


def _read_progress(file: Path) -> list[dict[str, Any]]:
    """Returns one entry per epoch; of an epoch that was trained again, the later one."""
    if not file.is_file():
        return []
    epochs: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            epochs[int(entry["epoch"])] = entry
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: left out a broken line", file)
    return [epochs[epoch] for epoch in sorted(epochs)]


def _read_summary(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        summary = read_summary(file)
    except ValueError as error:
        logger.warning("%s", error)
        return None
    return summary if summary["metric_per_case"] else None


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the object of a JSON file, empty where the file is missing or broken."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s: is not JSON (%s)", file, error)
        return {}
    return content if isinstance(content, dict) else {}
