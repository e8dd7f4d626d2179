"""Every bad input of the baseline: named by the audit, refused before work, never a bare trace."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from dataset_makers import (
    SHAPE,
    cut,
    make_4d,
    make_image,
    make_label,
    make_nnunet,
    save_float,
    save_nan,
    spoil,
    write_dataset_json,
    write_volume,
)

from umamba.cli.main import main

ROOT = Path(__file__).parents[2]
IMAGE, SECOND, LABEL = "imagesTr/a1_0000.nii.gz", "imagesTr/a1_0001.nii.gz", "labelsTr/a1.nii.gz"


def save_all_nan(path: Path) -> None:
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, np.nan, np.float32), image.affine), path)


def save_label(path: Path, value: float) -> None:
    write_volume(path, spoil(make_label().astype(np.float32), value))


def save_beside(path: Path, array: np.ndarray) -> None:
    write_volume(path, array, origin=(-10.0, 20.0, 8.0))


def flip(path: Path) -> None:
    """Let the header say that x runs the other way."""
    image = SimpleITK.ReadImage(str(path))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    SimpleITK.WriteImage(image, str(path))


def empty_labels(labels: Path) -> None:
    for path in labels.iterdir():
        write_volume(path, make_label(()))


def write_json(path: Path, **changes: object) -> None:
    write_dataset_json(path.parent, 5, **{"channel_names": {"0": "A", "1": "B"}, **changes})


def make_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


# the file that is spoiled, how, and what the audit says, all of one line
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated image": (IMAGE, lambda p: cut(p, 0.5), "is cut short"),
    "truncated label": (LABEL, lambda p: cut(p, 0.5), "is cut short"),
    "gzip without its end": (IMAGE, lambda p: cut(p, 0.999), "gzip stream has no end"),
    "0-byte image": (IMAGE, lambda p: p.write_bytes(b""), "is empty (0 bytes)"),
    "image of other size than the label": (
        LABEL, lambda p: write_volume(p, make_label(shape=(4, 8, 7))), "has shape (4, 8, 7)",
    ),
    "label value not in dataset.json": (LABEL, lambda p: save_label(p, 7), "label value(s) 7"),
    "negative label": (LABEL, lambda p: save_label(p, -1), "negative labels (-1)"),
    "fractional label": (LABEL, lambda p: save_label(p, 1.5), "no whole numbers (1.5)"),
    "missing channel": (SECOND, Path.unlink, "the case lacks this channel"),
    "surplus channel": (
        "imagesTr/a1_0002.nii.gz", lambda p: write_volume(p, make_image(9)),
        "a channel that dataset.json does not name",
    ),
    "missing label": (LABEL, Path.unlink, "the case has an image but no label"),
    "label without an image": (
        "labelsTr/b.nii.gz", lambda p: write_volume(p, make_label()), "a label without an image",
    ),
    "channels with other spacing": (
        SECOND, lambda p: write_volume(p, make_image(11), (2.5, 0.8, 1.0)), "has spacing",
    ),
    "channels with other origin": (
        SECOND, lambda p: save_beside(p, make_image(11)), "lies up to 5 mm (2 voxels) off",
    ),
    "label with other origin": (
        LABEL, lambda p: save_beside(p, make_label()), "lies up to 5 mm (2 voxels) off",
    ),
    "label flipped in direction": (LABEL, flip, "is flipped against its image a1_0000.nii.gz"),
    "NaN in an image": (IMAGE, lambda p: save_nan(p, np.nan), "holds 1 NaN of 280 voxels"),
    "image all NaN": (IMAGE, save_all_nan, "holds 280 NaN of 280 voxels"),
    "infinite voxel": (IMAGE, lambda p: save_nan(p, np.inf), "holds 1 infinite of 280 voxels"),
    "4D image": (IMAGE, make_4d, "is 4D with shape (2, 5, 8, 7)"),
    "all labels empty": ("labelsTr", empty_labels, "has no labeled voxel in any of its 5 labels"),
    "image swapped for another of other size": (
        IMAGE, lambda p: write_volume(p, make_image(0, (6, 8, 7))), "(6, 8, 7)",
    ),
    "no background": (
        "dataset.json", lambda p: write_json(p, labels={"one": 1, "two": 2}),
        "declares no background",
    ),
    "gap in the labels": (
        "dataset.json", lambda p: write_json(p, labels={"background": 0, "one": 1, "two": 3}),
        "skips the label value(s) 2",
    ),
    "broken dataset.json": (
        "dataset.json", lambda p: p.write_text('{"labels": '), "is not valid JSON",
    ),
    "symlink loop": (IMAGE, make_loop, "is a link that leads in a circle"),
    "broken link": (
        IMAGE, lambda p: (p.unlink(), p.symlink_to("no")), "does not exist or is a broken link",
    ),
}  # fmt: skip

WARNINGS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "constant image": (IMAGE, lambda p: write_volume(p, np.ones(SHAPE, np.float32)), "is constant"),
    "duplicate in training": (
        IMAGE, lambda p: shutil.copy(p.with_name("a3_0000.nii.gz"), p),
        "is the same image as a1_0000.nii.gz",
    ),
    "training image among the test images": (
        "imagesTs/t_0000.nii.gz",
        lambda p: (p.parent.mkdir(), shutil.copy(p.parents[1] / IMAGE, p)),
        "is the same image as a1_0000.nii.gz in imagesTr",
    ),
    "same file for two channels": (
        SECOND, lambda p: shutil.copy(p.with_name("a1_0000.nii.gz"), p),
        "is the same image as a1_0000.nii.gz",
    ),
    "truncated test image": (
        "imagesTs/t_0000.nii.gz",
        lambda p: (write_volume(p, make_image(90)), cut(p, 0.5)),
        "is cut short",
    ),
    "intensities of another unit": (
        IMAGE, lambda p: write_volume(p, make_image(10) * 1e4), " times more)",
    ),
    "one absurd voxel": (
        IMAGE, lambda p: write_volume(p, spoil(make_image(10), 1e7)), "is far above the others",
    ),
    "label class that no case shows": (
        "labelsTr", lambda p: [write_volume(f, make_label((1,))) for f in p.iterdir()],
        "names label 2 in dataset.json but no case shows it",
    ),
    "origin a hair off": (
        LABEL, lambda p: write_volume(p, make_label(), origin=(-10.0, 20.1, 3.0)),
        "lies up to 0.1 mm",
    ),
    "label in float": (LABEL, lambda p: save_float(p, make_label()), "stored as float32"),
}  # fmt: skip


def make(tmp_path: Path, spoiled: str, how: Callable[[Path], object]) -> Path:
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=5, n_channels=2)
    how(source / spoiled)
    return source


def call(*words: str | Path) -> int:
    return main([*map(str, words), "--workspace", "W"])


@pytest.mark.parametrize("name", FAULTS)
def test_the_audit_names_the_file_and_the_fault_and_exits_with_1(tmp_path, capsys, name):
    spoiled, how, said = FAULTS[name]
    source = make(tmp_path, spoiled, how)
    assert call("audit", source) == 1
    out, err = capsys.readouterr()
    lines = [line for line in (out + err).splitlines() if said in line]
    assert lines, out + err
    # a missing channel is named, and that the case has too few; a bad dataset.json has no table
    place = "has no labeled" if spoiled == "labelsTr" else Path(spoiled).name.split("_0")[0]
    assert any(place in line for line in lines), lines
    assert "traceback" not in err


@pytest.mark.parametrize("name", WARNINGS)
def test_what_is_only_doubtful_is_a_warning_and_exits_with_0(tmp_path, capsys, name):
    spoiled, how, said = WARNINGS[name]
    source = make(tmp_path, spoiled, how)
    assert call("audit", source) == 0
    out = capsys.readouterr().out
    assert "fault in" not in out
    assert said in out


HARMLESS: dict[str, Callable[[Path], object]] = {
    "numTraining wrong": lambda p: write_json(p / "dataset.json", numTraining=77),
    "no dataset.json, but folders of equal names": lambda p: (p / "dataset.json").unlink(),
    "one empty label": lambda p: write_volume(p / LABEL, make_label(())),
    "macOS's hidden twins": lambda p: (p / "imagesTr" / "._a1_0000.nii.gz").write_bytes(b"x"),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_legitimate_is_not_even_a_warning(tmp_path, capsys, name):
    source = make(tmp_path, "", HARMLESS[name])
    assert call("audit", source) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("name", ["truncated label", "infinite voxel", "missing channel"])
def test_plan_and_run_refuse_a_faulty_dataset_before_any_work(tmp_path, capsys, command, name):
    spoiled, how, said = FAULTS[name]
    words = ["--epochs", "1"] if command == "run" else []
    assert call(command, make(tmp_path, spoiled, how), *words) == 1
    err = capsys.readouterr().err
    assert said in err
    assert "traceback" not in err
    written = [path for path in (tmp_path / "W" / "preprocessed").rglob("*") if path.is_file()]
    assert all(path.suffix == ".json" for path in written), written
    assert not list((tmp_path / "W" / "results").iterdir())


ONLY_THE_AUDIT_SEES = {
    "channels with other origin", "label with other origin", "label flipped in direction",
    "NaN in an image", "image all NaN", "infinite voxel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_without_the_audit_what_planning_notices_is_named_in_one_sentence(tmp_path, capsys, name):
    spoiled, how, _ = FAULTS[name]
    source = make(tmp_path, spoiled, how)
    code = call("plan", source, "--no-audit", "-c", "3d_fullres", "--memory", "2")
    err = capsys.readouterr().err
    assert "the traceback" not in err, err
    assert code == (name not in ONLY_THE_AUDIT_SEES)
    if code:
        assert any(word in err for word in ("a1", "dataset.json", "label", "imagesTr")), err


def test_one_bad_case_among_a_thousand_is_the_one_that_is_named(tmp_path, capsys):
    source = make_nnunet(tmp_path / "Dataset123_Knee", n=1)
    image = gzip.decompress((source / "imagesTr" / "a0_0000.nii.gz").read_bytes())
    label = (source / "labelsTr" / "a0.nii.gz").read_bytes()
    for i in range(1, 1000):
        other = image[:-4] + np.float32(90 + i / 50).tobytes()
        path = source / "imagesTr" / f"a{i}_0000.nii.gz"
        path.write_bytes(gzip.compress(other, 1))
        (source / "labelsTr" / f"a{i}.nii.gz").write_bytes(label)
    cut(source / "imagesTr" / "a777_0000.nii.gz", 0.7)
    assert call("audit", source, "--json", "out.json") == 1
    assert "1 fault in" in capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [Path(fault["file"]).name for fault in found["faults"]] == ["a777_0000.nii.gz"]
    assert found["warnings"] == []
    assert found["n_cases"] == 1000


@pytest.mark.slow
def test_names_with_spaces_and_letters_of_any_script_work_through_preprocessing(tmp_path, capsys):
    source = make_nnunet(tmp_path / "Dataset123_Knie links", n=5)
    for path in [*source.glob("imagesTr/a1*"), *source.glob("labelsTr/a1*")]:
        path.rename(path.with_name(path.name.replace("a1", "Müller 膝 (2)")))
    assert call("audit", source) == 0
    assert "warning" not in capsys.readouterr().out
    assert call("plan", source, "-c", "3d_fullres", "--memory", "2") == 0
    preprocessed = tmp_path / "W" / "preprocessed"
    written = {path.name for path in preprocessed.rglob("Müller*")}
    assert "Müller 膝 (2).b2nd" in written
    assert "Müller 膝 (2).nii.gz" in written


NOBODY = 65534
# all is imported by an audit of a good dataset, since the interpreter itself may lie in root's home
AS_NOBODY = f"""
import os, sys
from umamba.cli.main import main
*words, good, locked = sys.argv[1:]
assert main([*words, good, "--workspace", good + "-W"]) == 0
print("now as another user", flush=True)
os.setgid({NOBODY})
os.setuid({NOBODY})
sys.exit(main([*words, locked, "--workspace", locked + "-W"]))
"""


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0,
    reason="another user's files need a second user, and only root can become one",
)
@pytest.mark.parametrize("what", ["image", "folder", "dataset.json"])
def test_a_path_that_another_user_may_not_read_is_named(tmp_path, what):
    with tempfile.TemporaryDirectory() as name:  # pytest's folder lets only its owner in
        good, source = (make_nnunet(Path(name) / f"Dataset{i}_Knee") for i in (122, 123))
        for path in [Path(name), *Path(name).rglob("*")]:
            os.chown(path, NOBODY, NOBODY)
        locked = {"image": source / IMAGE, "folder": source / "imagesTr"}.get(what, source / what)
        os.chown(locked, 0, 0)
        locked.chmod(0o700)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, "audit", str(good), str(source)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    _, _, printed = done.stdout.partition("now as another user")
    said = [line for line in (printed + done.stderr).splitlines() if "may not be read" in line]
    assert len(said) == 1, printed + done.stderr
    assert locked.name in said[0]
    assert done.returncode == 1
    assert "raceback" not in done.stderr
