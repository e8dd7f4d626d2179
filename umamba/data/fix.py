"""Writes a copy of a dataset in which what the audit can mend safely is mended."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK

from umamba.data.dataset import RawDataset
from umamba.data.faults import Repair
from umamba.data.images import NIFTI, ending_of, gunzip, read_image
from umamba.data.layout import list_cases, list_files
from umamba.data.links import link_file
from umamba.files import replacing, write_json

# where a voxel lies, in the words of NIfTI
GEOMETRY = (
    "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
    "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


def write_repaired(raw: RawDataset, repairs: Sequence[Repair], folder: Path) -> RawDataset:
    """Write the raw folder again with the repairs done, and return it; all of it or nothing.

    Files without a repair become links, those that exist only in the workspace copies. Labels keep
    their numbers. Raises ValueError where `folder` holds something already.
    """
    check_target(folder)
    kinds: dict[Path, dict[str, str | None]] = {}
    for repair in repairs:
        kinds.setdefault(Path(repair.file), {})[repair.kind] = repair.reference
    files = _files_by_name(raw)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)

    def place(name: str) -> None:
        source, target = files[name], part / name
        real = Path(os.path.realpath(source))
        with replacing(target) as temporary:
            if source in kinds:
                _repair(source, temporary, kinds[source])
            elif raw.source != raw.folder and real.is_relative_to(raw.folder.resolve()):
                shutil.copy2(real, temporary)
            else:
                link_file(real, temporary)

    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(place, files))
        content = {key: value for key, value in raw.dataset_json.items() if key != "dataset"}
        content["numTraining"] = len(list_cases(raw.folder, raw.dataset_json)[0])
        write_json(part / "dataset.json", content)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return RawDataset(folder, content, folder)


def check_target(folder: Path) -> None:
    """Raise a ValueError unless `folder` is free to be written."""
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(f"{folder} holds something already; name a new folder for the copy")


def _files_by_name(raw: RawDataset) -> dict[str, Path]:
    """Return the files of the copy by their place in it; explicit paths get the usual names."""
    is_explicit = "dataset" in raw.dataset_json
    files = {
        f"{where}/{name}": path
        for where in ("imagesTs", "labelsTs", *(() if is_explicit else ("imagesTr", "labelsTr")))
        for name, path in list_files(raw.folder / where).items()
    }
    if is_explicit:
        ending = raw.dataset_json["file_ending"]
        for identifier, case in list_cases(raw.folder, raw.dataset_json)[0].items():
            for i, path in enumerate(case.images):
                files[f"imagesTr/{identifier}_{i:04d}{ending}"] = path
            if case.label is not None:
                files[f"labelsTr/{identifier}{ending}"] = case.label
    return files


def _repair(source: Path, target: Path, kinds: dict[str, str | None]) -> None:
    """Write `source` with its values as integers, with the header of its image, or both."""
    values = _integers(source) if "integers" in kinds else None
    reference = kinds.get("header")
    if ending_of(source) in NIFTI:
        _write_nifti(source, target, values, reference)
        return
    image = SimpleITK.ReadImage(str(source))
    if values is not None:
        integers = SimpleITK.GetImageFromArray(values.reshape(image.GetSize()[::-1]))
        integers.CopyInformation(image)
        image = integers
    if reference is not None:
        image.CopyInformation(SimpleITK.ReadImage(reference))
    SimpleITK.WriteImage(image, str(target), True)


def _integers(path: Path) -> np.ndarray:
    """Return the values of a label map, rounded, in the smallest type that holds them."""
    values = np.rint(read_image(path, True, is_label=True).values()[0])
    low, high = int(values.min()), int(values.max())
    return values.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high)))


def _write_nifti(
    source: Path, target: Path, values: np.ndarray | None, reference: str | None
) -> None:
    """Write the header with other fields, and the voxels' own bytes where they may stay."""
    data, header = _read_nifti(source)
    offset = int(header.get_data_offset())
    voxels = data[offset:]
    if reference is not None:
        right = _read_nifti(Path(reference))[1]
        for name in GEOMETRY:
            header[name] = right[name]
        header["pixdim"][:4] = right["pixdim"][:4]
    if values is not None:
        header.set_data_dtype(values.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"] = header["cal_max"] = 0
        voxels = np.ascontiguousarray(values, header.get_data_dtype()).tobytes()
    n_header = len(header.binaryblock)
    whole = header.binaryblock + data[n_header:offset] + voxels
    if ending_of(source).endswith(".gz"):
        whole = gzip.compress(whole, 6, mtime=0)
    target.write_bytes(whole)


def _read_nifti(path: Path) -> tuple[bytes, Any]:
    """Return the decompressed file and its header, in the file's own byte order."""
    data = gunzip(path, path.read_bytes())
    is_v2 = 540 in (int.from_bytes(data[:4], "little"), int.from_bytes(data[:4], "big"))
    kind: Any = nibabel.Nifti2Header if is_v2 else nibabel.Nifti1Header
    return data, kind(data[: 540 if is_v2 else 348])
