"""The file of the backends that were fastest: what is kept, found again, and ignored."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from umamba.ops import cpu, remembered
from umamba.ops.remembered import Choice, choices_file, recall, remember

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A file of the test's own, in a folder that is not there yet."""
    path = tmp_path / "umamba" / "scan.json"
    monkeypatch.setattr(remembered, "choices_file", lambda: path)
    forget()
    yield path
    forget()


def forget() -> None:
    recall.cache_clear()
    remembered._read.cache_clear()


def test_the_file_is_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices_file() == tmp_path / "umamba" / "scan.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert choices_file() == Path.home() / ".cache" / "umamba" / "scan.json"


def test_nothing_is_remembered_at_first(file: Path, caplog: pytest.LogCaptureFixture):
    assert recall(CPU) is None
    assert not caplog.records


def test_what_is_remembered_is_recalled_and_the_latest_counts(file: Path):
    assert recall(CPU) is None
    assert remember(CPU, "chunked") == file
    assert remember(CPU, "reference") == file
    found = recall(CPU)
    assert found is not None
    assert found.backend == "reference"
    forget()
    assert recall(CPU) == found
    assert [path.name for path in file.parent.iterdir()] == ["scan.json"]


def test_deleting_the_file_forgets(file: Path):
    remember(CPU, "chunked")
    file.unlink()
    forget()
    assert recall(CPU) is None


def test_a_device_another_torch_and_another_umamba_have_choices_of_their_own(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    remember(CPU, "chunked")
    with monkeypatch.context() as patch:
        for module, name in ((torch, "__version__"), (remembered.umamba, "__version__")):
            patch.setattr(module, name, "0.0", raising=False)
            forget()
            assert recall(CPU) is None
            patch.undo()
        patch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        remember(torch.device("cuda", 0), "mamba_ssm")
        found = recall(torch.device("cuda"))
        assert found is not None
        assert found.backend == "mamba_ssm"
    forget()
    found = recall(CPU)
    assert found is not None
    assert found.backend == "chunked"
    assert len(json.loads(file.read_text())) == 2


def test_the_cpu_is_named_with_the_instruction_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cpu, "instruction_set", lambda: "v3")
    assert remembered.device_name(CPU).endswith(", v3")
    monkeypatch.setattr(cpu, "instruction_set", lambda: None)
    assert remembered.device_name(CPU).endswith(", no C library")


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", "\x00", '{"KEY": "cpu"}', '{"KEY": {"backend": 1, "date": "x"}}'],
    ids=["cut", "list", "binary", "no_entry", "no_name"],
)
def test_alien_content_is_ignored_with_one_sentence_and_replaced(
    file: Path, content: str, caplog: pytest.LogCaptureFixture
):
    file.parent.mkdir()
    file.write_text(content.replace("KEY", remembered._circumstances(CPU)))
    with caplog.at_level(logging.WARNING, "umamba.ops.remembered"):
        for _ in range(2):
            assert recall(CPU) is None
    assert len(caplog.records) == 1
    assert "ignoring" in caplog.text
    remember(CPU, "chunked")
    assert isinstance(recall(CPU), Choice)


def test_a_folder_in_place_of_the_file_is_ignored_too(file: Path, caplog: pytest.LogCaptureFixture):
    file.mkdir(parents=True)
    assert recall(CPU) is None
    assert len(caplog.records) == 1
