"""Which sources the C library is built of."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_sources(folder: Path) -> str:
    """Return a digest of the C files; setup.py, which cannot import umamba, runs this file."""
    digest = hashlib.sha256()
    for file in sorted((*folder.glob("*.c"), *folder.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
