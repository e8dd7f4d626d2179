"""`umamba models`: lists networks, shows one, imports checkpoints, fetches ImageNet weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from umamba.cli.common import UsageError, add_command, find_network, parse_fold
from umamba.cli.fetch import run_fetch
from umamba.cli.plan import parse_network_args

if TYPE_CHECKING:
    from umamba.planning.upstream import UpstreamEntry


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    text = "list networks, show one, import official checkpoints, fetch ImageNet weights"
    parser = subparsers.add_parser("models", help=text, description=text)
    actions = parser.add_subparsers(metavar="list|show|fetch|import", dest="action", required=True)

    add = add_command(actions, "list", run_list, run_list.__doc__).add_argument
    add("--dims", type=int, choices=(2, 3), help="only those for 2D or 3D images")
    add("--controls", action="store_true", help="the _noscan and _convmix controls, too")
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
    """List all networks, with their parameters in nnU-Net's plan for large images."""
    from umamba.networks import list_modules
    from umamba.planning.overview import all_networks, millions, overview
    from umamba.planning.upstream import UPSTREAM

    names = all_networks(args.dims, controls=args.controls)
    rows = [overview(name) for name in names]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = [["network", "parameters", "paper", "equals (tested)", "its licence", "ImageNet"]]
    for row in rows:
        parameters = ", ".join(f"{dims} {millions(n)}" for dims, n in row["parameters"].items())
        repository, commit = row["equals"].split("@")
        origin = f"{repository}@{commit[:7]}" if row["name"] not in UPSTREAM else "nnU-Net itself"
        table.append([row["name"], parameters, row["paper"], origin, row["licence"]])
        table[-1].append("yes" if row["pretrained"] else "")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        print("  ".join(f"{cell:{n}}" for cell, n in zip(cells, widths, strict=True)).rstrip())
    if not args.controls:
        print("\nthose with a scan also as NAME_noscan and NAME_convmix (--controls lists them)")
    if not args.dims:
        print(f"modules that plans cannot name: {', '.join(list_modules())}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Draw a network; tell where it comes from, what was kept of it and what it takes."""
    import inspect

    from umamba.networks import NetworkEntry, get_module, list_modules
    from umamba.planning.upstream import UpstreamEntry
    from umamba.training.recipes import official_recipes

    is_module = args.name.replace("-", "_") in list_modules()
    entry = get_module(args.name) if is_module else find_network(args.name)
    print(entry.name)
    if isinstance(entry, UpstreamEntry):
        show_upstream(entry)
        return 0
    rows = {
        "class": entry.class_path,
        "paper": entry.paper,
        "equals": f"{entry.reference} ({entry.licence})",
    }
    if isinstance(entry, NetworkEntry):
        rows["dimensions"] = ", ".join(f"{d}D" for d in entry.spatial_dims)
        rows["strides"] = str(entry.fixed_strides or "chosen by the planner")
        if entry.control_of:
            rows["control of"] = entry.control_of
    if entry.arguments:
        rows["implies"] = ", ".join(f"{k}={v!r}" for k, v in entry.arguments.items())
    if recipes := official_recipes(getattr(entry, "control_of", None) or entry.name):
        rows["recipe"] = f"{' or '.join(recipes)} (--recipe), nnU-Net's if not given"
    for label, value in rows.items():
        print(f"  {label:<11}{value}")
    print(f"\n{inspect.getdoc(inspect.getmodule(entry.cls))}")
    print(f"\n{inspect.getdoc(entry.cls)}")
    if entry.quirks:
        print("\nkept from the official code")
        for quirk in entry.quirks:
            print(f"- {quirk}")
    print(f"\narguments (of {'create_module' if is_module else 'the plans: arch_kwargs'})")
    parameters = inspect.signature(entry.cls).parameters
    for name in entry.keywords:
        default = entry.arguments.get(name, parameters[name].default)
        print(f"  {name}{'' if default is inspect.Parameter.empty else f' = {default!r}'}")
    if files := getattr(entry.cls, "pretrained_files", ()):
        print(f"\nImageNet weights (umamba models fetch): {', '.join(files)}")
    return 0


def show_upstream(entry: UpstreamEntry) -> None:
    """Prints where one of nnU-Net's own networks comes from, its planner, and what it takes."""
    planner = entry.planner_path.rsplit(".", 1)[1]
    rows = {
        "class": entry.class_path,
        "paper": entry.paper,
        "is": f"{entry.reference} ({entry.licence}), nnU-Net's own network",
        "planner": f"{planner}, which plans for {entry.memory_gb:g} GB",
        "dimensions": ", ".join(f"{d}D" for d in entry.spatial_dims),
        "strides": "chosen by the planner",
        "recipe": "nnU-Net's",
    }
    for label, value in rows.items():
        print(f"  {label:<11}{value}")
    print("\narguments (--network-arg; those not given are the planner's)")
    for name in entry.keywords:
        print(f"  {name}")


def run_import(args: argparse.Namespace) -> int:
    """Turn an official checkpoint into a model folder.

    Reads it with the plans.json and dataset.json of its training; `umamba predict -m` and nnU-Net
    load the folder. Arguments of the network that neither tells can be given with --network-arg.
    """
    fold, entry = parse_fold(args.fold), find_network(args.network)
    from umamba.networks import NetworkEntry

    if not isinstance(entry, NetworkEntry):
        raise UsageError(
            f"{entry.name} is nnU-Net's own: `umamba predict -m` reads the model folder of its "
            "training as it is, there is nothing to import"
        )
    network_args = parse_network_args(args.network_arg, entry)
    from umamba.inference.import_checkpoint import import_checkpoint

    files = (args.checkpoint, args.plans, args.dataset_json, args.output)
    options = {"configuration": args.configuration, "fold": fold, "network_args": network_args}
    report = import_checkpoint(entry.name, *files, **options)
    print(report)
    print(f"model folder: {args.output}")
    print(f"next: umamba predict -m {args.output} -i IMAGES -o SEGMENTATIONS")
    return 0
