"""`umamba train`: train, resume and validate one fold of a planned and preprocessed dataset.

Goes on where an earlier run stopped.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umamba.cli import common
from umamba.cli.common import UsageError
from umamba.lock import holding

if TYPE_CHECKING:
    from umamba.training.trainer import UMambaTrainer


FIELDS = (
    "only_validation", "validate_best", "save_probabilities",
    "disable_checkpointing", "pretrained_weights",
)  # fmt: skip
"""Fields of TrainingRun that are arguments of the same name."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    shared = "dataset -device -num_gpus -t --workspace --restart"
    add = common.add_command(subparsers, "train", run, __doc__, shared).add_argument
    add("configuration", help="2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres")
    add("fold", help="0 to 4, or all")
    add("-p", "--plans", default="umamba_bot", help="plans name (umamba_bot)")
    add("-pretrained_weights", "--pretrained-weights", help="checkpoint to start from")
    add("--c", "--continue", dest="resume", action="store_true", help="resume")
    for flags, field, text in (
        (["--val"], "only_validation", "only validate the trained fold"),
        (["--val_best", "--val-best"], "validate_best", "validate the best checkpoint"),
        (["--npz"], "save_probabilities", "save validation probabilities"),
        (["--disable_checkpointing"], "disable_checkpointing", "write no checkpoint"),
    ):
        add(*flags, dest=field, action="store_true", help=text)


def run(args: argparse.Namespace) -> int:
    """Trains; prints where the results went and the command to use next."""
    from umamba.planning.plans import load_plans, read_json

    fold = common.parse_fold(args.fold)
    if args.resume and (args.restart or args.pretrained_weights):
        raise UsageError(
            "--c resumes a training; it cannot go with --restart or pretrained weights"
        )
    if args.only_validation and args.restart:
        raise UsageError(
            "--val validates what is trained, which --restart removes: give one of them"
        )
    common.set_threads(args.threads)
    device = common.choose_device(args.device)
    dataset, workspace = common.open_dataset(args, strict=True)
    home = workspace.preprocessed / dataset.name
    file = home / f"{args.plans.replace('-', '_')}.json"
    with common.usage_errors(FileNotFoundError):
        plans = load_plans(file if file.is_file() else home / f"{args.plans}.json")
    if args.pretrained_weights:
        check_start(Path(args.pretrained_weights))
    dataset_json = read_json(home / "dataset.json")
    options = {field: getattr(args, field) for field in FIELDS}
    folder = train(plans, dataset_json, args.configuration, fold, device, args, **options)
    tell_results(folder, f"umamba report {shlex.quote(str(folder))}")
    return 0


def check_start(file: Path) -> None:
    """Reads a checkpoint to start from; ValueError or FileNotFoundError where it is none."""
    from umamba.networks.checkpoint import read_checkpoint

    if "network_weights" not in read_checkpoint(file):
        raise ValueError(
            f"{file} is not a checkpoint of a training here: it has no network_weights"
        )


def tell_results(folder: Path, report: str) -> None:
    """Prints where the results of a fold are, and the command that predicts with them."""
    model, fold = shlex.quote(str(folder.parent)), folder.name.removeprefix("fold_")
    print(f"\nresults: {folder}")
    print(f"report:  {report}")
    print(f"predict: umamba predict -m {model} -f {fold} -i IMAGES -o PREDICTIONS")


def train(
    plans: dict,
    dataset_json: dict,
    configuration: str,
    fold: int | str,
    device: str,
    args: argparse.Namespace,
    **options: Any,
) -> Path:
    """Trains and validates a fold, or goes on where it stopped; returns the fold's folder.

    A finished training is only validated; an unfinished one resumes, unless `args.restart`.
    `options` are further fields of `TrainingRun`.  Raises UsageError for an unknown configuration,
    ValueError where a first stage is missing or another training is in the way, InUseError where
    another process trains the fold.
    """
    from umamba.planning.plans import get_configuration
    from umamba.training.run import TrainingRun, fold_folder

    with common.usage_errors():
        get_configuration(plans, configuration)
    folder = fold_folder(TrainingRun(plans, configuration, fold, dataset_json))
    with holding(folder, "training"):
        return _train(folder, plans, dataset_json, configuration, fold, device, args, **options)


def _train(
    folder: Path,
    plans: dict,
    dataset_json: dict,
    configuration: str,
    fold: int | str,
    device: str,
    args: argparse.Namespace,
    **options: Any,
) -> Path:
    from umamba.planning.plans import get_configuration
    from umamba.training.checkpoints import BEST, FINAL, find_checkpoint
    from umamba.training.run import TrainingRun, train_fold

    part = get_configuration(plans, configuration)
    if part.get("previous_stage"):
        check_first_stage(plans, configuration, part)
    options |= {"device": device, "n_gpus": args.num_gpus, "validator": validate_fold}
    check_preprocessed(plans, configuration, fold)
    check_same_plan(folder, plans, configuration, args.restart)
    if args.restart:
        remove_training(folder, options.get("pretrained_weights"))
    if options.get("only_validation"):
        wanted = folder / (BEST if options.get("validate_best") else FINAL)
        if not wanted.is_file():
            raise ValueError(f"{wanted} is missing: train first, without --val")
        options["checkpoint"] = wanted
    elif checkpoint := find_checkpoint(folder):
        options |= {"checkpoint": checkpoint, "pretrained_weights": None}
        if checkpoint.name == FINAL:
            print(f"the training in {folder} is finished: only validating (--restart begins anew)")
            options["only_validation"] = True
        else:
            print(f"resuming the training in {folder} (--restart begins anew)")
    try:
        return train_fold(TrainingRun(plans, configuration, fold, dataset_json, **options))
    except AssertionError as error:  # nnU-Net's, of a missing key or another shape
        if not (start := options.get("pretrained_weights")):
            raise
        raise ValueError(f"{start} is not of the network in these plans: {error}") from error


def check_preprocessed(plans: dict, configuration: str, fold: int | str) -> None:
    """Raises ValueError unless the preprocessed data and the splits are those of all cases.

    The cases are those of the raw dataset or, where that is not there, as many as it had.
    """
    from umamba.planning.plans import get_configuration, preprocessed_folder, read_json
    from umamba.planning.preprocess import SUFFIXES, folder_is_current, read_dataset

    name = plans["dataset_name"]
    home = preprocessed_folder(name)
    folder = home / get_configuration(plans, configuration)["data_identifier"]
    cure = "preprocess (again) with umamba plan or umamba run"
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing: {cure}")
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
    try:
        cases = set(read_dataset(name)[1])
    except FileNotFoundError:  # without the raw dataset
        cases = {file.removesuffix(".pkl") for file in sizes if file.endswith(".pkl")}
        n_cases = read_json(home / "dataset.json")["numTraining"]
    else:
        n_cases = len(cases)
        stamped = folder.with_name(f"{folder.name}.stamp.json").is_file()  # not by stock nnU-Net
        if stamped and not folder_is_current(name, plans, configuration):
            raise ValueError(f"{folder} is not of these plans and all cases as they are: {cure}")
    absent = [c for c in sorted(cases) if not all(sizes.get(c + suffix) for suffix in SUFFIXES)]
    if absent or len(cases) < n_cases:
        n_absent = len(absent) + n_cases - len(cases)
        first = f", {absent[0]} among them" if absent else ""
        raise ValueError(f"{folder} lacks {n_absent} of {n_cases} cases{first}: {cure}")
    if fold != "all" and (file := home / "splits_final.json").is_file():
        check_splits(file, cases, int(fold))


def check_splits(file: Path, cases: set[str], fold: int) -> None:
    """Raises ValueError where the splits name unknown cases, or were drawn from fewer cases.

    Splits that somebody wrote may leave cases out, have the same in both parts of this fold, or not
    have it, and nnU-Net draws one: that is said.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    from umamba.planning.plans import read_json

    splits = read_json(file)
    cure = f"delete it, and all folds are drawn anew, or correct it ({len(cases)} cases)"
    try:
        named = {case for split in splits for part in ("train", "val") for case in split[part]}
    except (KeyError, TypeError):
        raise ValueError(f'{file} is no list of folds with "train" and "val": {cure}') from None
    if unknown := sorted(named - cases):
        raise ValueError(f"{file} names {unknown[0]}, which is no case of the dataset: {cure}")
    if fold >= len(splits):
        print(f"note: {file} has no fold {fold}: a fifth of all cases, drawn at random, validates")
    elif both := sorted(set(splits[fold]["train"]) & set(splits[fold]["val"])):
        print(f"note: {file} trains fold {fold} with cases that validate it ({both[0]} the first)")
    if not (left_out := sorted(cases - named)):
        return
    told = f"{file} leaves out {len(left_out)} cases ({left_out[0]} the first)"
    if len(named) >= 5 and splits == generate_crossval_split(sorted(named), seed=12345, n_splits=5):
        raise ValueError(f"{told}, as it was drawn from fewer than there are now: {cure}")
    print(f"note: {told}: they are in no fold")


def check_same_plan(folder: Path, plans: dict, configuration: str, restart: bool) -> None:
    """Raises ValueError where a fold in this model folder has another network or patch.

    Its plans are those of all its folds. restart: this fold's own training is to be removed.
    """
    from umamba.planning.plans import read_json

    file = folder.parent / "plans.json"
    trained = {found.parent for found in folder.parent.glob("fold_*/checkpoint_*.pth")}
    if restart:
        trained.discard(folder)
    if not trained or not file.is_file():
        return
    earlier = read_json(file)["configurations"].get(configuration, {})
    now = plans["configurations"][configuration]
    for key in ("architecture", "patch_size", "batch_size", "recipe"):
        if earlier.get(key) != now.get(key):
            cure = "begin anew with --restart" if folder in trained else "remove that folder"
            raise ValueError(
                f"{folder if folder in trained else min(trained)} holds a training with another "
                f"{key}: give this plan a name of its own (--plans-name), or {cure}"
            )


def remove_training(folder: Path, start: str | None) -> None:
    """Removes checkpoints and validation results; ValueError where `start` is one of them."""
    from umamba.training.checkpoints import NAMES

    there = [file for name in NAMES if (file := folder / name).is_file()]
    if start and any(file.samefile(start) for file in there):
        raise ValueError(f"--restart would remove {start}: copy it to another place, and give that")
    for file in (*there, *folder.glob("validation*/summary.*")):
        file.unlink()


def validate_fold(trainer: UMambaTrainer, save_probabilities: bool) -> None:
    """Predicts the fold's validation cases and evaluates them, plain and mirrored."""
    import torch.distributed

    from umamba.evaluation.summary import evaluate_folder, labels_of_dataset
    from umamba.inference.validation import predict_preprocessed_cases

    _, cases = trainer.do_split()
    cases = sorted(cases)
    folder = Path(trainer.output_folder)
    axes = trainer.inference_allowed_mirroring_axes
    for use_mirroring in (False, True) if axes else (False,):
        output = folder / ("validation_mirrored" if use_mirroring else "validation")
        shard = cases
        if trainer.is_ddp:
            shard = cases[trainer.local_rank :: torch.distributed.get_world_size()]
        predict_preprocessed_cases(
            trainer.network,
            trainer.plans_manager,
            trainer.configuration_manager,
            trainer.dataset_json,
            Path(trainer.preprocessed_dataset_folder),
            shard,
            output,
            device=trainer.device,
            use_mirroring=use_mirroring,
            mirror_axes=axes,
            save_probabilities=save_probabilities and not use_mirroring,
            previous_stage_folder=trainer.folder_with_segs_from_previous_stage,
            next_stages=None if use_mirroring else next_stages(trainer),
        )
        if trainer.is_ddp:
            torch.distributed.barrier()
        if trainer.local_rank != 0:
            continue
        labels, ignore_label = labels_of_dataset(trainer.dataset_json)
        summary = evaluate_folder(
            output,
            Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations",
            labels,
            ignore_label=ignore_label,
            file_ending=trainer.dataset_json["file_ending"],
            cases=cases,
        )
        mean = summary["foreground_mean"]["Dice"]
        dice = "undefined (no case shows a label)" if mean is None else f"{mean:.4f}"
        told = "with mirroring" if use_mirroring else "without mirroring"
        print(f"validation {told}: mean Dice {dice} over {len(cases)} cases -> {output}")


def next_stages(trainer: UMambaTrainer) -> dict[str, tuple[Path, Path]]:
    """For the first stage of a cascade: where the next stage's data are and its input belongs."""
    data, results = Path(trainer.preprocessed_dataset_folder_base), Path(trainer.output_folder_base)
    found = {}
    for name in trainer.configuration_manager.next_stage_names or ():
        identifier = trainer.plans_manager.get_configuration(name).data_identifier
        found[name] = (data / identifier, results / "predicted_next_stage" / name)
    return found


def check_first_stage(plans: dict, configuration: str, part: dict) -> None:
    """Raises ValueError where a cascade's second stage lacks the first stage's predictions."""
    from umamba.training.run import TrainingRun, fold_folder

    first = part["previous_stage"]
    data = Path(os.environ["nnUNet_preprocessed"]) / plans["dataset_name"] / part["data_identifier"]
    model_folder = fold_folder(TrainingRun(plans, first, 0, {})).parent
    folder = model_folder / "predicted_next_stage" / configuration
    cases = {file.stem for file in data.glob("*.pkl")}
    missing = sorted(cases - {file.stem for file in folder.glob("*")})
    if missing:
        raise ValueError(
            f"{configuration} needs the {first} prediction of every case and {len(missing)} are "
            f"missing in {folder} (first: {missing[0]}): train folds 0 to 4 of {first} first"
        )
