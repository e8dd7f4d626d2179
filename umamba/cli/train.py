"""`umamba train`: trains, resumes and validates one fold of one configuration."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umamba.training.trainer import UMambaTrainer


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the `train` command."""
    parser = subparsers.add_parser(
        "train",
        help="train, resume and validate one fold of a planned dataset",
        description="Trains one fold of a planned and preprocessed dataset, resumes where an "
        "earlier run stopped, and validates the fold.",
    )
    parser.add_argument("dataset", help="dataset folder, id or name, as given to `umamba plan`")
    parser.add_argument("configuration", help="2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres")
    parser.add_argument("fold", help="0 to 4, or all")
    parser.add_argument("-p", "--plans", default="umamba_bot", help="plans name (umamba_bot)")
    parser.add_argument(
        "-device", "--device", default=None, help="cpu, cuda or mps (cuda if there)"
    )
    parser.add_argument("-num_gpus", "--num-gpus", type=int, default=1, help="GPUs (DDP)")
    parser.add_argument(
        "-pretrained_weights", "--pretrained-weights", help="checkpoint to start from"
    )
    parser.add_argument("--c", "--continue", dest="resume", action="store_true", help="resume")
    parser.add_argument("--restart", action="store_true", help="begin anew where results exist")
    parser.add_argument("--val", action="store_true", help="only validate the trained fold")
    parser.add_argument(
        "--val_best", "--val-best", action="store_true", help="validate the best checkpoint"
    )
    parser.add_argument("--npz", action="store_true", help="save validation probabilities")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoint")
    parser.add_argument("--workspace", help="folder for raw, preprocessed and results")
    parser.add_argument("-t", "--threads", type=int, default=None, help="CPU threads")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains; prints where the results went and the command to use next."""
    fold = parse_fold(args.fold)
    if args.resume and (args.restart or args.pretrained_weights):
        from umamba.cli.main import UsageError

        raise UsageError(
            "--c resumes a training; it cannot go with --restart or pretrained weights"
        )
    from umamba.data.dataset import prepare_dataset

    dataset, workspace = prepare_dataset(args.dataset, args.workspace)
    print(workspace.describe())
    plans, dataset_json = load_plans(workspace.preprocessed / dataset.name, args.plans)
    check_configuration(plans, args.configuration)
    check_first_stage(plans, args.configuration)
    set_threads(args.threads)
    folder = train(
        plans,
        dataset_json,
        args.configuration,
        fold,
        device=args.device,
        restart=args.restart,
        only_validation=args.val,
        validate_best=args.val_best,
        save_probabilities=args.npz,
        disable_checkpointing=args.disable_checkpointing,
        pretrained_weights=args.pretrained_weights,
        n_gpus=args.num_gpus,
    )
    print(f"\nresults: {folder}")
    print(f"report:  umamba report {quoted(folder)}")
    print(f"predict: umamba predict -m {quoted(folder.parent)} -f {fold} -i IMAGES -o PREDICTIONS")
    return 0


def train(
    plans: dict,
    dataset_json: dict,
    configuration: str,
    fold: int | str,
    *,
    device: str | None = None,
    restart: bool = False,
    **options: Any,
) -> Path:
    """Trains and validates a fold, or goes on where it stopped; returns the fold's folder.

    A finished training is only validated; an unfinished one resumes, unless `restart`.
    """
    from umamba.training.run import TrainingRun, fold_folder, train_fold

    wanted = TrainingRun(
        plans, configuration, fold, dataset_json, device=choose_device(device), **options
    )
    folder = fold_folder(wanted)
    finished = (folder / "checkpoint_final.pth").is_file()
    unfinished = any((folder / f"checkpoint_{n}.pth").is_file() for n in ("latest", "best"))
    if finished or unfinished:
        check_same_plan(folder, plans, configuration, restart)
    if restart or options.get("only_validation") or options.get("pretrained_weights"):
        changes: dict[str, Any] = {}
    elif finished:
        print(f"the training in {folder} is finished: only validating (--restart begins anew)")
        changes = {"only_validation": True}
    elif unfinished:
        print(f"resuming the training in {folder} (--restart begins anew)")
        changes = {"continue_training": True}
    else:
        changes = {}
    if restart:
        for name in ("final", "latest", "best"):
            (folder / f"checkpoint_{name}.pth").unlink(missing_ok=True)
    import dataclasses

    return train_fold(dataclasses.replace(wanted, validator=validate_fold, **changes))


def check_same_plan(folder: Path, plans: dict, configuration: str, restart: bool) -> None:
    """Raises ValueError where results of another network or patch lie in the same folder."""
    import json

    file = folder.parent / "plans.json"
    if restart or not file.is_file():
        return
    earlier = json.loads(file.read_text())["configurations"].get(configuration, {})
    now = plans["configurations"][configuration]
    for key in ("architecture", "patch_size", "batch_size", "recipe"):
        if earlier.get(key) != now.get(key):
            raise ValueError(
                f"{folder} holds a training with another {key}: give this plan a name of its own "
                f"(--plans-name), or begin anew with --restart"
            )


def validate_fold(trainer: UMambaTrainer, save_probabilities: bool) -> None:
    """Predicts the fold's validation cases and evaluates them, plain and mirrored."""
    import torch.distributed

    from umamba.evaluation.summary import evaluate_folder, labels_of_dataset
    from umamba.inference.validation import predict_preprocessed_cases

    _, cases = trainer.do_split()
    cases = sorted(cases)
    folder = Path(trainer.output_folder)
    axes = trainer.inference_allowed_mirroring_axes
    passes = {"validation": False} | ({"validation_mirrored": True} if axes else {})
    for name, use_mirroring in passes.items():
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
            folder / name,
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
            folder / name,
            Path(trainer.preprocessed_dataset_folder_base) / "gt_segmentations",
            labels,
            ignore_label=ignore_label,
            file_ending=trainer.dataset_json["file_ending"],
            cases=cases,
        )
        mean = summary["foreground_mean"]["Dice"]
        told = "with mirroring" if use_mirroring else "without mirroring"
        dice = "undefined (no case shows a label)" if mean is None else f"{mean:.4f}"
        print(f"validation {told}: mean Dice {dice} over {len(cases)} cases -> {folder / name}")


def next_stages(trainer: UMambaTrainer) -> dict[str, tuple[Path, Path]] | None:
    """For the first stage of a cascade: where the next stage's data are and its input belongs."""
    names = trainer.configuration_manager.next_stage_names
    if not names:
        return None
    data, results = Path(trainer.preprocessed_dataset_folder_base), Path(trainer.output_folder_base)
    found = {}
    for name in names:
        identifier = trainer.plans_manager.get_configuration(name).data_identifier
        found[name] = (data / identifier, results / "predicted_next_stage" / name)
    return found


def check_first_stage(plans: dict, configuration: str) -> None:
    """Raises ValueError where a cascade's second stage lacks the first stage's predictions."""
    from umamba.planning.plans import get_configuration
    from umamba.training.trainer import UMambaTrainer

    part = get_configuration(plans, configuration)
    first = part.get("previous_stage")
    if not first:
        return
    dataset = plans["dataset_name"]
    data = Path(os.environ["nnUNet_preprocessed"]) / dataset / part["data_identifier"]
    folder = Path(os.environ["nnUNet_results"]) / dataset
    folder = folder / f"{UMambaTrainer.__name__}__{plans['plans_name']}__{first}"
    folder = folder / "predicted_next_stage" / configuration
    cases = {file.stem for file in data.glob("*.pkl")}
    missing = sorted(cases - {file.name.split(".")[0] for file in folder.glob("*")})
    if missing:
        raise ValueError(
            f"{configuration} needs the {first} prediction of every case and {len(missing)} are "
            f"missing in {folder} (first: {missing[0]}): train folds 0 to 4 of {first} first"
        )


# --- what run, train and demo share ------------------------------------------------------------


def parse_fold(text: str) -> int | str:
    """0 to 4 or "all"; UsageError otherwise."""
    from umamba.cli.main import UsageError

    if text == "all":
        return text
    if text.isdigit():
        return int(text)
    raise UsageError(f"fold {text!r} is not known: give 0, 1, 2, 3, 4 or all")


def load_plans(folder: Path, name: str) -> tuple[dict, dict]:
    """The named plans and dataset.json of a preprocessed dataset; UsageError says what there is."""
    import json

    from umamba.cli.main import UsageError
    from umamba.planning.plans import load_plans as read_plans

    file = folder / f"{name.replace('-', '_')}.json"
    if not file.is_file():
        file = folder / f"{name}.json"
    if not file.is_file():
        others = sorted(
            f.stem for f in folder.glob("*.json") if '"configurations"' in f.read_text()
        )
        there = f"there are {', '.join(others)}" if others else "nothing is planned there yet"
        raise UsageError(f"no plans {name!r} in {folder}: {there}; `umamba plan` makes them")
    return read_plans(file), json.loads((folder / "dataset.json").read_text())


def check_configuration(plans: dict, configuration: str) -> None:
    """UsageError with the nearest names where the plans have no such configuration."""
    from difflib import get_close_matches

    from umamba.cli.main import UsageError

    known = list(plans["configurations"])
    if configuration not in known:
        close = get_close_matches(configuration, known, 1, 0.3)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(
            f"the plans have no configuration {configuration!r}: {hint}they have {', '.join(known)}"
        )


def choose_device(name: str | None) -> str:
    """The device that is asked for, else CUDA where there is one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is visible to torch: use -device cpu, or see umamba doctor"
        )
    return name


def set_threads(n_threads: int | None) -> None:
    """Sets torch's CPU threads where a number is given."""
    if n_threads:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(n_threads)
        torch.set_num_threads(n_threads)


def quoted(path: Path | str) -> str:
    """A path as a shell takes it."""
    import shlex

    return shlex.quote(str(path))
