"""Ensembles: the mean of several networks' probabilities as label maps, equal to nnU-Net's."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from umamba.files import write_json
from umamba.inference.export import write_prediction
from umamba.inference.labels import label_dtype
from umamba.inference.model_folder import read_json
from umamba.inference.pipeline import CaseFailure, run_pipeline

# Legend: K classes or regions; Z, Y, X extents of the image.

_CHUNK = 1 << 20  # voxels of one class that are averaged at a time
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, NotImplementedError)


def ensemble_folders(
    folders: Sequence[Path], output: Path, on_done: Callable[[int, int], object] | None = None
) -> tuple[list[CaseFailure], int]:
    """Averages the .npz of every case over the folders; returns what failed, and all cases.

    plans.json and dataset.json are those of the first folder. A case that a folder lacks fails,
    the others are written. Raises FileNotFoundError or ValueError where the folders are unusable.
    """
    found: dict[Path, set[str]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give folders of predictions")
        found[folder] = {file.stem for file in folder.glob("*.npz")}
        if not found[folder]:
            raise FileNotFoundError(
                f"{folder} holds no probabilities (.npz): predict with --save_probabilities"
            )
    plans, dataset_json = (read_json(folders[0] / f"{n}.json") for n in ("plans", "dataset"))
    for folder in folders[1:]:
        if read_json(folder / "dataset.json").get("labels") != dataset_json.get("labels"):
            raise ValueError(f"{folder} and {folders[0]} are of other labels: see dataset.json")
    cases = {
        c: [folder / f"{c}.npz" for folder in folders] for c in sorted(set.union(*found.values()))
    }
    members = [str(folder.resolve()) for folder in folders]
    return ensemble_cases(cases, output, members, plans, dataset_json, on_done), len(cases)


def ensemble_cases(
    cases: Mapping[str, Sequence[Path]],
    output: Path,
    members: Sequence[str],
    plans: dict[str, Any],
    dataset_json: dict[str, Any],
    on_done: Callable[[int, int], object] | None = None,
) -> list[CaseFailure]:
    """Writes the label map of each case (its .npz files, with .pkl beside the first) to `output`.

    A label map that is there and newer than its files is left alone. Raises ValueError where
    `output` holds the ensemble of other members.
    """
    record = output / "ensemble.json"
    if record.is_file() and read_json(record).get("members") != list(members):
        raise ValueError(f"{output} holds an ensemble of others ({record}): give another folder")
    for name, content in (("plans", plans), ("dataset", dataset_json)):
        write_json(output / f"{name}.json", content)
    write_json(record, {"members": list(members)})
    plans_manager, ending = PlansManager(plans), dataset_json["file_ending"]
    label_manager = plans_manager.get_label_manager(dataset_json)
    if type(label_manager) is not LabelManager:
        name = type(label_manager).__name__
        raise ValueError(
            f"the plans name a label manager of their own, {name}: it is not supported"
        )
    n_done = 0

    def is_current(case: str) -> bool:
        target, sources = output / f"{case}{ending}", cases[case]
        if not target.is_file() or not all(file.is_file() for file in sources):
            return False
        return all(target.stat().st_mtime_ns > file.stat().st_mtime_ns for file in sources)

    def average(case: str) -> tuple[np.ndarray, dict[str, Any]]:
        return average_to_labels(cases[case], label_manager), _read_properties(cases[case][0])

    def export(case: str, _: object, averaged: tuple[np.ndarray, dict[str, Any]]) -> None:
        labels, properties = averaged
        write_prediction(
            output / f"{case}{ending}", labels, None, properties, plans_manager, ending
        )

    def count(_: str) -> None:
        nonlocal n_done
        n_done += 1
        if on_done is not None:
            on_done(n_done, len(waiting))

    waiting = [case for case in cases if not is_current(case)]
    return run_pipeline(waiting, str, average, lambda _, averaged: averaged, export, count)


def average_to_labels(files: Sequence[Path], label_manager: LabelManager) -> np.ndarray:
    """Label map (Z, Y, X) of the mean of `probabilities` (K, Z, Y, X) in several .npz files.

    They are read class by class, a piece at a time: beside the label map one float32 of its shape
    is held, and none for regions. Raises ValueError or FileNotFoundError naming the file.
    """
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(_Probabilities(file))) for file in files]
        shape, n_outputs = sources[0].shape, label_manager.num_segmentation_heads
        for source in sources:
            if source.shape != shape or shape[0] != n_outputs:
                raise ValueError(
                    f"{source.file}: has shape {source.shape}, expected {(n_outputs, *shape[1:])} "
                    "as the labels and the first of the ensemble say: predict the same images"
                )
        n_voxels = math.prod(shape[1:])
        labels = np.zeros(n_voxels, dtype=label_dtype(label_manager))
        best = np.empty(0 if label_manager.has_regions else n_voxels, dtype=np.float32)
        for index in range(n_outputs):
            for start in range(0, n_voxels, _CHUNK):
                part = slice(start, min(start + _CHUNK, n_voxels))
                mean = sources[0].read(part.stop - start).astype(np.float32)
                for source in sources[1:]:
                    mean += source.read(part.stop - start)
                mean /= len(sources)
                if label_manager.has_regions:
                    labels[part][mean > 0.5] = label_manager.regions_class_order[index]
                elif index == 0:
                    best[part] = mean
                else:
                    labels[part][mean > best[part]] = index
                    np.maximum(mean, best[part], out=best[part])
        for source in sources:
            source.finish()
    return labels.reshape(shape[1:])


class _Probabilities:
    """The array `probabilities` of an .npz, read from front to back, never whole."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; predict with --save_probabilities")
        self.file, self._open = file, ExitStack()
        try:
            archive = self._open.enter_context(zipfile.ZipFile(file))
            self._stream: Any = self._open.enter_context(archive.open("probabilities.npy"))
            major, form = np.lib.format.read_magic(self._stream)[0], np.lib.format
            header = form.read_array_header_1_0 if major == 1 else form.read_array_header_2_0
            self.shape, in_columns, self.dtype = header(self._stream)
            if in_columns:  # numpy's choice where only one axis is longer than 1
                with np.load(file) as loaded:
                    self._stream = io.BytesIO(loaded["probabilities"].tobytes())
        except _DAMAGE as error:
            self.close()
            raise self._damaged(error) from error

    def read(self, count: int) -> np.ndarray:
        try:
            return np.frombuffer(self._stream.read(count * self.dtype.itemsize), self.dtype, count)
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def finish(self) -> None:
        """Reads the end of the file, which checks the sum over all of it."""
        try:
            self._stream.read(1)
        except _DAMAGE as error:
            raise self._damaged(error) from error

    def close(self) -> None:
        self._open.close()

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.file}: is cut off or damaged ({error}); predict this case again")


class _PropertiesReader(pickle.Unpickler):
    """Reads numbers, names and arrays only, so that no code in the file can run."""

    def find_class(self, module: str, name: str) -> Any:
        known = ("_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype")
        if module.split(".")[0] == "numpy" and name in known:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_properties(archive: Path) -> dict[str, Any]:
    """What nnU-Net's writer wants to know of a case: the .pkl beside its .npz."""
    file = archive.with_suffix(".pkl")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: is missing beside {archive.name}; predict it again")
    try:
        with file.open("rb") as stream:
            return _PropertiesReader(stream).load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: is not nnU-Net's description of a case ({error})") from error
