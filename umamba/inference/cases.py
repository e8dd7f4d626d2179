"""Which cases to predict: input files by case, their outputs, shards, and what is done already."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


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
    paths: list[Path] = []
    for item in inputs:
        if "," in str(item) and not Path(item).exists():
            paths += [Path(part.strip()) for part in str(item).split(",") if part.strip()]
        else:
            paths.append(Path(item))
    missing = [str(p) for p in paths if not p.exists()]
    if missing:
        raise FileNotFoundError(f"input {', '.join(missing)} does not exist; check -i")
    folder = paths[0]
    if not any(p.is_dir() for p in paths):
        return {re.sub(r"_\d{4}$", "", folder.name.removesuffix(_ending(folder, ""))): paths}
    if len(paths) > 1:
        raise ValueError("-i takes one folder, or the files of one case, not several folders")

    files = sorted(p for p in folder.iterdir()
                   if p.name.endswith(file_ending) and not p.name.startswith("."))  # fmt: skip
    cases: dict[str, list[Path]] = {}
    bare: dict[str, list[Path]] = {}
    for file in files:
        stem = file.name.removesuffix(file_ending)
        if channel := re.fullmatch(r"(.+)_(\d{4})", stem):
            cases.setdefault(channel[1], []).append(file)
        else:
            bare[stem] = [file]
    for name, found in cases.items():
        expected = [folder / f"{name}_{i:04d}{file_ending}" for i in range(len(found))]
        if not bare_names and found != expected:
            # named as missing when the case is checked, else later channels would take its place
            found.insert(0, next(file for file in expected if file not in found))
    if bare_names:
        cases = bare | cases
    if not cases and files:
        name = files[0].name.removesuffix(file_ending)
        raise ValueError(
            f"the files in {folder} have no channel number; name them {name}_0000{file_ending}, "
            "the next channel _0001"
        )
    if not cases:
        others = sorted({"".join(p.suffixes[-2:]) for p in folder.iterdir() if p.is_file()})
        there = f"there are {', '.join(others[:5])}" if others else "it is empty"
        raise ValueError(
            f"{folder} has no files ending in {file_ending}, as the training images ({there})"
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
    to_file = output_folder(output, file_ending) != output
    if to_file and len(images) > 1:
        raise ValueError(f"{output} is a file, but there are {len(images)} cases; give a folder")
    ending = _ending(output, file_ending) if to_file else file_ending
    cases = []
    for name in sorted(images)[part_id::num_parts]:
        target = output if to_file else output / f"{name}{file_ending}"
        before = previous_stage_folder and previous_stage_folder / f"{name}{file_ending}"
        cases.append(PredictionCase(name, tuple(images[name]), target, ending, before))
    return cases


def output_folder(output: Path, file_ending: str) -> Path:
    """The folder that `output` is, or, where it names an image file, lies in."""
    known = (file_ending, ".nii.gz", ".nii", ".nrrd", ".mha", ".png", ".bmp", ".tif", ".tiff")
    return output.parent if output.name.endswith(known) and not output.is_dir() else output


def is_whole(
    case: PredictionCase, read: Callable[[Path], object], with_probabilities: bool
) -> bool:
    """Whether the outputs of a case are there and readable to their end.

    `read` raises ValueError for an image that is not, which SimpleITK does not for NIfTI.
    """
    if not case.output.is_file():
        return False
    stem = case.output.name.removesuffix(case.file_ending)
    try:
        read(case.output)
        if with_probabilities:
            if not case.output.with_name(f"{stem}.pkl").is_file():
                return False
            with zipfile.ZipFile(case.output.with_name(f"{stem}.npz")) as archive:
                return archive.testzip() is None
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile):
        return False
    return True


def _ending(file: Path, file_ending: str) -> str:
    if file_ending and file.name.endswith(file_ending):
        return file_ending
    return "".join(file.suffixes[-2:]) if file.suffix == ".gz" else file.suffix
