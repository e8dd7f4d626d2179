"""`umamba evaluate PRED GT`: Dice, NSD and HD95 of predictions, per case and class.

Compares two folders of label maps; writes summary.json (nnU-Net's keys and more) and summary.csv.
Exit code 3: some cases failed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from umamba.cli.common import UsageError, add_command, progress_bar

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".tiff")
METRICS = ("Dice", "NSD", "HD95")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(subparsers, "evaluate", run, __doc__)
    add = parser.add_argument
    add("predictions", type=Path, metavar="PRED", help="folder of predictions")
    add("references", type=Path, metavar="GT", help="folder of references")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-l", "--labels", nargs="+", metavar="LABEL",
        help="labels to evaluate; a region as 1,2 (default: dataset.json beside the folders)",
    )  # fmt: skip
    which.add_argument("-djfile", "--dataset-json", type=Path, metavar="FILE")
    add("-il", "--ignore-label", type=int, metavar="LABEL")
    add(
        "--tolerance", nargs="+", default=[], metavar="MM",
        help="of NSD in mm (default 2), or per label: 1=1.5 Liver=3; in pixels for PNG",
    )  # fmt: skip
    add("-o", "--output", type=Path, metavar="OUT", help="folder or .json (default: PRED)")
    add("-np", "--n-workers", type=int, metavar="N", help="processes (default: auto)")
    add("--chill", action="store_true", help="evaluate what is predicted, leave out the rest")
    add(
        "--empty-hd95", choices=("exclude", "diagonal"), default="exclude",
        help="HD95 where one of the masks is empty: undefined and counted, or the image's diagonal",
    )  # fmt: skip
    add("--voxel-count-nsd", action="store_true", help="add NSD by voxel count, as MONAI's default")
    add("--ignore-geometry", action="store_true", help="compare voxels though the headers differ")
    add("--file-ending", metavar="ENDING", help="of the label maps, as .nii.gz")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints a table; 3 when some cases could not be read."""
    from umamba.evaluation import evaluate_folder

    for folder in (args.predictions, args.references):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give PRED and GT as two folders")
    labels, ignore_label, ending = _what_to_evaluate(args)
    output = args.output or args.predictions
    with progress_bar("evaluating") as progress:
        summary = evaluate_folder(
            args.predictions,
            args.references,
            labels,
            ignore_label=ignore_label,
            file_ending=ending,
            tolerance_mm=_tolerance(args.tolerance),
            n_workers=args.n_workers,
            output=output,
            chill=args.chill,
            one_empty_hd95=args.empty_hd95,
            voxel_count_nsd=args.voxel_count_nsd,
            check_geometry=not args.ignore_geometry,
            progress=progress,
        )
    print(format_table(summary))
    file = output if output.suffix == ".json" else output / "summary.json"
    print(f"\nWritten: {file} and {file.with_suffix('.csv')}")
    if summary["failed"]:
        print(f"{len(summary['failed'])} cases could not be evaluated:")
        for entry in summary["failed"]:
            print(f"  {entry['error']}")
        return 3
    return 0


def format_table(summary: dict[str, Any]) -> str:
    """Returns the summary as a small table: a row per label, mean and standard deviation."""
    rows = [("label", "Dice", "NSD", "mm", "HD95 mm", "cases")]
    for key, name in summary["label_names"].items():
        spread, empty = summary["spread"][key], summary["empty"][key]
        one = empty["only_prediction_empty"] + empty["only_reference_empty"]
        notes = [f"{empty['both_empty']} empty in both"] if empty["both_empty"] else []
        notes += [f"{one} empty in one"] if one else []
        cases = f"{empty['cases']} ({', '.join(notes)})" if notes else str(empty["cases"])
        tolerance = f"{summary['rules']['tolerance_mm'][key]:g}"
        dice, nsd, hd95 = _cell(spread["Dice"]), _cell(spread["NSD"]), _cell(spread["HD95"], 2)
        rows.append((key if key == name else f"{key} {name}", dice, nsd, tolerance, hd95, cases))
    means = [{"mean": summary["foreground_mean"][name], "std": None} for name in METRICS]
    dice, nsd, hd95 = map(_cell, means)
    rows.append(("foreground mean", dice, nsd, "", hd95, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ([cell.ljust(n) for cell, n in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _what_to_evaluate(args: argparse.Namespace) -> tuple[Any, int | None, str]:
    """Returns labels, ignore label and file ending from the arguments or dataset.json."""
    from umamba.evaluation import labels_of_dataset

    labels: Any = [_label(text) for text in args.labels or ()]
    ignore_label: int | None = None
    ending: str | None = None
    if not labels:
        dataset_json = _read_dataset_json(args)
        labels, ignore_label = labels_of_dataset(dataset_json)
        ending = dataset_json.get("file_ending")
    if args.ignore_label is not None:
        ignore_label = args.ignore_label
    return labels, ignore_label, args.file_ending or ending or _ending_in(args.references)


def _read_dataset_json(args: argparse.Namespace) -> dict[str, Any]:
    folders = (args.predictions, args.references, args.references.absolute().parent)
    beside = [folder / "dataset.json" for folder in folders]
    candidates = [args.dataset_json] if args.dataset_json else beside
    file = next((file for file in candidates if file.is_file()), None)
    if file is None and args.dataset_json:
        raise FileNotFoundError(f"{args.dataset_json}: no such file; check -djfile")
    if file is None:
        raise UsageError(
            f"no dataset.json beside {args.predictions} or {args.references}; say which labels to "
            "evaluate with --labels 1 2, or name the file with -djfile"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error}); correct it") from error


def _ending_in(folder: Path) -> str:
    found = {e for e in ENDINGS for file in folder.iterdir() if file.name.endswith(e)}
    if len(found) == 1:
        return found.pop()
    seen = ", ".join(sorted(found)) or "none"
    raise ValueError(f"{folder}: file endings found: {seen}; choose with --file-ending")


def _label(text: str) -> int | tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.strip("()").split(",") if part)
    except ValueError:
        values = ()
    if not values:
        raise UsageError(f"label {text!r}: give whole numbers, a region as 1,2")
    return values[0] if len(values) == 1 else values


def _tolerance(texts: list[str]) -> dict[str, float]:
    """Returns tolerance by label from texts as 2 or Liver=3."""
    tolerances = {}
    for text in texts:
        label, _, value = text.rpartition("=")
        try:
            tolerances[label or "default"] = float(value)
        except ValueError:
            raise UsageError(f"tolerance {text!r}: give mm as 1.5, or LABEL=1.5") from None
    return tolerances


def _cell(spread: dict[str, Any], digits: int = 4) -> str:
    if spread["mean"] is None:
        return "undefined"
    std = "" if spread["std"] is None else f" ± {spread['std']:.{digits - 1}f}"
    return f"{spread['mean']:.{digits}f}{std}"
