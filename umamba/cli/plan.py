"""`umamba plan DATASET`: fingerprint, plans and preprocessing of a dataset for one network.

nnU-Net plans, the network is put in, and patch and batch are made to fit the memory.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from umamba.cli import common
from umamba.cli.common import UsageError
from umamba.lock import holding

if TYPE_CHECKING:
    from umamba.data.dataset import RawDataset
    from umamba.data.workspace import Workspace
    from umamba.networks import NetworkEntry
    from umamba.planning.upstream import UpstreamEntry
    from umamba.preprocessing.case_store import CaseStore

STEPS_PER_EPOCH = 250  # nnU-Net's


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    shared = (
        "dataset --network --recipe --pretrained --recompute -p --memory --network-arg -device -np"
    )
    shared += " --sampling --stock --workspace"
    add = common.add_command(subparsers, "plan", run, __doc__, shared).add_argument
    add(
        "-c", "--configuration", nargs="+", metavar="CONFIG",
        help="2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres (all that make sense)",
    )  # fmt: skip
    add(
        "-overwrite_target_spacing", "--target-spacing", type=float, nargs="+", metavar="MM",
        help="spacing to train at, three numbers in the images' axis order (z y x)",
    )  # fmt: skip
    add("--check", action="store_true", help="dry-run a training step per plan, on -device")
    add("--no-audit", action="store_true", help="do not look for faulty files")
    add("--no-preprocess", action="store_true", help="stop after the plans")


def run(args: argparse.Namespace) -> int:
    """Plans and preprocesses; prints what was planned, where it is, and the next command."""
    from umamba.planning.plans import check_plans_name
    from umamba.planning.topology import check_configurations

    common.check_numbers(args)
    spacing = args.target_spacing
    if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
        raise UsageError("-overwrite_target_spacing takes three numbers above 0, in mm")
    entry = common.find_network(args.network)
    network_args = parse_network_args(args.network_arg, entry)
    with common.usage_errors():
        check_configurations(args.configuration)
        check_plans_name(args.plans_name or "")
    recipe = common.find_recipe(args.recipe) | common.pretrained_recipe(args)
    recipe |= common.recompute_recipe(args)
    refuse_for_upstream(entry, args, recipe)
    device = common.choose_device(args.device) if args.check or args.device else None
    dataset, workspace = common.open_dataset(args, strict=args.no_audit)
    with holding(workspace.preprocessed / dataset.name, "planning"):
        return plan(args, entry, network_args, recipe, dataset, workspace, device)


def plan(
    args: argparse.Namespace,
    entry: NetworkEntry | UpstreamEntry,
    network_args: dict[str, Any],
    recipe: dict[str, Any],
    dataset: RawDataset,
    workspace: Workspace,
    device: str | None,
) -> int:
    """Audits, plans and preprocesses a dataset; the command's exit code. `device`: for --check."""
    from umamba.planning.cases import default_workers
    from umamba.planning.fingerprint import fingerprint_dataset
    from umamba.planning.planner import default_plans_name, plan_dataset
    from umamba.planning.plans import plans_file, save_plans
    from umamba.planning.preprocess import preprocess_dataset

    store = case_store(args)
    if not args.no_audit:
        common.refuse_faults(dataset, workspace, None if store is None else store.keep)
    common.check_recipe(recipe, dataset)
    n_workers = args.np or default_workers(dataset.name)
    store = store if n_workers == 1 else None
    fingerprint_dataset(dataset.name, n_workers, stock=args.stock, store=store)
    name = default_plans_name(entry.name, network_args, recipe.get("name"))
    name = args.plans_name or name + option_suffix(args)
    plans = plan_dataset(
        dataset.name,
        network=entry.name,
        plans_name=name,
        memory_gb=args.memory,
        network_args=network_args,
        recipe=recipe,
        configurations=args.configuration,
        overwrite_target_spacing=args.target_spacing,
    )
    names, plans_name = list(plans["configurations"]), plans["plans_name"]
    for name in names:
        print(describe_configuration(plans, name))
    print(f"plans: {plans_file(dataset.name, plans_name)}")
    common.tell_pretrained(plans, names)
    if args.check and device and not check(plans, names, dataset.dataset_json, device):
        return 1
    if not args.no_preprocess:
        how = {"stock": args.stock, "device": common.preprocessing_device(args)}
        folders = preprocess_dataset(dataset.name, plans_name, names, n_workers, store=store, **how)
        for folder in dict.fromkeys(folders.values()):
            print(f"preprocessed: {folder}")
    save_plans(common.settle_sampling(plans, names, args))
    first = "3d_fullres" if "3d_fullres" in names else names[0]
    words = ["umamba", "train", args.dataset, first, "0", "-p", plans_name]
    if args.workspace:
        words += ["--workspace", args.workspace]
    print(f"train: {shlex.join(words)}")
    return 0


def case_store(args: argparse.Namespace) -> CaseStore | None:
    """What the audit shall keep the cases in; None where others than this process read them."""
    from umamba.preprocessing.case_store import CaseStore

    return None if args.stock or args.np not in (None, 1) else CaseStore()


def option_suffix(args: argparse.Namespace) -> str:
    """What these options add to the plans name: with them it is another experiment."""
    pretrained = "" if args.pretrained is None else "_pretrained"
    recompute = "" if args.recompute == "none" else "_recompute"
    return pretrained + recompute + (f"_{args.sampling}" if args.sampling else "")


def refuse_for_upstream(
    entry: NetworkEntry | UpstreamEntry, args: argparse.Namespace, recipe: Mapping[str, Any]
) -> None:
    """UsageError for what a network of nnU-Net's own has no use for."""
    from umamba.networks import NetworkEntry

    if isinstance(entry, NetworkEntry):
        return
    if args.recompute != "none":
        raise UsageError(f"{entry.name} has no mixers to recompute: leave --recompute out")
    if recipe.get("freeze_encoder"):
        raise UsageError(
            f"recipe {args.recipe} freezes a pretrained encoder, and {entry.name} has none: choose "
            "another --recipe, or none"
        )


def parse_network_args(words: Sequence[str], entry: NetworkEntry | UpstreamEntry) -> dict[str, Any]:
    """Returns `key=json` words as a dict; a value that is no JSON is taken as text.

    Raises UsageError for what is not such a word, or no argument of the network.
    """
    from umamba.planning.topology import check_network_args

    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise UsageError(f"--network-arg {word!r} is not KEY=VALUE, for example d_state=32")
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            if value[:1] in "[{":
                raise UsageError(f"--network-arg {word!r}: the value is not valid JSON") from None
            arguments[key] = value
    with common.usage_errors():
        check_network_args(entry, arguments)
    return arguments


def describe_configuration(plans: Mapping[str, Any], name: str) -> str:
    """Returns the lines that tell a person what was planned for one configuration."""
    from umamba.planning.plans import get_configuration

    part = get_configuration(plans, name)
    facts = part["planning"]
    features = part["architecture"]["arch_kwargs"].get("features_per_stage")
    named = part.get("recipe", {}).get("name")
    size = f"{facts['parameters'] / 1e6:.1f} M parameters"
    if features:
        size += ", features " + "-".join(map(str, features))
    spacing = " x ".join(f"{mm:.3g}" for mm in part["spacing"])
    patch = "x".join(map(str, part["patch_size"]))
    lines = [
        f"{name}: {plans['umamba']['network']}, {size}",
        f"spacing {spacing} mm, patch {patch}, batch {part['batch_size']}, "
        f"{part['normalization_schemes'][0]}{f', recipe {named}' if named else ''}",
        *facts["reasons"],
    ]
    return "\n  ".join(lines)


def check(
    plans: dict[str, Any], names: Sequence[str], dataset_json: dict[str, Any], device: str
) -> bool:
    """Runs a step of each configuration's training on noise; prints planned against measured.

    Returns whether all losses are finite. Raises ValueError where the memory does not suffice.
    """
    import functools

    from umamba.planning.plans import check_plan
    from umamba.training.dry_run import DryRun

    finite = True
    for name in names:
        make_step = functools.partial(DryRun, plans, name, dataset_json, device)
        try:
            step = check_plan(plans, name, device, make_step)
        except MemoryError as error:
            raise ValueError(
                f"a training step of {name} as planned does not fit into the memory here ({error}):"
                f" give --memory less than the {plans_memory(plans, name):g} GB it is planned for"
            ) from error
        finite = finite and step.finite
        print(
            f"check {name}: one step on {step.device} takes {step.seconds:.2f} s "
            f"({step.cpu_seconds:.2f} CPU-s), an epoch of {STEPS_PER_EPOCH} "
            f"{STEPS_PER_EPOCH * step.seconds / 60:.0f} minutes\n"
            f"  planned {step.counted_bytes / 2**30:.2f} GB, measured "
            f"{step.peak_bytes / 2**30:.2f} GB at the peak\n"
            f"  {'the loss is finite' if step.finite else 'THE LOSS IS NOT FINITE'}"
        )
    return finite


def plans_memory(plans: Mapping[str, Any], name: str) -> float:
    """The GB that a configuration is planned for."""
    from umamba.planning.plans import get_configuration

    return float(get_configuration(plans, name)["planning"]["memory_gb"])
