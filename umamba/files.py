"""Writes files whole or not at all: to a temporary name beside the target, then renamed.

A disk that fills up, a missing permission and the like become one sentence that names the file and
the cure (`OutputError`), whichever library was writing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NO_ROOM = {
    errno.ENOSPC: "no space is left on its disk; free some or choose another place",
    errno.EDQUOT: "the disk quota of this user is used up; free some or choose another place",
    errno.EFBIG: "it would exceed the size that files may have here; raise that (ulimit -f)",
}
"""Causes that some libraries hide: SimpleITK leaves a NIfTI file cut short without an error."""
NO_WAY = {
    errno.EROFS: "its file system is read-only; choose another place",
    errno.EACCES: "this user may not write there; change the permissions or choose another place",
    errno.EPERM: "this user may not write there; change the permissions or choose another place",
    errno.ENAMETOOLONG: "its name is too long; choose a shorter one",
    errno.ELOOP: "a link in its path leads back to itself; remove that link",
    errno.ENOTDIR: "a part of its path is a file, not a folder; choose another place",
    errno.EEXIST: "a part of its path is a file, not a folder; choose another place",
    errno.EISDIR: "it is a folder; remove that or choose another name",
    errno.EIO: "the disk reports an error; check it",
    errno.ENOENT: "its folder was removed meanwhile; run the same command again",
}
LONGEST_NAME = 255  # bytes, on every common file system
MARGIN = 1 << 16  # more than any library's last write

_unfinished: set[Path] = set()


class OutputError(OSError):
    """A file could not be written; the one sentence names it, the cause and the cure."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden temporary name beside `path`, of its ending; at the end it becomes `path`.

    The folder is made where it is missing. When the block raises, `path` is as it was before.
    Raises OutputError where the file cannot be written.
    """
    ending = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix
    with _temporary(path, ending) as temporary:
        yield temporary
        _check_room(temporary)
        os.replace(temporary, path)


@contextlib.contextmanager
def replacing_together(path: Path) -> Iterator[Path]:
    """Yield a hidden folder; at the end what is in it moves beside `path`, `path` itself last.

    For files that belong together: where `path` is there, the others are. Else as `replacing`.
    """
    with _temporary(path, "") as folder:
        folder.mkdir()
        yield folder
        written = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
        for file in folder.rglob("*"):
            _check_room(file)
        for file in written:
            os.replace(file, path.parent / file.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file; one with equal content is left alone."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON as nnU-Net does, indented by four; an equal file is left alone."""
    write_text(path, json.dumps(content, indent=4) + "\n")


def printable(path: Path | str) -> str:
    """Return a path as text; bytes in it that are not UTF-8, which no encoder takes, become `?`."""
    return str(path).encode("utf-8", "replace").decode()


def describe_error(error: OSError) -> str:
    """Return one sentence for an error of the system, naming the file where it is known."""
    if error.errno is None or error.strerror is None:
        return str(error)
    name = error.filename2 or error.filename
    reason = NO_ROOM.get(error.errno, error.strerror[:1].lower() + error.strerror[1:])
    return f"{os.fsdecode(name)}: {reason}" if isinstance(name, str | bytes) else reason


def discard_unfinished() -> None:
    """Remove the temporaries of writes under way, before the process is ended."""
    for temporary in list(_unfinished):
        _remove(temporary)


@contextlib.contextmanager
def _temporary(path: Path, ending: str) -> Iterator[Path]:
    """Yield a free name in the folder of `path`, gone at the end; explain errors of writing."""
    name = f".{path.name}.{os.getpid()}{ending}"
    if len(os.fsencode(name)) > LONGEST_NAME >= len(os.fsencode(path.name)):
        name = f".{hashlib.md5(path.name.encode()).hexdigest()}.{os.getpid()}{ending}"
    temporary = path.with_name(name)
    _unfinished.add(temporary)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (temporary, *_leftovers(path.parent).pop(path.name, ())):
            _remove(leftover)
        yield temporary
    except (OSError, RuntimeError) as error:
        reason = _reason(error, temporary)
        if reason is None:
            raise
        raise OutputError(f"{path} cannot be written: {reason}") from error
    finally:
        _remove(temporary)
        _unfinished.discard(temporary)


def _reason(error: Exception, temporary: Path) -> str | None:
    """Return why the temporary could not be written; None where the error is about another file."""
    if isinstance(error, OutputError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        about = [os.fsdecode(n) for n in (error.filename, error.filename2) if n is not None]
        places = (str(temporary), *map(str, temporary.parents))
        is_ours = not about or any(n in places or n.startswith(places[0]) for n in about)
        if error.errno in NO_ROOM or is_ours:
            return (NO_ROOM | NO_WAY).get(error.errno)
    probe = temporary / "probe" if temporary.is_dir() else temporary
    try:
        probe.touch()
        _check_room(probe)
    except OSError as found:
        return NO_ROOM.get(found.errno or 0)
    return None


def _check_room(file: Path) -> None:
    """Raise OSError where a file could not grow: then its last bytes may be missing."""
    if file.is_symlink() or not file.is_file():
        return
    status, left = file.stat(), MARGIN
    if status.st_nlink > 1:  # a hard link to somebody's file, which is not written to
        return
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
        try:
            while left:
                left -= os.write(descriptor, bytes(left))
        finally:
            os.ftruncate(descriptor, status.st_size)
            os.close(descriptor)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError as error:
        if error.errno in NO_ROOM:
            raise


@functools.lru_cache(maxsize=64)
def _leftovers(folder: Path) -> dict[str, list[Path]]:
    """What killed processes left in a folder, by the target's name; looked up once a process."""
    found: dict[str, list[Path]] = {}
    for name in os.listdir(folder):
        match = re.fullmatch(r"\.(.+)\.(\d+)(\.nii\.gz|\.\D[^.]*)?", name)
        if match and not _is_alive(int(match[2])):
            found.setdefault(match[1], []).append(folder / name)
    return found


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":  # there signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
