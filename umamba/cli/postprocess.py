"""`umamba postprocess`: keep the largest components in predictions, as `umamba best` determined.

A label map that cannot be read is named at the end, all others are done (exit code 3).
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from umamba.cli import common
from umamba.cli.evaluate import ENDINGS


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    add = common.add_command(subparsers, "postprocess", run, __doc__, "-t").add_argument
    add("-i", "--input", required=True, type=Path, metavar="FOLDER", help="predicted label maps")
    add("-o", "--output", required=True, type=Path, metavar="FOLDER")
    add(
        "--postprocessing", required=True, type=Path, metavar="FILE",
        help="postprocessing.json of umamba best or of nnU-Net",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Writes all label maps; returns 0, or 3 where some failed, or 1 where all did."""
    from umamba.evaluation.postprocessing import postprocess_files, read_postprocessing
    from umamba.files import replacing

    groups = read_postprocessing(args.postprocessing)
    if not args.input.is_dir():
        raise FileNotFoundError(f"-i {args.input} is not a folder; give a folder of label maps")
    if args.output.resolve() == args.input.resolve():
        raise common.UsageError("-o is the folder of -i; give another one, to keep the predictions")
    found = sorted(f for f in args.input.iterdir() if f.name.endswith(ENDINGS) and f.is_file())
    files = {file: args.output / file.name for file in found if not file.name.startswith(".")}
    if not files:
        raise ValueError(f"{args.input} holds no label maps ({', '.join(ENDINGS)})")
    with common.progress_bar("post-processing") as progress:
        failures = postprocess_files(files, groups, args.threads, progress)
    n_written = len(files) - len(failures)
    for name in ("dataset.json", "plans.json"):  # umamba evaluate reads the labels there
        if n_written and (args.input / name).is_file():
            with replacing(args.output / name) as temporary:
                shutil.copy(args.input / name, temporary)
    print(f"{n_written} of {len(files)} label maps post-processed -> {args.output}")
    return common.tell_failures(failures, n_written)
