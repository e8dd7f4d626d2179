"""`umamba models`: lists networks, shows one, and imports official checkpoints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command and its three actions."""
    parser = subparsers.add_parser(
        "models",
        help="list networks, show one, import official checkpoints",
        description="The registered networks, and official checkpoints as model folders.",
    )
    actions = parser.add_subparsers(metavar="list|show|import", dest="action", required=True)

    listing = actions.add_parser("list", help="the registered networks")
    listing.add_argument("--dims", type=int, choices=(2, 3), help="only those for 2D or 3D images")
    listing.add_argument("--json", action="store_true", help="print JSON")
    listing.set_defaults(run=run_list)

    showing = actions.add_parser("show", help="where a network comes from and what it takes")
    showing.add_argument("name", metavar="NAME")
    showing.set_defaults(run=run_show)

    importing = actions.add_parser(
        "import",
        help="turn an official checkpoint into a model folder",
        description="Reads an official checkpoint with the plans.json and dataset.json of its "
        "training, and writes a model folder that `umamba predict -m` and nnU-Net load.",
    )
    importing.add_argument("--network", required=True, metavar="NAME")
    importing.add_argument("--checkpoint", required=True, type=Path, metavar="FILE")
    importing.add_argument("--plans", required=True, type=Path, metavar="FILE")
    importing.add_argument("--dataset-json", required=True, type=Path, metavar="FILE")
    importing.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER")
    importing.add_argument(
        "-c", "--configuration", help="default: the one that the checkpoint names"
    )
    importing.add_argument("-f", "--fold", default="0", help="0 to 4 or all (default: 0)")
    importing.set_defaults(run=run_import)


def run_list(args: argparse.Namespace) -> int:
    """Prints the registered names."""
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
    """Prints all that is known of one network."""
    import inspect

    entry = _entry(args.name)
    dims = ", ".join(f"{d}D" for d in entry.spatial_dims)
    print(entry.name)
    print(f"  {(inspect.getdoc(entry.cls) or '').splitlines()[0]}")
    rows = {
        "class": entry.class_path,
        "dimensions": dims,
        "paper": entry.paper,
        "equals": f"{entry.reference} ({entry.licence})",
        "strides": "chosen by the planner" if entry.fixed_strides is None else entry.fixed_strides,
    }
    if entry.control_of:
        rows["control of"] = entry.control_of
        rows["differs by"] = ", ".join(f"{k}={v!r}" for k, v in entry.arguments.items())
    for label, value in rows.items():
        print(f"  {label:<11}{value}")
    print("  arguments (of the plans' arch_kwargs)")
    for parameter in inspect.signature(entry.cls).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            required = parameter.default is parameter.empty
            print(f"    {parameter.name}{'' if required else f' = {parameter.default!r}'}")
    if entry.quirks:
        print("  kept from the official code")
        for quirk in entry.quirks:
            print(f"    - {quirk}")
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Imports an official checkpoint."""
    from umamba.cli.main import UsageError

    if args.fold != "all" and not args.fold.isdigit():
        raise UsageError(f"fold {args.fold!r} does not exist; choose 0, 1, 2, 3, 4 or all")
    entry = _entry(args.network)
    from umamba.inference.import_checkpoint import import_checkpoint

    report = import_checkpoint(
        entry.name,
        args.checkpoint,
        args.plans,
        args.dataset_json,
        args.output,
        configuration=args.configuration,
        fold=args.fold if args.fold == "all" else int(args.fold),
    )
    print(report)
    print(f"model folder: {args.output}")
    print(f"next: umamba predict -m {args.output} -i IMAGES -o SEGMENTATIONS")
    return 0


def _entry(name: str):  # type: ignore[no-untyped-def]
    """The registry entry; an unknown name is a usage error."""
    from umamba.cli.main import UsageError
    from umamba.networks import get_entry

    try:
        return get_entry(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
