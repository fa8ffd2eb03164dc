"""Who is let in, the line in which sequences wait for a slot and pages, and until when they must be answered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from .request import EngineError, Request
from .sequence import Job, Rank, Sequence


def too_long(request: Request, context: int, capacity: int) -> EngineError | None:
    """Why the request could not be finished even with all `capacity` tokens of the KV cache to itself."""
    prompt, answer = len(request.token_ids), request.sampling.max_tokens if request.sampling else 0
    needed = min(prompt + answer, context)
    if prompt == 0:
        message = "the prompt has no tokens"
    elif prompt > context:
        message = f"the prompt has {prompt} tokens, the context {context}"
    elif prompt == context and answer:
        message = f"the prompt has {prompt} tokens and fills the context: no room for an answer"
    elif needed > capacity:
        message = f"prompt ({prompt}) and answer (up to {answer}) need {needed} tokens, the KV cache holds {capacity}"
    else:
        return None
    return EngineError("invalid", message)


class Waiting:
    """Waiting sequences, lowest rank first. Everything takes O(log n) however many wait.

    The bounds count requests that never ran; what was preempted, and choices that wait for room, were let in before.
    A single request may exceed the bound on tokens.
    """

    def __init__(self, max_requests: int, max_tokens: int, on_refusal: Callable[[str], None]) -> None:
        """`on_refusal` is told the bound that was hit."""
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._on_refusal = on_refusal
        self._requests = 0
        self._tokens = 0
        self._heap: list[tuple[Rank, Sequence]] = []
        self._gone = 0  # entries whose sequence is gone

    def __len__(self) -> int:
        return len(self._heap) - self._gone

    def refusal(self, prompt: int, now: float) -> EngineError | None:
        """Why no further request with so many prompt tokens may wait."""
        requests, tokens = self._requests, self._tokens
        if requests < self._max_requests and (not requests or tokens + prompt <= self._max_tokens):
            return None
        message = (
            f"{requests} requests with {tokens} prompt tokens wait already "
            f"(limits: {self._max_requests} requests, {self._max_tokens} tokens)"
        )
        first = self.first()
        waited = now - first.job.arrived if first else 0.0  # the next one's fate, if nothing changes
        self._on_refusal("max_waiting_requests" if requests >= self._max_requests else "max_waiting_tokens")
        return EngineError("overloaded", message, retry_after=float(min(60, max(1, math.ceil(waited)))))

    def enlist(self, job: Job) -> None:
        """Counts a request towards the bounds until it is `discharged`."""
        self._requests += 1
        self._tokens += job.own

    def discharge(self, job: Job) -> None:
        self._requests -= 1
        self._tokens -= job.own

    def push(self, sequence: Sequence) -> None:
        heappush(self._heap, (sequence.rank, sequence))

    def first(self) -> Sequence | None:
        while self._heap and self._heap[0][1].gone:
            heappop(self._heap)
            self._gone -= 1
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """The one that `first` just gave."""
        return heappop(self._heap)[1]

    def remove(self, sequence: Sequence) -> None:
        """Marks it as gone; its entry goes when it comes up, or once half of the entries are of that kind."""
        sequence.gone = True
        self._gone += 1
        if self._gone > 32 and self._gone * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if not entry[1].gone]
            heapify(self._heap)
            self._gone = 0


class Deadlines:
    """When which request must be answered."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []  # (deadline, request id, job)
        self._tidy = 64  # entries above which those of finished requests are thrown out

    def add(self, job: Job) -> None:
        request = job.request
        if request.deadline is None:
            return
        heappush(self._heap, (request.deadline, request.id, job))
        if len(self._heap) > self._tidy:
            self._heap = [entry for entry in self._heap if entry[2].sequences]
            heapify(self._heap)
            self._tidy = 2 * len(self._heap) + 64

    def due(self, now: float) -> Iterator[Job]:
        """Unfinished requests whose time has come; each is named once."""
        while self._heap and self._heap[0][0] <= now:
            job = heappop(self._heap)[2]
            if job.sequences:
                yield job
