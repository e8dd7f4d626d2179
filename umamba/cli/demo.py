"""`umamba demo`: the whole chain on a synthetic dataset, in minutes, without any download."""

from __future__ import annotations

import argparse
from pathlib import Path

MINUTES = 4.0
PLANS_NAME = "demo"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the `demo` command."""
    parser = subparsers.add_parser(
        "demo",
        help="run the whole chain on a synthetic dataset, in minutes",
        description="Makes a synthetic 3D dataset, then plans, trains, validates, predicts, "
        "evaluates and reports on it.",
    )
    parser.add_argument("-o", "--output", default="umamba-demo", help="folder (umamba-demo)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"wall time ({MINUTES:g})")
    parser.add_argument("--network", default="umamba_bot", help="see `umamba models list`")
    parser.add_argument("-device", "--device", help="cpu, cuda or mps (cuda if there)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Makes the data, runs the chain, predicts the test cases, and shows where the report is."""
    from umamba.cli.main import main
    from umamba.data.synthetic import make_demo_dataset

    folder = Path(args.output).absolute()
    dataset = folder / "Dataset900_Demo"
    if not (dataset / "dataset.json").is_file():
        print(f"making a synthetic dataset in {dataset}")
        make_demo_dataset(dataset)
    work = folder / "work"
    device = ["-device", args.device] if args.device else []
    words = [str(dataset), "--network", args.network, "--minutes", f"{args.minutes:g}"]
    words += ["--plans-name", PLANS_NAME]
    code = main(["run", *words, "--workspace", str(work), *device])
    if code:
        return code
    results = work / "results" / dataset.name / f"UMambaTrainer__{PLANS_NAME}__3d_fullres"
    predictions = folder / "predictions"
    print("\npredicting the test cases")
    images = str(dataset / "imagesTs")
    code = main(
        ["predict", "-m", str(results), "-f", "0", "-i", images, "-o", str(predictions), *device]
    )
    if code:
        return code
    labels = ["-djfile", str(dataset / "dataset.json")]
    code = main(["evaluate", str(predictions), str(dataset / "labelsTs"), *labels])
    if code:
        return code
    print(f"\nthe report: {results / 'fold_0' / 'report.html'}")
    return 0
