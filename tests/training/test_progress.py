"""Tests of what a training tells where it cannot write: said once, and never in the way."""

from pathlib import Path

import pytest
from matplotlib import pyplot

from umamba.training.progress import PatientWriter, ProgressPlot, add_line

FULL = Path("/dev/full")  # where every write fails for want of room
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@needs_full
def test_a_log_that_cannot_be_written_is_named_once(caplog):
    write = PatientWriter()
    assert [write(add_line, FULL, "a line") for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert "/dev/full: no space is left on its disk" in record.message


@needs_full
def test_a_drawing_that_fails_leaves_the_last_one_and_no_figure_open(tmp_path, caplog):
    def draw(folder):
        figure = pyplot.figure(figsize=(1, 1))
        (Path(folder) / "progress.png").symlink_to(target)
        figure.savefig(Path(folder) / "progress.png")
        pyplot.close()

    plot = ProgressPlot(draw, PatientWriter())
    before, target = pyplot.get_fignums(), tmp_path / "drawn"
    plot.draw(str(tmp_path))
    (tmp_path / "progress.png").unlink()
    (tmp_path / "progress.png").write_text("the last one")
    target = FULL
    plot.draw(str(tmp_path))
    assert (tmp_path / "progress.png").read_text() == "the last one"
    assert f"{tmp_path / 'progress.png'} cannot be written: no space" in caplog.text
    assert {file.name for file in tmp_path.iterdir()} == {"progress.png", "drawn"}
    assert pyplot.get_fignums() == before


def test_drawings_are_a_minute_apart(tmp_path, monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    plot = ProgressPlot(lambda _: drawn.append(now[0]), PatientWriter())
    for now[0] in (1.0, 30.0, 60.9, 61.5, 100.0, 200.0):
        plot.now_and_then(str(tmp_path))
    assert drawn == [1.0, 61.5, 200.0]
