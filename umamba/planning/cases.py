"""The cases of a dataset, what their files are now, and functions run over all of them."""

import copy
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from umamba.planning.plans import digest, read_json
from umamba.preprocessing.reading import Kept
from umamba.processes import count_cores, worker_pool

Cases = dict[str, dict[str, Any]]

CASE_ERRORS = (RuntimeError, ValueError, OSError, AssertionError, IndexError)
SMALL_CASE = 2_000_000  # bytes of files: of such cases one process works on several at a time


class Store(Protocol):
    """What has been read of the cases already (`umamba.preprocessing.case_store.CaseStore`)."""

    def get(self, name: str) -> Kept | None: ...


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

    The same as nnU-Net's own listing, which forks a pool and compares each case with every file,
    but for hidden files (macOS leaves some beside others).
    """
    if "dataset" in dataset_json:
        from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

        return get_filenames_of_train_images_and_targets(
            str(raw_folder), copy.deepcopy(dict(dataset_json))
        )
    ending = dataset_json["file_ending"]
    image_name = re.compile(rf"([^.].*)_\d{{4}}{re.escape(ending)}")
    images: dict[str, list[str]] = {}
    for path in sorted((raw_folder / "imagesTr").iterdir()):
        if match := image_name.fullmatch(path.name):
            images.setdefault(match[1], []).append(str(path))
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
    facts: dict[str, list[tuple[str, int, int]]] = {}
    for name, case in cases.items():
        facts[name] = []
        for file in (*case["images"], case["label"]):
            try:
                status = os.stat(file)
            except OSError:
                raise FileNotFoundError(
                    f"case {name} has no file {file}: add it or drop the case"
                ) from None
            facts[name].append((os.path.basename(file), status.st_size, status.st_mtime_ns))
    return facts


def case_digests(cases: Cases) -> dict[str, str]:
    """Returns per case what tells whether its files are still the same."""
    return {name: digest(facts) for name, facts in case_facts(cases).items()}


def default_workers(dataset_name: str) -> int:
    """Returns 1 for data that one process reads in about a minute, else up to the cores."""
    _, cases = read_dataset(dataset_name)
    n_bytes = sum(size for facts in case_facts(cases).values() for _, size, _ in facts)
    return max(1, min(count_cores(), 8, n_bytes // 200_000_000))


def count_threads(cases: Cases) -> int:
    """Returns how many cases one process should have in work: several where they are small."""
    largest = max(sum(size for _, size, _ in facts) for facts in case_facts(cases).values())
    return min(count_cores(), 4) if largest < SMALL_CASE else 1


def run_cases(
    function: Callable[..., Any],
    jobs: Mapping[str, Sequence[Any]],
    n_workers: int,
    title: str,
    progress: bool,
    n_threads: int = 1,
) -> dict[str, Any]:
    """Returns function(*job) per case; a case that fails raises ValueError with its name.

    One worker is this process, with `n_threads` threads; several are spawned processes, which end
    with this one however it ends.
    """
    results = _results(function, jobs, n_workers, n_threads)
    hidden = None if progress else True
    return dict(tqdm(results, title, len(jobs), unit="case", disable=hidden))


def _results(
    function: Callable[..., Any], jobs: Mapping[str, Sequence[Any]], n_workers: int, n_threads: int
) -> Iterator[tuple[str, Any]]:
    if n_workers <= 1 and n_threads <= 1:
        for name, job in jobs.items():
            yield name, _result(name, functools.partial(function, *job))
        return
    with worker_pool(n_workers) if n_workers > 1 else _thread_pool(n_threads) as pool:
        futures = {pool.submit(function, *job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], _result(futures[future], future.result)


@contextmanager
def _thread_pool(n_threads: int) -> Iterator[Executor]:
    pool = ThreadPoolExecutor(n_threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _result(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process was killed, most likely for want of memory: use fewer (-np 1)"
        ) from error
    except CASE_ERRORS as error:
        raise ValueError(
            f"case {name} cannot be read and preprocessed ({type(error).__name__}: {error}): "
            "`umamba audit` lists the faults of all files"
        ) from error
