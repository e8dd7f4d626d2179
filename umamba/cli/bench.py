"""What `umamba doctor --bench` does: times the scan backends on networks, remembers the fastest."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from umamba.ops.timing import Call

HOPELESS = 10  # times slower than the fastest backend: not timed further


def find_calls(plans: Path | None, configuration: str | None) -> Counter[Call]:
    """The scans and convolutions of one step of the planned networks, or of typical ones."""
    import torch

    from umamba.planning.scan_calls import plans_calls, typical_calls

    if plans is None:
        return typical_calls(torch.cuda.is_available())
    return plans_calls(plans, configuration)


def compare_backends(
    calls: Counter[Call], speeds: Mapping[str, float], device: torch.device
) -> dict[str, Any]:
    """Times each call on each backend; the one with the least total is remembered for the device.

    speeds: tokens per second of the backends that take part, the right ones. Tells its progress on
    the standard error stream.
    """
    from umamba.ops import timing
    from umamba.ops.remembered import device_name, remember

    left_out: dict[str, str] = {}
    _leave_out_the_hopeless({name: 1 / speed for name, speed in speeds.items()}, left_out)
    rows: list[dict[str, Any]] = []
    totals = {name: 0.0 for name in speeds if name not in left_out}
    largest_first = sorted(calls.items(), key=lambda item: -item[0].size())
    for number, (call, count) in enumerate(largest_first, 1):
        print(f"timing {number} of {len(calls)}: {call}", file=sys.stderr, flush=True)
        times: dict[str, float] = {}
        for name in totals:
            try:
                times[name] = 1000 * timing.shortest_run(call, name, device)
                totals[name] += count * times[name]
            except Exception as error:  # whatever it is: such a backend cannot win
                left_out[name] = f"fails at {call}: {' '.join(str(error).split())}"
        rows.append({"call": str(call), "count": count, "ms": times})
        _leave_out_the_hopeless(totals, left_out)
        totals = {name: total for name, total in totals.items() if name not in left_out}
    found: dict[str, Any] = {
        "device": device_name(device),
        "rows": rows,
        "total_ms": totals,
        "left_out": left_out,
        "fastest": min(totals, key=totals.__getitem__, default=None),
        "file": None,
    }
    if totals:
        try:
            found["file"] = str(remember(device, found["fastest"]))
        except (OSError, RuntimeError) as error:
            found["problem"] = f"the choice cannot be remembered: {error}"
    return found


def _leave_out_the_hopeless(times: Mapping[str, float], left_out: dict[str, str]) -> None:
    """Adds the backends that are far behind the fastest, and by how much."""
    racing = {name: time for name, time in times.items() if name not in left_out}
    for name, time in racing.items():
        fastest = min(racing, key=racing.__getitem__)
        if time > HOPELESS * racing[fastest]:
            ratio = time / racing[fastest]
            left_out[name] = f"{ratio:.0f} times slower than {fastest}: not timed further"


def bench_lines(found: Mapping[str, Any]) -> list[str]:
    """The result of compare_backends as a table, its title first."""
    names = list(found["total_ms"])
    table = [["calls per step", "", *names]]
    for row in found["rows"]:
        times = [f"{row['ms'][name]:.2f}" for name in names]
        table.append([f"{row['count']} x", row["call"], *times])
    table.append(["", "one step", *(f"{total:.1f}" for total in found["total_ms"].values())])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"Forward and backward in ms on {found['device']}"]
    for cells in table:
        first, second, *rest = zip(cells, widths, strict=True)
        texts = [f"{first[0]:>{first[1]}}", f"{second[0]:<{second[1]}}"]
        lines.append("  ".join([*texts, *(f"{cell:>{width}}" for cell, width in rest)]))
    lines += [f"{name}: {reason}" for name, reason in found["left_out"].items()]
    if found["file"]:
        lines.append(f"{found['fastest']} is fastest and remembered in {found['file']}")
    elif found["fastest"]:
        lines.append(f"{found['fastest']} is fastest; {found['problem']}")
    else:
        lines.append("no backend could be timed: the choice stays as it was")
    return lines
