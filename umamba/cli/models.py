"""`umamba models`: lists networks, shows one, imports checkpoints, fetches ImageNet weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from umamba.cli.common import add_command, find_network, parse_fold, usage_errors
from umamba.cli.fetch import run_fetch
from umamba.cli.plan import parse_network_args


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    text = "list networks, show one, import official checkpoints, fetch ImageNet weights"
    parser = subparsers.add_parser("models", help=text, description=text)
    actions = parser.add_subparsers(metavar="list|show|fetch|import", dest="action", required=True)

    add = add_command(actions, "list", run_list, run_list.__doc__).add_argument
    add("--dims", type=int, choices=(2, 3), help="only those for 2D or 3D images")
    add("--json", action="store_true", help="print JSON")

    add_command(actions, "show", run_show, run_show.__doc__).add_argument("name", metavar="NAME")

    add = add_command(actions, "fetch", run_fetch, run_fetch.__doc__).add_argument
    add("name", metavar="NAME", help="of the weights, or of a network that starts from some")
    add("--download", action="store_true", help="get the file")
    add("--sha256", metavar="HEX", help="checksum that the file must have")
    add("--trust", action="store_true", help="take a file of which no checksum is known")

    shared = "-f --network-arg"
    add = add_command(actions, "import", run_import, run_import.__doc__, shared).add_argument
    add("--network", required=True, metavar="NAME")
    for file in ("--checkpoint", "--dataset-json"):
        add(file, required=True, type=Path, metavar="FILE")
    add("--plans", type=Path, metavar="FILE", help="plans.json; not needed for segmamba")
    add("-o", "--output", required=True, type=Path, metavar="FOLDER")
    add("-c", "--configuration", help="default: the one that the checkpoint names")


def run_list(args: argparse.Namespace) -> int:
    """List the registered networks."""
    from umamba.networks import get_entry, list_networks

    names = list_networks(args.dims)
    if args.json:
        print(json.dumps(names))
        return 0
    width = max(map(len, names))
    for name in names:
        entry = get_entry(name)
        dims = ", ".join(f"{d}D" for d in entry.spatial_dims)
        what = f"control of {entry.control_of}" if entry.control_of else entry.reference[:60]
        print(f"{name:{width}}  {dims:6}  {what}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Tell where a network comes from and what it takes."""
    import inspect

    entry = find_network(args.name)
    print(entry.name)
    print(f"  {(inspect.getdoc(entry.cls) or '').splitlines()[0]}")
    rows = {
        "class": entry.class_path,
        "dimensions": ", ".join(f"{d}D" for d in entry.spatial_dims),
        "paper": entry.paper,
        "equals": f"{entry.reference} ({entry.licence})",
        "strides": entry.fixed_strides or "chosen by the planner",
    }
    if entry.control_of:
        rows["control of"] = entry.control_of
        rows["differs by"] = ", ".join(f"{k}={v!r}" for k, v in entry.arguments.items())
    for label, value in rows.items():
        print(f"  {label:<11}{value}")
    print("  arguments (of the plans' arch_kwargs)")
    parameters = inspect.signature(entry.cls).parameters
    for name in entry.keywords:
        default = parameters[name].default
        print(f"    {name}{'' if default is inspect.Parameter.empty else f' = {default!r}'}")
    if files := getattr(entry.cls, "pretrained_files", ()):
        print(f"  ImageNet weights (umamba models fetch): {', '.join(files)}")
    if entry.quirks:
        print("  kept from the official code")
        for quirk in entry.quirks:
            print(f"    - {quirk}")
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Turn an official checkpoint into a model folder.

    Reads it with the plans.json and dataset.json of its training; `umamba predict -m` and nnU-Net
    load the folder. Arguments of the network that neither tells can be given with --network-arg.
    """
    fold, network_args = parse_fold(args.fold), parse_network_args(args.network_arg)
    entry = find_network(args.network)
    from umamba.planning.topology import check_network_args

    with usage_errors():
        check_network_args(entry, network_args)
    from umamba.inference.import_checkpoint import import_checkpoint

    files = (args.checkpoint, args.plans, args.dataset_json, args.output)
    options = {"configuration": args.configuration, "fold": fold, "network_args": network_args}
    report = import_checkpoint(entry.name, *files, **options)
    print(report)
    print(f"model folder: {args.output}")
    print(f"next: umamba predict -m {args.output} -i IMAGES -o SEGMENTATIONS")
    return 0
