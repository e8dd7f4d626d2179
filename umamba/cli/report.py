"""`umamba report RUN...`: one self-contained HTML page about one or several runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "report",
        help="one HTML page about a run: result, cases, curves, plan",
        description="Writes one self-contained HTML page about one or several runs of a dataset.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="model folder or a fold of it"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: report.html in the first RUN"
    )
    parser.add_argument("--raw", type=Path, metavar="DIR", help="raw dataset folder (imagesTr)")
    parser.add_argument("--references", type=Path, metavar="DIR", help="folder of label maps")
    parser.add_argument("--workspace", type=Path, metavar="DIR", help="workspace of the dataset")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where."""
    from umamba.report.page import build_report

    output = args.output if args.output is not None else args.runs[0] / "report.html"
    if output.is_dir() or not output.suffix:
        output = output / "report.html"
    raw, references = find_data(args.runs[0], args.workspace)
    page = build_report(args.runs, output, args.raw or raw, args.references or references)
    print(f"Written: {page.absolute()}")
    return 0


def find_data(run_folder: Path, workspace: Path | None) -> tuple[Path | None, Path | None]:
    """Returns the raw folder of the run's dataset and the folder of its references, if found.

    Looked for in --workspace, beside the results folder, and where nnU-Net's variables point.
    """
    run_folder = run_folder.absolute()
    model_folder = run_folder.parent if run_folder.name.startswith("fold_") else run_folder
    dataset, results = model_folder.parent.name, model_folder.parent.parent
    roots = [] if workspace is None else [workspace]
    roots.append(results.parent)
    raw = [root / name for root in roots for name in ("raw", "nnUNet_raw")]
    preprocessed = [
        root / name for root in roots for name in ("preprocessed", "nnUNet_preprocessed")
    ]
    for folders, variable in ((raw, "nnUNet_raw"), (preprocessed, "nnUNet_preprocessed")):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]))
    raw_folder = _first_folder([folder / dataset for folder in raw])
    references = [folder / dataset / "gt_segmentations" for folder in preprocessed]
    references += [folder / dataset / "labelsTr" for folder in raw]
    return raw_folder, _first_folder(references)


def _first_folder(candidates: Sequence[Path]) -> Path | None:
    return next((folder for folder in candidates if folder.is_dir()), None)
