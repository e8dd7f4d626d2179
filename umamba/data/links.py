"""Fills a raw dataset folder of the workspace with links to files, and keeps it up to date.

What was linked or converted from which file (its size and time) stands in `umamba_source.json`
beside dataset.json, so that a second call only touches what has changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from umamba.data.faults import REPLACE, Fault, Faults, UnreadableImageError
from umamba.data.images import last_line
from umamba.files import OutputError, printable, replacing, write_json

STATE = "umamba_source.json"


class LinkedFolder:
    """A raw dataset folder whose files come from `source`.

    Call `link` and `convert` for every file it shall hold, then `finish`. notes: what was assumed
    on the way; faults: what was found wrong; memory: what the caller wants to find again next time.
    """

    def __init__(self, folder: Path, source: Path) -> None:
        self.folder, self.source = folder, source
        self.notes: list[str] = []
        self.faults = Faults()
        state = read_state(folder)
        is_same = state.get("source") == str(source)
        self.memory: dict[str, Any] = state.get("memory", {}) if is_same else {}
        known: dict[str, list[Any]] = state.get("entries", {})
        self._known = known if is_same else {name: [] for name in known}
        self._entries: dict[str, list[Any]] = {}
        self._jobs: dict[str, Callable[[Path], None]] = {}

    def link(self, name: str, source: Path) -> None:
        """Make `name` (relative to the folder) a link to the file `source`."""
        self.convert(name, source, "", partial(link_file, source))
        target = self.folder / name
        if target.is_symlink() and os.readlink(target) == str(source):
            self._jobs.pop(name, None)

    def convert(self, name: str, source: Path, how: str, make: Callable[[Path], None]) -> None:
        """Make `name` by `make(path)` from `source`; done again when `source` or `how` changes."""
        stamp = self._entries[name] = [str(source), *stamp_of(source), how]
        if self._known.get(name) != stamp or not (self.folder / name).exists():
            self._jobs[name] = make

    def finish(self, dataset_json: dict[str, Any]) -> None:
        """Carry out what is due, remove what no longer belongs here, write dataset.json.

        A file that cannot be made, since its source is damaged, is a fault and is not there.
        """
        for name in self._known.keys() - self._entries.keys():
            (self.folder / name).unlink(missing_ok=True)
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            failures = pool.map(self._make, self._jobs)
            self.faults += dict.fromkeys(fault for fault in failures if fault)
        write_json(self.folder / "dataset.json", dataset_json)
        state = {"source": str(self.source), "memory": self.memory, "entries": self._entries}
        write_json(self.folder / STATE, state)

    def _make(self, name: str) -> Fault | None:
        """Make one file; return what is wrong with its source."""
        try:
            with replacing(self.folder / name) as temporary:
                self._jobs[name](temporary)
            return None
        except OutputError:
            raise
        except UnreadableImageError as error:
            fault = error.fault
        except Exception as error:  # a decoder raises anything on bytes it does not understand
            source = printable(self._entries[name][0])
            fault = Fault(source, f"cannot be read ({last_line(error)})", REPLACE)
        (self.folder / name).unlink(missing_ok=True)  # of an earlier state of the source
        del self._entries[name]
        return fault


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


def stamp_of(path: Path) -> tuple[int, int]:
    """Return size and modification time (ns), zeros where the file is missing."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
