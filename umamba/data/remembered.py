"""What an audit found, kept as JSON, so that files that have not changed are not read again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from umamba.data.case import Findings, Setup
from umamba.data.images import TIFF, ending_of
from umamba.data.layout import CaseFiles
from umamba.data.links import stamp_of
from umamba.files import write_json

FORMAT = 2  # another number: what was found must be found anew


class AuditMemory:
    """The findings of cases without a fault, known by name, size and time of their files.

    Cases with a fault are not kept, so that one cured by other permissions is looked at again.
    """

    def __init__(
        self,
        file: Path | None,
        setup: Setup,
        shown: Callable[[Path], str],
        files: Mapping[str, CaseFiles],
    ) -> None:
        self._file, self._shown, self._files = file, shown, files
        self._key = {"format": FORMAT, "setup": json.loads(json.dumps(dataclasses.asdict(setup)))}
        self._cases: dict[str, Any] = {}
        # as they are before a case is read: a file that changes since is read again
        self._stamps = {name: self._stamps_of(case) for name, case in files.items()}
        content = _read(file)
        if all(content.get(key) == value for key, value in self._key.items()):
            self._cases = content.get("cases", {})

    def recall(self, name: str) -> Findings | None:
        """Return what the unchanged files of a case showed; None where they must be read."""
        try:
            entry = self._cases[name]
            if entry["files"] == self._stamps[name]:
                return Findings.from_json(entry["found"])
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
        self._cases.pop(name, None)
        return None

    def add(self, name: str, found: Findings) -> None:
        """Keep what a case showed that was not recalled, unless it has a fault."""
        if not found.faults:
            self._cases[name] = {"files": self._stamps[name], "found": found.to_json()}

    def write(self, report: Mapping[str, Any] | None = None) -> None:
        """Write what is known of the cases, and the report. Raises OSError."""
        if self._file is not None:
            known = {name: self._cases[name] for name in self._files if name in self._cases}
            write_json(self._file, {**self._key, **(report or {}), "cases": known})

    def _stamps_of(self, case: CaseFiles) -> list[list[Any]]:
        """Return name, path, size and time of each file, and of the one with a TIFF's spacing."""
        files = [*case.images, *([] if case.label is None else [case.label])]
        stamps = []
        for path in files:
            ending = ending_of(path)
            stem = path.name[: len(path.name) - len(ending)]
            asides = [f"{stem}.json", f"{stem[:-5]}.json"] if ending in TIFF else []
            for file in (path, *(path.with_name(name) for name in asides)):
                stamp = stamp_of(file) if os.access(file, os.R_OK) else (0, 0)
                stamps.append([self._shown(file), str(file), *stamp])
        return stamps


def _read(file: Path | None) -> dict[str, Any]:
    try:
        content = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
