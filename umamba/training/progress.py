"""What a training tells of itself: the lines of `progress.jsonl`, times, and what it cost."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from umamba.files import describe_error, replacing_together, write_text

logger = logging.getLogger(__name__)

PLOT_EVERY_SECONDS = 60.0  # drawing takes a second, which short epochs would feel


class PatientWriter:
    """Calls a function that writes; a full disk does not end a long training."""

    def __init__(self) -> None:
        self.has_failed = False

    def __call__(self, write: Callable[..., None], *arguments: Any) -> bool:
        """Whether it wrote; the first OSError is said in a sentence, and those that follow not."""
        try:
            write(*arguments)
        except OSError as error:
            if not self.has_failed:
                logger.warning(
                    f"the training goes on, but could not write and tries again after each epoch: "
                    f"{describe_error(error)}"
                )
            self.has_failed = True
            return False
        return True


class ProgressPlot:
    """Draws nnU-Net's `progress.png`, whole or not at all; a full disk does not end a training."""

    def __init__(self, plot: Callable[[str], None], write: PatientWriter) -> None:
        self.plot = plot
        self.write = write
        self._drawn_at = -PLOT_EVERY_SECONDS

    def now_and_then(self, folder: str) -> None:
        """Draws into this folder where the last drawing is a minute ago."""
        if time.monotonic() - self._drawn_at > PLOT_EVERY_SECONDS:
            self.draw(folder)
            self._drawn_at = time.monotonic()

    def draw(self, folder: str) -> None:
        """Draws into this folder."""
        self.write(self._draw, Path(folder) / "progress.png")

    def _draw(self, file: Path) -> None:
        try:
            with replacing_together(file) as temporary:
                self.plot(str(temporary))
        except OSError:
            pyplot.close()  # as nnU-Net does after a drawing that it could write
            raise


def add_line(file: Path, line: str) -> None:
    """Adds a line to a log; OSError with its name where it cannot be written."""
    try:
        with open(file, "a", encoding="utf-8") as log:
            log.write(f"{line}\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error


class ProgressFile:
    """A line of JSON per epoch; the file is replaced at each, so that it is never torn."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lines: list[str] = []

    def keep_before(self, epoch: int) -> None:
        """Drops the lines of epochs that will be trained (again), and one that is torn."""
        text = self.file.read_text() if self.file.is_file() else ""
        self._lines = [line for line in text.splitlines(keepends=True) if is_before(line, epoch)]
        if text:
            write_text(self.file, "".join(self._lines))

    def add(self, record: dict[str, Any]) -> None:
        """Adds a line; OSError where the file cannot be written: the next line brings it along."""
        self._lines.append(json.dumps(record) + "\n")
        write_text(self.file, "".join(self._lines))


def print_epoch(record: dict[str, Any], n_epochs: int, seconds_left: float) -> None:
    """Prints the line of an epoch for the terminal."""
    shown = " ".join(f"{value:.3f}" for value in record["dice_per_class"][:12])
    print(
        f"epoch {record['epoch'] + 1:>4}/{n_epochs}  {format_seconds(seconds_left):>8} left  "
        f"loss {record['train_loss']:+.3f}  pseudo Dice {shown}  lr {record['lr']:.2e}",
        flush=True,
    )


def is_before(line: str, epoch: int) -> bool:
    """Whether a line of the file is whole and of an earlier epoch."""
    try:
        return line.endswith("\n") and json.loads(line)["epoch"] < epoch
    except ValueError:
        return False


def format_seconds(seconds: float) -> str:
    """`1:02:03` or `2:03`; days from 48 hours on."""
    seconds = round(seconds)
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} d"
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def process_cost() -> dict[str, float]:
    """CPU seconds of this process and its ended children, and its peak memory (GiB)."""
    try:
        import resource
    except ImportError:  # Windows
        return {"cpu_seconds": round(time.process_time(), 1)}
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return {"cpu_seconds": round(seconds, 1), "peak_gib": round(own.ru_maxrss / unit, 2)}
