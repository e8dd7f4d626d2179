"""`umamba env [DATASET]`: print the variables that nnU-Net's own commands need.

After eval "$(umamba env DATASET)" they use the same folders and find UMambaTrainer.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from umamba.cli import common


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = common.add_command(subparsers, "env", run, __doc__, "--workspace")
    parser.add_argument("dataset", nargs="?", help="id, name or folder of a dataset")


def run(args: argparse.Namespace) -> int:
    """Prints an export line per variable; makes no folder."""
    from umamba.data.workspace import resolve_workspace

    folder = None
    if args.dataset:
        path = Path(args.dataset).expanduser()
        if path.is_dir():
            folder = path.resolve()
        elif "/" in args.dataset or path.exists():
            raise FileNotFoundError(f"There is no folder {path}; give the folder of the dataset")
    workspace = resolve_workspace(folder, args.workspace)
    for name, value in {**workspace.variables(), "nnUNet_extTrainer": common.TRAINERS}.items():
        print(f"export {name}={shlex.quote(str(value))}")
    return 0
