"""`umamba evaluate PRED GT`: Dice, NSD and HD95 of a folder of predictions, per case and class."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl", ".png", ".bmp", ".tif", ".tiff")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="Dice, NSD and HD95 of predictions against references",
        description="Compares a folder of predicted label maps with a folder of references. Writes "
        "summary.json (nnU-Net's keys and more) and summary.csv. Exit 3: some cases failed.",
    )
    parser.add_argument("predictions", type=Path, metavar="PRED", help="folder of predictions")
    parser.add_argument("references", type=Path, metavar="GT", help="folder of references")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-l",
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="labels to evaluate; a region as 1,2 (default: dataset.json beside the folders)",
    )
    which.add_argument("-djfile", "--dataset-json", type=Path, metavar="FILE")
    parser.add_argument("-il", "--ignore-label", type=int, metavar="LABEL")
    parser.add_argument(
        "--tolerance",
        nargs="+",
        default=[],
        metavar="MM",
        help="of NSD in mm (default 2), or per label: 1=1.5 Liver=3; in pixels for PNG",
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="OUT", help="folder or .json (default: PRED)"
    )
    parser.add_argument(
        "-np", "--n-workers", type=int, metavar="N", help="processes (default: auto)"
    )
    parser.add_argument(
        "--chill", action="store_true", help="evaluate what is predicted, leave out the rest"
    )
    parser.add_argument(
        "--empty-hd95",
        choices=("exclude", "diagonal"),
        default="exclude",
        help="HD95 where one of the masks is empty: undefined and counted, or the image's diagonal",
    )
    parser.add_argument(
        "--voxel-count-nsd",
        action="store_true",
        help="add NSD by voxel count, as MONAI's default",
    )
    parser.add_argument(
        "--ignore-geometry", action="store_true", help="compare voxels though the headers differ"
    )
    parser.add_argument("--file-ending", metavar="ENDING", help="of the label maps, as .nii.gz")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints a table; 3 when some cases could not be read."""
    from tqdm import tqdm

    from umamba.evaluation import evaluate_folder

    for folder in (args.predictions, args.references):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; give PRED and GT as two folders")
    labels, ignore_label, ending = _what_to_evaluate(args)
    with tqdm(desc="evaluating", unit="case", disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        summary = evaluate_folder(
            args.predictions,
            args.references,
            labels,
            ignore_label=ignore_label,
            file_ending=ending,
            tolerance_mm=_tolerance(args.tolerance),
            n_workers=args.n_workers,
            output=args.output,
            chill=args.chill,
            one_empty_hd95=args.empty_hd95,
            voxel_count_nsd=args.voxel_count_nsd,
            check_geometry=not args.ignore_geometry,
            progress=progress,
        )
    print(format_table(summary))
    output = args.output if args.output is not None else args.predictions
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
    names, tolerance = summary["label_names"], summary["rules"]["tolerance_mm"]
    width = max(len("foreground mean"), *(len(_title(key, names[key])) for key in names))
    lines = [f"{'label':<{width}}  {'Dice':>13}  {'NSD':>13}  {'mm':>4}  {'HD95 mm':>15}  cases"]
    for key, name in names.items():
        spread, empty = summary["spread"][key], summary["empty"][key]
        one = empty["only_prediction_empty"] + empty["only_reference_empty"]
        notes = [f"{empty['both_empty']} empty in both"] if empty["both_empty"] else []
        notes += [f"{one} empty in one"] if one else []
        lines.append(
            f"{_title(key, name):<{width}}  {_cell(spread['Dice']):>13}  "
            f"{_cell(spread['NSD']):>13}  {tolerance[key]:>4g}  {_cell(spread['HD95'], 2):>15}  "
            f"{empty['cases']}" + (f" ({', '.join(notes)})" if notes else "")
        )
    overall = summary["foreground_mean"]
    dice, nsd, hd95 = (_number(overall[metric]) for metric in ("Dice", "NSD", "HD95"))
    lines.append(f"{'foreground mean':<{width}}  {dice:<13}  {nsd:<13}  {'':>4}  {hd95:<15}")
    return "\n".join(line.rstrip() for line in lines)


def _what_to_evaluate(args: argparse.Namespace) -> tuple[Any, int | None, str]:
    """Returns labels, ignore label and file ending from the arguments or dataset.json."""
    from umamba.evaluation import labels_of_dataset

    if args.labels:
        ending = args.file_ending or _ending_in(args.references)
        return [_label(text) for text in args.labels], args.ignore_label, ending
    dataset_json = _read_dataset_json(args)
    labels, ignore_label = labels_of_dataset(dataset_json)
    if args.ignore_label is not None:
        ignore_label = args.ignore_label
    ending = args.file_ending or dataset_json.get("file_ending") or _ending_in(args.references)
    return labels, ignore_label, ending


def _read_dataset_json(args: argparse.Namespace) -> dict[str, Any]:
    import json

    candidates = [args.dataset_json] if args.dataset_json else []
    if not candidates:
        folders = (args.predictions, args.references, args.references.absolute().parent)
        candidates = [folder / "dataset.json" for folder in folders]
    for file in candidates:
        if file.is_file():
            try:
                return json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}: is not JSON ({error}); correct it") from error
    if args.dataset_json:
        raise FileNotFoundError(f"{args.dataset_json}: no such file; check -djfile")
    from umamba.cli.main import UsageError

    raise UsageError(
        f"no dataset.json beside {args.predictions} or {args.references}; say which labels to "
        "evaluate with --labels 1 2, or name the file with -djfile"
    )


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
        from umamba.cli.main import UsageError

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
            from umamba.cli.main import UsageError

            raise UsageError(f"tolerance {text!r}: give mm as 1.5, or LABEL=1.5") from None
    return tolerances


def _title(key: str, name: str) -> str:
    return key if key == name else f"{key} {name}"


def _cell(spread: dict[str, Any], digits: int = 4) -> str:
    if spread["mean"] is None:
        return "undefined"
    std = "" if spread["std"] is None else f" ± {spread['std']:.{digits - 1}f}"
    return f"{spread['mean']:.{digits}f}{std}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
