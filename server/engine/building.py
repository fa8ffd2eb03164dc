"""Requests whose grammar is being built: until that is done, in another thread, the scheduler does not know them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from time import monotonic

from .request import EngineError, Finish, Output, Request

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    request: Request
    future: Future[None]
    arrived: float
    aborted: list[int] = field(default_factory=list[int])  # choices


class Building:
    """In order of arrival. At most `most` requests."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: Request, future: Future[None]) -> EngineError | None:
        if len(self._entries) >= self._most:
            message = f"the grammars of {len(self._entries)} requests are being built already (limit: {self._most})"
            return EngineError("overloaded", message, retry_after=1.0)
        self._entries[request.id] = _Entry(request, future, monotonic())
        return None

    @property
    def any_built(self) -> bool:
        return any(entry.future.done() for entry in self._entries.values())

    def built(self) -> Iterator[tuple[Request, EngineError | None, list[int]]]:
        """Takes out those that are done: request, why it cannot run, choices that are not wanted any more."""
        for number, entry in list(self._entries.items()):
            if entry.future.done():
                del self._entries[number]
                yield entry.request, _error(entry.future), entry.aborted

    def wait(self, seconds: float) -> None:
        """For the first to be done."""
        wait([entry.future for entry in self._entries.values()], seconds, FIRST_COMPLETED)

    def abort(self, request_id: int, choice: int | None, finish: Finish, version: int) -> list[Output]:
        entry = self._entries.get(request_id)
        if entry is None:
            return []
        left = [one for one in range(entry.request.n) if one not in entry.aborted]
        ended = left if choice is None else [choice] if choice in left else []
        entry.aborted += ended
        if len(ended) == len(left):
            entry.future.cancel()
            del self._entries[request_id]
        return [Output(request_id, one, finish=finish, weight_version=version) for one in ended]

    def abort_all(self, version: int) -> list[Output]:
        return [output for number in list(self._entries) for output in self.abort(number, None, "abort", version)]

    def expire(self, now: float, version: int) -> list[Output]:
        outputs: list[Output] = []
        for number, entry in list(self._entries.items()):
            deadline = entry.request.deadline
            if deadline is not None and deadline <= now:
                message = (
                    f"the deadline came {now - entry.arrived:.1f} s after the request, while its grammar was built"
                )
                error = EngineError("deadline", message)
                outputs.append(Output(number, finish="error", error=error, weight_version=version))
                entry.future.cancel()
                del self._entries[number]
        return outputs


def _error(future: Future[None]) -> EngineError | None:
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, ValueError):
        return EngineError("invalid", str(error))
    log.error("a grammar could not be built", exc_info=error)
    return EngineError(
        "internal", f"the grammar could not be built ({type(error).__name__}); the log has the traceback"
    )
