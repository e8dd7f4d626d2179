"""`umamba env [DATASET]`: nnU-Net's variables, for `eval "$(umamba env)"` before its commands."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "env",
        help="print the variables that nnU-Net's own commands need",
        description='Print shell lines for eval "$(umamba env DATASET)"; after it nnU-Net\'s own '
        "commands use the same folders and find UMambaTrainer.",
    )
    parser.add_argument(
        "dataset", metavar="DATASET", nargs="?", help="id, name or folder of a dataset"
    )
    parser.add_argument("--workspace", metavar="DIR", help="where linked data and results go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import shlex
    from pathlib import Path

    import umamba
    from umamba.data.workspace import resolve_workspace

    folder = Path(args.dataset).expanduser() if args.dataset else None
    is_folder = folder is not None and folder.is_dir()
    if folder is not None and not is_folder and ("/" in args.dataset or folder.exists()):
        raise FileNotFoundError(f"There is no folder {folder}; give the folder of the dataset")
    workspace = resolve_workspace(
        folder.resolve() if folder and is_folder else None, args.workspace
    )
    trainers = Path(str(umamba.__file__)).parent / "training" / "nnunet_trainers"
    for name, value in {**workspace.variables(), "nnUNet_extTrainer": trainers}.items():
        print(f"export {name}={shlex.quote(str(value))}")
    return 0
