"""Tests of `umamba predict` on everything that can be wrong with files, disks and machines.

A bad case is named in a sentence and the others are done; nothing half-written stays.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from umamba.cli.main import main
from umamba.inference import pipeline
from umamba.inference import predictor as predictor_file
from umamba.inference.predictor import UMambaPredictor

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))

from model_folders import make_image, make_model_folder, make_plans, read_array, write_cases
from model_folders import write_nifti as write_image

ROOT = Path(__file__).parents[2]
SIDE_FILES = {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}
SHAPE = (5, 12, 13)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def images(tmp_path):
    return write_cases(tmp_path / "images", dict.fromkeys("abcd", SHAPE))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def predict(model, images, out, *words):
    """The exit code of the whole command."""
    words = ("-m", model, "-i", images, "-o", out, "-device", "cpu", "--disable_tta", *words)
    return main(["predict", *map(str, words), "--disable_progress_bar"])


def predicted(out):
    """Cases whose label maps are there; nothing but whole files is."""
    names = {p.name for p in out.iterdir()} - SIDE_FILES
    assert all(name.endswith(".nii.gz") and not name.startswith(".") for name in names)
    return {name.removesuffix(".nii.gz") for name in names}


def sentences(capsys):
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return errors


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-200])


def link_to_itself(file):
    file.unlink()
    file.symlink_to(file)


def link_to_nothing(file):
    file.unlink()
    file.symlink_to(file.with_name("gone.nii.gz"))


def fill_with_nan(file):
    image = make_image(SHAPE)
    image[2, 3, 4] = np.nan
    write_image(file, image, (1, 1, 1))


BAD = {
    "truncated": (cut_short, "is cut short"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "no image": (lambda file: file.write_bytes(b"text" * 100), "b_0000"),
    "link to itself": (link_to_itself, "leads in a circle"),
    "broken link": (link_to_nothing, "does not exist or is a broken link"),
    "folder": (lambda file: (file.unlink(), file.mkdir()), "b_0000"),
    "NaN": (fill_with_nan, "holds 1 NaN"),
}


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_case_of_four_is_named_and_the_others_are_done(model, images, out, capsys, kind):
    spoil, expected = BAD[kind]
    spoil(images / "b_0000.nii.gz")
    assert predict(model, images, out) == 3
    assert predicted(out) == {"a", "c", "d"}
    errors = sentences(capsys)
    assert errors.startswith("error: 1 cases could not be predicted:\n  b: ")
    assert "b_0000.nii.gz" in errors
    assert expected in errors


def test_a_folder_of_bad_cases_ends_with_one_and_names_them_all(model, images, out, capsys):
    for file in images.iterdir():
        cut_short(file)
    assert predict(model, images, out) == 1
    assert predicted(out) == set()
    errors = sentences(capsys)
    assert all(f"{name}_0000.nii.gz: is cut short" in errors for name in "abcd")


def test_the_one_bad_case_of_a_thousand_is_named_and_the_others_are_done(
    tmp_path, out, capsys, monkeypatch
):
    plans = make_plans(patch_size=(4, 4, 4), spacing=(1.0, 1.0, 1.0))
    model = make_model_folder(tmp_path / "m", plans)
    monkeypatch.setattr(
        UMambaPredictor,
        "predict_labels",
        lambda self, data, properties, **_: (np.zeros((4, 4, 4), np.uint8), None),
    )
    images = write_cases(tmp_path / "images", {"a": (4, 4, 4)}, spacing=(1.0, 1.0, 1.0))
    content = (images / "a_0000.nii.gz").read_bytes()
    for number in range(999):
        (images / f"case {number:03}_0000.nii.gz").write_bytes(content)
    cut_short(images / "case 500_0000.nii.gz")
    assert predict(model, images, out) == 3
    assert len(predicted(out)) == 999
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 2
    assert "case 500_0000.nii.gz: is cut short" in captured.err
    assert "999 of 1000 cases predicted" in captured.out


def test_names_with_spaces_and_other_letters_are_kept(model, tmp_path, out):
    names = ("große Lunge", "肝 1", "foie_à_gauche", "a'b\"c")
    images = write_cases(tmp_path / "Bilder für 肝", dict.fromkeys(names, SHAPE))
    assert predict(model, images, out) == 0
    assert predicted(out) == set(names)
    assert all(read_array(out / f"{name}.nii.gz").shape == SHAPE for name in names)


def test_an_image_removed_while_the_others_are_predicted_is_named(
    model, images, out, capsys, monkeypatch
):
    predict_labels = UMambaPredictor.predict_labels

    def remove_last(self, *case, **folders):
        (images / "d_0000.nii.gz").unlink(missing_ok=True)
        return predict_labels(self, *case, **folders)

    monkeypatch.setattr(UMambaPredictor, "predict_labels", remove_last)
    assert predict(model, images, out) == 3
    assert predicted(out) == {"a", "b", "c"}
    assert "d_0000.nii.gz: does not exist" in sentences(capsys)


def test_a_case_that_is_too_large_for_the_memory_fails_alone(
    model, images, out, capsys, monkeypatch
):
    write_cases(images, {"b": (7, 12, 13)})
    predict_labels = UMambaPredictor.predict_labels

    def allocate(self, data, properties, **folders):
        if data.shape[1] > 8:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9")
        return predict_labels(self, data, properties, **folders)

    monkeypatch.setattr(UMambaPredictor, "predict_labels", allocate)
    assert predict(model, images, out) == 3
    assert predicted(out) == {"a", "c", "d"}
    assert "b: it needs more memory than is left: end other programs" in sentences(capsys)


def test_an_exception_while_a_case_is_exported_fails_it_alone(
    model, images, out, capsys, monkeypatch
):
    write, calls = predictor_file.write_prediction, []

    def fail_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise IndexError("list index out of range")
        return write(*arguments)

    monkeypatch.setattr(predictor_file, "write_prediction", fail_once)
    assert predict(model, images, out) == 3
    assert predicted(out) == {"a", "c", "d"}
    assert "b: IndexError: list index out of range" in sentences(capsys)


@pytest.mark.parametrize("torn", ["a.nii.gz", "a.npz"])
def test_continuing_does_a_torn_output_again(model, images, out, torn):
    assert predict(model, images, out, "--npz") == 0
    whole = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    before = read_array(out / "a.nii.gz")
    with np.load(out / "a.npz") as content:
        probabilities = content["probabilities"]
    (out / torn).write_bytes((out / torn).read_bytes()[:60])
    assert predict(model, images, out, "--npz", "--continue") == 0
    again = {name for name, time in whole.items() if (out / name).stat().st_mtime_ns != time}
    assert again - SIDE_FILES == {"a.nii.gz", "a.npz", "a.pkl"}
    assert np.array_equal(read_array(out / "a.nii.gz"), before)
    with np.load(out / "a.npz") as content:
        assert np.array_equal(content["probabilities"], probabilities)


KILLED = """
import os, signal, sys
from umamba.cli.main import main
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
write = SimpleITKIO.write_seg
def write_half(self, seg, file, properties):
    write(self, seg, file, properties)
    if "c.nii.gz" in file:
        os.truncate(file, 60)
        os.kill(os.getpid(), signal.SIGKILL)
SimpleITKIO.write_seg = write_half
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_prediction_continues_to_the_result_of_an_uninterrupted_one(
    model, images, out, tmp_path, capsys
):
    words = ["-m", model, "-i", images, "-o", out, "-device", "cpu", "--disable_tta"]
    command = [sys.executable, "-c", KILLED, "predict", *map(str, words)]
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == -signal.SIGKILL
    assert any(p.name.startswith(".c.nii.gz") for p in out.iterdir())
    assert predict(model, images, out, "--continue") == 0
    assert "2 of 4 cases predicted, 2 were there already" in capsys.readouterr().out
    assert predict(model, images, tmp_path / "straight") == 0
    assert predicted(out) == predicted(tmp_path / "straight") == set("abcd")
    for name in "abcd":
        first, second = (folder / f"{name}.nii.gz" for folder in (out, tmp_path / "straight"))
        assert first.read_bytes() == second.read_bytes()


def test_a_full_disk_ends_the_run_with_one_sentence_and_whole_files_only(model, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=104k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted by this user")
    try:
        images = write_cases(tmp_path / "images", dict.fromkeys("abcdefgh", (24, 40, 40)))
        assert predict(model, images, disk) == 1
        done = predicted(disk)
        assert 0 < len(done) < 8
        errors = sentences(capsys)
        assert errors.count("\n") == 1
        assert "cannot be written: no space is left on its disk" in errors
        assert all(read_array(disk / f"{name}.nii.gz").shape == (24, 40, 40) for name in done)
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert predict(model, images, disk, "--continue") == 0
        assert predicted(disk) == set("abcdefgh")
        capsys.readouterr()
        large = write_cases(tmp_path / "large", {"i": (60, 120, 120)})
        assert predict(model, large, disk, "--npz") == 1
        assert f"i: {disk}: no space is left on its disk; free some" in sentences(capsys)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_second_prediction_into_the_folder_ends_at_once(model, images, out, capsys, monkeypatch):
    run, codes = pipeline.run_pipeline, []

    def predict_beside(*arguments, **options):
        codes.append(predict(model, images, out))
        return run(*arguments, **options)

    monkeypatch.setattr("umamba.inference.predictor.run_pipeline", predict_beside)
    assert predict(model, images, out) == 0
    assert codes == [1]
    assert f"{out} is in use (prediction: process {os.getpid()} on " in sentences(capsys)


AS_ANOTHER_USER = """
import os, sys
from umamba.cli.main import main
model, images, folder = sys.argv[1:]
def predict(source, target):
    words = ["predict", "-m", model, "-i", source, "-o", target, "-device", "cpu", "--disable_tta"]
    return main([*words, "--disable_progress_bar"])
predict(images, folder + "/first")  # imports what another user may not read
os.setuid(65534)
for source, target in (("images", "out"), ("images", "closed"), ("closed", "out")):
    print("code", predict(f"{folder}/{source}", f"{folder}/{target}"))
    print("end", file=sys.stderr)
"""


def test_files_and_folders_of_another_user_are_named():
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model_folder(folder / "m")
        images = write_cases(folder / "images", dict.fromkeys("ab", SHAPE))
        (images / "b_0000.nii.gz").chmod(0o600)
        folder.chmod(0o755)
        for part, mode in (("out", 0o777), ("closed", 0o700)):
            (folder / part).mkdir()
            (folder / part).chmod(mode)
        words = [sys.executable, "-c", AS_ANOTHER_USER, *map(str, (model, images, folder))]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert [line for line in done.stdout.splitlines() if line.startswith("code")] == [
            "code 3", "code 1", "code 1",
        ]  # fmt: skip
        case, place, source = done.stderr.split("end\n")[:3]
        assert "b_0000.nii.gz: may not be read by this user; change its permissions" in case
        assert (
            f"{folder}/closed/predict_from_raw_data_args.json cannot be written: this user may not"
            in place
        )
        assert source == f"error: {folder}/closed: permission denied\n"
        assert predicted(folder / "out") == {"a"}
