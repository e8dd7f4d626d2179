"""`umamba run`: a dataset folder in, a trained, validated and reported segmentation out."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from umamba.data.dataset import RawDataset
    from umamba.data.workspace import Workspace


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the `run` command."""
    parser = subparsers.add_parser(
        "run",
        help="audit, plan, preprocess, train, validate and report a dataset folder",
        description="The whole chain: audit, plan, preprocess, train, validate, report. "
        "Killed or stopped, the same command goes on where it was.",
    )
    parser.add_argument(
        "dataset", help="nnU-Net folder, id, name, MSD folder, or images/ + labels/"
    )
    parser.add_argument("--network", default="umamba_bot", help="see `umamba models list`")
    parser.add_argument("-c", "--configuration", help="default: 3d_fullres, or 2d for 2D data")
    parser.add_argument("-f", "--fold", default="0", help="0 to 4, or all (0)")
    parser.add_argument("-p", "--plans-name", help="default: the network's name (and the budget)")
    parser.add_argument("--minutes", type=float, help="wall time of this whole command")
    parser.add_argument("--epochs", type=int, help="epochs of nnU-Net's own schedule (1000)")
    parser.add_argument("--memory", type=float, metavar="GB", help="memory to plan for")
    parser.add_argument("--network-arg", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument("--seed", type=int, help="seed of weights and of the main process")
    parser.add_argument("-device", "--device", help="cpu, cuda or mps (cuda if there)")
    parser.add_argument("-num_gpus", "--num-gpus", type=int, default=1, help="GPUs (DDP)")
    parser.add_argument("-t", "--threads", type=int, help="CPU threads")
    parser.add_argument("-np", type=int, default=1, help="processes for preprocessing")
    parser.add_argument("--workspace", help="folder for raw, preprocessed and results")
    parser.add_argument("--restart", action="store_true", help="begin anew where results exist")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the chain; prints where things went and the predict command to use next."""
    started = time.monotonic()
    check_arguments(args)
    from umamba.cli.train import choose_device, parse_fold, quoted, set_threads, train

    fold = parse_fold(args.fold)
    set_threads(args.threads)
    device = choose_device(args.device)
    from umamba.data.audit import audit_dataset
    from umamba.data.dataset import prepare_dataset

    dataset, workspace = prepare_dataset(args.dataset, args.workspace, strict=False)
    print(workspace.describe())
    for note in dataset.notes:
        print(f"note: {note}")
    audit = audit_dataset(dataset)
    audit.raise_if_faults()
    for warning in audit.warnings:
        print(f"warning: {warning}")

    plans, configuration = make_plans(args, dataset, workspace, fold, device, started)
    print_plan(plans, configuration)
    print("training")
    dataset_json = dataset.dataset_json
    folder = train(
        plans,
        dataset_json,
        configuration,
        fold,
        device=device,
        restart=args.restart,
        n_gpus=args.num_gpus,
    )
    from umamba.report.page import build_report

    page = build_report(
        [folder],
        folder / "report.html",
        raw_folder=dataset.folder,
        reference_folder=workspace.preprocessed / dataset.name / "gt_segmentations",
    )
    minutes = (time.monotonic() - started) / 60
    print(f"\ndone in {minutes:.1f} minutes")
    print(f"results: {folder}")
    print(f"report:  {page}")
    print(f"predict: umamba predict -m {quoted(folder.parent)} -f {fold} -i IMAGES -o PREDICTIONS")
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """UsageError for what is wrong in itself, before anything is read."""
    from umamba.cli.main import UsageError

    if args.minutes is not None and args.epochs is not None:
        raise UsageError("--minutes and --epochs exclude each other")
    if args.minutes is not None and args.minutes < 1:
        raise UsageError(f"--minutes {args.minutes:g} is too short; give at least 1")
    if args.epochs is not None and args.epochs < 1:
        raise UsageError(f"--epochs {args.epochs} makes no sense; give at least 1")
    if args.memory is not None and args.memory <= 0:
        raise UsageError(f"--memory {args.memory:g} makes no sense; give gigabytes above 0")
    check_network(args.network)


def check_network(name: str) -> None:
    """UsageError with the nearest names for an unknown network."""
    from umamba.cli.main import UsageError
    from umamba.networks import get_entry

    try:
        get_entry(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def make_plans(
    args: argparse.Namespace,
    dataset: RawDataset,
    workspace: Workspace,
    fold: int | str,
    device: str,
    started: float,
) -> tuple[dict, str]:
    """Plans (or reads the plans of the same request), preprocesses, and fits a time budget."""
    from umamba.cli.main import UsageError
    from umamba.cli.plan import parse_network_args
    from umamba.cli.train import check_configuration
    from umamba.networks import get_entry
    from umamba.planning.fit import fit_to_time
    from umamba.planning.planner import default_plans_name, plan_dataset
    from umamba.planning.plans import load_plans, save_plans
    from umamba.planning.preprocess import fingerprint_dataset, preprocess_dataset

    network = get_entry(args.network).name
    network_args = parse_network_args(args.network_arg)
    request = {
        "network": network,
        "network_args": network_args,
        "minutes": args.minutes,
        "epochs": args.epochs,
        "memory": args.memory,
        "configuration": args.configuration,
        "seed": args.seed,
        "device": device.split(":")[0],
    }
    name = args.plans_name or default_plans_name(network, network_args) + budget_suffix(args)
    folder = workspace.preprocessed / dataset.name
    file = folder / f"{name}.json"
    fingerprint_dataset(dataset.name, n_workers=args.np)
    if file.is_file() and not args.restart:
        plans = load_plans(file)
        if plans.get("umamba", {}).get("request") == request:
            configuration = plans["umamba"]["configuration"]
            print(f"plans:   {file} (from an earlier run)")
            preprocess_dataset(dataset.name, name, [configuration], n_workers=args.np)
            return plans, configuration
        if list((workspace.results / dataset.name).glob(f"*__{name}__*/fold_*/checkpoint_*.pth")):
            raise UsageError(
                f"results of other plans named {name} exist in {workspace.results / dataset.name}: "
                "give --plans-name, or --restart to begin anew"
            )
    recipe = {} if args.seed is None else {"seed": args.seed}
    if args.epochs is not None:
        recipe["num_epochs"] = args.epochs
    plans = plan_dataset(
        dataset.name,
        network=network,
        plans_name=name,
        memory_gb=args.memory,
        network_args=network_args,
        recipe=recipe,
    )
    configuration = args.configuration or (
        "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"
    )
    check_configuration(plans, configuration)
    if args.minutes is None and args.epochs is None and device == "cpu":
        refuse_endless(plans, configuration, args)
    preprocess_dataset(dataset.name, name, [configuration], n_workers=args.np)
    if args.minutes is not None:
        seconds = 60 * args.minutes - (time.monotonic() - started)
        print(f"measuring training steps to fit {args.minutes:g} minutes")
        plans = fit_to_time(
            plans,
            configuration,
            seconds=seconds,
            fold=fold,
            device=device,
            memory_gb=args.memory,
        )
    plans["umamba"] = plans.get("umamba", {}) | {"request": request, "configuration": configuration}
    save_plans(plans, file)
    print(f"plans:   {file}")
    return plans, configuration


def budget_suffix(args: argparse.Namespace) -> str:
    """What a budget adds to the plans name: it is another experiment, with results of its own."""
    if args.minutes is not None:
        return f"_{args.minutes:g}min".replace(".", "p")
    return "" if args.epochs is None else f"_{args.epochs}epochs"


def refuse_endless(plans: dict, configuration: str, args: argparse.Namespace) -> None:
    """UsageError with the estimate in days and three commands, for a CPU without a budget."""
    from umamba.cli.main import UsageError
    from umamba.cli.train import quoted
    from umamba.planning.fit import days_of_training

    days = days_of_training(plans, configuration, 1000 * 250, "cpu")
    command = f"umamba run {quoted(args.dataset)} --network {args.network}"
    raise UsageError(
        f"nnU-Net's schedule (1000 epochs of 250 iterations) would take about {days:.1f} days on "
        f"this CPU. Choose one:\n"
        f"  {command} --minutes 30      (plans for the time)\n"
        f"  {command} --epochs 50       (about {days / 20:.1f} days)\n"
        f"  {command} --epochs 1000     (all of it)"
    )


def print_plan(plans: dict, configuration: str) -> None:
    """What was planned, in a few plain lines."""
    part = plans["configurations"][configuration]
    arguments = part["architecture"]["arch_kwargs"]
    network = part["architecture"]["network_class_name"].rsplit(".", 1)[-1]
    patch = "x".join(map(str, part["patch_size"]))
    features = "-".join(map(str, arguments["features_per_stage"]))
    batch = part["batch_size"]
    print(f"{configuration}: {network}, features {features}, patch {patch}, batch {batch}")
    for reason in part.get("planning", {}).get("reasons", []):
        print(f"  {reason}")
