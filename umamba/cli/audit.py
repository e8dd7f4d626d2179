"""`umamba audit DATASET`: every fault of a dataset at once, each with its cure.

Reads every file once; files that have not changed since the last audit, run or plan are not read
again. Exit code 0: no fault; 1: some.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from umamba.cli.common import UsageError, add_command, audit_memory, open_dataset

if TYPE_CHECKING:
    from umamba.data.audit import AuditReport
    from umamba.data.dataset import RawDataset
    from umamba.data.faults import Fault

MOST_ROWS = 10  # warnings printed under one cure


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(subparsers, "audit", run, __doc__, "dataset --workspace")
    add = parser.add_argument
    add("--json", metavar="FILE", help="write the findings as JSON, too")
    add("--fix", metavar="FOLDER", help="write a copy with all repaired that is safe to repair")
    add("--again", action="store_true", help="read files again that have not changed")
    add(
        "-np", "--num_processes", type=int, metavar="N",
        help="cases read at once (one per core, at most 8)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prints what was read and what is wrong with it; 1 where there are faults."""
    from umamba.data.audit import audit_dataset
    from umamba.data.table import count, format_summary
    from umamba.files import write_json

    if args.num_processes is not None and args.num_processes < 1:
        raise UsageError(f"-np {args.num_processes} makes no sense; give at least 1")
    file = Path(args.json).absolute() if args.json else None
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent} for {file.name}")
    if file is not None and file.is_dir():
        raise UsageError(f"--json {args.json} is a folder; name a file")
    copy = Path(args.fix).expanduser().absolute() if args.fix else None
    if copy is not None:
        from umamba.data.fix import check_target

        check_target(copy)
    dataset, workspace = open_dataset(args)
    memory = audit_memory(dataset, workspace)
    if args.again:
        memory.unlink(missing_ok=True)
    report = audit_dataset(dataset, args.num_processes, memory=memory)
    if report.summary:
        print(f"\n{format_summary(report.summary)}")
    if report.n_remembered:
        n_cases = count(report.n_remembered, "case")
        print(f"\nnot read again, as unchanged since the last time: {n_cases} (--again reads all)")
    _print_findings("warning", report.warnings, dataset.source, MOST_ROWS)
    _print_findings("fault", report.faults, dataset.source)
    if file is not None:
        write_json(file, report.to_dict())
        print(f"Written to {args.json}")
    if copy is not None:
        return _fix(dataset, report, copy)
    if report.faults:
        return 1
    print(f"\n{dataset.name}: {count(report.n_cases, 'case')}, no fault")
    return 0


def _print_findings(
    kind: str, findings: Sequence[Fault], folder: Path, most: int | None = None
) -> None:
    from umamba.data.table import format_findings

    if findings:
        print(f"\n{format_findings(kind, findings, folder, most)}")


def _fix(dataset: RawDataset, report: AuditReport, copy: Path) -> int:
    """Writes the repaired copy and audits it; 1 where it has faults, too."""
    from umamba.data.audit import audit_dataset
    from umamba.data.fix import write_repaired
    from umamba.data.table import count

    if not report.repairs:
        print(f"\nnothing to repair; {copy} is not written")
        return 1 if report.faults else 0
    fixed = write_repaired(dataset, report.repairs, copy)
    n_files = count(len({repair.file for repair in report.repairs}), "file")
    print(f"\n{n_files} repaired in the copy {copy}, the others are links")
    after = audit_dataset(fixed)
    _print_findings("fault", after.faults, copy)
    if after.faults:
        return 1
    print(f"{copy.name}: {count(after.n_cases, 'case')}, no fault")
    return 0
