"""Prediction in the precision asked for: near float32, with sums in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_folders import UMAMBA_BOT, make_dataset_json, make_image, make_model_folder, make_plans

from umamba.inference.folds import FoldWeights, mean_tiles
from umamba.inference.predictor import UMambaPredictor
from umamba.inference.sliding_window import predict_mirrored
from umamba.inference.volume import predict_volume
from umamba.networks import precision as precision_file

CPU = torch.device("cpu")
SPACING = (3.0, 0.8, 1.3)
SHAPE = (14, 37, 29)
VARIANTS = {
    "plain unet": {"mirror_axes": (0, 1, 2)},
    "umamba bot": {"plans": {"class_path": UMAMBA_BOT}},
    "2d": {"plans": {"patch_size": (16, 12), "spacing": (1.0, 1.0)}, "mirror_axes": (0, 1)},
    "two folds": {"folds": (0, 3)},
    "cascade": {"plans": {"configuration": "3d_cascade_fullres"}},
}


@pytest.fixture(autouse=True)
def let_this_processor_compute_bfloat16(monkeypatch):
    monkeypatch.setattr(precision_file, "computes_bfloat16", lambda device: True)


def make_model(folder, name):
    settings = VARIANTS[name]
    plans = make_plans(**settings.get("plans", {}))
    if name == "cascade":
        plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    return make_model_folder(
        folder, plans, make_dataset_json(),
        folds=settings.get("folds", (0,)), mirror_axes=settings.get("mirror_axes", (2,)),
    )  # fmt: skip


def load(model, precision=None):
    predictor = UMambaPredictor(device=CPU, precision=precision)
    predictor.initialize_from_trained_model_folder(model)
    return predictor


@pytest.mark.parametrize("name", VARIANTS)
def test_labels_in_bfloat16_are_nearly_those_in_float32(tmp_path, name):
    model = make_model(tmp_path / "model", name)
    image = make_image(SHAPE)[None]
    previous = (image[0] > 70).astype(np.uint8) if name == "cascade" else None
    labels, types = {}, {}
    for precision in (None, "float32", "bfloat16"):
        predictor = load(model, precision)
        seen = types[precision] = set()
        head = predictor.network.decoder.seg_layers[-1]
        head.register_forward_hook(lambda module, features, out, seen=seen: seen.add(out.dtype))
        labels[precision] = predict_volume(image, SPACING, predictor, previous_stage=previous)
    assert types == {
        None: {torch.float32}, "float32": {torch.float32}, "bfloat16": {torch.bfloat16},
    }  # fmt: skip
    assert np.array_equal(labels[None], labels["float32"])
    assert np.mean(labels["bfloat16"] != labels[None]) < 0.03
    assert len(np.unique(labels["bfloat16"])) == 3


@pytest.mark.parametrize("name", ["plain unet", "umamba bot", "two folds"])
def test_logits_are_summed_up_in_float32(tmp_path, name):
    model = make_model(tmp_path / "model", name)
    image = torch.from_numpy(make_image(SHAPE))[None] / 40
    exact, found = (
        load(model, precision).predict_logits_from_preprocessed_data(image)
        for precision in ("float32", "bfloat16")
    )
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    assert 0 < (found - exact).norm() < 0.05 * exact.norm()


def test_each_fold_computes_with_its_own_weights(tmp_path):
    predictor = load(make_model(tmp_path / "model", "two folds"), "bfloat16")
    network, tiles = predictor.network.eval(), torch.randn(1, 1, 8, 16, 12)
    weights = FoldWeights(network, predictor.list_of_parameters)
    alone = []
    # without inference mode, where newer versions of torch keep no cast weights
    with torch.no_grad(), weights.in_turn() as use:
        ((_, mean),) = mean_tiles(predictor, use, 2, predictor.autocast)(tiles)
        for fold in (0, 1):
            use(fold)
            with predictor.autocast():
                alone.append(predict_mirrored(network, tiles, (2,)))
    assert not torch.equal(*alone)
    torch.testing.assert_close(mean, (alone[0] + alone[1]) / 2)
