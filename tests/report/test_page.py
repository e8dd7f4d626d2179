"""The report: whole, self-contained, escaped, and plain about what is missing."""

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from umamba.cli import report as report_cli
from umamba.evaluation import evaluate_folder
from umamba.report.page import build_report

DATASET = "Dataset511_Spheres"
SPACING = (2.0, 0.9, 1.3)
SIZES = {"share": 2e-5, "parts_per_case": 1.5, "median_voxels": 20}
SAMPLING = {
    "chosen": "balanced",
    "n_cases": 9,
    "classes": [
        {"name": "liver <b>&", "n_cases": 9, "random": 0.9, "stock": 0.95, "chosen": 0.85}
        | dict.fromkeys(SIZES),
        {"name": "rare $x", "n_cases": 3, "random": 0.031, "stock": 0.17, "chosen": 0.476} | SIZES,
    ],
}


def write(file: Path, array: np.ndarray, is_vector: bool = False) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array, isVector=is_vector)
    if file.suffix != ".png":
        image.SetSpacing(SPACING[::-1])
    SimpleITK.WriteImage(image, str(file))


def spheres(shift: int, rare: bool) -> np.ndarray:
    z, y, x = np.ogrid[:9, :21, :26]
    labels = np.zeros((9, 21, 26), dtype=np.uint8)
    labels[((z - 4) * 2) ** 2 + (y - 9) ** 2 + (x - 9 - shift) ** 2 < 40] = 1
    if rare:
        labels[3:6, 15:19, 18:23] = 2
    return labels


def make_run(
    workspace: Path, plans_name: str = "umamba_bot", fold: str = "fold_0", extra: int = 0
) -> Path:
    """Writes a model folder with one validated fold of five cases and the data it came from."""
    model_folder = workspace / "results" / DATASET / f"UMambaTrainer__{plans_name}__3d_fullres"
    fold_folder = model_folder / fold
    references = workspace / "preprocessed" / DATASET / "gt_segmentations"
    generator = np.random.default_rng(0)
    for index in range(5):
        reference = spheres(0, index % 2 == 0)
        prediction = spheres(index + extra, index % 2 == 0)
        image = (60 * reference + generator.normal(0, 20, reference.shape)).astype(np.float32)
        write(references / f"case_{index}.nii.gz", reference)
        write(fold_folder / "validation" / f"case_{index}.nii.gz", prediction)
        write(workspace / "raw" / DATASET / "imagesTr" / f"case_{index}_0000.nii.gz", image)
    dataset_json = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver <b>&": 1, "rare $x": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    plans: dict[str, Any] = {
        "dataset_name": DATASET,
        "plans_name": plans_name,
        "umamba": {"network": "umamba_bot", "request": {"minutes": 4}},
        "configurations": {
            "base": {"spacing": [2.0, 1.0, 1.0], "normalization_schemes": ["CTNormalization"]},
            "3d_fullres": {
                "inherits_from": "base",
                "patch_size": [8, 16, 16],
                "batch_size": 2,
                "architecture": {
                    "network_class_name": "umamba.networks.umamba.UMambaBot",
                    "arch_kwargs": {"features_per_stage": [8, 16]},
                },
                "recipe": {"optimizer": "adamw", "train_seconds": 200.0},
                "planning": {
                    "reasons": ["<script>narrow</script> because of 4 minutes"],
                    "sampling": SAMPLING,
                },
            },
        },
    }
    model_folder.joinpath("dataset.json").write_text(json.dumps(dataset_json))
    model_folder.joinpath("plans.json").write_text(json.dumps(plans))
    lines = [
        {
            "epoch": epoch,
            "elapsed_s": 50.0 * (epoch + 1),
            "train_loss": 1 / (epoch + 1),
            "val_loss": float("nan") if epoch == 0 else 0.5,
            "mean_fg_dice": 0.2 * epoch,
            "dice_per_class": [0.2 * epoch, float("nan")],
            "lr": 0.01,
            "iterations": 10 * (epoch + 1),
        }
        for epoch in (0, 1, 1, 2, 3)
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"epoch": 4, "trai'
    fold_folder.joinpath("progress.jsonl").write_text(text)
    evaluate_folder(
        fold_folder / "validation", references, {"liver <b>&": 1, "rare $x": 2}, tolerance_mm=1.5
    )
    return fold_folder


class Checker(HTMLParser):
    """Collects what a page loads and whether its elements are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(str(value))
            if name == "id":
                self.ids.append(str(value))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def fold(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def whole_fold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fold for the tests that only read."""
    return make_run(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def page(whole_fold: Path) -> str:
    return page_of(whole_fold)


def page_of(fold: Path, **keywords: Any) -> str:
    workspace = fold.parents[3]
    folders: dict[str, Any] = {
        "raw_folder": workspace / "raw" / DATASET,
        "reference_folder": workspace / "preprocessed" / DATASET / "gt_segmentations",
    }
    folders.update(keywords)
    return build_report([fold], fold / "report.html", **folders).read_text(encoding="utf-8")


def test_page_is_well_formed_and_loads_nothing(page: str, whole_fold: Path) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in checker.links)
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)
    assert len(checker.ids) == len(set(checker.ids))
    assert [file.name for file in whole_fold.glob("*report*")] == ["report.html"]


def test_page_says_what_was_reached_and_what_to_do_next(page: str, whole_fold: Path) -> None:
    summary = json.loads((whole_fold / "validation" / "summary.json").read_text())
    assert f"mean Dice of {summary['foreground_mean']['Dice']:.3f}" in page
    assert "NSD at 1.5 mm" in page
    assert "8 × 16 × 16" in page
    assert "CTNormalization" in page  # from the configuration that is inherited
    assert "of 4 min for everything" in page
    assert "4 epochs, 40 iterations in 3.3 min" in page
    assert f"umamba predict -m {whole_fold.parent} -f 0 -i IMAGES -o PREDICTIONS" in page
    assert "3 of 5" in page  # the rare class is absent from two cases


def test_page_shows_how_often_a_patch_holds_each_class(page: str) -> None:
    rows = re.findall(r"<tr>.*?</tr>", page[page.index("How often a training patch") :], re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert cells[0][-3:] == ["random", "stock", "balanced"]
    assert cells[1][1:] == ["9 of 9", "–", "–", "–", "90 %", "95 %", "85 %"]
    rare = ["rare $x", "3 of 9", "0.002 %", "1.5", "20 voxels", "3.1 %", "17 %", "47.6 %"]
    assert cells[2] == rare


def test_every_outside_text_is_escaped(page: str) -> None:
    assert "liver &lt;b&gt;&amp;" in page
    assert "liver <b>" not in page
    assert "&lt;script&gt;narrow&lt;/script&gt;" in page


def test_best_median_and_worst_case_are_shown_in_three_planes(page: str) -> None:
    assert re.findall(r"(?:Best|Median|Worst): case_\d", page) == [
        "Best: case_0",
        "Median: case_2",
        "Worst: case_3",
    ]
    assert page.count("data:image/png;base64,") == 9
    for plane in ("axial", "coronal", "sagittal"):
        assert page.count(f"<figcaption>{plane}</figcaption>") == 3


@pytest.mark.parametrize(
    ("remove", "sentence"),
    [
        ("progress.jsonl", "There are no curves"),
        ("validation/summary.json", "There is no validation yet"),
        ("../plans.json", "plans.json is missing"),
        ("../dataset.json", "dataset.json is missing"),
        ("validation/case_3.nii.gz", "No picture: "),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(fold: Path, remove: str, sentence: str) -> None:
    (fold / remove).unlink()
    page = page_of(fold)
    assert sentence in page
    Checker().feed(page)


def test_missing_images_leave_out_the_pictures_only(fold: Path) -> None:
    page = page_of(fold, raw_folder=None)
    assert page.count("the images of the dataset were not found") == 3
    assert "All 5 cases" in page


def test_stock_summary_without_nsd_is_reported(fold: Path) -> None:
    file = fold / "validation" / "summary.json"
    summary = json.loads(file.read_text())
    stock = {key: summary[key] for key in ("mean", "metric_per_case", "foreground_mean")}
    for entry in stock["metric_per_case"]:
        del entry["case"]
        for values in entry["metrics"].values():
            for name in ("NSD", "HD95", "ASSD"):
                del values[name]
    for name in ("NSD", "HD95", "ASSD"):
        del stock["foreground_mean"][name]
    file.write_text(json.dumps(stock).replace("null", "NaN"))
    page = page_of(fold)
    assert "stock nnU-Net" in page
    assert "Worst: case_3" in page


def test_all_folds_of_a_model_folder_are_pooled(tmp_path: Path) -> None:
    make_run(tmp_path)
    fold = make_run(tmp_path, fold="fold_1", extra=1)
    page = build_report([fold.parent], tmp_path / "page.html").read_text()
    assert "on 10 validation cases" in page
    assert "Validation of fold 0, fold 1" in page
    assert "-f 0 1 -i IMAGES" in page


def test_two_runs_are_compared_case_by_case(tmp_path: Path) -> None:
    first = make_run(tmp_path, "umamba_bot")
    second = make_run(tmp_path, "umamba_bot_noscan", extra=2)
    page = build_report([first, second], tmp_path / "page.html").read_text()
    assert "umamba_bot_noscan minus umamba_bot" in page
    assert "0 / 0 / 5" in page  # every case is worse
    assert page.count("What was planned and why") == 2


def test_colour_images_in_2d_are_shown_as_one_plane(tmp_path: Path) -> None:
    fold = make_run(tmp_path)
    for file in [*fold.glob("validation/*"), *fold.parent.glob("dataset.json")]:
        file.unlink()
    references, images = tmp_path / "gt", tmp_path / "raw2d" / "imagesTr"
    for index in range(2):
        labels = spheres(0, True)[4]
        write(references / f"p{index}.png", labels)
        write(fold / "validation" / f"p{index}.png", np.roll(labels, index, axis=0))
        colour = np.stack([labels * 90, labels * 30 + 20, 255 - labels * 60], axis=-1)
        write(images / f"p{index}_0000.png", colour.astype(np.uint8), is_vector=True)
    fold.parent.joinpath("dataset.json").write_text(
        json.dumps({"labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".png"})
    )
    evaluate_folder(fold / "validation", references, {"a": 1, "b": 2}, file_ending=".png")
    page = page_of(fold, raw_folder=images.parent, reference_folder=references)
    assert page.count("data:image/png;base64,") == 2
    assert "Best: p0" in page
    assert "<figcaption>" not in page


def test_command_finds_the_data_beside_the_results(
    fold: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.delenv(variable, raising=False)
    parser = argparse.ArgumentParser()
    report_cli.add_parser(parser.add_subparsers())
    args = parser.parse_args(["report", str(fold)])
    assert args.run(args) == 0
    assert str(fold / "report.html") in capsys.readouterr().out
    assert (fold / "report.html").read_text().count("data:image/png;base64,") == 9


@pytest.mark.parametrize("wrong", ["nowhere", "empty"])
def test_a_folder_that_is_no_run_is_refused_with_the_cure(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises((ValueError, FileNotFoundError), match="give a model folder"):
        build_report([tmp_path / wrong], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
