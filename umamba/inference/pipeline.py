"""Runs cases through three steps at once: one is prepared, one predicted, one exported."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

logger = logging.getLogger(__name__)

Case = TypeVar("Case")
Prepared = TypeVar("Prepared")
Predicted = TypeVar("Predicted")
Result = TypeVar("Result")

# Cases waiting for each thread: enough to hide a slow disk, few enough to bound the memory.
LOOKAHEAD = 1


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
) -> list[CaseFailure]:
    """Prepares, predicts and exports every case; a case that fails is returned, the others go on.

    `predict` runs in the calling thread, `prepare` and `export` each in one thread of their own;
    `on_done` is called in the calling thread, once per case that succeeded, in order.
    """
    failures: dict[Case, CaseFailure] = {}

    def attempt(case: Case, step: Callable[[], Result]) -> list[Result]:
        """The result in a list, which is empty where the step failed."""
        try:
            return [step()]
        # One bad case, whatever it does to a reader or to the network, must not end the others.
        except Exception as error:
            logger.debug("case %s failed", identifier(case), exc_info=True)
            message = " ".join(str(error).split()) or "no message"
            if not isinstance(error, ValueError | FileNotFoundError):
                message = f"{type(error).__name__}: {message}"
            failures[case] = CaseFailure(identifier(case), message)
            return []

    reader, writer = ThreadPoolExecutor(1, "prepare"), ThreadPoolExecutor(1, "export")
    preparing: deque[Future[Prepared]] = deque()
    exporting: deque[tuple[Case, Future[None]]] = deque()

    def finish(keep: int) -> None:
        while len(exporting) > keep:
            case, future = exporting.popleft()
            if attempt(case, future.result) and on_done is not None:
                on_done(case)

    try:
        upcoming = iter(cases)
        for case in cases:
            while len(preparing) <= LOOKAHEAD and (following := next(upcoming, None)) is not None:
                preparing.append(reader.submit(prepare, following))
            for prepared in attempt(case, preparing.popleft().result):
                for predicted in attempt(case, partial(predict, case, prepared)):
                    exporting.append((case, writer.submit(export, case, prepared, predicted)))
            finish(LOOKAHEAD)
        finish(0)
    finally:
        reader.shutdown(cancel_futures=True)
        writer.shutdown()
    return [failures[case] for case in cases if case in failures]
