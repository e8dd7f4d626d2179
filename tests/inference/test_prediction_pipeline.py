"""Tests of the three-step pipeline: order, failures, bounded memory."""

from __future__ import annotations

import threading

import pytest
import torch

from umamba.files import OutputError
from umamba.inference.pipeline import CaseFailure, run_pipeline


def run(cases, prepare=str, predict=None, export=None, on_done=None, **options):
    return run_pipeline(
        cases,
        lambda case: f"case_{case}",
        prepare,
        predict or (lambda case, prepared: f"{prepared}!"),
        export or (lambda case, prepared, predicted: None),
        on_done,
        **options,
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
        predict=fail_on(3, RuntimeError("wrong\nshape")),
        export=fail_on(5, OSError(5, "Input/output error", "a.nii.gz")),
        on_done=done.append,
    )
    assert failures == [
        CaseFailure("case_1", "a.nii.gz is missing"),
        CaseFailure("case_3", "RuntimeError: wrong shape"),
        CaseFailure("case_5", "a.nii.gz: input/output error"),
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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    ],
    ids=["numpy", "cpu", "cuda"],
)
def test_a_case_that_needs_too_much_memory_fails_alone_with_the_cure(error):
    def predict(case, prepared):
        if case == 1:
            raise error

    (failure,) = run(list(range(3)), predict=predict)
    assert failure.identifier == "case_1"
    assert failure.reason.startswith("it needs more memory than is left: end other programs")


def test_a_result_that_cannot_be_written_ends_the_run_at_once():
    predicted = []

    def export(case, *_):
        raise OutputError("a.nii.gz cannot be written: no space")

    with pytest.raises(OutputError, match=r"a\.nii\.gz"):
        run(list(range(40)), predict=lambda case, _: predicted.append(case), export=export)
    assert len(predicted) <= 3


def test_a_large_case_is_alone_in_memory():
    alive: set[int] = set()
    beside: dict[int, set[int]] = {case: set() for case in range(12)}

    def note(case):
        for other in list(alive):
            beside[other] |= set(alive)
        return case

    def prepare(case):
        alive.add(case)
        return note(case)

    def export(case, *_):
        note(case)
        alive.discard(case)

    run(list(range(12)), prepare, lambda case, _: note(case), export,
        size=lambda prepared: 10 if prepared % 3 == 0 else 1, most_ahead=5)  # fmt: skip
    for case in range(12):
        if case % 3 == 0:
            assert beside[case] <= {case - 2, case - 1, case}  # those before it leave, none comes


def test_no_cases_are_no_failure():
    assert run([]) == []
