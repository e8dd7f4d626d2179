"""`umamba audit DATASET`: every fault of a dataset at once, each with its cure.

Reads every file once. Exit code 0: no fault; 1: some.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umamba.cli.common import add_command, open_dataset

if TYPE_CHECKING:
    from umamba.data.faults import Fault


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(subparsers, "audit", run, __doc__, "dataset --workspace")
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the findings as JSON, too")
    add("-np", "--num_processes", type=int, default=2, metavar="N", help="files read at once (2)")


def run(args: argparse.Namespace) -> int:
    """Prints what was read and what is wrong with it; 1 where there are faults."""
    from umamba.data.audit import audit_dataset
    from umamba.files import write_json

    file = Path(args.json).absolute() if args.json else None
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent} for {file.name}")
    dataset, _ = open_dataset(args)
    report = audit_dataset(dataset, n_workers=args.num_processes)
    print_summary(report.summary)
    print_findings("warning", report.warnings)
    print_findings("fault", report.faults)
    if file is not None:
        write_json(file, report.to_dict())
        print(f"Written to {args.json}")
    if report.faults:
        return 1
    print(f"{dataset.name}: {report.n_cases} cases, no fault")
    return 0


def print_summary(summary: dict[str, Any]) -> None:
    """Prints cases, shapes, spacings and the share of each label."""
    if not summary:
        return
    print(f"\n{summary['name']}: {summary['n_cases']} cases, channels {summary['channels']}")
    for key, title in (("shape", "shape (z, y, x)"), ("spacing_mm", "spacing (z, y, x), mm")):
        rows = [f"{name} {_by(values)}" for name, values in summary[key].items()]
        if rows:
            print(f"  {title}: {', '.join(rows)}")
    width = max((len(label["name"]) for label in summary["labels"].values()), default=0)
    for value, label in summary["labels"].items():
        share = 100 * label["share"]
        print(f"  {value:>3} {label['name']:<{width}} {share:8.3f} % in {label['n_cases']} cases")


def print_findings(kind: str, findings: Iterable[Fault]) -> None:
    """Prints faults or warnings, those with the same words gathered under one cure."""
    groups: dict[tuple[str, str], list[str]] = {}
    for fault in findings:
        groups.setdefault((fault.what, fault.cure), []).append(fault.file)
    n = sum(map(len, groups.values()))
    if n:
        print(f"\n{n} {kind}{'s' if n > 1 else ''}:")
    for (what, cure), files in groups.items():
        for file in files:
            print(f"  {file}: {what}")
        print(f"      cure: {cure}")


def _by(values: Iterable[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)
