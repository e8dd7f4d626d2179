"""`umamba report RUN...`: one self-contained HTML page: result, cases, curves and plan of runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from umamba.cli.common import add_command


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    add = add_command(subparsers, "report", run, __doc__, "--workspace").add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="model folder or a fold of it")
    add("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the first RUN")
    add("--raw", type=Path, metavar="DIR", help="raw dataset folder (imagesTr)")
    add("--references", type=Path, metavar="DIR", help="folder of label maps")


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where."""
    from umamba.report.page import build_report

    output = args.output if args.output is not None else args.runs[0]
    if output.is_dir() or not output.suffix:
        output = output / "report.html"
    raw, references = find_data(args.runs[0], args.workspace)
    page = build_report(args.runs, output, args.raw or raw, args.references or references)
    print(f"Written: {page.absolute()}")
    return 0


def find_data(run_folder: Path, workspace: str | None) -> tuple[Path | None, Path | None]:
    """Returns the raw folder of the run's dataset and the folder of its references, if found.

    Looked for in --workspace, beside the results folder, and where nnU-Net's variables point.
    """
    run_folder = run_folder.absolute()
    model_folder = run_folder.parent if run_folder.name.startswith("fold_") else run_folder
    dataset, results = model_folder.parent.name, model_folder.parent.parent
    roots = [Path(workspace)] if workspace else []
    roots.append(results.parent)

    def places(name: str) -> list[Path]:
        folders = [root / folder for root in roots for folder in (name, f"nnUNet_{name}")]
        variable = os.environ.get(f"nnUNet_{name}")
        if variable:
            folders.append(Path(variable))
        return [folder / dataset for folder in folders]

    raw, preprocessed = places("raw"), places("preprocessed")
    references = [folder / "gt_segmentations" for folder in preprocessed]
    return _first_folder(raw), _first_folder(references + [folder / "labelsTr" for folder in raw])


def _first_folder(candidates: Sequence[Path]) -> Path | None:
    return next((folder for folder in candidates if folder.is_dir()), None)
