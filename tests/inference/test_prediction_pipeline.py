"""Tests of the three-step pipeline: order, failures, bounded memory."""

from __future__ import annotations

import threading

from umamba.inference.pipeline import CaseFailure, run_pipeline


def run(cases, prepare=str, predict=None, export=None, on_done=None):
    return run_pipeline(
        cases,
        lambda case: f"case_{case}",
        prepare,
        predict or (lambda case, prepared: f"{prepared}!"),
        export or (lambda case, prepared, predicted: None),
        on_done,
    )


def test_every_case_passes_the_three_steps_in_order():
    exported, done = [], []
    failures = run(list(range(6)), export=lambda *item: exported.append(item), on_done=done.append)
    assert failures == []
    assert exported == [(i, str(i), f"{i}!") for i in range(6)]
    assert done == list(range(6))


def test_a_failure_in_any_step_is_reported_and_the_others_are_done():
    def fail_on(number, error):
        def step(case, *_):
            if case == number:
                raise error
            return case

        return step

    done: list[int] = []
    failures = run(
        list(range(6)),
        prepare=fail_on(1, FileNotFoundError("a.nii.gz is missing")),
        predict=fail_on(3, RuntimeError("out of\nmemory")),
        export=fail_on(5, OSError("disk full")),
        on_done=done.append,
    )
    assert failures == [
        CaseFailure("case_1", "a.nii.gz is missing"),
        CaseFailure("case_3", "RuntimeError: out of memory"),
        CaseFailure("case_5", "OSError: disk full"),
    ]
    assert done == [0, 2, 4]


def test_prediction_runs_in_the_calling_thread_and_the_others_beside_it():
    threads: dict[str, set[int]] = {"prepare": set(), "predict": set(), "export": set()}

    def note(name):
        return lambda *_: threads[name].add(threading.get_ident())

    run(list(range(4)), note("prepare"), note("predict"), note("export"))
    assert threads["predict"] == {threading.get_ident()}
    assert threads["predict"].isdisjoint(threads["prepare"] | threads["export"])
    assert threads["prepare"].isdisjoint(threads["export"])


def test_few_cases_are_held_at_a_time():
    held, most = 0, 0
    lock = threading.Lock()

    def prepare(case):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)

    def export(*_):
        nonlocal held
        with lock:
            held -= 1

    run(list(range(40)), prepare, lambda *_: None, export)
    assert held == 0
    assert most <= 6


def test_no_cases_are_no_failure():
    assert run([]) == []
