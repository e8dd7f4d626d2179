"""A fault of a dataset: the file, what is wrong with it and what cures it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from umamba.files import printable

REPLACE = "replace it by a whole copy, or remove the case"


@dataclass(frozen=True)
class Fault:
    """One finding. `what` and `cure` are phrases that read as a sentence behind the file's name."""

    file: str
    what: str
    cure: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}; {self.cure}"


class Faults(list[Fault]):
    """Findings in the order in which they were made."""

    def add(self, file: Path | str, what: str, cure: str) -> None:
        """Append a Fault."""
        self.append(Fault(printable(file), what, cure))


@dataclass(frozen=True)
class Repair:
    """What can be mended safely in a copy of a file: its "header" or its voxels to "integers".

    file: its path; reference: the path of the image whose header is right, None for integers.
    """

    file: str
    kind: str
    reference: str | None


class UnreadableImageError(ValueError):
    """An image file that nnU-Net could not read, or would read wrongly; `fault` says why."""

    def __init__(self, file: Path, what: str, cure: str = REPLACE) -> None:
        self.fault = Fault(printable(file), what, cure)
        super().__init__(str(self.fault))


def raise_if_faults(faults: Sequence[Fault], name: str) -> None:
    """Raise a ValueError that lists every fault of the dataset `name`, one line each."""
    if len(faults) == 1:
        raise ValueError(str(faults[0]))
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ValueError(f"{name} has {len(faults)} faults:\n{lines}")
