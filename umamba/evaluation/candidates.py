"""Trained configurations as candidates for the best one: their validation over the same folds."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umamba.evaluation.statistics import compare_paired
from umamba.evaluation.tables import case_of, mean_per_case, read_summary, summarize

_PLAIN, _MIRRORED = "validation", "validation_mirrored"  # as umamba train writes them
_OWN_TRAINER = "UMambaTrainer"
_FEW_CASES = 5  # below, a bootstrap knows too little of the spread


@dataclass(frozen=True)
class Candidate:
    """One model folder as it was validated, or two of which the probabilities are averaged.

    mirrored: per model folder, whether its predictions are with mirroring. predictions: the label
    map of each case. summary: tables.summarize of their Dice over all folds.
    """

    models: tuple[Path, ...]
    mirrored: tuple[bool, ...]
    predictions: Mapping[str, Path]
    summary: Mapping[str, Any]

    @property
    def dice(self) -> float:
        """The mean over the labels of their mean over the cases; -1 where no label is defined."""
        mean = self.summary["foreground_mean"]["Dice"]
        return -1.0 if mean is None else mean

    @property
    def title(self) -> str:
        """Plans and configuration of each model; other trainers than ours by their name."""
        names = [name_parts(model) for model in self.models]
        return " + ".join(
            " ".join(part for part in parts if part != _OWN_TRAINER) for parts in names
        )


def name_parts(model: Path) -> tuple[str, str, str]:
    """Returns trainer, plans and configuration of a model folder."""
    trainer, plans, configuration = model.name.split("__")
    return trainer, plans, configuration


def find_models(results: Path, dataset_json: Mapping[str, Any]) -> tuple[list[Path], list[str]]:
    """Returns the model folders of a dataset with a validated fold, and why others are left out."""
    models, notes = [], []
    for folder in sorted(results.glob("*__*__*")):
        if folder.name.count("__") != 2 or not (folder / "dataset.json").is_file():
            continue
        try:
            labels = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["labels"]
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"{folder.name}: its dataset.json cannot be read ({error})")
            continue
        if labels != dataset_json.get("labels"):
            notes.append(f"{folder.name}: was trained on other labels than dataset.json has now")
        elif not validated_folds(folder):
            notes.append(
                f"{folder.name}: no fold is validated; the end of its training does it, or --val"
            )
        else:
            models.append(folder)
    return models, notes


def validated_folds(model: Path, variants: Collection[str] = (_PLAIN, _MIRRORED)) -> set[int]:
    """Returns the numbers of the folds that have the summary of a validation."""
    found = [file for variant in variants for file in model.glob(f"fold_*/{variant}/summary.json")]
    names = [file.parent.parent.name.removeprefix("fold_") for file in found]
    return {int(name) for name in names if name.isdigit()}


def choose_folds(
    models: Sequence[Path], asked: Sequence[int] | None
) -> tuple[list[int], list[Path], list[str]]:
    """Returns the folds to compare over, the models that have them, and what is left out.

    asked: folds, by default those that all models have. Raises ValueError where there is none.
    """
    there = {model: validated_folds(model) for model in models}
    listing = "".join(f"\n  {model.name}: {sorted(folds)}" for model, folds in there.items())
    folds = sorted(set(asked or set.intersection(*there.values())))
    if not folds:
        raise ValueError(f"no fold is validated by all candidates (choose with -c, -p):{listing}")
    chosen = [model for model in models if there[model].issuperset(folds)]
    if not chosen:
        raise ValueError(f"no candidate has the validation of folds {folds}:{listing}")
    notes = []
    for model, found in there.items():
        if model not in chosen:
            notes.append(f"{model.name}: left out, its validated folds are {sorted(found)}")
        elif not asked and found - set(folds):
            notes.append(f"{model.name}: has folds {sorted(found)}, others lack some of them")
    return folds, chosen, notes


def read_candidates(model: Path, folds: Sequence[int], file_ending: str) -> list[Candidate]:
    """Returns the validation of a model folder without and with mirroring, as far as it is there.

    nnU-Net's own trainers mirror in their one validation. Raises ValueError naming what is wrong.
    """
    found = []
    for variant in (_PLAIN, _MIRRORED):
        if set(folds) - validated_folds(model, [variant]):
            continue
        predictions: dict[str, Path] = {}
        entries: list[dict[str, Any]] = []
        for fold in folds:
            folder = model / f"fold_{fold}" / variant
            for entry in read_summary(folder / "summary.json")["metric_per_case"]:
                case, metrics = case_of(entry), _overlap_of(entry, folder)
                if case in predictions:
                    raise ValueError(f"{folder}: case {case} is in the validation of two folds")
                if entries and metrics.keys() != entries[0]["metrics"].keys():
                    raise ValueError(f"{folder}: case {case} was evaluated on other labels; --val")
                predictions[case] = folder / f"{case}{file_ending}"
                entries.append({"case": case, "metrics": metrics})
        if not entries:
            raise ValueError(f"{model}: the validation of fold {folds} has no case")
        summary = summarize(entries, list(entries[0]["metrics"]))
        mirrored = is_mirrored(model, variant)
        found.append(Candidate((model,), (mirrored,), predictions, summary))
    return found


def archives_of(model: Path, folds: Sequence[int]) -> dict[str, Path]:
    """Returns the probabilities (.npz) of each case; they lie in the first of the validations."""
    folders = [model / f"fold_{fold}" / _PLAIN for fold in folds]
    return {file.stem: file for folder in folders for file in sorted(folder.glob("*.npz"))}


def is_mirrored(model: Path, variant: str = _PLAIN) -> bool:
    """Whether a validation is with mirroring; nnU-Net's own trainers have one, and it is."""
    return variant == _MIRRORED or name_parts(model)[0] != _OWN_TRAINER


def compare_candidates(a: Candidate, b: Candidate) -> dict[str, Any]:
    """Returns b - a in mean Dice per case, its interval, and whether the cases tell them apart."""
    found = compare_paired(mean_per_case(a.summary), mean_per_case(b.summary), "mean Dice")
    low, high = found.interval
    return {
        "difference": found.difference,
        "interval": [low, high],
        "n": found.n,
        "indistinguishable": found.n < _FEW_CASES or low <= 0 <= high,
        "text": f"{found.difference:+.4f} per case (95 % of bootstraps: {low:+.4f} to {high:+.4f})",
    }


def _overlap_of(entry: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Returns Dice, n_pred and n_ref of each label; raises ValueError naming the folder."""
    names = ("Dice", "n_pred", "n_ref")
    try:
        return {
            label: {name: values[name] for name in names}
            for label, values in entry["metrics"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        message = f"{folder / 'summary.json'}: lacks {error} of a case; validate again (--val)"
        raise ValueError(message) from error
