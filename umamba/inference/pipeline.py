"""Runs cases through three steps at once: one is prepared, one predicted, one exported."""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from umamba.files import OutputError, describe_error

logger = logging.getLogger(__name__)

Case = TypeVar("Case")
Prepared = TypeVar("Prepared")
Predicted = TypeVar("Predicted")
Result = TypeVar("Result")

# Cases waiting for the export: enough to hide a slow disk, few enough to bound the memory.
LOOKAHEAD = 1
# Of torch's errors, whose types differ between devices and versions.
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


@dataclass(frozen=True)
class CaseFailure:
    """A case that could not be predicted, and why, in one sentence."""

    identifier: str
    reason: str


def run_pipeline(
    cases: Sequence[Case],
    identifier: Callable[[Case], str],
    prepare: Callable[[Case], Prepared],
    predict: Callable[[Case, Prepared], Predicted],
    export: Callable[[Case, Prepared, Predicted], None],
    on_done: Callable[[Case], object] | None = None,
    *,
    size: Callable[[Prepared], int] = lambda prepared: 0,
    most_ahead: int = sys.maxsize,
) -> list[CaseFailure]:
    """Prepares, predicts and exports every case; a case that fails is returned, the others go on.

    `predict` runs in the calling thread, `prepare` and `export` each in one thread of their own;
    `on_done` is called in the calling thread, once per case that succeeded, in order.  While a case
    is predicted, the next one is prepared and the one before exported, but a case whose `size`
    (bytes, once prepared) is above `most_ahead` is alone in memory.

    Raises OutputError where a result cannot be written: the next one could not be either.
    """
    failures: dict[Case, CaseFailure] = {}

    def attempt(case: Case, step: Callable[[], Result]) -> list[Result]:
        """The result in a list, which is empty where the step failed."""
        try:
            return [step()]
        except OutputError:
            raise
        # One bad case, whatever it does to a reader or to the network, must not end the others.
        except Exception as error:
            logger.debug("case %s failed", identifier(case), exc_info=True)
            failures[case] = CaseFailure(identifier(case), _reason(error))
            return []

    reader, writer = ThreadPoolExecutor(1, "prepare"), ThreadPoolExecutor(1, "export")
    upcoming = iter(cases)
    preparing: deque[Future[Prepared]] = deque()
    exporting: deque[tuple[Case, Future[None]]] = deque()

    def prepare_next() -> None:
        if not preparing and (following := next(upcoming, None)) is not None:
            preparing.append(reader.submit(prepare, following))

    def finish(keep: int) -> None:
        while len(exporting) > keep:
            case, future = exporting.popleft()
            if attempt(case, future.result) and on_done is not None:
                on_done(case)

    def run_case(case: Case) -> None:
        for prepared in attempt(case, preparing.popleft().result):
            is_alone = size(prepared) > most_ahead
            if is_alone:
                finish(0)
            else:
                prepare_next()
            for predicted in attempt(case, partial(predict, case, prepared)):
                exporting.append((case, writer.submit(export, case, prepared, predicted)))
            finish(0 if is_alone else LOOKAHEAD)

    try:
        for case in cases:
            prepare_next()
            run_case(case)
        finish(0)
    finally:
        # Nothing is left to wait for, unless an error or a signal ends the run early.
        reader.shutdown(wait=False, cancel_futures=True)
        writer.shutdown(wait=False, cancel_futures=True)
    return [failures[case] for case in cases if case in failures]


def _reason(error: Exception) -> str:
    """Why a case failed, in one sentence."""
    message = " ".join(str(error).split()) or "no message"
    if isinstance(error, MemoryError) or any(words in message.lower() for words in NO_MEMORY):
        return (
            "it needs more memory than is left: end other programs, or predict it on a machine "
            f"with more ({message[:200]})"
        )
    if isinstance(error, OSError):
        return describe_error(error)
    return message if isinstance(error, ValueError) else f"{type(error).__name__}: {message}"
