"""Probabilities of a whole image on their way to nnU-Net's .npz, in a file instead of memory."""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

CHUNK = 2**24


class ProbabilityFile:
    """Probabilities (K, ...) float32, written box by box, in the image's own order of axes.

    The file has no name, so nothing remains of it however the process ends.
    """

    def __init__(
        self,
        folder: Path,
        n_outputs: int,
        shape: Sequence[int],
        transpose_backward: Sequence[int],
        crop: Sequence[slice],
        *,
        background: bool,
    ) -> None:
        """`shape` and `crop` are in the order of the plans; with `background`, what is outside
        the crop has probability 1 in the first channel."""
        self._backward = tuple(transpose_backward)
        self.shape = (n_outputs, *(int(shape[i]) for i in self._backward))
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(prefix=".umamba_", dir=folder, buffering=0)  # noqa: SIM115
        self._file.truncate(4 * math.prod(self.shape))
        if background and [(c.start, c.stop) for c in crop] != [(0, n) for n in shape]:
            ones = np.ones(CHUNK // 4, np.float32)
            n = math.prod(self.shape[1:])
            for i in range(0, n, len(ones)):
                _write_at(self._file.fileno(), ones[: n - i], 4 * i)

    @classmethod
    def of_case(
        cls,
        folder: Path,
        properties: dict[str, Any],
        plans_manager: PlansManager,
        label_manager: LabelManager,
    ) -> ProbabilityFile:
        """The file for a case, of which nnU-Net's preprocessor recorded the properties."""
        return cls(
            folder,
            label_manager.num_segmentation_heads,
            properties["shape_before_cropping"],
            plans_manager.transpose_backward,
            [slice(int(a), int(b)) for a, b in properties["bbox_used_for_cropping"]],
            background=not label_manager.has_regions,
        )

    def write(self, probabilities: np.ndarray, box: Sequence[slice]) -> None:
        """Takes probabilities (K, z, y, x) of a box of the image, both in the plans' order."""
        found = probabilities.transpose([0, *(i + 1 for i in self._backward)])
        found = np.ascontiguousarray(found, dtype=np.float32)
        parts = [box[i] for i in self._backward]
        _, n_0, n_1, n_2 = self.shape
        whole_rows = parts[2].stop - parts[2].start == n_2
        for k, i in np.ndindex(found.shape[:2]):
            plane = (k * n_0 + parts[0].start + i) * n_1 + parts[1].start
            lines = [found[k, i]] if whole_rows else found[k, i]
            for j, line in enumerate(lines):
                place = 4 * ((plane + j) * n_2 + parts[2].start)
                _write_at(self._file.fileno(), line, place)

    def close(self) -> None:
        self._file.close()

    def save(self, file: Path) -> None:
        """Writes the .npz that np.savez_compressed would, and closes."""
        with (
            self._file as source,
            zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("probabilities.npy", "w", force_zip64=True) as target,
        ):
            header = {"descr": "<f4", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(target, header)
            source.seek(0)
            while chunk := source.read(CHUNK):
                target.write(chunk)


def _write_at(file: int, array: np.ndarray, place: int) -> None:
    memory = array.data.cast("B")
    done = 0
    while done < len(memory):
        done += os.pwrite(file, memory[done:], place + done)
