"""Functions run over all cases, in threads or processes."""

import os
import threading

import pytest

from umamba.planning.cases import run_cases


def test_threads_give_the_results_by_case():
    results = run_cases(lambda n: n + 1, {"a": (1,), "b": (2,)}, 1, "Add", False, n_threads=2)
    assert results == {"a": 2, "b": 3}


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(ValueError, match=r"a worker process was killed.*use fewer \(-np 1\)"):
        run_cases(os._exit, {"a": (9,), "b": (9,)}, 2, "Die", False)


def test_a_case_that_fails_in_a_thread_is_named_and_no_further_case_begins():
    begun = []
    release = threading.Event()

    def fail_first(n: int) -> None:
        begun.append(n)
        if n == 0:
            raise OSError("torn")
        release.wait(0.2)

    jobs = {f"case_{n}": (n,) for n in range(40)}
    with pytest.raises(ValueError, match=r"case case_0 .*torn"):
        run_cases(fail_first, jobs, 1, "Fail", False, n_threads=2)
    assert len(begun) < 20
