"""`umamba doctor`: what this machine offers, which scan runs on it, and whether it is right."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "nnunetv2", "numpy", "scipy", "SimpleITK", "nibabel", "torchvision", "triton")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "doctor",
        help="check versions, hardware, scan backends and folders",
        description="Prints versions, hardware, each scan backend with the reason where it cannot "
        "be used, the error of the scan against float64, its speed, and nnU-Net's folders. "
        "Exit 1: the scan of this machine is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--bench", action="store_true", help="time every backend, not the chosen")
    parser.add_argument("--workspace", metavar="DIR", help="where linked data and results go")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the findings; 1 when the self-check fails."""
    import json

    findings = examine(args.workspace, bench=args.bench)
    print(json.dumps(findings, indent=2) if args.json else "\n".join(_lines(findings)))
    return 0 if all(check["passed"] for check in findings["self_check"]) else 1


def examine(workspace: str | None = None, bench: bool = False) -> dict[str, Any]:
    """Everything that the command prints, as plain JSON values."""
    import os
    import platform

    import torch

    cuda = torch.cuda.is_available()
    kinds = ["cpu", *(["cuda"] if cuda else [])]
    backends = {kind: _backends(kind) for kind in kinds}
    return {
        "versions": _versions(),
        "torchvision": _torchvision(),
        "hardware": {
            "machine": platform.machine(),
            "cpu_cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            **_memory(),
            "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if cuda else [],
        },
        "scan": {
            kind: {
                "backends": reasons,
                "chosen": chosen,
                "why": why,
            }
            for kind, (reasons, chosen, why) in backends.items()
        },
        "instruction_set": _instruction_set(),
        "self_check": [
            check
            for kind, (reasons, _, _) in backends.items()
            for check in _self_checks(kind, reasons)
        ],
        "speed": [
            measured
            for kind, (reasons, chosen, _) in backends.items()
            for measured in _speeds(kind, [n for n in reasons if bench or n == chosen], reasons)
        ],
        "folders": _folders(workspace),
    }


def _versions() -> dict[str, str | None]:
    import platform

    import umamba

    versions: dict[str, str | None] = {"umamba": umamba.__version__}
    versions["Python"] = platform.python_version()
    versions.update({name: _version(name) for name in PACKAGES})
    return versions


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
        state = "is not installed" if absent else f"does not load ({_one_line(error)})"
        return {"state": state, "works": works, "fails": fails, "cure": cure}
    return {"state": "loads", "works": f"{works} Stock commands with our trainer work, too."}


def _memory() -> dict[str, float]:
    from umamba.planning.machine import GIB, available_memory_bytes

    return {"ram_available_gb": round(available_memory_bytes() / GIB, 1)}


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {"name": properties.name, "memory_gb": round(properties.total_memory / 1024**3, 1)}


def _backends(kind: str) -> tuple[dict[str, str | None], str | None, str]:
    """The reason of each backend against float32 tensors of this kind, and the choice."""
    import os

    import torch

    from umamba.ops.dispatch import VARIABLE, backend_name, choose, explain

    reasons = explain(torch.device(kind), torch.float32, 16)
    try:
        chosen = backend_name(choose(torch.device(kind), torch.float32, 16))
    except ValueError as error:
        return reasons, None, str(error)
    if os.environ.get(VARIABLE):
        return reasons, chosen, f"{VARIABLE} asks for it"
    return reasons, chosen, "the first of the list that can be used"


def _instruction_set() -> str | None:
    from umamba.ops import cpu

    return cpu.instruction_set()


def _self_checks(kind: str, reasons: dict[str, str | None]) -> list[dict[str, Any]]:
    import torch

    from umamba.ops.self_check import TOLERANCE, scan_errors

    checks = []
    for name in (name for name, reason in reasons.items() if reason is None):
        errors = scan_errors(name, torch.device(kind))
        worst = max(errors, key=errors.__getitem__)
        passed = errors[worst] <= TOLERANCE
        checks.append(
            {
                "device": kind,
                "backend": name,
                "worst": worst,
                "error": errors[worst],
                "passed": passed,
            }
        )
    return checks


def _speeds(
    kind: str, names: list[str], reasons: dict[str, str | None]
) -> list[dict[str, str | float]]:
    import torch

    from umamba.ops.self_check import tokens_per_second

    rows: list[dict[str, str | float]] = []
    for name in names:
        if reasons[name] is None:
            length = 256 if name == "reference" else 8192
            forward, both = tokens_per_second(name, torch.device(kind), length=length)
            row = {"forward": round(forward), "forward_and_backward": round(both)}
            rows.append({"device": kind, "backend": name, **row})
    return rows


def _folders(workspace: str | None) -> dict[str, Any]:
    import os

    import umamba
    from umamba.data.workspace import VARIABLES, resolve_workspace

    trainers = Path(str(umamba.__file__)).parent / "training" / "nnunet_trainers"
    found: dict[str, Any] = {
        "variables": {
            name: os.environ.get(name) or None for name in (*VARIABLES, "nnUNet_extTrainer")
        },
        "stock_commands": f"export nnUNet_extTrainer={trainers}",
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
    import os

    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _lines(findings: dict[str, Any]) -> list[str]:
    """The findings as text."""
    vision, hardware, folders = findings["torchvision"], findings["hardware"], findings["folders"]
    lines = ["Versions"]
    lines += [f"  {name:<12} {value or '-'}" for name, value in findings["versions"].items()]
    lines += [f"torchvision {vision['state']}"]
    lines += [f"  {vision[key]}" for key in ("works", "fails", "cure") if key in vision]
    lines += [
        "Hardware",
        f"  {hardware['cpu_cores']} CPU cores ({hardware['machine']}), torch uses "
        f"{hardware['torch_threads']} threads; {hardware['ram_available_gb']} GB of RAM available",
    ]
    lines += [f"  {gpu['name']}, {gpu['memory_gb']} GB" for gpu in hardware["gpus"]] or ["  no GPU"]
    for kind, scan in findings["scan"].items():
        lines += [f"Scan on {kind}: {scan['chosen'] or 'none'} ({scan['why']})"]
        for name, reason in scan["backends"].items():
            lines.append(f"  {name:<10} {'can be used' if reason is None else 'no: ' + reason}")
    if findings["instruction_set"]:
        lines.append(f"  the C library runs its {findings['instruction_set']} code")
    lines.append("Self-check: largest error against float64, relative to the tensor's maximum")
    for check in findings["self_check"]:
        verdict = "ok" if check["passed"] else "WRONG: do not use this scan, and report it"
        lines.append(
            f"  {check['device']} {check['backend']:<10} {check['error']:.1e} "
            f"({check['worst']}) {verdict}"
        )
    lines.append("Speed: tokens of 64 channels per second, forward / forward and backward")
    lines += [
        f"  {row['device']} {row['backend']:<10} {row['forward']:>12,} / "
        f"{row['forward_and_backward']:,}"
        for row in findings["speed"]
    ]
    lines.append("Folders")
    lines += [f"  {name} = {value or '(not set)'}" for name, value in folders["variables"].items()]
    if folders["workspace"]:
        lines.append(f"  workspace {folders['workspace']} ({folders['chosen_by']})")
    if "problem" in folders:
        lines.append(f"  problem: {folders['problem']}")
    lines += [
        "To train with UMambaTrainer by stock nnUNetv2_train",
        f"  {folders['stock_commands']}",
    ]
    return lines


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
