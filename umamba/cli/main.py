"""The `umamba` command: finds the subcommand, runs it, and turns errors into one sentence."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import umamba
from umamba.cli.common import UsageError
from umamba.files import describe_error, discard_unfinished

COMMANDS = (
    "run", "audit", "plan", "train", "best", "predict", "ensemble", "postprocess", "evaluate",
    "report", "models", "demo", "doctor", "env",
)  # fmt: skip
GRACE = 5.0  # seconds between the wish to stop and the end of the process


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
    try:
        with stopping_quickly():
            code = run_command([word for word in words if word != "--debug"])
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        return 1
    except BrokenPipeError:  # what reads our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in words:
            raise
        print(f"error: {tell(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def run_command(words: list[str]) -> int:
    """Sets the process up and runs the command of these words; returns its exit code."""
    # Read when torch loads GNU's OpenMP. Threads that wait spinning (its default) starve the data
    # loaders: with one more process than cores a step took twice as long; sleeping at once instead
    # costs a tenth on an idle machine. This many turns, some microseconds, do neither.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Large tensors in huge pages: half the time of a sliding window on a CPU is page faults.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    parser = build_parser()
    args = parser.parse_args(words)
    if args.version:
        print(f"umamba {umamba.__version__}")
        return 0
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    keep_freed_memory()
    return int(args.run(args))


def tell(error: Exception) -> str:
    """One sentence for an error; an unexpected one is a bug, and has the way to the traceback."""
    if isinstance(error, OSError):
        return describe_error(error)
    if isinstance(error, ValueError):
        return str(error)
    return f"{type(error).__name__}: {error}\n(the traceback: the same command with --debug)"


@contextlib.contextmanager
def stopping_quickly() -> Iterator[None]:
    """Makes SIGTERM stop the block as Ctrl-C does, and the process end soon after either.

    What is in the way then, such as a thread that works on a large volume, gets `GRACE` seconds;
    at a second signal, none. Half-written files are removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def leave() -> None:
        discard_unfinished()
        os._exit(1)

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a forked child, which its parent ends by SIGTERM
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif timer.is_alive():
            leave()
        else:
            timer.start()
            raise KeyboardInterrupt

    timer = threading.Timer(GRACE, leave)
    timer.daemon = True
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except Exception:
        if not timer.is_alive():
            raise
        # Of what was cut off: numpy, stopped while it is imported, recurses without end.
        raise KeyboardInterrupt from None
    finally:
        if not timer.is_alive():
            for number, handler in before.items():
                signal.signal(number, handler)


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


def run_and_leave() -> NoReturn:
    """Runs the command of sys.argv and ends the process, as multiprocessing ends its children.

    Python would first take apart all that torch has loaded: up to a second more.
    """
    code = main()
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError):  # told by main
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run_and_leave()
