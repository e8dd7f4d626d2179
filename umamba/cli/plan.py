"""`umamba plan`: fingerprint, plans and preprocessing of a dataset for one network."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the `plan` command."""
    parser = subparsers.add_parser(
        "plan",
        help="fingerprint, plans and preprocessing of a dataset for one network",
        description="Reads the dataset, lets nnU-Net plan it, puts the network in, makes patch "
        "and batch fit the memory, and preprocesses the cases.",
    )
    parser.add_argument(
        "dataset", help="nnU-Net folder, id, name, MSD folder, or images/ + labels/"
    )
    parser.add_argument("--network", default="umamba_bot", help="see `umamba models list`")
    parser.add_argument("-p", "--plans-name", help="default: the network's name")
    parser.add_argument(
        "-c",
        "--configuration",
        nargs="+",
        metavar="CONFIG",
        help="2d, 3d_fullres, 3d_lowres, 3d_cascade_fullres (all that make sense)",
    )
    parser.add_argument("--memory", type=float, metavar="GB", help="memory to plan for")
    parser.add_argument("--network-arg", action="append", default=[], metavar="KEY=JSON")
    parser.add_argument(
        "-overwrite_target_spacing",
        "--target-spacing",
        type=float,
        nargs="+",
        metavar="MM",
        help="spacing to train at, three numbers in the images' axis order (z y x)",
    )
    parser.add_argument("--check", action="store_true", help="dry-run one training step per plan")
    parser.add_argument("-device", "--device", help="device of the dry run (cuda if there)")
    parser.add_argument("--no-audit", action="store_true", help="do not look for faulty files")
    parser.add_argument("--no-preprocess", action="store_true", help="stop after the plans")
    parser.add_argument("-np", type=int, help="processes (1 for small data)")
    parser.add_argument("--workspace", help="folder for raw, preprocessed and results")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Plans and preprocesses; prints what was planned, where it is, and the next command."""
    from umamba.cli.main import UsageError

    _check_usage(args)
    network_args = parse_network_args(args.network_arg)
    from umamba.networks import get_entry
    from umamba.planning.network_block import check_configurations, check_network_args

    try:
        entry = get_entry(args.network)
        check_network_args(entry, network_args)
        check_configurations(args.configuration)
    except ValueError as error:
        raise UsageError(str(error)) from error
    from umamba.data.dataset import prepare_dataset
    from umamba.planning.cases import default_workers
    from umamba.planning.planner import plan_dataset
    from umamba.planning.plans import plans_file
    from umamba.planning.preprocess import fingerprint_dataset, preprocess_dataset

    dataset, workspace = prepare_dataset(args.dataset, args.workspace, strict=args.no_audit)
    print(workspace.describe())
    for note in dataset.notes:
        print(f"note: {note}")
    if not args.no_audit:
        _audit(dataset)
    n_workers = args.np or default_workers(dataset.name)
    fingerprint_dataset(dataset.name, n_workers)
    plans = plan_dataset(
        dataset.name,
        network=entry.name,
        plans_name=args.plans_name,
        memory_gb=args.memory,
        network_args=network_args,
        configurations=args.configuration,
        overwrite_target_spacing=args.target_spacing,
    )
    names = list(plans["configurations"])
    for name in names:
        for line in describe_configuration(plans, name):
            print(line)
    print(f"plans: {plans_file(dataset.name, plans['plans_name'])}")
    if args.check and not _check(plans, names, args.device):
        return 1
    if not args.no_preprocess:
        folders = preprocess_dataset(dataset.name, plans["plans_name"], names, n_workers)
        for folder in dict.fromkeys(folders.values()):
            print(f"preprocessed: {folder}")
    first = "3d_fullres" if "3d_fullres" in names else names[0]
    place = f" --workspace {args.workspace}" if args.workspace else ""
    print(f"train: umamba train {args.dataset} {first} 0 -p {plans['plans_name']}{place}")
    return 0


def parse_network_args(words: Sequence[str]) -> dict[str, Any]:
    """Returns `key=json` words as a dict; a value that is no JSON is taken as text."""
    import json

    from umamba.cli.main import UsageError

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
    return arguments


def describe_configuration(plans: dict[str, Any], name: str) -> list[str]:
    """Returns the lines that tell a person what was planned for one configuration."""
    from umamba.planning.plans import get_configuration

    part = get_configuration(plans, name)
    arguments = part["architecture"]["arch_kwargs"]
    facts = part["planning"]
    features = arguments.get("features_per_stage")
    size = f"{facts['parameters'] / 1e6:.1f} M parameters"
    if features:
        size += ", features " + "-".join(map(str, features))
    spacing = " x ".join(f"{mm:.3g}" for mm in part["spacing"])
    patch = "x".join(map(str, part["patch_size"]))
    return [
        f"{name}: {plans['umamba']['network']}, {size}",
        f"  spacing {spacing} mm, patch {patch}, batch {part['batch_size']}, "
        f"{part['normalization_schemes'][0]}",
        *(f"  {reason}" for reason in facts["reasons"]),
    ]


def _check_usage(args: argparse.Namespace) -> None:
    from umamba.cli.main import UsageError

    if args.memory is not None and args.memory <= 0:
        raise UsageError(f"--memory {args.memory:g} makes no sense; give gigabytes above 0")
    if args.np is not None and args.np < 1:
        raise UsageError(f"-np {args.np} makes no sense; give at least 1")
    spacing = args.target_spacing
    if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
        raise UsageError("-overwrite_target_spacing takes three numbers above 0, in mm")


def _audit(dataset: Any) -> None:
    from umamba.data.audit import audit_dataset

    report = audit_dataset(dataset)
    report.raise_if_faults()
    for warning in report.warnings:
        print(f"warning: {warning}")


def _check(plans: dict[str, Any], names: Sequence[str], device: str | None) -> bool:
    from umamba.planning.plans import check_plan

    finite = True
    for name in names:
        step = check_plan(plans, name, device=device)
        finite = finite and step.finite
        print(
            f"check {name}: one step on {step.device} takes {step.seconds:.2f} s "
            f"({step.cpu_seconds:.2f} CPU-s), peak {step.peak_bytes / 2**30:.2f} GB "
            f"(planned {step.counted_bytes / 2**30:.2f} GB), "
            f"{'the loss is finite' if step.finite else 'THE LOSS IS NOT FINITE'}"
        )
    return finite
