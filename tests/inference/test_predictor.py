"""Tests of the predictor on tiny model folders, with stock nnU-Net as the oracle."""

from __future__ import annotations

import contextlib
import functools
import io
import sys

import numpy as np
import pytest
import SimpleITK
import torch
from model_folders import (
    PLAIN_UNET,
    UMAMBA_BOT,
    make_dataset_json,
    make_image,
    make_model_folder,
    make_plans,
    read_array,
    write_cases,
    write_nifti,
)
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from umamba.inference import predictor as predictor_file
from umamba.inference.cases import find_images, plan_cases
from umamba.inference.predictor import UMambaPredictor
from umamba.inference.volume import predict_volume

CPU = torch.device("cpu")
ENDING = ".nii.gz"
SHAPES = {"a": (7, 21, 14), "b": (5, 12, 13)}
SPACING = (3.0, 0.8, 1.3)


def predict_ours(model, images, output, *, exact=False, previous=None, **options):
    predictor = UMambaPredictor(
        device=CPU, nnunet_exact=exact, use_mirroring=options.pop("use_mirroring", True)
    )
    predictor.initialize_from_trained_model_folder(model, options.pop("folds", None))
    cases = plan_cases(
        find_images([images], predictor.dataset_json["file_ending"], bare_names=False),
        output,
        predictor.dataset_json["file_ending"],
        previous_stage_folder=previous,
    )
    failures = predictor.predict_cases(cases, **options)
    assert failures == []
    return {c.identifier: c.output for c in cases}


def predict_stock(model, images, output, folds=(0,), previous=None, save_probabilities=False):
    output.mkdir()
    files = [list(map(str, f)) for f in find_images([images], ENDING, bare_names=False).values()]
    with contextlib.redirect_stdout(io.StringIO()):
        predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model), folds, "checkpoint_final.pth")
        predictor.predict_from_files_sequential(
            files, str(output), save_probabilities, True, previous and str(previous)
        )


VARIANTS = {
    "plain unet": {"mirror_axes": (0, 1, 2)},
    "umamba bot": {"plans": {"class_path": UMAMBA_BOT}},
    "2d": {"plans": {"patch_size": (16, 12), "spacing": (1.0, 1.0)}, "mirror_axes": (0, 1)},
    "no mirroring": {"mirror_axes": None},
    "separate z": {"plans": {"spacing": (6.0, 1.0, 1.0)}},
    "transposed": {"plans": {"transpose": (1, 2, 0)}},
    "two folds": {"folds": (0, 3)},
    "regions": {"dataset": {"regions": True}},
    "two channels": {"plans": {"n_channels": 2}, "dataset": {"n_channels": 2}},
}


@pytest.fixture(params=VARIANTS, ids=list(VARIANTS))
def variant(request, tmp_path):
    settings = VARIANTS[request.param]
    dataset = settings.get("dataset", {})
    model = make_model_folder(
        tmp_path / "model",
        make_plans(**settings.get("plans", {})),
        make_dataset_json(**dataset),
        folds=settings.get("folds", (0,)),
        mirror_axes=settings.get("mirror_axes", (2,)),
    )
    images = write_cases(tmp_path / "images", SHAPES, SPACING, dataset.get("n_channels", 1))
    return model, images, settings.get("folds", (0,))


def test_exact_arithmetic_gives_the_labels_of_stock_nnunet(variant, tmp_path):
    model, images, folds = variant
    outputs = predict_ours(model, images, tmp_path / "ours", exact=True)
    predict_stock(model, images, tmp_path / "stock", folds)
    for name, file in outputs.items():
        stock_file = tmp_path / "stock" / f"{name}{ENDING}"
        stock = SimpleITK.ReadImage(str(stock_file))
        ours = SimpleITK.ReadImage(str(file))
        assert np.array_equal(read_array(file), read_array(stock_file))
        assert ours.GetPixelID() == stock.GetPixelID()
        for get in ("GetSpacing", "GetOrigin", "GetDirection", "GetSize"):
            assert getattr(ours, get)() == getattr(stock, get)()
    assert len({v for f in outputs.values() for v in np.unique(read_array(f))}) > 1


def test_float32_logits_stay_close_to_those_of_stock_nnunet(variant, tmp_path):
    model, images, _ = variant
    logits = []
    for exact in (True, False):
        predictor = UMambaPredictor(device=CPU, nnunet_exact=exact)
        predictor.initialize_from_trained_model_folder(model)
        # without a Gaussian the windows have the same weights, and only rounding differs
        predictor.use_gaussian = False
        files = find_images([images], ENDING, bare_names=False)["a"]
        prepared = predictor.preprocessor().from_files(files, None)
        logits.append(predictor.predict_logits_from_preprocessed_data(prepared.data).float())
    scale = logits[0].std()
    assert logits[1].dtype == torch.float32
    assert float((logits[0] - logits[1]).abs().max()) < 0.01 * float(scale)


def test_second_stage_of_a_cascade_takes_the_label_maps_of_the_first(tmp_path):
    plans = make_plans(configuration="3d_cascade_fullres")
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    model = make_model_folder(tmp_path / "model", plans)
    images = write_cases(tmp_path / "images", SHAPES, SPACING)
    previous = tmp_path / "low"
    for name, shape in SHAPES.items():
        labels = (make_image(shape, seed=5) > 50).astype(np.uint8)
        write_nifti(previous / f"{name}{ENDING}", labels, SPACING)
    outputs = predict_ours(model, images, tmp_path / "ours", exact=True, previous=previous)
    predict_stock(model, images, tmp_path / "stock", previous=previous)
    for name, file in outputs.items():
        assert np.array_equal(read_array(file), read_array(tmp_path / "stock" / f"{name}{ENDING}"))
    with pytest.raises(ValueError, match=r"3d_lowres.*-prev_stage_predictions"):
        predict_ours(model, images, tmp_path / "none")


def test_probabilities_are_those_of_stock_nnunet_in_exact_arithmetic(tmp_path):
    model = make_model_folder(tmp_path / "model")
    images = write_cases(tmp_path / "images", {"a": SHAPES["a"]}, SPACING)
    predict_stock(model, images, tmp_path / "stock", save_probabilities=True)
    expected = np.load(tmp_path / "stock" / "a.npz")["probabilities"]
    for exact in (True, False):
        folder = tmp_path / f"ours_{exact}"
        predict_ours(model, images, folder, exact=exact, save_probabilities=True)
        probabilities = np.load(folder / "a.npz")["probabilities"]
        assert probabilities.shape == expected.shape
        assert probabilities.dtype == expected.dtype
        # resampled logits are rounded to half precision: a few to the other neighbor
        difference = np.abs(probabilities - expected)
        assert not exact or ((difference > 1e-6).mean() < 0.02 and difference.max() < 2e-3)
        assert np.array_equal(probabilities.argmax(0), read_array(folder / f"a{ENDING}"))


def test_folds_are_averaged(tmp_path):
    model = make_model_folder(tmp_path / "model", folds=(0, 1))
    data = torch.randn(1, 9, 18, 14)
    logits = []
    for folds in (0, 1, (0, 1), None):
        predictor = UMambaPredictor(device=CPU, use_mirroring=False)
        predictor.initialize_from_trained_model_folder(model, folds)
        # twice: the weights of the folds take turns in one network
        predictor.predict_logits_from_preprocessed_data(data)
        logits.append(predictor.predict_logits_from_preprocessed_data(data))
    torch.testing.assert_close(logits[2], (logits[0] + logits[1]) / 2, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits[2], logits[3])


def test_volume_in_memory_gives_the_label_map_of_the_file(tmp_path):
    model = make_model_folder(tmp_path / "model")
    images = write_cases(tmp_path / "images", {"a": SHAPES["a"]}, SPACING)
    (file,) = predict_ours(model, images, tmp_path / "ours").values()
    image = read_array(images / f"a_0000{ENDING}")[None]
    labels = predict_volume(image, SPACING, model, device=CPU)
    assert np.array_equal(labels, read_array(file))
    predictor = UMambaPredictor(device=CPU)
    predictor.initialize_from_trained_model_folder(model)
    assert np.array_equal(predict_volume(image, SPACING, predictor), labels)


@pytest.mark.parametrize(
    ("image", "spacing", "match"),
    [
        (np.zeros((5, 6, 7)), (1, 1, 1), r"\(channels, z, y, x\)"),
        (np.zeros((1, 5, 6, 7)), (1, 1), "2 entries"),
        (np.zeros((2, 5, 6, 7)), (1, 1, 1), "2 channels; the network takes 1"),
    ],
    ids=["no channels", "spacing", "channels"],
)
def test_volume_of_the_wrong_form_is_refused(tmp_path, image, spacing, match):
    model = make_model_folder(tmp_path / "model")
    with pytest.raises(ValueError, match=match):
        predict_volume(image, spacing, model, device=CPU)


def test_a_label_map_of_the_first_stage_in_memory_has_the_shape_of_the_image(tmp_path):
    plans = make_plans(configuration="3d_cascade_fullres")
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    cascade = make_model_folder(tmp_path / "cascade", plans)
    plain = make_model_folder(tmp_path / "plain")
    image, labels = make_image(SHAPES["a"])[None], np.zeros(SHAPES["a"], np.uint8)
    found = predict_volume(image, SPACING, cascade, device=CPU, previous_stage=labels)
    assert found.shape == SHAPES["a"]
    with pytest.raises(ValueError, match="needs the label map of 3d_lowres as previous_stage"):
        predict_volume(image, SPACING, cascade, device=CPU)
    with pytest.raises(ValueError, match="takes no label map as previous_stage"):
        predict_volume(image, SPACING, plain, device=CPU, previous_stage=labels)
    larger = np.zeros((9, 21, 14), np.uint8)
    with pytest.raises(ValueError, match=r"shape \(9, 21, 14\), the image \(7, 21, 14\)"):
        predict_volume(image, SPACING, cascade, device=CPU, previous_stage=larger)


def test_unreadable_case_is_reported_and_the_others_are_predicted(tmp_path):
    model = make_model_folder(tmp_path / "model")
    images = write_cases(tmp_path / "images", SHAPES, SPACING)
    (images / "a1_0000.nii.gz").write_bytes(b"no image")
    predictor = UMambaPredictor(device=CPU)
    predictor.initialize_from_trained_model_folder(model)
    cases = plan_cases(find_images([images], ENDING, bare_names=False), tmp_path / "out", ENDING)
    done = []
    failures = predictor.predict_cases(cases, on_done=lambda c: done.append(c.identifier))
    assert [f.identifier for f in failures] == ["a1"]
    assert done == ["a", "b"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"a.nii.gz", "b.nii.gz"}


def test_no_trainer_is_searched_and_no_torchvision_needed(tmp_path, monkeypatch):
    def search(name):
        raise AssertionError(f"searched the trainer {name}")

    monkeypatch.setattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", search)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    model = make_model_folder(tmp_path / "model")
    images = write_cases(tmp_path / "images", {"a": (4, 9, 11)}, SPACING)
    predict_ours(model, images, tmp_path / "out", use_mirroring=False)


def test_an_image_of_zeros_is_predicted(tmp_path):
    model = make_model_folder(tmp_path / "model")
    images = tmp_path / "images"
    write_nifti(images / "zero_0000.nii.gz", np.zeros((4, 9, 11), np.float32), SPACING)
    (file,) = predict_ours(model, images, tmp_path / "out").values()
    assert read_array(file).shape == (4, 9, 11)


def test_stock_interface_predicts_a_folder_too(tmp_path, capsys):
    model = make_model_folder(tmp_path / "model")
    images = write_cases(tmp_path / "images", {"a": SHAPES["a"]}, SPACING)
    (file,) = predict_ours(model, images, tmp_path / "ours").values()
    predictor = UMambaPredictor(device=CPU)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    (tmp_path / "stock").mkdir()
    predictor.predict_from_files_sequential(
        [[str(images / f"a_0000{ENDING}")]], str(tmp_path / "stock")
    )
    difference = read_array(file) != read_array(tmp_path / "stock" / f"a{ENDING}")
    assert difference.mean() < 0.002


@pytest.mark.parametrize(("recipe", "precision"), [(None, "auto"), ({"precision": "fp32"}, "fp32")])
def test_the_network_runs_in_the_precision_of_the_recipe(tmp_path, monkeypatch, recipe, precision):
    plans = make_plans()
    if recipe is not None:
        plans["configurations"]["3d_fullres"]["recipe"] = recipe
    predictor = UMambaPredictor(device=CPU, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(make_model_folder(tmp_path / "model", plans))
    asked, seen = [], []

    def autocast(device, precision, of_prediction):
        assert of_prediction is None
        asked.append((device, precision))
        return torch.autocast("cpu", dtype=torch.bfloat16)  # stands in for a GPU's

    def watch(module, images, logits):
        seen.append(torch.is_autocast_enabled("cpu"))

    monkeypatch.setattr(predictor_file, "autocast", autocast)
    predictor.network.register_forward_hook(watch)
    logits = predictor.predict_logits_from_preprocessed_data(torch.zeros(1, 8, 16, 12))
    assert asked == [(CPU, precision)]
    assert seen == [True]
    assert logits.dtype == torch.float32
    predictor.nnunet_exact = True
    predictor.predict_logits_from_preprocessed_data(torch.zeros(1, 8, 16, 12))
    assert len(asked) == 1
    assert seen == [True, False]


def test_a_compiled_network_predicts_every_fold_as_without(tmp_path, monkeypatch, capsys):
    model = make_model_folder(tmp_path / "model", folds=(0, 3))
    image = torch.from_numpy(make_image(SHAPES["a"]))[None]

    def logits():
        predictor = UMambaPredictor(device=CPU)
        predictor.initialize_from_trained_model_folder(model)
        return predictor, predictor.predict_logits_from_preprocessed_data(image)

    monkeypatch.delenv("nnUNet_compile", raising=False)
    _, expected = logits()
    monkeypatch.setenv("nnUNet_compile", "true")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    predictor, actual = logits()
    assert isinstance(predictor.network, torch._dynamo.OptimizedModule)
    torch.testing.assert_close(actual, expected)


def test_plain_unet_is_what_the_default_fixture_makes():
    name = make_plans()["configurations"]["3d_fullres"]["architecture"]["network_class_name"]
    assert name == PLAIN_UNET
