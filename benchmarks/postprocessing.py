"""Post-processing and ensembles beside nnU-Net's: CPU seconds and peak memory, results compared.

    python benchmarks/postprocessing.py [--shape 100 200 200] [--classes 15] [--cases 4]

Every row runs in a process of its own, so that its memory is its own. nnU-Net determines
post-processing with one worker process per step, whose CPU time counts and whose memory does not;
the ensemble is its `merge_files` in one process. The label maps and the decisions have to agree.
"""

from __future__ import annotations

import argparse
import json
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import SimpleITK
from scipy import ndimage

PLANS = {
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "configurations": {},
}


def make(folder: Path, shape: list[int], n_classes: int, n_cases: int) -> None:
    """References with one body per class, predictions with specks, probabilities of two members."""
    grid = np.indices(shape).sum(0)
    random = np.random.default_rng(0)
    labels = {"background": 0} | {f"l{i}": i for i in range(1, n_classes)}
    dataset_json = {"labels": labels, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset_json))
    for case in map(str, range(n_cases)):
        reference = (grid * n_classes // (grid.max() + 1)).astype(np.uint8)
        coarse = random.random([n // 10 + 1 for n in shape])
        specks = ndimage.zoom(coarse, 10, order=0)[tuple(map(slice, shape))] > 0.95
        prediction = np.where(specks, n_classes - 1 - reference, reference).astype(np.uint8)
        for name, array in (("predictions", prediction), ("references", reference)):
            (folder / name).mkdir(exist_ok=True)
            image = SimpleITK.GetImageFromArray(array)
            SimpleITK.WriteImage(image, str(folder / name / f"{case}.nii.gz"), True)
    for member in "ab":
        (folder / member).mkdir()
        values = random.random((n_classes, *(n // 10 + 1 for n in shape)), dtype=np.float32)
        crop = (slice(None), *map(slice, shape))
        np.savez_compressed(
            folder / member / "0.npz",
            probabilities=ndimage.zoom(values, (1, 10, 10, 10), order=0)[crop],
        )
        stuff = {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}
        (folder / member / "0.pkl").write_bytes(pickle.dumps({"sitk_stuff": stuff}))


def run_row(row: str, folder: Path) -> dict:
    """Does one row; returns CPU seconds after the imports and the peak of this process in MiB."""
    from nnunetv2.ensembling.ensemble import merge_files
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from umamba.evaluation import postprocessing as ours
    from umamba.inference.ensemble import ensemble_cases

    dataset_json = json.loads((folder / "dataset.json").read_text())
    files = [str(folder / member / "0.npz") for member in "ab"]
    predictions, references = folder / "predictions", folder / "references"
    before, result = _cpu_seconds(), None
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if row == "determine, nnU-Net":
        _, found = determine_postprocessing(
            str(predictions), str(references), PLANS, dataset_json, num_processes=1
        )
        result = [np.atleast_1d(entry["labels_or_regions"]).tolist() for entry in found]
    elif row == "determine, umamba":
        pairs = {f.name: (f, references / f.name) for f in sorted(predictions.glob("*.nii.gz"))}
        labels = list(range(1, len(dataset_json["labels"])))
        groups, _ = ours.determine_postprocessing(
            ours.measure_cases(pairs, labels, n_threads=1), labels
        )
        targets = {file: folder / "postprocessed" / file.name for file, _ in pairs.values()}
        ours.postprocess_files(targets, groups, n_threads=1)
        result = list(map(list, groups))
    elif row == "ensemble, nnU-Net":
        plans = PlansManager(PLANS)
        managers = plans.image_reader_writer_class(), plans.get_label_manager(dataset_json)
        merge_files(files, str(folder / "theirs"), ".nii.gz", *managers)
    else:
        failures = ensemble_cases(
            {"0": list(map(Path, files))}, folder / "ours", ["a", "b"], PLANS, dataset_json
        )
        assert not failures, failures
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "row": row,
        "cpu_s": round(_cpu_seconds() - before, 2),
        "peak_mib_above_imports": (peak - base) // 1024,
        "result": result,
    }


def _cpu_seconds() -> float:
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def read(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=[100, 200, 200])
    parser.add_argument("--classes", type=int, default=15)
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(run_row(args.row, args.folder)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.shape, args.classes, args.cases)
        for row in (
            f"{what}, {who}" for what in ("determine", "ensemble") for who in ("nnU-Net", "umamba")
        ):
            command = [sys.executable, __file__, "--row", row, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(done.stderr)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print("{row:20}{cpu_s:8.1f} CPU-s{peak_mib_above_imports:8d} MiB".format(**rows[-1]))
        assert rows[0]["result"] == rows[1]["result"], "the decisions differ"
        for file in (folder / "postprocessed").iterdir():
            theirs = folder / "predictions" / "postprocessed" / file.name
            assert np.array_equal(read(file), read(theirs)), "the post-processed label maps differ"
        averaged = folder / "theirs.nii.gz", folder / "ours" / "0.nii.gz"
        assert np.array_equal(*map(read, averaged)), "the ensembles differ"
        n_groups = len(rows[0]["result"])
    print(f"label maps and decisions agree ({n_groups} groups keep their largest component)")
    if args.json:
        args.json.write_text(json.dumps({"settings": [args.shape, args.classes], "rows": rows}))


if __name__ == "__main__":
    main()
