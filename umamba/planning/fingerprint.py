"""nnU-Net's fingerprint of a dataset: each case is read once, or was by the audit."""

import contextlib
import io
from typing import Any

import numpy as np

from umamba.files import write_json
from umamba.planning.cases import (
    Cases,
    Store,
    case_facts,
    count_threads,
    read_dataset,
    run_cases,
)
from umamba.planning.plans import digest, preprocessed_folder, read_json
from umamba.preprocessing.reading import Kept
from umamba.preprocessing.statistics import CaseStatistics, analyze_case, summarize

SAMPLED_VOXELS = 10e7  # foreground of all cases together, drawn for the intensity statistics


def fingerprint_dataset(
    dataset_name: str,
    n_workers: int = 1,
    progress: bool = True,
    *,
    stock: bool = False,
    store: Store | None = None,
) -> dict[str, Any]:
    """Writes nnU-Net's dataset_fingerprint.json and returns it; kept where the cases are the same.

    Values equal those of nnU-Net's extractor: the same foreground voxels are drawn. One worker is
    this process itself, which is faster for small data, and takes cases that are in the store.
    stock: nnU-Net's own code reads the cases and draws.
    """
    dataset_json, cases = read_dataset(dataset_name)
    target = preprocessed_folder(dataset_name) / "dataset_fingerprint.json"
    stamp = digest(case_facts(cases))
    if target.is_file():
        known: dict[str, Any] = read_json(target)
        if known.get("cases_digest") == stamp:
            return known
    reader = find_reader(dataset_json, cases)
    n_samples = int(SAMPLED_VOXELS // len(cases))
    kept = store.get if store is not None and n_workers <= 1 else lambda name: None
    jobs = {
        name: (case["images"], case["label"], reader, n_samples, kept(name))
        for name, case in cases.items()
    }
    n_threads = count_threads(cases)
    analyze = analyze_stock if stock else analyze_case
    results = run_cases(analyze, jobs, n_workers, "Fingerprint", progress, n_threads)
    fingerprint = summarize([results[name] for name in cases], n_samples)
    fingerprint |= {"cases_digest": stamp}
    write_json(target, fingerprint)
    return fingerprint


def analyze_stock(
    images: list[str], label: str, reader: str, n_samples: int, _: Kept | None
) -> CaseStatistics:
    """Does what `analyze_case` does with nnU-Net's own function."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    reader_class = recursive_find_reader_writer_by_name(reader)
    analyze = DatasetFingerprintExtractor.analyze_case
    shape, spacing, drawn, _, relative = analyze(images, label, reader_class, n_samples)
    return CaseStatistics(shape, spacing, [np.asarray(d) for d in drawn], True, relative)


def find_reader(dataset_json: dict[str, Any], cases: Cases) -> str:
    """Returns the name of the class with which nnU-Net reads the dataset."""
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    example = next(iter(cases.values()))["images"][0]
    with contextlib.redirect_stdout(io.StringIO()):
        reader = determine_reader_writer_from_dataset_json(dataset_json, example)
    return str(reader.__name__)
