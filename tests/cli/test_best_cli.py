"""`umamba best`, `ensemble`, `postprocess`: what is chosen, said and written, and wrong input."""

from __future__ import annotations

import json
import pickle
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from umamba.cli.main import main
from umamba.lock import holding

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
from model_folders import make_plans

DATASET = "Dataset501_Tiny"
SHAPE, SPACING = (6, 14, 12), (2.5, 1.0, 0.8)
LABELS = {"background": 0, "one": 1, "two": 2}
FOLDS = {0: ("a", "b", "c"), 1: ("d", "e", "f")}


def reference(seed: int) -> np.ndarray:
    """Two boxes whose place depends on the seed."""
    labels, shift = np.zeros(SHAPE, np.uint8), seed % 3
    labels[1:4, 2 + shift : 7 + shift, 2:6] = 1
    labels[2:5, 2 + shift : 8, 7:11] = 2
    return labels


def faulty(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """The label map with a share of its foreground missing at random."""
    return labels * (np.random.default_rng(seed).random(labels.shape) > share)


def write(file: Path, labels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(SPACING[::-1])
    SimpleITK.WriteImage(image, str(file))


def read(file: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))


class Results:
    """A workspace with preprocessed references and the validation of made-up trainings."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "results" / DATASET
        preprocessed = root / "preprocessed" / DATASET
        self.references = preprocessed / "gt_segmentations"
        self.dataset_json = {
            "channel_names": {"0": "MR"},
            "labels": LABELS,
            "numTraining": 6,
            "file_ending": ".nii.gz",
        }
        for seed, case in enumerate("abcdef"):
            write(self.references / f"{case}.nii.gz", reference(seed))
        (preprocessed / "dataset.json").write_text(json.dumps(self.dataset_json))

    def train(
        self,
        configuration: str,
        share: float,
        *,
        mirrored: float | None = None,
        folds: tuple[int, ...] = (0, 1),
        trainer: str = "UMambaTrainer",
        speck: bool = False,
        npz: bool = False,
    ) -> Path:
        """A model folder; `share` and `mirrored` of the foreground are missing in its validation.

        speck: a piece of label 1 far from the true one is found as well. npz: probabilities that
        are unsure where the label map is wrong.
        """
        from umamba.evaluation import evaluate_folder, labels_of_dataset

        labels, ignore_label = labels_of_dataset(self.dataset_json)
        model = self.home / f"{trainer}__tiny__{configuration}"
        model.mkdir(parents=True)
        plans = make_plans(configuration=configuration)
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(self.dataset_json))
        for fold in folds:
            variants = {"validation": share, "validation_mirrored": mirrored}
            for variant, missing in variants.items():
                if missing is None:
                    continue
                folder = model / f"fold_{fold}" / variant
                for case in FOLDS[fold]:
                    true = read(self.references / f"{case}.nii.gz")
                    found = faulty(true, missing, ord(case) + len(configuration))
                    if speck:
                        found[5, 13, 0] = 1
                    write(folder / f"{case}.nii.gz", found)
                    if npz and variant == "validation":
                        self.write_probabilities(folder / f"{case}.npz", true, found)
                evaluate_folder(
                    folder, self.references, labels, ignore_label=ignore_label, cases=FOLDS[fold]
                )
        return model

    def write_probabilities(self, file: Path, true: np.ndarray, found: np.ndarray) -> None:
        classes = np.arange(3)[:, None, None, None]
        sure = np.where(true == found, 0.9, 0.55)
        probabilities = np.where(classes == found, sure, (1 - sure) / 2).astype(np.float32)
        if "regions_class_order" in self.dataset_json:
            probabilities = np.stack([probabilities[1:].sum(0), probabilities[2]])
        np.savez_compressed(file, probabilities=probabilities)
        image = {
            "spacing": SPACING[::-1],
            "origin": (0.0, 0.0, 0.0),
            "direction": tuple(np.eye(3).ravel()),
        }
        file.with_suffix(".pkl").write_bytes(pickle.dumps({"sitk_stuff": image}))

    def best(self, *words: object) -> int:
        return main(["best", "501", "--workspace", str(self.root), *map(str, words)])

    def record(self) -> dict:
        return json.loads((self.home / "best.json").read_text())


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.delenv(f"nnUNet_{name}", raising=False)
    return Results(tmp_path / "work")


def test_the_best_is_named_with_its_interval_and_its_command(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.train("2d", 0.3)
    better = results.train("3d_fullres", 0.1)
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert "folds 0, 1: 2 of nnU-Net's 5; 6 cases" in printed
    assert "best: tiny 3d_fullres, against tiny 2d +0." in printed
    assert "cannot tell the two apart" not in printed
    assert f"umamba predict -m {better} -f 0 1 -i IMAGES -o PREDICTIONS --disable_tta\n" in printed
    record = results.record()
    assert [row["models"] for row in record["candidates"]] == [
        ["UMambaTrainer__tiny__3d_fullres"],
        ["UMambaTrainer__tiny__2d"],
    ]
    assert record["best_against_second"]["interval"][0] > 0
    assert record["cases"] == list("abcdef")


def test_equal_candidates_are_called_indistinguishable(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.train("3d_lowres", 0.2)
    results.train("3d_fullres", 0.2)
    assert results.best() == 0
    assert "cannot tell the two apart" in capsys.readouterr().out


@pytest.mark.parametrize(("mirrored", "chosen"), [(0.05, True), (0.3, False), (0.2, False)])
def test_mirroring_is_chosen_where_it_helps(
    results: Results, capsys: pytest.CaptureFixture[str], mirrored: float, chosen: bool
) -> None:
    results.train("2d", 0.2, mirrored=mirrored)
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert ("--disable_tta" in printed) != chosen
    assert "mirroring changes the best by" in printed
    assert results.record()["candidates"][0]["mirrored"] == [chosen]


def test_the_one_validation_of_nnunets_trainers_counts_as_mirrored(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.train("2d", 0.2, trainer="nnUNetTrainer")
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert "nnUNetTrainer tiny 2d" in printed
    assert "--disable_tta" not in printed


def test_an_ensemble_that_is_better_wins_and_its_commands_are_printed(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    for configuration in ("2d", "3d_fullres"):
        results.train(configuration, 0.2, npz=True)
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert "best: tiny 2d + tiny 3d_fullres, against" in printed
    assert printed.count("--disable_tta --save_probabilities") == 2
    assert "umamba ensemble PREDICTIONS_1 PREDICTIONS_2 -o PREDICTIONS\n" in printed
    assert len(list((results.home / "best" / "label_maps").iterdir())) == 6
    members = [row["models"] for row in results.record()["candidates"]]
    assert sorted(map(len, members)) == [1, 1, 2]

    assert results.best("--no-ensemble") == 0
    assert " + " not in capsys.readouterr().out


def test_regions_and_an_ignore_label_are_those_of_the_dataset(results: Results) -> None:
    results.dataset_json["labels"] = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    results.dataset_json["regions_class_order"] = [1, 2]
    text = json.dumps(results.dataset_json)
    (results.root / "preprocessed" / DATASET / "dataset.json").write_text(text)
    for seed, case in enumerate("abcdef"):
        labels = reference(seed)
        labels[:, :3] = 3
        write(results.references / f"{case}.nii.gz", labels)
    for configuration in ("2d", "3d_fullres"):
        results.train(configuration, 0.2, npz=True)
    assert results.best() == 0
    first = results.record()["candidates"][0]
    assert len(first["models"]) == 2
    assert first["mean"].keys() == {"(1, 2)", "(2,)"}


def test_missing_probabilities_are_told_with_the_command_that_makes_them(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.train("2d", 0.2, npz=True)
    results.train("3d_fullres", 0.2)
    assert results.best() == 0
    cure = f"umamba train 501 --workspace {results.root} 3d_fullres FOLD -p tiny --val --npz"
    assert cure in capsys.readouterr().out


def test_a_torn_archive_leaves_its_ensembles_out_and_is_named(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    for configuration in ("2d", "3d_fullres"):
        model = results.train(configuration, 0.2, npz=True)
    file = model / "fold_1" / "validation" / "e.npz"
    file.write_bytes(file.read_bytes()[:200])
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert f"left out, 1 failed (e: {file}: is cut off or damaged" in printed
    assert all(len(row["models"]) == 1 for row in results.record()["candidates"])


def test_postprocessing_is_determined_for_the_best_and_the_printed_command_applies_it(
    results: Results, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = results.train("2d", 0.0, speck=True)
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert "post-processing: largest component of 1; Dice" in printed
    maps = results.home / "best" / "label_maps"
    assert all(
        np.array_equal(read(file), read(results.references / file.name)) for file in maps.iterdir()
    )
    command = next(line for line in printed.splitlines() if "umamba postprocess" in line)
    words = shlex.split(command)[1:]
    words[words.index("PREDICTIONS")] = str(model / "fold_0" / "validation")
    words[words.index("FINAL")] = str(tmp_path / "final")
    assert main(words) == 0
    for case in FOLDS[0]:
        wanted = read(maps / f"{case}.nii.gz")
        assert np.array_equal(read(tmp_path / "final" / f"{case}.nii.gz"), wanted)


def test_only_folds_that_all_have_are_compared_and_one_is_called_a_single_split(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.train("2d", 0.2)
    results.train("3d_fullres", 0.1, folds=(0,))
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert "fold 0 only: a single split, not a cross-validation; 3 cases" in printed
    assert "3 cases cannot tell the two apart" in printed  # three are too few
    assert "UMambaTrainer__tiny__2d: has folds [0, 1], others lack some of them" in printed

    assert results.best("-f", 0, 1) == 0
    assert "UMambaTrainer__tiny__3d_fullres: left out" in capsys.readouterr().out
    assert results.record()["folds"] == [0, 1]


def test_a_candidate_without_all_cases_or_with_other_labels_is_left_out_with_the_cure(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.train("2d", 0.2)
    incomplete = results.train("3d_fullres", 0.1) / "fold_1" / "validation" / "summary.json"
    summary = json.loads(incomplete.read_text())
    summary["metric_per_case"] = summary["metric_per_case"][1:]
    incomplete.write_text(json.dumps(summary))
    other = results.train("3d_lowres", 0.0) / "dataset.json"
    other.write_text(json.dumps(results.dataset_json | {"labels": {"background": 0, "one": 1}}))
    (results.train("3d_cascade_fullres", 0.0) / "dataset.json").write_text("{")
    assert results.best() == 0
    printed = capsys.readouterr().out
    assert "UMambaTrainer__tiny__3d_cascade_fullres: its dataset.json cannot be read" in printed
    assert "UMambaTrainer__tiny__3d_fullres: left out, a validation lacks cases (d" in printed
    assert "3d_fullres FOLD -p tiny --val" in printed
    assert "UMambaTrainer__tiny__3d_lowres: was trained on other labels" in printed
    assert len(results.record()["candidates"]) == 1


def leave_out_a_count(summary: dict) -> None:
    del summary["metric_per_case"][0]["metrics"]["1"]["n_pred"]


def leave_out_a_label(summary: dict) -> None:
    del summary["metric_per_case"][0]["metrics"]["1"]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(leave_out_a_count, "lacks 'n_pred' of a case"), (leave_out_a_label, "on other labels")],
    ids=["a count", "a label"],
)
def test_a_summary_of_another_form_leaves_its_candidate_out(
    results: Results, capsys: pytest.CaptureFixture[str], spoil: Callable, reason: str
) -> None:
    results.train("2d", 0.2)
    file = results.train("3d_fullres", 0.1) / "fold_1" / "validation" / "summary.json"
    summary = json.loads(file.read_text())
    spoil(summary)
    file.write_text(json.dumps(summary))
    assert results.best() == 0
    assert f"note: UMambaTrainer__tiny__3d_fullres: left out, {file.parent}" in (
        printed := capsys.readouterr().out
    )
    assert reason in printed
    assert len(results.record()["candidates"]) == 1


def test_no_record_of_an_earlier_call_stays_beside_other_label_maps(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.train("2d", 0.2)
    assert results.best() == 0
    monkeypatch.setattr("umamba.cli.best._write_label_maps", lambda *_: 1 / 0)
    assert results.best() == 1
    assert not (results.home / "best.json").exists()


def test_the_second_stage_of_a_cascade_is_predicted_after_the_first(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    model = results.train("3d_cascade_fullres", 0.1)
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    (model / "plans.json").write_text(json.dumps(plans))
    assert results.best() == 0
    first, second = [
        line for line in capsys.readouterr().out.splitlines() if "umamba predict" in line
    ]
    assert "UMambaTrainer__tiny__3d_lowres -f 0 1 -i IMAGES -o FIRST_STAGE_1" in first
    assert "-prev_stage_predictions FIRST_STAGE_1" in second


def test_two_at_once_notice_each_other(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    results.train("2d", 0.2)
    with holding(results.home / "best", "a test"):
        assert results.best() == 1
    assert "a test" in capsys.readouterr().err
    assert not (results.home / "best.json").exists()


def test_the_same_command_again_changes_nothing(results: Results) -> None:
    for configuration in ("2d", "3d_fullres"):
        results.train(configuration, 0.2, npz=True)
    assert results.best() == 0
    ensemble = next(iter((results.home / "best").glob("*___*")))
    before = results.record(), {f: f.stat().st_mtime_ns for f in ensemble.iterdir()}
    assert results.best() == 0
    assert (results.record(), {f: f.stat().st_mtime_ns for f in ensemble.iterdir()}) == before


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["-p", "other"], 2, "other: not trained and validated; known: tiny"),
        (["-c", "3d_lowres"], 2, "3d_lowres: not trained and validated; known: 2d"),
        (["-f", "3"], 1, "no candidate has the validation of folds [3]"),
    ],
    ids=["plans", "configuration", "fold"],
)
def test_what_is_not_there_is_said_in_a_sentence(
    results: Results, capsys: pytest.CaptureFixture[str], words: list[str], code: int, sentence: str
) -> None:
    results.train("2d", 0.2)
    assert results.best(*words) == code
    assert sentence in capsys.readouterr().err


def test_a_dataset_without_a_validated_training_says_so(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    assert results.best() == 1
    assert "nothing of this dataset is trained and validated" in capsys.readouterr().err
    (results.train("2d", 0.1, folds=(0,)) / "fold_0" / "validation" / "summary.json").unlink()
    assert results.best() == 1
    assert "no fold is validated" in capsys.readouterr().err


def test_ensemble_command_averages_what_it_can_and_exits_with_3(
    results: Results, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    models = [results.train(name, 0.2, npz=True, folds=(0,)) for name in ("2d", "3d_fullres")]
    folders = []
    for model in models:
        folders.append(model / "fold_0" / "validation")
        for name in ("plans.json", "dataset.json"):
            (folders[-1] / name).write_bytes((model / name).read_bytes())
    words = ["ensemble", *map(str, folders), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    assert "3 of 3 cases averaged" in capsys.readouterr().out
    (folders[1] / "b.npz").unlink()
    assert main(words) == 3
    assert f"b: {folders[1] / 'b.npz'}: no such file" in capsys.readouterr().err
    assert main(["ensemble", str(folders[0]), "-o", str(tmp_path / "other")]) == 2
    assert main([*words[:2], str(tmp_path / "nowhere"), "-o", str(tmp_path / "other")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert main([*words[:3], "-o", str(folders[0])]) == 2


def test_postprocess_command_goes_on_past_a_bad_file_and_keeps_its_input(
    results: Results, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = results.train("2d", 0.0, speck=True, folds=(0,)) / "fold_0" / "validation"
    assert results.best() == 0
    file = results.home / "best" / "postprocessing.json"
    (folder / "b.nii.gz").write_bytes(b"no image")
    words = ["postprocess", "-i", str(folder), "--postprocessing", str(file), "-o"]
    assert main([*words, str(tmp_path / "out")]) == 3
    assert "b.nii.gz" in capsys.readouterr().err
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a.nii.gz", "c.nii.gz"]
    assert main([*words, str(folder)]) == 2
    assert "to keep the predictions" in capsys.readouterr().err


def test_postprocess_command_names_the_files_where_none_can_be_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.nii.gz", "dataset.json"):
        (tmp_path / "in" / name).write_text("{}")
    rule = tmp_path / "rule.json"
    rule.write_text('{"postprocessing_fns": [], "postprocessing_kwargs": []}')
    words = ["postprocess", "-i", tmp_path / "in", "--postprocessing", rule, "-o", tmp_path / "out"]
    assert main(list(map(str, words))) == 1
    assert f"1 failed:\n  {tmp_path / 'in' / 'a.nii.gz'}: " in capsys.readouterr().err
