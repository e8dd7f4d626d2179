"""`umamba audit DATASET`: every fault of a dataset at once, each with its cure."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umamba.data.faults import Fault


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "audit",
        help="list every fault of a dataset, with its cure",
        description="Read every file of a dataset once and list every fault, with its cure. "
        "Exit code 0: none; 1: some.",
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="id, name, or folder (nnU-Net, Medical Segmentation Decathlon, images/ + labels/)",
    )
    parser.add_argument("--workspace", metavar="DIR", help="where linked data and results go")
    parser.add_argument("--json", metavar="FILE", help="write the findings as JSON, too")
    parser.add_argument(
        "-np", "--num_processes", type=int, default=2, metavar="N", help="files read at once"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from umamba.data.audit import audit_dataset
    from umamba.data.dataset import prepare_dataset
    from umamba.data.links import write_json

    raw, workspace = prepare_dataset(args.dataset, args.workspace, strict=False)
    print(workspace.describe())
    for note in raw.notes:
        print(note)
    report = audit_dataset(raw, n_workers=args.num_processes)
    print_summary(report.summary)
    print_findings("warning", report.warnings)
    print_findings("fault", report.faults)
    if args.json:
        path = Path(args.json)
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"There is no folder {path.absolute().parent} for {path.name}")
        write_json(path, json.loads(json.dumps(report.to_dict())))
        print(f"Written to {path}")
    if not report.faults:
        print(f"{raw.name}: {report.n_cases} cases, no fault")
    return 1 if report.faults else 0


def print_summary(summary: dict[str, Any]) -> None:
    """Print cases, shapes, spacings and the share of each label."""
    if not summary:
        return
    print(f"\n{summary['name']}: {summary['n_cases']} cases, channels {summary['channels']}")
    for key, title in (("shape", "shape (z, y, x)"), ("spacing_mm", "spacing (z, y, x), mm")):
        rows = [f"{name} {_row(values)}" for name, values in summary[key].items()]
        if rows:
            print(f"  {title}: {', '.join(rows)}")
    width = max((len(label["name"]) for label in summary["labels"].values()), default=0)
    for value, label in summary["labels"].items():
        share = 100 * label["share"]
        print(f"  {value:>3} {label['name']:<{width}} {share:8.3f} % in {label['n_cases']} cases")


def print_findings(kind: str, findings: Iterable[Fault]) -> None:
    """Print faults or warnings, those with the same words gathered under one cure."""
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


def _row(values: list[float]) -> str:
    return "x".join(f"{value:.4g}" for value in values)
