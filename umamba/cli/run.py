"""`umamba run DATASET`: audit, plan, preprocess, train, validate and report a dataset folder.

Killed or stopped, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import shlex
import time
from typing import TYPE_CHECKING

from umamba.cli import common
from umamba.cli.common import UsageError
from umamba.cli.plan import (
    case_store,
    describe_configuration,
    option_suffix,
    parse_network_args,
    refuse_for_upstream,
)
from umamba.cli.train import tell_results, train
from umamba.lock import holding

if TYPE_CHECKING:
    from umamba.data.dataset import RawDataset
    from umamba.data.workspace import Workspace


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    shared = "dataset --network --recipe --pretrained --recompute -p -f --memory --network-arg -np"
    shared += " --sampling --stock --workspace --restart -device -num_gpus -t"
    add = common.add_command(subparsers, "run", run, __doc__, shared).add_argument
    add("-c", "--configuration", help="default: 3d_fullres, or 2d for 2D data")
    add("--minutes", type=float, help="wall time of this whole command")
    add("--epochs", type=int, help="epochs of nnU-Net's own schedule (1000)")
    add("--seed", type=int, help="seed of weights and of the main process")


def run(args: argparse.Namespace) -> int:
    """Runs the chain; prints where things went and the predict command to use next."""
    from umamba.planning.plans import check_plans_name
    from umamba.planning.topology import check_configurations

    started = time.monotonic()
    common.check_numbers(args)
    if args.minutes is not None and args.epochs is not None:
        raise UsageError("--minutes and --epochs exclude each other")
    if args.minutes is not None and not 1 <= args.minutes < math.inf:
        raise UsageError(f"--minutes {args.minutes:g} is too short or endless; give at least 1")
    if args.epochs is not None and args.epochs < 1:
        raise UsageError(f"--epochs {args.epochs} makes no sense; give at least 1")
    fold = common.parse_fold(args.fold)
    entry = common.find_network(args.network)
    network_args = parse_network_args(args.network_arg, entry)
    with common.usage_errors():
        check_configurations([args.configuration] if args.configuration else None)
        check_plans_name(args.plans_name or "")
    recipe = common.find_recipe(args.recipe) | common.pretrained_recipe(args)
    recipe |= common.recompute_recipe(args)
    refuse_for_upstream(entry, args, recipe)
    common.set_threads(args.threads)
    device = common.choose_device(args.device)
    dataset, workspace = common.open_dataset(args)
    with holding(workspace.preprocessed / dataset.name, "planning"):
        plans, configuration = make_plans(
            args, entry.name, network_args, recipe, dataset, workspace, fold, device, started
        )
    print(describe_configuration(plans, configuration))
    print("training")
    folder = train(plans, dataset.dataset_json, configuration, fold, device, args)
    from umamba.report.page import build_report

    references = workspace.preprocessed / dataset.name / "gt_segmentations"
    page = build_report([folder], folder / "report.html", dataset.folder, references)
    print(f"\ndone in {(time.monotonic() - started) / 60:.1f} minutes")
    tell_results(folder, str(page))
    return 0


def make_plans(
    args: argparse.Namespace,
    network: str,
    network_args: dict,
    named: dict,
    dataset: RawDataset,
    workspace: Workspace,
    fold: int | str,
    device: str,
    started: float,
) -> tuple[dict, str]:
    """Audits, plans (or reads the plans of the same request), preprocesses, and fits a budget."""
    from umamba.planning.cases import default_workers
    from umamba.planning.fingerprint import fingerprint_dataset
    from umamba.planning.planner import default_plans_name, plan_dataset
    from umamba.planning.plans import get_configuration, load_plans, save_plans
    from umamba.planning.preprocess import preprocess_dataset

    store = case_store(args)
    common.refuse_faults(dataset, workspace, None if store is None else store.keep)
    common.check_recipe(named, dataset)
    asked = ("minutes", "epochs", "memory", "configuration", "seed")
    request = {
        "network": network,
        "network_args": network_args,
        **{option: getattr(args, option) for option in asked},
        "device": device.split(":")[0],
        **{key: named[key] for key in ("name", "pretrained", "recompute") if key in named},
        **({"sampling": args.sampling} if args.sampling else {}),
    }
    suffix = option_suffix(args) + budget_suffix(args)
    name = args.plans_name or default_plans_name(network, network_args, named.get("name")) + suffix
    file = workspace.preprocessed / dataset.name / f"{name}.json"
    results = workspace.results / dataset.name
    n_workers = args.np or default_workers(dataset.name)
    store = store if n_workers == 1 else None
    how: dict = {"n_workers": n_workers, "stock": args.stock, "store": store}
    fingerprint_dataset(dataset.name, **how)
    how["device"] = common.preprocessing_device(args)
    if file.is_file() and not args.restart:
        plans = load_plans(file)
        facts = plans.get("umamba", {})
        if facts.get("request") == request:
            print(f"plans:   {file} (from an earlier run)")
            preprocess_dataset(dataset.name, name, [facts["configuration"]], **how)
            return plans, facts["configuration"]
        if any(results.glob(f"*__{name}__*/fold_*/checkpoint_*.pth")):
            raise UsageError(
                f"results of other plans named {name} exist in {results}: "
                "give --plans-name, or --restart to begin anew"
            )
    asked_for = {"seed": args.seed, "num_epochs": args.epochs}
    recipe = named | {key: value for key, value in asked_for.items() if value is not None}
    plans = plan_dataset(
        dataset.name,
        network=network,
        plans_name=name,
        memory_gb=args.memory,
        network_args=network_args,
        recipe=recipe,
        configurations=[args.configuration] if args.configuration else None,
    )
    default = "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"
    configuration = args.configuration or default
    with common.usage_errors():
        get_configuration(plans, configuration)
    common.tell_pretrained(plans, [configuration])
    if args.minutes is None and args.epochs is None and device == "cpu":
        refuse_endless(plans, configuration, args)
    preprocess_dataset(dataset.name, name, [configuration], **how)
    del how, store  # their memory is wanted for training
    if args.minutes is None:
        plans = common.settle_sampling(plans, [configuration], args)
    else:
        plans = fit_minutes(plans, configuration, args, fold, device, started)
    plans["umamba"] |= {"request": request, "configuration": configuration}
    save_plans(plans, file)
    print(f"plans:   {file}")
    return plans, configuration


def fit_minutes(
    plans: dict,
    configuration: str,
    args: argparse.Namespace,
    fold: int | str,
    device: str,
    started: float,
) -> dict:
    """Fits the size and the sampling of a training to what is left of --minutes."""
    from umamba.planning.budget import fit_to_time

    print(f"measuring training steps to fit {args.minutes:g} minutes")
    plans = fit_to_time(
        plans,
        configuration,
        seconds=60 * args.minutes - (time.monotonic() - started),
        fold=fold,
        device=device,
        memory_gb=args.memory,
    )
    fitted = time.monotonic()
    plans = common.settle_sampling(plans, [configuration], args)
    recipe = plans["configurations"][configuration]["recipe"]
    left = recipe["train_seconds"] - (time.monotonic() - fitted)
    recipe["train_seconds"] = max(1.0, round(left, 1))
    return plans


def budget_suffix(args: argparse.Namespace) -> str:
    """What a budget adds to the plans name: it is another experiment, with results of its own."""
    if args.minutes is not None:
        return f"_{args.minutes:g}min".replace(".", "p")
    return "" if args.epochs is None else f"_{args.epochs}epochs"


def refuse_endless(plans: dict, configuration: str, args: argparse.Namespace) -> None:
    """UsageError with the estimate in days and three commands, for a CPU without a budget."""
    from umamba.planning.budget import days_of_training
    from umamba.planning.plans import get_configuration

    n_epochs = get_configuration(plans, configuration)["recipe"].get("num_epochs", 1000)
    days = days_of_training(plans, configuration, n_epochs * 250, "cpu")
    command = command_without_budget(args)
    raise UsageError(
        f"{args.recipe or 'nnU-Net'}'s schedule ({n_epochs} epochs of 250 iterations) would "
        f"take about {days:.1f} days on this CPU. Choose one:\n"
        f"  {command} --minutes 30      (plans for the time)\n"
        f"  {command} --epochs 50       (about {50 * days / n_epochs:.1f} days)\n"
        f"  {command} --epochs {n_epochs:<8} (all of it)"
    )


def command_without_budget(args: argparse.Namespace) -> str:
    """The command that was given, to which a budget can be added."""
    words = ["umamba", "run", args.dataset, "--network", args.network]
    for option in ("recipe", "configuration", "plans_name", "memory", "recompute", "sampling",
                   "device", "workspace"):  # fmt: skip
        value = getattr(args, option)
        if value not in (None, "none"):
            words += [f"--{option.replace('_', '-')}", str(value)]
    for pair in args.network_arg:
        words += ["--network-arg", pair]
    if args.fold != "0":
        words += ["--fold", args.fold]
    if args.pretrained is not None:
        words += ["--pretrained", args.pretrained] if args.pretrained else ["--pretrained"]
    return shlex.join(words)
