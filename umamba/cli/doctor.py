"""`umamba doctor`: what this machine offers, which scan runs on it, and whether it is right.

Prints versions, hardware, each scan backend with the reason where it cannot be used, the error of
the scan against float64, its speed, and nnU-Net's folders. Exit code 1: the scan is wrong.
With --bench it times the backends on the scans of networks, those of a plans file if one is given,
and the fastest is taken on this device from then on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umamba.cli.common import TRAINERS, UsageError, add_command

if TYPE_CHECKING:
    import torch

    from umamba.ops.timing import Call

PACKAGES = (
    "umamba", "torch", "nnunetv2", "numpy", "scipy",
    "SimpleITK", "nibabel", "torchvision", "triton",
)  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(subparsers, "doctor", run, __doc__, "--workspace")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--bench", action="store_true", help="choose the backend by its speed")
    parser.add_argument(
        "--plans", type=Path, metavar="FILE",
        help="time the scans of these plans (those of three typical networks)",
    )  # fmt: skip
    parser.add_argument("-c", "--configuration", help="one configuration of the plans (all)")


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 1 when the self-check fails."""
    if (args.plans and not args.bench) or (args.configuration and not args.plans):
        raise UsageError("doctor takes --configuration with --plans, and --plans with --bench")
    calls = None
    if args.bench:
        from umamba.cli.bench import find_calls

        calls = find_calls(args.plans, args.configuration)
    findings = examine(args.workspace, calls)
    print(json.dumps(findings, indent=2) if args.json else "\n".join(_lines(findings)))
    return 0 if all(check["passed"] for check in findings["self_check"]) else 1


def examine(workspace: str | None = None, calls: Counter[Call] | None = None) -> dict[str, Any]:
    """Everything that the command prints, as plain JSON values.

    calls: of the operators, on which the backends are timed: on the GPU if there is one.
    """
    import torch

    from umamba.ops import cpu

    findings: dict[str, Any] = {
        "versions": _versions(),
        "torchvision": _torchvision(),
        "hardware": _hardware(),
        "scan": {},
        "instruction_set": cpu.instruction_set(),
        "self_check": [],
        "speed": [],
        "bench": None,
        "folders": _folders(workspace),
    }
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for kind in kinds:
        _examine_scan(kind, calls if kind == kinds[-1] else None, findings)
    return findings


def _versions() -> dict[str, str | None]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def _torchvision() -> dict[str, str]:
    """Whether it loads. A build for another torch raises RuntimeError, not ImportError."""
    works = "All umamba commands work: they never import it."
    fails = (
        "Stock nnUNetv2_train and nnUNetv2_predict fail with any trainer but nnUNetTrainer, ours "
        "included, because their search imports timm, which imports torchvision; with "
        "nnUNetTrainer they work, as do the other stock commands."
    )
    cure = "To use them, install the torchvision build that belongs to this torch, as torch was."
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torchvision"
        state = "is not installed" if absent else f"does not load ({' '.join(str(error).split())})"
        return {"state": state, "works": works, "fails": fails, "cure": cure}
    return {"state": "loads", "works": f"{works} Stock commands with our trainer work, too."}


def _hardware() -> dict[str, Any]:
    import platform

    import torch

    from umamba.memory import available_memory
    from umamba.planning.footprint import GIB
    from umamba.processes import count_cores

    every = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(every)]
    return {
        "machine": platform.machine(),
        "cpu_cores": count_cores(),
        "torch_threads": torch.get_num_threads(),
        "ram_available_gb": round(available_memory() / GIB, 1),
        "gpus": [{"name": gpu.name, "memory_gb": round(gpu.total_memory / GIB, 1)} for gpu in gpus],
    }


def _examine_scan(kind: str, calls: Counter[Call] | None, findings: dict[str, Any]) -> None:
    """Adds for float32 tensors of a kind of device: backends and choice, errors, speed, timing."""
    import torch

    from umamba.cli.bench import compare_backends
    from umamba.ops.dispatch import explain
    from umamba.ops.self_check import TOLERANCE, scan_errors, tokens_per_second

    device = torch.device(kind)
    reasons = explain(device, torch.float32, 16)
    sound = []
    for name in (name for name, reason in reasons.items() if reason is None):
        errors = scan_errors(name, device)
        worst = max(errors, key=errors.__getitem__)
        check = {"worst": worst, "error": errors[worst], "passed": errors[worst] <= TOLERANCE}
        findings["self_check"].append({"device": kind, "backend": name} | check)
        if check["passed"]:
            sound.append(name)
    chosen, why = _choice(device)
    speeds = {}
    for name in reasons:
        if name == chosen or (calls and name in sound):
            length = 256 if name == "reference" else 8192
            forward, both = tokens_per_second(name, device, length=length)
            speed = {"forward": round(forward), "forward_and_backward": round(both)}
            findings["speed"].append({"device": kind, "backend": name} | speed)
            speeds[name] = both
    if calls:
        contest = {name: speeds[name] for name in sound}
        findings["bench"] = compare_backends(calls, contest, device)
        chosen, why = _choice(device)
    findings["scan"][kind] = {"backends": reasons, "chosen": chosen, "why": why}


def _choice(device: torch.device) -> tuple[str | None, str]:
    """The backend that a scan of float32 tensors takes now, None if it fails, and why."""
    import torch

    from umamba.ops.dispatch import VARIABLE, backend_name, choose
    from umamba.ops.remembered import choices_file, recall

    try:
        chosen = backend_name(choose(device, torch.float32, 16))
    except ValueError as error:
        return None, str(error)
    if os.environ.get(VARIABLE):
        return chosen, f"{VARIABLE} asks for it"
    fastest = recall(device)
    if fastest is None:
        return chosen, "the first of the list that can be used"
    source = f"remembered from `umamba doctor --bench` on {fastest.date}"
    if fastest.backend != chosen:
        return chosen, f"{fastest.backend}, {source}, cannot be used"
    return chosen, f"{source}; to forget it delete {choices_file()}"


def _folders(workspace: str | None) -> dict[str, Any]:
    from umamba.data.workspace import VARIABLES, resolve_workspace

    found: dict[str, Any] = {
        "variables": {
            name: os.environ.get(name) or None for name in (*VARIABLES, "nnUNet_extTrainer")
        },
        "stock_commands": f"export nnUNet_extTrainer={TRAINERS}",
    }
    try:
        place = resolve_workspace(None, workspace)
    except ValueError as error:
        return {**found, "workspace": None, "problem": str(error)}
    found |= {"workspace": str(place.root), "chosen_by": place.chosen_by}
    refused = [str(folder) for folder in place.variables().values() if not _is_writable(folder)]
    if refused:
        found["problem"] = f"{', '.join(refused)}: cannot be written to; use --workspace DIR"
    return found


def _is_writable(folder: Path) -> bool:
    """Whether the folder, or the nearest one above it that exists, lets us write."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _lines(findings: dict[str, Any]) -> list[str]:
    """The findings as text."""
    vision, hardware, folders = findings["torchvision"], findings["hardware"], findings["folders"]
    gpus = [f"{gpu['name']}, {gpu['memory_gb']} GB" for gpu in hardware["gpus"]]
    sections = {
        "Versions": [f"{name:<12} {value or '-'}" for name, value in findings["versions"].items()],
        f"torchvision {vision['state']}": [text for key, text in vision.items() if key != "state"],
        "Hardware": [
            f"{hardware['cpu_cores']} CPU cores ({hardware['machine']}), torch uses "
            f"{hardware['torch_threads']} threads; {hardware['ram_available_gb']} GB of RAM "
            "available",
            *(gpus or ["no GPU"]),
        ],
    }
    for kind, scan in findings["scan"].items():
        sections[f"Scan on {kind}: {scan['chosen'] or 'none'} ({scan['why']})"] = [
            f"{name:<10} {'can be used' if reason is None else 'no: ' + reason}"
            for name, reason in scan["backends"].items()
        ]
    if findings["instruction_set"]:
        sections[f"The C library runs its {findings['instruction_set']} code"] = []
    sections["Self-check: largest error against float64, relative to the tensor's maximum"] = [
        f"{check['device']} {check['backend']:<10} {check['error']:.1e} ({check['worst']}) "
        + ("ok" if check["passed"] else "WRONG: do not use this scan, and report it")
        for check in findings["self_check"]
    ]
    sections["Speed: tokens of 64 channels per second, forward / forward and backward"] = [
        f"{row['device']} {row['backend']:<10} {row['forward']:>12,} / "
        f"{row['forward_and_backward']:,}"
        for row in findings["speed"]
    ]
    if findings["bench"]:
        from umamba.cli.bench import bench_lines

        title, *rows = bench_lines(findings["bench"])
        sections[title] = rows
    rows = [f"{name} = {value or '(not set)'}" for name, value in folders["variables"].items()]
    if folders["workspace"]:
        rows.append(f"workspace {folders['workspace']} ({folders['chosen_by']})")
    if "problem" in folders:
        rows.append(f"problem: {folders['problem']}")
    sections["Folders"] = rows
    sections["To train with UMambaTrainer by stock nnUNetv2_train"] = [folders["stock_commands"]]
    return [line for title in sections for line in (title, *(f"  {x}" for x in sections[title]))]
