"""Reads every file of a dataset once and lists every fault, each with its cure."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tqdm import tqdm

from umamba.data.across import (
    check_duplicates,
    check_intensities,
    check_presence,
    check_spacings,
)
from umamba.data.case import Findings, Setup, inspect_case
from umamba.data.dataset import RawDataset
from umamba.data.faults import Fault, Faults, Repair, raise_if_faults
from umamba.data.images import ImageContent
from umamba.data.layout import (
    CaseFiles,
    channel_names,
    check_dataset_json,
    is_label,
    label_values,
    list_cases,
    list_test_cases,
)
from umamba.data.links import read_state
from umamba.data.remembered import AuditMemory
from umamba.data.summary import summarize
from umamba.processes import count_cores

OnCase = Callable[[str, list[ImageContent], ImageContent | None], None]
SECONDS_BETWEEN = 30.0  # writing down what was found, so that a killed audit goes on from there


@dataclass(frozen=True)
class AuditReport:
    """What the audit found.

    summary: cases, shapes and spacings (z, y, x; smallest, median, largest), voxels, and per label
    what `umamba.data.summary.summarize` counts; empty where dataset.json says too little to look
    at the files. repairs: what `write_repaired` can mend in a copy; n_remembered: cases that were
    not read because an earlier audit did.
    """

    n_cases: int
    faults: list[Fault]
    warnings: list[Fault]
    summary: dict[str, Any]
    name: str
    repairs: list[Repair] = field(default_factory=list)
    n_remembered: int = 0

    def raise_if_faults(self) -> None:
        """Raise a ValueError that lists every fault, one line each."""
        raise_if_faults(self.faults, self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self)


def audit_dataset(
    raw: RawDataset,
    n_workers: int | None = None,
    progress: bool = True,
    *,
    on_case: OnCase | None = None,
    memory: Path | None = None,
) -> AuditReport:
    """Return every fault and warning of a dataset in nnU-Net's raw format.

    Files that were linked into the workspace are named as they are in the user's folder. The images
    in imagesTs are looked at, too, but what is wrong with them is a warning.
    n_workers: threads, each with one case in memory; the default is a thread per core, at most 8.
    on_case: called in the thread that read a case, if the case has no fault, with its identifier,
    its images in the order of the channels and its label; what it raises ends the audit.
    memory: a JSON file in which the report is kept with what each case showed; cases whose files
    are as they were then are not read, nor given to on_case.
    """
    content = raw.dataset_json
    faults, warnings = Faults(raw.faults), Faults()
    is_linked = raw.source != raw.folder
    if not is_linked:
        faults += check_dataset_json(content, raw.folder / "dataset.json")
    labels, ending = content.get("labels"), content.get("file_ending")
    has_labels = isinstance(labels, dict) and all(map(is_label, labels.values()))
    if not has_labels or not isinstance(ending, str) or not ending:
        return AuditReport(0, list(dict.fromkeys(faults)), warnings, {}, raw.name)
    cases, by_name = list_cases(raw.folder, content)
    if not is_linked:
        faults += by_name
    tests = list_test_cases(raw.folder, content)
    values, ignore = label_values(content)
    listed = [*values, *([] if ignore is None else [ignore])]
    reader = str(content.get("overwrite_image_reader_writer"))
    use_nibabel = reader.startswith("NibabelIO") or ending.lower() == ".nii"
    setup = Setup(len(channel_names(content)), tuple(sorted({0, *listed})), use_nibabel)
    shown = _shown_names(raw)
    everything = {**cases, **{f"imagesTs/{name}": case for name, case in tests.items()}}

    remembered = AuditMemory(memory, setup, shown, everything)
    findings = {name: found for name in everything if (found := remembered.recall(name))}
    n_remembered = len(findings)

    def inspect(name: str) -> Findings:
        give = None if on_case is None or name not in cases else partial(on_case, name)
        return inspect_case(everything[name], setup, shown, give)

    todo = [name for name in everything if name not in findings]
    read = _inspect_all(todo, inspect, n_workers or min(count_cores(), 8), remembered)
    hidden = not progress or not todo
    findings |= tqdm(read, f"Checking {raw.name}", len(todo), disable=hidden, unit="case")
    of_cases = [findings[name] for name in cases]
    of_tests = [findings[name] for name in everything if name not in cases]
    for found in of_cases:
        faults += found.faults
        warnings += found.warnings
    for found in of_tests:
        warnings += [*found.faults, *found.warnings]
    check_duplicates(of_cases, of_tests, warnings)
    check_spacings(of_cases, warnings)
    channels = list(map(str, channel_names(content).values()))
    check_intensities(of_cases, channels, warnings)
    check_presence(of_cases, values, raw.source, faults, warnings)
    names = {value: name for name, value in content["labels"].items() if isinstance(value, int)}
    summary = {
        "name": raw.name,
        "channels": channels,
        "n_test_cases": len(tests),
        **summarize(of_cases, names, listed),
    }
    repairs = [repair for found in (*of_cases, *of_tests) for repair in found.repairs]
    unique = list(dict.fromkeys(faults))
    report = AuditReport(len(cases), unique, warnings, summary, raw.name, repairs, n_remembered)
    try:
        remembered.write(report.to_dict())
    except OSError as error:  # spoils no audit
        cure = "make room or change its permissions, else the next audit reads all files again"
        warnings.add(str(memory), f"cannot be written ({error.strerror or error})", cure)
    return report


def _inspect_all(
    names: list[str],
    inspect: Callable[[str], Findings],
    n_workers: int,
    remembered: AuditMemory,
) -> Iterator[tuple[str, Findings]]:
    """Yield each name with what its files show, in order; kept now and then, and when stopped."""
    written = time.monotonic()
    try:
        with ThreadPoolExecutor(n_workers) as pool:
            for name, found in zip(names, pool.map(inspect, names), strict=True):
                remembered.add(name, found)
                yield name, found
                if time.monotonic() - written > SECONDS_BETWEEN:
                    written = time.monotonic()
                    with contextlib.suppress(OSError):  # the last writing says so
                        remembered.write()
    except BaseException:
        with contextlib.suppress(OSError):
            remembered.write()
        raise


def check_images(
    files_per_case: dict[str, list[Path]],
    n_channels: int,
    *,
    reader_writer: str | None = None,
    label_maps: Mapping[str, Path] = MappingProxyType({}),
    labels: tuple[int, ...] = (),
) -> dict[str, list[Fault]]:
    """Return the faults of each case to predict, for the cases that have any.

    n_channels: what the network was trained on; reader_writer: the class in the plans; label_maps:
    per case the one that a cascade starts from, which may hold `labels`.
    """
    setup = Setup(n_channels, labels, str(reader_writer).startswith("NibabelIO"))

    def faults_of(case: str) -> Faults:
        files = CaseFiles(tuple(files_per_case[case]), label_maps.get(case))
        return inspect_case(files, setup).faults

    with ThreadPoolExecutor(2) as pool:
        found = zip(files_per_case, pool.map(faults_of, files_per_case), strict=True)
        return {case: faults for case, faults in found if faults}


def _shown_names(raw: RawDataset) -> Callable[[Path], str]:
    """Return a function from a file to the name the user knows it by."""
    entries = read_state(raw.folder).get("entries", {})
    folder = str(raw.folder) + os.sep

    def shown(path: Path) -> str:
        entry = entries.get(str(path).removeprefix(folder))
        return str(entry[0]) if entry else str(path)

    return shown
