"""What the commands share: options, checks of arguments, and the first steps with a dataset."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from umamba.data.audit import AuditReport, OnCase
    from umamba.data.dataset import RawDataset
    from umamba.data.workspace import Workspace
    from umamba.networks import NetworkEntry
    from umamba.planning.upstream import UpstreamEntry

OPTIONS: dict[str, dict[str, Any]] = {
    "dataset": {"help": "id, name or folder: nnU-Net's, MSD's, or images/ + labels/"},
    "--network": {"default": "umamba_bot", "help": "see `umamba models list`"},
    "-p --plans-name": {"help": "default: the network's name (and recipe, budget)"},
    "-f --fold": {"default": "0", "help": "0 to 4, or all (0)"},
    "--memory": {"type": float, "metavar": "GB", "help": "memory to plan for"},
    "--network-arg": {"action": "append", "default": [], "metavar": "KEY=JSON"},
    "--recipe": {"metavar": "NAME", "help": "train as an official code does (nnU-Net's way)"},
    "--recompute": {
        "choices": ("none", "mixer"),
        "default": "none",
        "help": "mixer: train in less memory and more time",
    },
    "--sampling": {
        "choices": ("auto", "stock", "jittered", "balanced"),
        "help": "how patches with foreground are chosen (auto; stock with --recipe)",
    },
    "-device --device": {"help": "cpu, cuda or mps (the GPU if there is one)"},
    "-num_gpus --num-gpus": {"type": int, "default": 1, "help": "GPUs (DDP)"},
    "-t --threads": {"type": int, "metavar": "N", "help": "CPU threads"},
    "-np": {"type": int, "metavar": "N", "help": "processes that read and preprocess"},
    "--workspace": {"metavar": "DIR", "help": "folder for raw, preprocessed and results"},
    "--pretrained": {
        "nargs": "?",
        "const": "",
        "metavar": "WEIGHTS",
        "help": "start from ImageNet weights: their name or file (the network's own)",
    },
    "--stock": {"action": "store_true", "help": "fingerprint, preprocess with nnU-Net's own code"},
    "--restart": {"action": "store_true", "help": "begin anew where results exist"},
}
"""Options of several commands, by their flags."""

TRAINERS = Path(__file__).parents[1] / "training" / "nnunet_trainers"
"""What nnUNet_extTrainer has to name, so that nnU-Net's own commands find our trainer."""


class UsageError(ValueError):
    """A wrong name or combination of arguments: exit code 2."""


def add_command(
    subparsers: argparse._SubParsersAction,
    name: str,
    run: Callable[[argparse.Namespace], int],
    doc: str | None,
    shared: str = "",
) -> argparse.ArgumentParser:
    """Adds a command that calls `run`; returns its parser.

    doc: the description, whose first line also stands in the list of all commands; a leading
    "`umamba NAME`: " is left out. shared: options of `OPTIONS` by their first flags.
    """
    text = re.sub("^`[^`]*`: ", "", doc or "")
    overview = text.split("\n")[0].rstrip(".")
    parser = subparsers.add_parser(name, help=overview, description=text[:1].upper() + text[1:])
    parser.set_defaults(run=run)
    by_name = {flags.split()[0]: flags for flags in OPTIONS}
    for flags in (by_name[option] for option in shared.split()):
        parser.add_argument(*flags.split(), **OPTIONS[flags])
    return parser


@contextmanager
def usage_errors(kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turns errors of a kind into UsageError."""
    try:
        yield
    except kind as error:
        raise UsageError(str(error)) from error


def find_network(name: str) -> NetworkEntry | UpstreamEntry:
    """The entry of a network, ours or nnU-Net's; UsageError with the nearest names if unknown."""
    from umamba.planning.upstream import find_entry

    with usage_errors():
        return find_entry(name)


def find_recipe(name: str | None) -> dict[str, Any]:
    """The values of a named recipe, none without a name; UsageError for an unknown one."""
    from umamba.training.recipes import get_recipe

    with usage_errors():
        return {} if name is None else get_recipe(name)


def recompute_recipe(args: argparse.Namespace) -> dict[str, str]:
    """The recipe's part of --recompute, empty without it."""
    return {} if args.recompute == "none" else {"recompute": args.recompute}


def settle_sampling(plans: dict[str, Any], names: Sequence[str], args: argparse.Namespace) -> dict:
    """Plans that say how foreground is sampled; prints the rates and the reason."""
    from umamba.planning.sampling import settle_sampling
    from umamba.report.sampling import describe_sampling

    asked = args.sampling or ("stock" if args.recipe else "auto")
    settled = settle_sampling(plans, names, asked)
    for name in names:
        print(f"{name}: how often a training patch holds each class")
        print(f"  {describe_sampling(settled['configurations'][name]['planning'])}")
    return settled


def check_recipe(recipe: Mapping[str, Any], dataset: RawDataset) -> None:
    """UsageError for a recipe's loss that is not defined on the dataset's labels."""
    labels = dataset.dataset_json["labels"].values()
    regions = any(isinstance(label, list | tuple) and len(label) > 1 for label in labels)
    if recipe.get("loss") == "region_tversky" and regions:
        raise UsageError(
            f"recipe {recipe.get('name')} is for labels that exclude each other, and "
            f"{dataset.name} has overlapping regions: choose another --recipe, or none"
        )


def check_numbers(args: argparse.Namespace) -> None:
    """UsageError for a --memory or -np that makes no sense."""
    if args.memory is not None and not 0 < args.memory < math.inf:
        raise UsageError(f"--memory {args.memory:g} makes no sense; give gigabytes above 0")
    if args.np is not None and args.np < 1:
        raise UsageError(f"-np {args.np} makes no sense; give at least 1")


def pretrained_recipe(args: argparse.Namespace) -> dict[str, str]:
    """The recipe's part of --pretrained, empty without it.

    Raises UsageError where the network has no such weights, FileNotFoundError where the file is not
    there yet, ValueError where it cannot be read.
    """
    if args.pretrained is None:
        return {}
    entry = find_network(args.network)
    from umamba.networks.checkpoint import read_weights
    from umamba.networks.pretrained import choose_file, find_file

    with usage_errors():
        chosen = choose_file(entry, args.pretrained)
    file = find_file(chosen)
    read_weights(file)
    print(f"pretrained weights: {file}")
    return {"pretrained": chosen}


def tell_pretrained(plans: dict[str, Any], names: Iterable[str]) -> None:
    """Prints what the planned networks take of the pretrained weights; ValueError if they clash."""
    import torch

    from umamba.networks.base import SegmentationNetwork
    from umamba.networks.pretrained import find_file, initialize_encoder
    from umamba.planning.plans import get_configuration, network_builder

    for name in names:
        part = get_configuration(plans, name)
        if chosen := part.get("recipe", {}).get("pretrained"):
            planned = (part["planning"][key] for key in ("input_channels", "num_classes"))
            with torch.device("meta"):
                network = network_builder(part, *planned)()
            assert isinstance(network, SegmentationNetwork)
            print(f"{name} takes {chosen}: {initialize_encoder(network, find_file(chosen))}")


def parse_fold(text: str) -> int | str:
    """0 to 4 or "all"; UsageError otherwise."""
    if text != "all" and not text.isdigit():
        raise UsageError(f"fold {text!r} is not known: give 0, 1, 2, 3, 4 or all")
    return text if text == "all" else int(text)


def choose_device(name: str | None) -> str:
    """The device that is asked for, else CUDA where there is one, else the CPU.

    Raises UsageError for an unknown name, ValueError for a device that is not there.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise UsageError(f"-device {name} is not known: give cpu, cuda or mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "no CUDA device is visible to torch: use -device cpu, or see umamba doctor"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("torch has no MPS device here: use -device cpu")
    return name


def preprocessing_device(args: argparse.Namespace) -> str | None:
    """The GPU that -device asks for, on which images are resampled; None where -np does not."""
    asked = args.device or ""
    return asked if asked.startswith("cuda") and args.np in (None, 1) else None


def set_threads(n_threads: int | None) -> None:
    """Sets torch's CPU threads, also those of child processes, where a number is given."""
    if n_threads:
        import torch

        os.environ["OMP_NUM_THREADS"] = str(n_threads)
        torch.set_num_threads(n_threads)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], object]]:
    """A bar of cases on a terminal, gone at the end; yields what is told n done, n in all."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="case", disable=None, leave=False) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def tell_failures(failures: list[str], n_done: int) -> int:
    """Prints what failed, one line each; the exit code: 0 nothing, 3 some, 1 all that there was."""
    if not failures:
        return 0
    print(f"error: {len(failures)} failed:", *failures, sep="\n  ", file=sys.stderr)
    return 3 if n_done else 1


def open_dataset(args: argparse.Namespace, *, strict: bool = False) -> tuple[RawDataset, Workspace]:
    """The dataset that is named and its workspace, now active; prints what was assumed of both.

    strict: ValueError with all faults of the file list and of dataset.json, which an audit else
    finds with its own.
    """
    from umamba.data.dataset import prepare_dataset

    dataset, workspace = prepare_dataset(args.dataset, args.workspace, strict=strict)
    print(workspace.describe())
    for note in dataset.notes:
        print(f"note: {note}")
    return dataset, workspace


def audit_memory(dataset: RawDataset, workspace: Workspace) -> Path:
    """The file in which the audit of a dataset is kept, beside its fingerprint."""
    return workspace.preprocessed / dataset.name / "audit.json"


def refuse_faults(
    dataset: RawDataset, workspace: Workspace, on_case: OnCase | None = None
) -> AuditReport:
    """Reads every file that has changed; ValueError with all faults. Prints the warnings.

    on_case: takes each case that is read and has no fault (see `audit_dataset`).
    """
    from umamba.data.audit import audit_dataset
    from umamba.data.table import format_findings

    memory = audit_memory(dataset, workspace)
    report = audit_dataset(dataset, on_case=on_case, memory=memory)
    report.raise_if_faults()
    if report.warnings:
        print(format_findings("warning", report.warnings, dataset.source, most=3))
    return report
