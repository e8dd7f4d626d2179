"""`umamba demo`: run the whole chain on a synthetic 3D dataset, in minutes, without any download.

Makes the data, then plans, trains, validates, predicts, evaluates and reports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from umamba.cli.common import add_command
from umamba.cli.main import main

MINUTES = 4.0
PLANS_NAME = "demo"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = add_command(subparsers, "demo", run, __doc__, "--network -device")
    parser.add_argument("-o", "--output", default="umamba-demo", help="folder (umamba-demo)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"wall time ({MINUTES:g})")


def run(args: argparse.Namespace) -> int:
    """Makes the data, runs the chain, predicts the test cases, and shows where the report is."""
    from umamba.data.synthetic import make_demo_dataset

    folder = Path(args.output).absolute()
    dataset, work, predictions = folder / "Dataset900_Demo", folder / "work", folder / "predictions"
    results = work / "results" / dataset.name / f"UMambaTrainer__{PLANS_NAME}__3d_fullres"
    if not (dataset / "dataset.json").is_file():
        print(f"making a synthetic dataset in {dataset}")
        make_demo_dataset(dataset)
    device = ["-device", args.device] if args.device else []
    train = ["run", dataset, "--network", args.network, "--minutes", f"{args.minutes:g}"]
    train += ["--plans-name", PLANS_NAME, "--workspace", work, *device]
    predict = ["predict", "-m", results, "-f", 0, "-i", dataset / "imagesTs", "-o", predictions]
    evaluate = ["evaluate", predictions, dataset / "labelsTs", "-djfile", dataset / "dataset.json"]
    steps = {
        "planning and training": train,
        "\npredicting the test cases": [*predict, *device],
        "\nevaluating the predictions": evaluate,
    }
    for title, words in steps.items():
        print(title)
        code = main([str(word) for word in words])
        if code:
            return code
    print(f"\nthe report: {results / 'fold_0' / 'report.html'}")
    return 0
