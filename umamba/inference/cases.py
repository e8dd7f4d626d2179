"""Which cases to predict: input files by case, their outputs, shards, and what is done already."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PredictionCase:
    """One case: its images, one per channel, and the label map that is to be written."""

    identifier: str
    images: tuple[Path, ...]
    output: Path
    file_ending: str
    previous_stage: Path | None = None


def find_images(
    inputs: Sequence[str | Path], file_ending: str, *, bare_names: bool
) -> dict[str, list[Path]]:
    """Files per case, by channel: those of a folder (case_0000.ending ...), or those of one case.

    Args:
        inputs: one folder, or the image files of a single case in the order of the channels.
        file_ending: that of the dataset, with its dot.
        bare_names: whether a file without `_0000` counts as a case of one channel.

    Raises FileNotFoundError for what is not there, ValueError where nothing can be used.
    """
    paths = _split_commas(inputs)
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        raise FileNotFoundError(f"input {', '.join(missing)} does not exist; check -i")
    if not any(p.is_dir() for p in paths):
        return {_identifier(paths[0]): paths}
    if len(paths) > 1:
        raise ValueError("-i takes one folder, or the files of one case, not several folders")
    folder = paths[0]
    files = sorted(p for p in folder.iterdir()
                   if p.name.endswith(file_ending) and not p.name.startswith("."))  # fmt: skip
    with_channel = re.compile(r"(.+)_(\d{4})" + re.escape(file_ending))
    cases: dict[str, list[Path]] = {}
    bare: dict[str, list[Path]] = {}
    for file in files:
        match = with_channel.fullmatch(file.name)
        if match:
            cases.setdefault(match[1], []).append(file)
        else:
            bare[file.name.removesuffix(file_ending)] = [file]
    if bare_names:
        cases = {**bare, **cases}
    if not cases and files:
        raise ValueError(
            f"the files in {folder} have no channel number; name them "
            f"{files[0].name.removesuffix(file_ending)}_0000{file_ending}, the next channel _0001"
        )
    if not cases:
        others = sorted({"".join(p.suffixes[-2:]) for p in folder.iterdir() if p.is_file()})
        there = f" (there are {', '.join(others[:5])})" if others else " (it is empty)"
        raise ValueError(
            f"{folder} has no files ending in {file_ending}, as the training images{there}"
        )
    return dict(sorted(cases.items()))


def plan_cases(
    images: dict[str, list[Path]],
    output: Path,
    file_ending: str,
    *,
    previous_stage_folder: Path | None = None,
    num_parts: int = 1,
    part_id: int = 0,
) -> list[PredictionCase]:
    """The cases of this part; `output` is a folder, or, for one case, the file to write."""
    if not 0 <= part_id < num_parts:
        raise ValueError(
            f"part_id {part_id} is not one of 0..{num_parts - 1}; parts are counted from 0"
        )
    to_file = _is_file_name(output, file_ending)
    if to_file and len(images) > 1:
        raise ValueError(f"{output} is a file, but there are {len(images)} cases; give a folder")
    cases = []
    for identifier in sorted(images)[part_id::num_parts]:
        before = None
        if previous_stage_folder is not None:
            before = previous_stage_folder / f"{identifier}{file_ending}"
        ending = _ending(output, file_ending) if to_file else file_ending
        target = output if to_file else output / f"{identifier}{ending}"
        cases.append(PredictionCase(identifier, tuple(images[identifier]), target, ending, before))
    return cases


def output_folder(output: Path, file_ending: str) -> Path:
    """The folder that `output` is, or lies in."""
    return output.parent if _is_file_name(output, file_ending) else output


def is_whole(case: PredictionCase, reader: Any, with_probabilities: bool) -> bool:
    """Whether the outputs of a case are there and readable to their end.

    `reader` is an instance of nnU-Net's reader class; SimpleITK alone reads a truncated .nii.gz
    without an error, so the checksum of the compressed stream is verified first.
    """
    if not case.output.is_file() or case.output.stat().st_size == 0:
        return False
    stem = case.output.name.removesuffix(case.file_ending)
    try:
        if case.output.suffix == ".gz":
            with gzip.open(case.output) as stream:
                while stream.read(2**22):
                    pass
        reader.read_seg(str(case.output))
        if with_probabilities:
            if not case.output.with_name(f"{stem}.pkl").is_file():
                return False
            with zipfile.ZipFile(case.output.with_name(f"{stem}.npz")) as archive:
                return archive.testzip() is None
    except (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile):
        return False
    return True


def _split_commas(inputs: Sequence[str | Path]) -> list[Path]:
    paths: list[Path] = []
    for item in inputs:
        whole = Path(item)
        if whole.exists() or "," not in str(item):
            paths.append(whole)
        else:
            paths += [Path(part.strip()) for part in str(item).split(",") if part.strip()]
    return paths


def _identifier(file: Path) -> str:
    stem = file.name.removesuffix(_ending(file, ""))
    return re.sub(r"_\d{4}$", "", stem)


def _ending(file: Path, file_ending: str) -> str:
    if file_ending and file.name.endswith(file_ending):
        return file_ending
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix


def _is_file_name(output: Path, file_ending: str) -> bool:
    known = {file_ending, ".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".bmp", ".tif", ".tiff"}
    return not output.is_dir() and any(output.name.endswith(e) for e in known)
