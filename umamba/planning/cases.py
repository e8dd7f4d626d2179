"""The cases of a raw dataset: files, what identifies them, and work on them one by one."""

import copy
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from umamba.planning.plans import read_json

Cases = dict[str, dict[str, Any]]

CASE_ERRORS = (RuntimeError, ValueError, OSError, AssertionError, IndexError)


def read_dataset(dataset_name: str) -> tuple[dict[str, Any], Cases]:
    """Returns dataset.json and the cases of a dataset under nnUNet_raw."""
    from nnunetv2.paths import nnUNet_raw

    folder = Path(nnUNet_raw) / dataset_name
    path = folder / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: nnU-Net's description of the dataset")
    dataset_json = read_json(path)
    return dataset_json, list_cases(folder, dataset_json)


def list_cases(raw_folder: Path, dataset_json: Mapping[str, Any]) -> Cases:
    """Returns per identifier its image files (one per channel) and its label file, as strings.

    The same as nnU-Net's own listing, which forks a pool and compares each case with every file.
    """
    if "dataset" in dataset_json:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        return get_filenames_of_train_images_and_targets(
            str(raw_folder), copy.deepcopy(dict(dataset_json))
        )
    ending = dataset_json["file_ending"]
    images: dict[str, list[str]] = {}
    for name in sorted(entry.name for entry in os.scandir(raw_folder / "imagesTr")):
        stem = name.removesuffix(ending)
        if name.endswith(ending) and stem[-5:-4] == "_" and stem[-4:].isdigit():
            images.setdefault(stem[:-5], []).append(str(raw_folder / "imagesTr" / name))
    if not images:
        raise ValueError(
            f"{raw_folder / 'imagesTr'} holds no image called <case>_0000{ending}: check the "
            "names and the file_ending in dataset.json"
        )
    return {
        case: {"images": files, "label": str(raw_folder / "labelsTr" / f"{case}{ending}")}
        for case, files in sorted(images.items())
    }


def case_facts(cases: Cases) -> dict[str, list[tuple[str, int, int]]]:
    """Returns name, size and time of change of every file of every case."""
    facts = {}
    for name, case in cases.items():
        files = [Path(file) for file in (*case["images"], case["label"])]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"case {name} has no file {missing[0]}: add it or drop the case"
            )
        facts[name] = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return facts


def default_workers(dataset_name: str) -> int:
    """Returns 1 for data that one process reads in about a minute, else up to the cores."""
    _, cases = read_dataset(dataset_name)
    n_bytes = sum(size for facts in case_facts(cases).values() for _, size, _ in facts)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, 8, n_bytes // 200_000_000))


def run_cases(
    function: Callable[..., Any],
    jobs: Mapping[str, Sequence[Any]],
    n_workers: int,
    title: str,
    progress: bool,
) -> dict[str, Any]:
    """Returns function(*job) per case; a case that fails raises ValueError with its name."""
    results: dict[str, Any] = {}
    bar = tqdm(total=len(jobs), desc=title, unit="case", disable=None if progress else True)
    with bar:
        for name, result in _results(function, jobs, n_workers):
            results[name] = result
            bar.update()
    return results


def _results(
    function: Callable[..., Any], jobs: Mapping[str, Sequence[Any]], n_workers: int
) -> Iterator[tuple[str, Any]]:
    if n_workers <= 1:
        for name, job in jobs.items():
            try:
                yield name, function(*job)
            except CASE_ERRORS as error:
                raise _case_error(name, error) from error
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_workers, mp_context=context) as pool:
        futures = {pool.submit(function, *job): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed, most likely for want of memory: use fewer (-np 1)"
            ) from error
        except CASE_ERRORS as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise _case_error(futures[future], error) from error


def _case_error(name: str, error: Exception) -> ValueError:
    return ValueError(
        f"case {name} cannot be read and preprocessed ({type(error).__name__}: {error}): "
        "`umamba audit` lists the faults of all files"
    )
