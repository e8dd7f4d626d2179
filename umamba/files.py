"""Writes files whole or not at all: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden temporary name beside `path`, of its ending; at the end it becomes `path`.

    The folder is made where it is missing. When the block raises, `path` is as it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix
    temporary = path.with_name(f".{path.name}.{os.getpid()}{ending}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
