"""`umamba best DATASET`: the best configuration or ensemble of those trained, and how to use it.

Compares the validation of all trained plans and configurations over the same folds and cases,
determines post-processing for the best, and prints the commands that predict with it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umamba.cli import common
from umamba.cli.common import UsageError
from umamba.lock import holding

if TYPE_CHECKING:
    from umamba.evaluation.candidates import Candidate
    from umamba.evaluation.postprocessing import MeasuredPieces

    Measure = Callable[[str, Mapping[str, Path]], dict[str, MeasuredPieces]]
    Validate = Callable[[Path], str]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    shared = "dataset --workspace -t"
    add = common.add_command(subparsers, "best", run, __doc__, shared).add_argument
    add("-p", "--plans", nargs="+", metavar="PLANS", help="only these plans (all)")
    add("-c", "--configurations", nargs="+", metavar="CONFIG", help="only these (all)")
    add("-f", "--folds", nargs="+", type=int, metavar="FOLD", help="(those that all have)")
    add("--no-ensemble", "--disable_ensembling", action="store_true", help="no ensembles of two")


def run(args: argparse.Namespace) -> int:
    """Compares, determines post-processing, writes best.json and prints what to do with it."""
    from umamba.evaluation import labels_of_dataset
    from umamba.evaluation.candidates import choose_folds, find_models
    from umamba.evaluation.postprocessing import determine_postprocessing, measure_cases

    dataset, workspace = common.open_dataset(args)
    results = workspace.results / dataset.name
    references = workspace.preprocessed / dataset.name / "gt_segmentations"
    if not references.is_dir():
        references = workspace.raw / dataset.name / "labelsTr"
    named, ignore_label = labels_of_dataset(dataset.dataset_json)
    labels, ending = list(named.values()), dataset.dataset_json["file_ending"]

    def measure(title: str, predictions: Mapping[str, Path]) -> dict[str, MeasuredPieces]:
        pairs = {case: (file, references / f"{case}{ending}") for case, file in predictions.items()}
        with common.progress_bar(title) as progress:
            return measure_cases(pairs, labels, ignore_label, args.threads, progress)

    named_dataset = shlex.quote(args.dataset)
    if args.workspace:
        named_dataset += f" --workspace {shlex.quote(args.workspace)}"
    found, notes = find_models(results, dataset.dataset_json)
    folds, models, left_out = choose_folds(_choose_models(found, notes, args), args.folds)
    notes += left_out
    validate = partial(_validation_command, named_dataset, folds)
    variants = _read_variants(models, folds, ending, notes, validate)
    with holding(results / "best", "finding the best"):
        # of equals, without mirroring, which is faster
        candidates = [max(of_one, key=lambda candidate: candidate.dice) for of_one in variants]
        pieces: dict[tuple[Path, ...], dict[str, MeasuredPieces]] = {}
        if not args.no_ensemble:
            for pair, measured in _average_pairs(
                candidates, folds, results / "best", measure, labels, notes, validate
            ):
                pieces[pair.models] = measured
                candidates.append(pair)
        # stable: of equals, a single one stays before its ensembles
        candidates.sort(key=lambda candidate: -candidate.dice)
        best = candidates[0]
        for note in notes:
            print(f"note: {note}")
        comparison = _tell_comparison(candidates, variants, folds)
        measured = pieces.get(best.models) or measure(
            "determining post-processing", best.predictions
        )
        groups, content = determine_postprocessing(measured, labels)
        _tell_postprocessing(groups, content)
        record = results / "best.json"
        record.unlink(missing_ok=True)  # what it says of the files below holds no longer
        file = _write_label_maps(results / "best", best, groups, content, args.threads)
        commands = _commands(best, folds, file if groups else None)
        _write_record(record, candidates, folds, comparison, content, commands)
        print("\nto predict with it:", *commands, sep="\n  ")
    return 0


def _choose_models(found: list[Path], notes: list[str], args: argparse.Namespace) -> list[Path]:
    """The model folders that are asked for; ValueError where there is none."""
    from umamba.evaluation.candidates import name_parts

    if not found:
        reasons = "".join(f"\n  {note}" for note in notes)
        raise ValueError(f"nothing of this dataset is trained and validated: umamba train{reasons}")
    for position, asked in ((1, args.plans), (2, args.configurations)):
        known = sorted({name_parts(model)[position] for model in found})
        unknown = sorted(set(asked or ()) - set(known))
        if unknown:
            listing = ", ".join(known)
            raise UsageError(f"{', '.join(unknown)}: not trained and validated; known: {listing}")
        found = [model for model in found if not asked or name_parts(model)[position] in asked]
    if not found:
        raise UsageError("no trained configuration is of these plans and configurations")
    return found


def _read_variants(
    models: list[Path], folds: list[int], ending: str, notes: list[str], validate: Validate
) -> list[list[Candidate]]:
    """Without and with mirroring, by model folder; all that have every case of the others."""
    from umamba.evaluation.candidates import read_candidates

    found = {}
    for model in models:
        try:
            found[model] = read_candidates(model, folds, ending)
        except ValueError as error:
            notes.append(f"{model.name}: left out, {error}")
    every = {c for variants in found.values() for variant in variants for c in variant.predictions}
    complete = []
    for model, variants in found.items():
        whole = [variant for variant in variants if every == variant.predictions.keys()]
        if len(whole) < len(variants) or not variants:
            missing = sorted(
                every - min((v.predictions.keys() for v in variants), key=len, default=set())
            )
            listing = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
            left_out = "" if whole else "left out, "
            lacks = f"{left_out}a validation lacks cases ({listing})"
            notes.append(f"{model.name}: {lacks}: {validate(model)}")
        if whole:
            complete.append(whole)
    if not complete:
        raise ValueError("no candidate has all cases of the others:\n  " + "\n  ".join(notes))
    return complete


def _average_pairs(
    candidates: Sequence[Candidate],
    folds: list[int],
    folder: Path,
    measure: Measure,
    labels: Sequence[Any],
    notes: list[str],
    validate: Validate,
) -> Iterator[tuple[Candidate, dict[str, MeasuredPieces]]]:
    """Ensembles of two, as far as the probabilities of their validation are there."""
    from umamba.evaluation.candidates import Candidate, archives_of, is_mirrored
    from umamba.evaluation.postprocessing import summarize_pieces
    from umamba.inference.ensemble import ensemble_cases
    from umamba.inference.model_folder import read_json

    archives = {}
    for candidate in candidates:
        model, cases = candidate.models[0], candidate.predictions.keys()
        found = archives_of(model, folds)
        if cases <= found.keys():
            archives[model] = {case: found[case] for case in sorted(cases)}
        elif len(candidates) > 1:
            cure = f"{validate(model)} --npz"
            notes.append(f"{model.name}: in no ensemble, its probabilities are missing: {cure}")
    for pair in combinations(archives, 2):
        names = [model.name for model in pair]
        output = folder / "___".join(names)
        files = {case: [archives[model][case] for model in pair] for case in archives[pair[0]]}
        plans, dataset_json = (read_json(pair[0] / f"{n}.json") for n in ("plans", "dataset"))
        with common.progress_bar(f"averaging {' + '.join(names)}") as progress:
            failures = ensemble_cases(files, output, names, plans, dataset_json, progress)
        if failures:
            reasons = "; ".join(f"{f.identifier}: {f.reason}" for f in failures[:3])
            notes.append(f"{' + '.join(names)}: left out, {len(failures)} failed ({reasons})")
            continue
        predictions = {case: output / f"{case}{dataset_json['file_ending']}" for case in files}
        measured = measure(f"evaluating {' + '.join(names)}", predictions)
        summary = summarize_pieces(measured, labels)
        yield Candidate(pair, tuple(map(is_mirrored, pair)), predictions, summary), measured


def _tell_comparison(
    candidates: Sequence[Candidate], variants: Sequence[Sequence[Candidate]], folds: list[int]
) -> dict[str, Any] | None:
    """Prints the table, and whether the first two differ; returns that as a record."""
    from umamba.evaluation.candidates import compare_candidates

    n_cases = len(candidates[0].predictions)
    kind = f"folds {', '.join(map(str, folds))}: {len(folds)} of nnU-Net's 5"
    if len(folds) == 1:
        kind = f"fold {folds[0]} only: a single split, not a cross-validation"
    print(f"\n{kind}; {n_cases} cases\n\nmean Dice  without / with mirroring")
    by_models = {of_one[0].models: of_one for of_one in variants}
    for candidate in candidates:
        both = {v.mirrored[0]: v.dice for v in by_models.get(candidate.models, [candidate])}
        cells = [f"{both[m]:.4f}" if both.get(m, -1) >= 0 else "   -  " for m in (False, True)]
        print(f"{candidate.dice:9.4f}  {' / '.join(cells)}  {candidate.title}")
    of_best = by_models.get(candidates[0].models, ())
    if len(of_best) == 2:
        told = compare_candidates(*of_best)
        print(f"\nmirroring changes the best by {told['text']}; without is up to 8 times faster")
    if len(candidates) == 1:
        return None
    told = compare_candidates(candidates[1], candidates[0])
    print(f"\nbest: {candidates[0].title}, against {candidates[1].title} {told['text']}")
    if told["indistinguishable"]:
        print(f"{told['n']} cases cannot tell the two apart: take the faster one, or add folds")
    return told


def _tell_postprocessing(groups: Sequence[Sequence[int]], content: Mapping[str, Any]) -> None:
    if not groups:
        print("post-processing: none, the largest components alone are no better")
        return
    means = [content[key]["foreground_mean"]["Dice"] for key in ("input_folder", "postprocessed")]
    listing = ", ".join("+".join(map(str, group)) for group in groups)
    print(f"post-processing: largest component of {listing}; Dice {means[0]:.4f} -> {means[1]:.4f}")


def _write_label_maps(
    folder: Path,
    best: Candidate,
    groups: list[tuple[int, ...]],
    content: dict[str, Any],
    n_threads: int | None,
) -> Path:
    """Writes the validation of the best, post-processed, and what was determined; returns that."""
    from umamba.evaluation.postprocessing import postprocess_files
    from umamba.files import write_json
    from umamba.inference.postprocessing import write_nnunet_postprocessing

    maps = folder / "label_maps"
    shutil.rmtree(maps, ignore_errors=True)
    files = {file: maps / file.name for file in best.predictions.values()}
    with common.progress_bar("writing label maps") as progress:
        failures = postprocess_files(files, groups, n_threads, progress)
    if failures:
        raise ValueError(failures[0])
    write_nnunet_postprocessing(groups, folder / "postprocessing.pkl")
    write_json(folder / "postprocessing.json", content)
    return folder / "postprocessing.json"


def _commands(best: Candidate, folds: list[int], postprocessing: Path | None) -> list[str]:
    """What predicts new images as the best did, one command a line."""
    from umamba.evaluation.candidates import is_mirrored, name_parts
    from umamba.planning.plans import get_configuration

    commands, outputs = [], []
    chosen = f"-f {' '.join(map(str, folds))} -i IMAGES"
    several = len(best.models) > 1
    for number, (model, mirrored) in enumerate(zip(best.models, best.mirrored, strict=True), 1):
        plans = json.loads((model / "plans.json").read_text(encoding="utf-8"))
        trainer, name, configuration = name_parts(model)
        first = get_configuration(plans, configuration).get("previous_stage")
        outputs.append(f"PREDICTIONS_{number}" if several else "PREDICTIONS")
        options = "" if mirrored else " --disable_tta"
        if first:  # whose validation without mirroring the second stage was trained on
            stage = shlex.quote(str(model.with_name(f"{trainer}__{name}__{first}")))
            plain = "" if is_mirrored(model) else " --disable_tta"
            commands.append(f"umamba predict -m {stage} {chosen} -o FIRST_STAGE_{number}{plain}")
            options += f" -prev_stage_predictions FIRST_STAGE_{number}"
        options += " --save_probabilities" if several else ""
        quoted = shlex.quote(str(model))
        commands.append(f"umamba predict -m {quoted} {chosen} -o {outputs[-1]}{options}")
    if several:
        commands.append(f"umamba ensemble {' '.join(outputs)} -o PREDICTIONS")
    if postprocessing is not None:
        file = shlex.quote(str(postprocessing))
        commands.append(f"umamba postprocess -i PREDICTIONS -o FINAL --postprocessing {file}")
    return commands


def _write_record(
    file: Path,
    candidates: Sequence[Candidate],
    folds: list[int],
    comparison: dict[str, Any] | None,
    postprocessing: Mapping[str, Any],
    commands: list[str],
) -> None:
    from umamba.files import write_json

    rows = [
        {
            "models": [model.name for model in candidate.models],
            "mirrored": list(candidate.mirrored),
            "foreground_mean": candidate.summary["foreground_mean"]["Dice"],
            "mean": {label: mean["Dice"] for label, mean in candidate.summary["mean"].items()},
        }
        for candidate in candidates
    ]
    content = {
        "folds": folds,
        "cases": sorted(candidates[0].predictions),
        "candidates": rows,
        "best_against_second": comparison,
        "postprocessing": postprocessing,
        "commands": commands,
    }
    write_json(file, content)
    print(f"\nwritten: {file}; label maps and postprocessing.json in {file.with_suffix('')}")


def _validation_command(dataset: str, folds: Sequence[int], model: Path) -> str:
    """What validates a model folder anew."""
    from umamba.evaluation.candidates import is_mirrored, name_parts

    trainer, plans, configuration = name_parts(model)
    fold = folds[0] if len(folds) == 1 else "FOLD"
    if is_mirrored(model):
        return f"nnUNetv2_train DATASET {configuration} {fold} -p {plans} -tr {trainer} --val"
    return f"umamba train {dataset} {configuration} {fold} -p {plans} --val"
