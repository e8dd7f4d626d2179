"""Fills a raw dataset folder of the workspace with links to files, and keeps it up to date.

What was linked or converted from which file (its size and time) stands in `umamba_source.json`
beside dataset.json, so that a second call only touches what has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from umamba.data.content import split_ending

STATE = "umamba_source.json"


class LinkedFolder:
    """A raw dataset folder whose files come from `source`.

    Call `link` and `convert` for every file it shall hold, then `finish`.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder = folder
        self.source = source
        self.memory: dict[str, Any] = {}  # what the caller wants to find again next time
        state = read_state(folder)
        self._known: dict[str, list[Any]] = state.get("entries", {})
        if state.get("source") == str(source):
            self.memory = state.get("memory", {})
        else:
            self._known = {name: [] for name in self._known}
        self._entries: dict[str, list[Any]] = {}
        self._jobs: dict[str, Callable[[Path], None]] = {}

    def link(self, name: str, source: Path) -> None:
        """Make `name` (relative to the folder) a link to the file `source`."""
        stamp = [str(source), *stamp_of(source), ""]
        target = self.folder / name
        if target.is_symlink() and os.readlink(target) == str(source):
            self._entries[name] = stamp
        elif not self._is_current(name, stamp):
            self._jobs[name] = lambda path: link_file(source, path)

    def convert(self, name: str, source: Path, how: str, make: Callable[[Path], None]) -> None:
        """Make `name` by `make(path)` from `source`; done again when `source` or `how` changes."""
        stamp = [str(source), *stamp_of(source), how]
        if not self._is_current(name, stamp):
            self._jobs[name] = make

    def finish(self, dataset_json: dict[str, Any], n_workers: int | None = None) -> None:
        """Carry out what is due, remove what no longer belongs here, write dataset.json."""
        folders = {(self.folder / name).parent for name in self._entries} | {self.folder}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for name in self._known.keys() - self._entries.keys():
            (self.folder / name).unlink(missing_ok=True)
        with ThreadPoolExecutor(n_workers or min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(self._run, self._jobs.items()))
        write_json(self.folder / "dataset.json", dataset_json)
        state = {"source": str(self.source), "memory": self.memory, "entries": self._entries}
        write_json(self.folder / STATE, state)

    def _is_current(self, name: str, stamp: list[Any]) -> bool:
        self._entries[name] = stamp
        return self._known.get(name) == stamp and (self.folder / name).exists()

    def _run(self, job: tuple[str, Callable[[Path], None]]) -> None:
        name, make = job
        with replacing(self.folder / name) as temporary:
            make(temporary)


def read_state(folder: Path) -> dict[str, Any]:
    """Return what `LinkedFolder` wrote about a folder; empty where it did not make it."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return state if isinstance(state, dict) else {}


def link_file(source: Path, target: Path) -> None:
    """Make `target` a symbolic link to `source`, else a hard link, else a copy."""
    for make in (os.symlink, os.link):
        with contextlib.suppress(OSError):
            make(source, target)
            return
    shutil.copy2(source, target)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, of the same ending; at the end it becomes `path`."""
    parts = split_ending(path.name)
    ending = parts[1] if parts else path.suffix
    temporary = path.with_name(f".{path.name}.{os.getpid()}{ending}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON to a temporary name and rename it; leaves an equal file alone."""
    text = json.dumps(content, indent=2) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def stamp_of(path: Path) -> tuple[int, int]:
    """Return size and modification time (ns), zeros where the file is missing."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
