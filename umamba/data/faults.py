"""A fault of a dataset: the file, what is wrong with it and what cures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One finding. `what` and `cure` are phrases that read as a sentence behind the file's name."""

    file: str
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.cure}"


class UnreadableImageError(ValueError):
    """An image file that nnU-Net could not read, or would read wrongly."""

    def __init__(self, file: str, what: str, cure: str) -> None:
        super().__init__(f"{file}: {what}; {cure}")
        self.fault = Fault(file, what, cure)


def raise_if_faults(faults: Sequence[Fault], name: str) -> None:
    """Raise a ValueError that lists every fault of the dataset `name`, one line each."""
    if len(faults) == 1:
        raise ValueError(str(faults[0]))
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ValueError(f"{name} has {len(faults)} faults:\n{lines}")
