"""The `umamba` command: finds the subcommand, runs it, and turns errors into one sentence."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

import umamba
from umamba.cli.common import UsageError

COMMANDS = (
    "run", "audit", "plan", "train", "predict", "evaluate",
    "report", "models", "demo", "doctor", "env",
)  # fmt: skip
PLAIN_ERRORS = (ValueError, FileNotFoundError, PermissionError, NotADirectoryError)
"""Those whose sentence says all; others are bugs, and named with the way to the traceback."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with the `add_parser` of all commands; importing these loads nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="umamba",
        description="Medical image segmentation with U-shaped Mamba networks, nnU-Net style.",
        epilog="Start with: umamba demo   or   umamba run DATASET_FOLDER",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"umamba.cli.{name}").add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0 done, 1 failed, 2 usage, 3 some cases failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # Read when torch loads GNU's OpenMP. Threads that wait spinning (its default) starve the data
    # loaders: with one more process than cores a step took twice as long; sleeping at once instead
    # costs a tenth on an idle machine. This many turns, some microseconds, do neither.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parser = build_parser()
    args = parser.parse_args([word for word in words if word != "--debug"])
    if args.version:
        print(f"umamba {umamba.__version__}")
        return 0
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    keep_freed_memory()
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        return 1
    except Exception as error:
        if "--debug" in words:
            raise
        message = f"error: {error}"
        if not isinstance(error, PLAIN_ERRORS):
            message = f"error: {type(error).__name__}: {error}"
            message += "\n(the traceback: the same command with --debug)"
        print(message, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors give back instead of asking the system for new pages each step.

    Zeroing pages was an eighth of a training step on a CPU.  Arrays of 256 MiB and more still go
    back to the system, so that a large volume does not stay in memory.
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # names of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, 2**28)
        library.mallopt(trim_threshold, -1)


if __name__ == "__main__":
    sys.exit(main())
