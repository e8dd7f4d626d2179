"""`umamba ensemble FOLDER FOLDER...`: average the probabilities of several predictions.

The folders are those of `umamba predict --save_probabilities` (or nnUNetv2_predict). A case that
is damaged or that a folder lacks is named at the end, all others are done (exit code 3).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from umamba.cli import common
from umamba.lock import holding


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    add = common.add_command(subparsers, "ensemble", run, __doc__).add_argument
    add("folders", type=Path, nargs="+", metavar="FOLDER", help="predictions with .npz")
    add("-o", "--output", required=True, type=Path, metavar="FOLDER")


def run(args: argparse.Namespace) -> int:
    """Averages all cases; returns 0, or 3 where some failed, or 1 where all did."""
    from umamba.inference.ensemble import ensemble_folders

    if len({folder.resolve() for folder in args.folders}) < 2:
        raise common.UsageError("an ensemble has two members at least: give different folders")
    if args.output.resolve() in {folder.resolve() for folder in args.folders}:
        raise common.UsageError("-o is one of the members; give a folder of its own")
    with holding(args.output, "averaging"), common.progress_bar("averaging") as progress:
        failures, n_cases = ensemble_folders(args.folders, args.output, progress)
    n_written = n_cases - len(failures)
    print(f"{n_written} of {n_cases} cases averaged -> {args.output}")
    return common.tell_failures([f"{f.identifier}: {f.reason}" for f in failures], n_written)
