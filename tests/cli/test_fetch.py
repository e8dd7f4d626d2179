"""`umamba models fetch`: nothing unasked, nothing in place that no checksum vouches for."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from umamba.cli import fetch
from umamba.cli.main import main
from umamba.networks import pretrained
from umamba.networks.pretrained import CATALOGUE, PublishedFile

CONTENT = b"weights" * 1000
RIGHT = hashlib.sha256(CONTENT).hexdigest()


@dataclasses.dataclass(frozen=True)
class LocalFile(PublishedFile):
    """A file that is published in a folder."""

    @property
    def address(self) -> str:
        return (Path(self.release) / self.file).as_uri()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where weights are put; a catalogue of two files that are published below tmp_path."""
    published = tmp_path / "published"
    published.mkdir()
    for name, checksum in (("vssm_tiny", RIGHT), ("vssm_small", None)):
        file = f"{name}.pth"
        (published / file).write_bytes(CONTENT)
        entry = LocalFile(name, file, str(published), 1_000_000, sha256=checksum)
        monkeypatch.setitem(CATALOGUE, name, entry)
    target = tmp_path / "weights"
    monkeypatch.setenv(pretrained.FOLDER_VARIABLE, str(target))
    return target


def test_without_download_only_facts_are_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", "fetch", "swin-umamba"]) == 0
    said = capsys.readouterr().out
    for word in (CATALOGUE["vssm_tiny"].address, "MIT", "4 MB", RIGHT, "swin_umamba_d", "next:"):
        assert word in said
    assert not folder.exists()
    assert main(["models", "fetch", "vm_unet"]) == 0
    assert "none is published" in capsys.readouterr().out


def test_a_file_with_the_recorded_checksum_is_put_in_place(folder: Path) -> None:
    assert main(["models", "fetch", "vssm_tiny", "--download"]) == 0
    assert [p.name for p in folder.iterdir()] == ["vssm_tiny.pth"]
    assert (folder / "vssm_tiny.pth").read_bytes() == CONTENT


def test_another_checksum_deletes_what_came(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "0" * 64
    assert main(["models", "fetch", "vssm_tiny", "--download", "--sha256", wrong]) == 1
    error = capsys.readouterr().err
    assert RIGHT in error
    assert wrong in error
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("answer", [["--trust"], ["--sha256", RIGHT.upper()]])
def test_without_a_known_checksum_the_file_waits_for_an_answer(
    answer: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["models", "fetch", "vssm_small", "--download"]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert RIGHT in said
    assert "--trust" in said
    assert [p.name for p in folder.iterdir()] == ["vssm_small.pth.unchecked"]
    # What waits is not fetched again.
    (Path(CATALOGUE["vssm_small"].release) / "vssm_small.pth").unlink()
    assert main([*words, *answer]) == 0
    assert [p.name for p in folder.iterdir()] == ["vssm_small.pth"]


def test_a_download_that_fails_or_ends_early_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Short:
        headers = {"Content-Length": "99"}  # noqa: RUF012
        chunks = iter([b"half"])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def read(self, size):
            return next(self.chunks, b"")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", lambda address, timeout: Short())
    assert main(["models", "fetch", "vssm_tiny", "--download"]) == 1
    assert "ended after 4 of 99 bytes" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv(pretrained.FOLDER_VARIABLE, str(folder))
    with pytest.raises(ValueError, match="cannot be reached"):
        fetch.download((folder / "absent.pth").as_uri(), folder / "x.pth")
    assert list(folder.iterdir()) == []


def test_an_unknown_name_and_a_network_without_weights_are_usage_errors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["models", "fetch", "vssm_huge"]) == 2
    assert "vssm_tiny" in capsys.readouterr().err
    assert main(["models", "fetch", "segmamba"]) == 2
    assert "no ImageNet weights" in capsys.readouterr().err
