"""Keeps what one step has read of the cases for the next, as far as memory goes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from umamba.preprocessing.reading import Content, Kept

MOST_BYTES = 2**31
SHARE = 8  # of the machine's memory: an eighth


class CaseStore:
    """Images and labels by case, in the files' own types; what does not fit is read again.

    `keep` is what `umamba.data.audit.audit_dataset` calls per case (on_case); any thread may.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        """most_bytes: of all arrays together (2 GiB, or an eighth of the memory if less)."""
        self._left = default_bytes() if most_bytes is None else most_bytes
        self._cases: dict[str, Kept] = {}
        self._lock = threading.Lock()

    def keep(self, name: str, images: Sequence[Content], label: Content | None) -> None:
        """Keep a case if it fits."""
        contents = [*images, *([] if label is None else [label])]
        n_bytes = sum(content.array.nbytes for content in contents)
        with self._lock:
            if n_bytes <= self._left:
                self._left -= n_bytes
                self._cases[name] = Kept(list(images), label)

    def get(self, name: str) -> Kept | None:
        """Return what is kept of a case; None where it has to be read."""
        return self._cases.get(name)


def default_bytes() -> int:
    """Return how much to keep at most on this machine."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return MOST_BYTES // 4
    return min(MOST_BYTES, memory // SHARE)
