"""What the parts of the GPU benchmark share: options, facts of the device, timing, results."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
STARTED = time.monotonic()
# Written before each repeat: many times the L2 of any GPU, and about 0.6 ms of work, in which the
# host launches what is measured.
FLUSH_BYTES = 2 * 2**30
COPY_BYTES = 2**30
# An H200, as the floors were worked out; on a GPU the numbers are the device's own.
NOMINAL = {"multiprocessors": 132, "clock_ghz": 1.98, "copy_bytes_per_second": 4.3e12}


def parse(doc: str, extra: Callable[[argparse.ArgumentParser], None] | None = None) -> Any:
    """The options of a part: those that all parts take, and `extra`'s."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: to try the code out")
    parser.add_argument("--seconds", type=float, default=600, help="no row begins later")
    parser.add_argument("--backend", help="of our scan (triton; on a CPU chunked)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every row")
    if extra is not None:
        extra(parser)
    args = parser.parse_args()
    args.backend = args.backend or ("triton" if args.device == "cuda" else "chunked")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device here (torch.cuda.is_available() is False)\n")
    args.device = torch.device(args.device)
    return args


class Results:
    """The rows of a part: printed as they come, kept in a JSON file, none begun after `--seconds`.

    part: its name. columns: heading -> what a row shows there, by functions of the row.
    """

    def __init__(
        self, part: str, args: Any, columns: dict[str, Callable[[dict[str, Any]], str]]
    ) -> None:
        self.part, self.columns, self.file = part, columns, args.json
        self.device = args.device
        self.ends = STARTED + args.seconds
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        print(f"\n## {part}", flush=True)

    def add(self, name: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        """Measures and prints one row; a failure is kept as a line of the row, and ends there."""
        if time.monotonic() > self.ends:
            row = name | {"error": "no time was left"}
        else:
            try:
                row = name | measure()
            except Exception as error:  # whatever fails, the other rows are still wanted
                row = name | {"error": one_line(error)}
            tidy(self.device)
        if not self.rows:
            print("\n" + "\n".join(markdown_head(list(self.columns))))
        self.rows.append(row)
        print(markdown_row(row, self.columns), flush=True)
        self.save()

    def note(self, sentence: str) -> None:
        """Prints a sentence, above the table or below it, and keeps it."""
        self.notes.append(sentence)
        print(f"\n{sentence}", flush=True)
        self.save()

    def save(self) -> None:
        if self.file is not None:
            found = {"part": self.part, "rows": self.rows, "notes": self.notes}
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text(json.dumps(found, indent=1) + "\n")
            os.replace(temporary, self.file)

    @property
    def failed(self) -> bool:
        """Whether no row has figures."""
        return all("error" in row for row in self.rows)


def markdown_head(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def markdown_row(row: dict[str, Any], columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """One line of a table; what a row does not have is "-", and the error stands at the end."""
    cells = []
    for show in columns.values():
        try:
            cells.append(show(row))
        except (KeyError, TypeError, ZeroDivisionError):
            cells.append("-")
    line = f"| {' | '.join(cells)} |"
    return f"{line} {row['error']}" if "error" in row else line


def one_line(error: BaseException) -> str:
    """What went wrong, in at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def tidy(device: torch.device) -> None:
    """Gives memory back, so that the next row does not meet what this one left."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # after an illegal access every call raises
            torch.cuda.empty_cache()


def milliseconds(call: Callable[[], object], device: torch.device, seconds: float = 0.25) -> float:
    """The median time of a call on the device, after warm-up, with a cold L2 cache.

    On a GPU between two events, 5 to 30 times in about so many seconds; all are queued without
    waiting, so that launching is hidden where it takes less than the flush and the work.
    """
    if device.type != "cuda":
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times[1:])
    call()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    once = time.perf_counter() - start
    repeats = min(30, max(5, round(seconds / (once + 1e-3))))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in pairs:
        flush.zero_()
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """The memory that a call needs at its peak beside what is allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    tidy(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def device_facts(device: torch.device) -> dict[str, Any]:
    """What the floors need, and what a reader wants to know of device and versions."""
    facts: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version_of("triton"),
        "nnunetv2": version_of("nnunetv2"),
        "commit": output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"),
    }
    if device.type != "cuda":
        return facts | {"device": platform.machine(), "nominal": True} | NOMINAL
    properties = torch.cuda.get_device_properties(device)
    driver, _, clock = query_gpu("driver_version,clocks.max.sm").partition(",")
    megahertz = clock.strip().removesuffix("MHz").strip()
    known = megahertz.isdecimal()
    return facts | {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver.strip() or None,
        "multiprocessors": properties.multi_processor_count,
        "clock_ghz": int(megahertz) / 1e3 if known else NOMINAL["clock_ghz"],
        "clock_is": "the GPU's highest" if known else "nominal: nvidia-smi does not tell",
        "copy_bytes_per_second": copy_rate(device),
    }


def copy_rate(device: torch.device) -> float:
    """Bytes read and written in a second by a large copy on the device."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e-3 * milliseconds(lambda: target.copy_(source), device))


def query_gpu(fields: str) -> str:
    """The first GPU's answer to nvidia-smi, without units; empty where there is none."""
    words = (f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0")
    return output_of("nvidia-smi", *words) or ""


def output_of(*command: str) -> str | None:
    """The first line that a program prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    lines = result.stdout.splitlines()
    return lines[0].strip() if result.returncode == 0 and lines else None


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is missing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
