"""Tests of writing files whole or not at all, on full, read-only and forbidden places."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
import torch

from umamba.files import (
    OutputError,
    _leftovers,
    describe_error,
    discard_unfinished,
    replacing,
    replacing_together,
    write_json,
    write_text,
)

ROOT = Path(__file__).parents[1]
NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 60)).astype(np.uint8)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode
    except FileNotFoundError:
        done = 1
    if done:
        pytest.skip("a small file system cannot be mounted by this user")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def write_image(path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(NOISE), str(path))


WRITERS = {
    "a.nii.gz": write_image,
    "a.nii": write_image,
    "a.nrrd": write_image,
    "a.npy": lambda path: np.save(path, NOISE),
    "a.npz": lambda path: np.savez_compressed(path, NOISE),
    "a.pth": lambda path: torch.save({"x": torch.from_numpy(NOISE)}, path),
    "a.txt": lambda path: path.write_text("x" * 100_000),
}


@pytest.mark.parametrize("name", WRITERS)
def test_on_a_full_disk_the_file_is_named_the_old_one_stays_and_nothing_else(small_disk, name):
    target = small_disk / name
    target.write_text("old")
    with pytest.raises(OutputError) as caught, replacing(target) as temporary:
        WRITERS[name](temporary)
    assert str(caught.value) == (
        f"{target} cannot be written: no space is left on its disk; free some or choose another "
        "place"
    )
    assert [p.name for p in small_disk.iterdir()] == [name]
    assert target.read_text() == "old"


@pytest.mark.parametrize("name", ["a.nii.gz", "a.txt"])
def test_a_limit_of_file_size_is_named_in_a_sentence(tmp_path, name):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OutputError, match="ulimit -f"), replacing(tmp_path / name) as temporary:
            WRITERS[name](temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WRITERS)
def test_what_was_written_is_neither_longer_nor_newer_than_its_writer_made_it(tmp_path, name):
    with replacing(tmp_path / name) as temporary:
        WRITERS[name](temporary)
        os.utime(temporary, (1, 2))
        content = temporary.read_bytes()
    assert (tmp_path / name).read_bytes() == content
    assert (tmp_path / name).stat().st_mtime == 2


def test_files_that_belong_together_appear_together_the_named_one_last(tmp_path, monkeypatch):
    moved = []
    move = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or move(a, b))
    with replacing_together(tmp_path / "a.txt") as folder:
        for name in ("a.txt", "a.pkl", "z.npz"):
            (folder / name).write_text(name)
        assert [p for p in tmp_path.iterdir() if not p.name.startswith(".")] == []
    assert moved == ["a.pkl", "z.npz", "a.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pkl", "a.txt", "z.npz"]


def test_of_files_that_belong_together_none_appears_on_a_full_disk(small_disk):
    def write_both():
        with replacing_together(small_disk / "a.nii.gz") as folder:
            (folder / "a.pkl").write_text("facts")
            write_image(folder / "a.nii.gz")

    with pytest.raises(OutputError, match="no space"):
        write_both()
    assert list(small_disk.iterdir()) == []


def test_an_error_that_is_not_about_the_target_passes_unchanged(tmp_path):
    missing = tmp_path / "source.txt"
    with (
        pytest.raises(FileNotFoundError, match=r"source\.txt"),
        replacing(tmp_path / "a.txt") as temporary,
    ):
        temporary.write_bytes(missing.read_bytes())
    with pytest.raises(RuntimeError, match="unrelated"), replacing(tmp_path / "a.txt"):
        raise RuntimeError("unrelated")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("file/a.txt", "a part of its path is a file"),
        ("file/below/a.txt", "a part of its path is a file"),
        ("loop/a.txt", "a part of its path is a file|leads back to itself"),
        ("x" * 300, "its name is too long"),
        ("folder", "it is a folder"),
    ],
    ids=["parent is a file", "grandparent is a file", "loop", "long name", "folder"],
)
def test_a_place_that_cannot_be_written_is_named_with_the_cure(tmp_path, place, match):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=f"cannot be written: .*({match})") as caught:
        write_text(tmp_path / place, "new")
    assert str(tmp_path / place) in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "loop"]


def test_a_read_only_file_system_is_named(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutputError, match="its file system is read-only"):
        write_json(small_disk / "a.json", {})


def test_another_user_is_told_that_the_folder_is_not_his(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    code = (
        "import os, sys; from pathlib import Path; from umamba.files import write_json; "
        "os.setuid(65534)\n"
        "try: write_json(Path(sys.argv[1]), {})\n"
        "except OSError as error: print(error)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "a.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "a.json cannot be written: this user may not write there" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_may_be_is_written(tmp_path):
    path = tmp_path / ("x" * 247 + ".txt")
    write_text(path, "new")
    assert path.read_text() == "new"


def test_what_a_killed_process_left_goes_when_its_target_is_written_again(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = [f".a.txt.{dead.pid}.txt", f".a.txt.{dead.pid}", f".a.nii.gz.{dead.pid}.nii.gz"]
    kept = [f".a.txt.{os.getppid()}.txt", f".b.txt.{dead.pid}.txt", ".a.txt.backup"]
    for name in (*stale, *kept):
        (tmp_path / name).write_text("half")
    _leftovers.cache_clear()
    write_text(tmp_path / "a.txt", "whole")
    write_text(tmp_path / "a.nii.gz", "whole")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "a.nii.gz", *kept}


def test_writes_under_way_are_discarded_before_the_process_is_ended(tmp_path):
    with replacing_together(tmp_path / "b") as folder:
        (folder / "b").write_text("half")
        discard_unfinished()
        assert list(tmp_path.iterdir()) == []
        folder.mkdir()


def test_an_error_of_the_system_is_one_sentence_with_its_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "missing").read_text()
    assert describe_error(caught.value) == f"{tmp_path / 'missing'}: no such file or directory"
    assert describe_error(OSError(28, "No space left on device")).startswith("no space is left")
    assert describe_error(OSError("as it is")) == "as it is"


def test_a_hard_link_is_put_in_place_without_a_write_to_its_file(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"somebody's")
    monkeypatch.setattr("umamba.files.os.write", lambda *_: pytest.fail("written to"))
    with replacing(tmp_path / "copy") as temporary:
        os.link(tmp_path / "source", temporary)
    assert (tmp_path / "copy").samefile(tmp_path / "source")
