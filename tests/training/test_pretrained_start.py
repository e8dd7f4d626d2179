"""Pretrained weights: taken by a fresh training, not by one that resumes or starts elsewhere."""

import copy
from pathlib import Path

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from umamba.networks.vmamba import VMambaClassifier, VMambaEncoder
from umamba.training.trainer import UMambaTrainer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

WIDTHS = (8, 12, 16, 20)
KEY = "encoder.stages.3.0.mixer.A_log"


@pytest.fixture
def weights(tmp_path):
    """A VMamba file of small widths, whose tensors are all 3."""
    classifier = VMambaClassifier(VMambaEncoder(3, features_per_stage=WIDTHS, depths=(1,) * 4), 2)
    official = classifier.official_key_map().to_official(classifier.state_dict())
    file = tmp_path / "weights.pth"
    torch.save({"model": {k: torch.full_like(v, 3.0) for k, v in official.items()}}, file)
    return file


@pytest.fixture
def make_trainer(blobs, monkeypatch):
    """Makes trainers of a flat configuration; they start without loading data."""
    plans, content = copy.deepcopy(blobs)
    flat = {**plans["configurations"]["3d_fullres"], "patch_size": [64, 64], "spacing": [1, 1]}
    flat["architecture"] = {
        "network_class_name": "umamba.networks.swin_umamba.SwinUMambaD",
        "arch_kwargs": {
            "strides": [[1, 1], [4, 4], [2, 2], [2, 2], [2, 2]],
            "features_per_stage": [8, *WIDTHS],
            "depths": [1] * 4,
            "depths_decoder": [1] * 3,
        },
        "_kw_requires_import": [],
    }
    plans["configurations"]["2d"] = flat
    plans["continue_training"] = False

    def start(trainer):
        if not trainer.was_initialized:
            trainer.initialize()

    monkeypatch.setattr(nnUNetTrainer, "on_train_start", start)

    def make(pretrained):
        flat["recipe"] = {**flat["recipe"], "pretrained": str(pretrained)}
        return UMambaTrainer(copy.deepcopy(plans), "2d", 0, content, torch.device("cpu"))

    return make


def test_a_fresh_training_takes_them_and_a_resumed_one_needs_no_file(
    make_trainer, weights, tmp_path, capsys
):
    trainer = make_trainer(weights)
    trainer.on_train_start()
    assert trainer.network.state_dict()[KEY].eq(3).all()
    assert "tensors taken" in capsys.readouterr().out
    with torch.no_grad():
        trainer.network.get_parameter(KEY).fill_(5)
    trainer.save_checkpoint(str(tmp_path / "checkpoint.pth"))
    weights.unlink()
    resumed = make_trainer(weights)
    resumed.load_checkpoint(str(tmp_path / "checkpoint.pth"))
    resumed.on_train_start()
    assert resumed.network.state_dict()[KEY].eq(5).all()


def test_a_missing_file_stops_before_the_network_is_built(make_trainer, tmp_path):
    trainer = make_trainer(Path("nowhere.pth"))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        trainer.on_train_start()
    assert trainer.network is None
