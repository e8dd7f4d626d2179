"""Lets two commands that would write into the same folder notice each other."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NO_LOCKS_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""Nothing can be locked in this folder; where it cannot be written either, the writer says so."""

_held: set[int] = set()


class InUseError(OSError):
    """Another process is at work in a folder; the sentence says which."""


@contextlib.contextmanager
def holding(folder: Path, purpose: str, part: int = 0) -> Iterator[None]:
    """Keep other processes that ask for the same `folder` out while the block runs; advisory.

    Args:
        folder: made where it is missing, and removed again if nothing was written to it. A hidden
            file in it is the lock, removed at the end; one that a killed process left holds nobody
            up.
        purpose: what is done meanwhile, for others to read: "training".
        part: processes with different parts may share the folder.

    Raises InUseError at once where another process holds it, with its id, host, start and command.
    """
    file, is_new = folder / f".umamba_{part}.lock", not os.path.exists(folder)
    descriptor = _open_locked(file)
    if descriptor is None:
        yield
        return
    _held.add(descriptor)
    try:
        now = datetime.now().isoformat(" ", "seconds")
        who = {"purpose": purpose, "pid": os.getpid(), "host": socket.gethostname(), "since": now}
        who["command"] = shlex.join(["umamba", *sys.argv[1:]])
        with contextlib.suppress(OSError):  # a full disk: whoever writes results will say so
            os.write(descriptor, json.dumps(who).encode())
        yield
    finally:
        _held.discard(descriptor)
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(descriptor)
        with contextlib.suppress(OSError):
            file.unlink()
            if is_new:
                folder.rmdir()
        if sys.platform != "win32":
            os.close(descriptor)


def _open_locked(file: Path) -> int | None:
    """Return a locked, empty file's descriptor; None where the folder does not allow locks."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in NO_LOCKS_HERE:
                return None
            raise
        with contextlib.suppress(PermissionError):  # by whom it is not owned
            file.chmod(0o666)  # else nobody else could open and lock it in a folder for all
        try:
            _lock(descriptor)
            # Its last holder may have removed the file between the two calls.
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                os.ftruncate(descriptor, 0)
                return descriptor
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(descriptor)
            raise InUseError(_sentence(file)) from None
        except OSError as error:
            os.close(descriptor)
            if error.errno in NO_LOCKS_HERE:
                return None
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock or raise BlockingIOError; the system unlocks when the process ends, however it ends."""
    if sys.platform == "win32":
        try:
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # far behind the text, which others may read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        except PermissionError:
            raise BlockingIOError from None
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _sentence(file: Path) -> str:
    try:
        who = json.loads(file.read_text())
        holder = f"{who['purpose']}: process {who['pid']} on {who['host']} since {who['since']}"
        holder += f", {who['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        holder = "another umamba process"
    return (
        f"{file.parent} is in use ({holder}): wait until that has ended, or end it, "
        "and run this command again"
    )


def _let_go() -> None:
    """In a forked child: the lock stays the parent's alone."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
