"""How many processors there are to use, and worker processes that end with their parent."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

CHECK_EVERY = 0.5  # seconds


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def die_with_parent() -> None:
    """Kill this process about half a second after the process that started it has ended.

    To be called first thing in a child process, under any start method. A process that is stopped
    inside a call that holds Python's lock ends when that call returns.
    """
    # Not prctl(PR_SET_PDEATHSIG): it fires when the *thread* that started the child ends.
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent_id: int) -> None:
    parent = multiprocessing.parent_process()
    sentinels = [] if parent is None else [parent.sentinel]
    while os.getppid() == parent_id:
        if multiprocessing.connection.wait(sentinels, CHECK_EVERY):
            break
    # Not sys.exit: only the watching thread would end; and nothing is left to clean up for.
    os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def begin_worker() -> None:
    """Initialise a worker of a pool: it ends with its parent and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


class _SpawnProcess(multiprocessing.context.SpawnProcess):
    """Begins with Ctrl-C held back: `begin_worker` cannot ignore it while Python still starts."""

    def start(self) -> None:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _SpawnContext(multiprocessing.context.SpawnContext):
    Process = _SpawnProcess


@contextlib.contextmanager
def worker_pool(n_workers: int) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of spawned processes; when the block raises, they are killed at once.

    A worker that is killed from outside makes its futures raise BrokenProcessPool.
    """
    pool = ProcessPoolExecutor(n_workers, mp_context=_SpawnContext(), initializer=begin_worker)
    try:
        yield pool
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        raise
    pool.shutdown()
