"""Worker processes leave nothing behind: not after SIGKILL of the parent, not after Ctrl-C."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from umamba import processes
from umamba.processes import worker_pool

PARENT = """
import os, signal, time
from umamba import processes
from umamba.processes import worker_pool
if __name__ == "__main__":
    # a shell starts what runs in the background with this signal ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with worker_pool(2) as pool:
        ids = {pool.submit(os.getpid).result() for _ in range(8)}
        waiting = pool.submit(time.sleep, 60)
        print(*ids, flush=True)
        waiting.result()
"""


def wait_until_gone(ids: list[int], seconds: float = 10.0) -> list[int]:
    """The ids of those that still live when the time is over."""
    end = time.monotonic() + seconds
    while (alive := [i for i in ids if lives(i)]) and time.monotonic() < end:
        time.sleep(0.05)
    return alive


def lives(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT"])
def test_workers_end_with_their_parent(tmp_path, kind):
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    parent = subprocess.Popen(
        [sys.executable, program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert workers and all(lives(i) for i in workers)
    parent.send_signal(getattr(signal, kind))
    parent.stdout.close()
    assert parent.wait(10) != 0
    assert wait_until_gone(workers) == []


def test_a_pool_whose_block_raises_is_gone_at_once():
    ids = []

    def fail() -> None:
        with worker_pool(1) as pool:
            ids.append(pool.submit(os.getpid).result())
            pool.submit(time.sleep, 60)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert wait_until_gone(ids) == []


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="this system has no masks")
def test_workers_begin_with_ctrl_c_held_back_and_their_parent_does_not():
    """A terminal sends it to all: one that is just starting would print a traceback."""
    with worker_pool(1) as pool:
        assert pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, ()).result() == {signal.SIGINT}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_pools_of_processes_are_made_in_one_place():
    """Those of `worker_pool` end with the process that made them, others stay."""
    package = Path(processes.__file__).parent
    own = [
        str(file.relative_to(package))
        for file in sorted(package.rglob("*.py"))
        if re.search(r"ProcessPoolExecutor\(|\bPool\(", file.read_text())
    ]
    assert own == ["processes.py"]
