"""Keeps what one step has read of the cases for the next, as far as memory goes."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from umamba.memory import available_memory
from umamba.preprocessing.reading import Content, Kept

MOST_BYTES = 2**31
SHARE = 8  # of the memory that is free: an eighth


class CaseStore:
    """Images and labels by case, in the files' own types; what does not fit is read again.

    `keep` is what `umamba.data.audit.audit_dataset` calls per case (on_case); any thread may.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        """most_bytes: of all arrays together (2 GiB, or an eighth of what is free)."""
        if most_bytes is None:
            most_bytes = min(MOST_BYTES, available_memory() // SHARE)
        self._left = most_bytes
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
