"""The demo's data: repeatable, clean, anisotropic, with one rare class."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
from dataset_makers import read_array

from umamba.data.audit import audit_dataset
from umamba.data.dataset import prepare_dataset
from umamba.data.synthetic import LABELS, make_case, make_demo_dataset
from umamba.data.workspace import VARIABLES


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo_dataset(
        tmp_path_factory.mktemp("demo") / "Dataset900_Demo", n_train=4, n_test=2
    )


def test_the_demo_dataset_passes_the_audit_and_shows_every_label(demo, tmp_path, monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
    raw, _ = prepare_dataset(str(demo), tmp_path)
    report = audit_dataset(raw, progress=False)
    assert (report.n_cases, report.faults, report.warnings) == (4, [], [])
    counts = {name: report.summary["labels"][str(v)]["n_cases"] for name, v in LABELS.items()}
    assert counts["vessel"] == counts["large_organ"] == counts["kidney"] == 4
    assert 0 < counts["lesion"] < 4
    shares = {name: report.summary["labels"][str(v)]["share"] for name, v in LABELS.items()}
    assert shares["lesion"] < shares["vessel"] < shares["large_organ"]


def test_spacings_are_anisotropic_and_differ_between_cases():
    images = [make_case(np.random.default_rng(i))[0] for i in range(3)]
    spacings = {image.GetSpacing() for image in images}
    assert len(spacings) == 3
    assert all(x == y < z for x, y, z in spacings)


def test_test_cases_come_with_labels(demo):
    assert len(list((demo / "imagesTs").iterdir())) == len(list((demo / "labelsTs").iterdir())) == 2


def test_the_same_seed_gives_the_same_voxels_and_another_seed_others(tmp_path):
    folders = [
        make_demo_dataset(tmp_path / str(i), n_train=1, n_test=0, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    for name in ("imagesTr/demo_000_0000.nii.gz", "labelsTr/demo_000.nii.gz"):
        first, same, other = (read_array(folder / name) for folder in folders)
        assert np.array_equal(first, same)
        assert not np.array_equal(first, other)


def test_brightness_alone_does_not_find_the_vessel():
    image, label = make_case(np.random.default_rng(0))
    values, truth = map(SimpleITK.GetArrayFromImage, (image, label))
    vessel = truth == LABELS["vessel"]
    threshold = np.quantile(values[vessel], 0.2)
    found = values > threshold
    dice = 2 * (found & vessel).sum() / (found.sum() + vessel.sum())
    assert dice < 0.6
