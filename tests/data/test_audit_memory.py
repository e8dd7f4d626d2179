"""The audit's memory: only files that changed are read again, and the report is the same."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
from dataset_makers import make_image, make_label, make_nnunet, open_raw, save_nan, write_volume

from umamba.data import case as case_module
from umamba.data.audit import audit_dataset
from umamba.data.images import read_image


@pytest.fixture
def source(tmp_path):
    return make_nnunet(tmp_path / "Dataset123_Knee", n=4)


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read."""
    names: list[str] = []

    def read_and_note(path, *rest):
        names.append(path.name)
        return read_image(path, *rest)

    monkeypatch.setattr(case_module, "read_image", read_and_note)
    return names


def audit(source: Path, **options):
    memory = source.parent / "preprocessed" / "audit.json"
    return audit_dataset(open_raw(source), progress=False, memory=memory, **options), memory


def test_a_second_audit_reads_nothing_and_reports_the_same(source, read):
    write_volume(source / "labelsTr" / "a2.nii.gz", make_label((1,)).astype(np.float32))
    first, memory = audit(source)
    assert len(read) == 8
    read.clear()
    seen: list[str] = []
    second, _ = audit(source, on_case=lambda name, images, label: seen.append(name))
    assert read == seen == []
    assert second.n_remembered == 4
    assert second.summary == first.summary
    assert second.warnings == first.warnings != []
    assert second.repairs == first.repairs != []
    assert json.loads(memory.read_text())["summary"] == first.summary


def test_only_the_case_whose_file_changed_is_read_again_and_handed_on(source, read):
    audit(source)
    write_volume(source / "imagesTr" / "a1_0000.nii.gz", make_image(77))
    read.clear()
    seen: list[str] = []
    report, _ = audit(source, on_case=lambda name, images, label: seen.append(name))
    assert sorted(read) == ["a1.nii.gz", "a1_0000.nii.gz"]
    assert seen == ["a1"]
    assert report.faults == []


def test_a_file_of_the_same_size_and_another_time_is_read_again(source, read):
    audit(source)
    os.utime(source / "labelsTr" / "a3.nii.gz", ns=(1, 1))
    read.clear()
    audit(source)
    assert sorted(read) == ["a3.nii.gz", "a3_0000.nii.gz"]


def test_a_case_with_a_fault_is_read_each_time(source, read):
    save_nan(source / "imagesTr" / "a0_0000.nii.gz", np.nan)
    first, memory = audit(source)
    assert list(json.loads(memory.read_text())["cases"]) == ["a1", "a2", "a3"]
    read.clear()
    second, _ = audit(source)
    assert sorted(read) == ["a0.nii.gz", "a0_0000.nii.gz"]
    assert second.faults == first.faults != []


def test_other_labels_in_dataset_json_make_it_read_everything(source, read):
    audit(source)
    read.clear()
    content = json.loads((source / "dataset.json").read_text())
    content["labels"] = {"background": 0, "one": 1}
    (source / "dataset.json").write_text(json.dumps(content))
    report, _ = audit(source)
    assert len(read) == 8
    assert len(report.faults) == 4
    content["numTraining"] = 99  # does not matter for a case
    content["labels"] = {"background": 0, "one": 1, "two": 2}
    (source / "dataset.json").write_text(json.dumps(content))
    audit(source)
    read.clear()
    content["numTraining"] = 4
    (source / "dataset.json").write_text(json.dumps(content))
    audit(source)
    assert read == []


@pytest.mark.parametrize("text", ["", "[1, 2", "[]", '{"format": 1, "cases": {"a0": 3}}'])
def test_a_broken_memory_is_as_good_as_none(source, text):
    first, memory = audit(source)
    memory.write_text(text)
    second, _ = audit(source)
    assert second.summary == first.summary
    damaged = json.loads(memory.read_text())
    damaged["cases"]["a1"]["found"] = {"shape": None}
    memory.write_text(json.dumps(damaged))
    assert audit(source)[0].summary == first.summary


def test_what_was_read_before_the_audit_was_stopped_is_not_read_again(source, read):
    def stop(name, images, label):
        if name == "a3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        audit(source, on_case=stop, n_workers=1)
    read.clear()
    report, _ = audit(source)
    assert sorted(read) == ["a3.nii.gz", "a3_0000.nii.gz"]
    assert report.n_cases == 4


def test_a_memory_that_cannot_be_written_is_a_warning(source):
    (source.parent / "preprocessed").write_text("a file where a folder should be")
    report, _ = audit(source)
    assert report.faults == []
    assert "audit.json" in report.warnings[-1].file
    assert "cannot be written" in report.warnings[-1].what


def test_never_more_cases_are_in_memory_than_workers(tmp_path):
    source = make_nnunet(tmp_path / "Dataset124_Many", n=12)
    alive: set[int] = set()
    most = 0

    def count(name, images, label):
        nonlocal most
        alive.add(id(images[0]))
        weakref.finalize(images[0], alive.discard, id(images[0]))
        most = max(most, len(alive))

    audit_dataset(open_raw(source), n_workers=2, progress=False, on_case=count)
    assert 1 <= most <= 2
    assert not alive
