"""The `umamba` command: finds the subcommand, runs it, and turns errors into one sentence."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = (
    "run",
    "audit",
    "plan",
    "train",
    "predict",
    "evaluate",
    "report",
    "models",
    "demo",
    "doctor",
    "env",
)


class UsageError(ValueError):
    """A wrong name or combination of arguments: exit code 2."""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands; importing their files loads nothing heavy."""
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
    debug = "--debug" in words
    # Read when torch loads GNU's OpenMP. Threads that wait spinning (its default) starve the data
    # loaders: with one more process than cores a step took twice as long; sleeping at once instead
    # costs a tenth on an idle machine. This many turns, some microseconds, do neither.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    parser = build_parser()
    args = parser.parse_args([word for word in words if word != "--debug"])
    if args.version:
        from importlib.metadata import version

        print(f"umamba {version('umamba')}")
        return 0
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    _keep_freed_memory()
    try:
        return int(args.run(args) or 0)
    except UsageError as error:
        return _fail(error, 2, debug)
    except (ValueError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        return _fail(error, 1, debug)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        return 1
    except Exception as error:  # the last resort: named, with the traceback at hand
        if debug:
            raise
        message = f"{type(error).__name__}: {error}"
        print(f"error: {message}\n(the traceback: the same command with --debug)", file=sys.stderr)
        return 1


def _keep_freed_memory() -> None:
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


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        raise error
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    # Under its own name, so that commands raise the very UsageError that is caught here.
    sys.exit(importlib.import_module("umamba.cli.main").main())
