"""The answer to one request, as the side that asked for it reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from .request import Logprobs, Output, Request


class Stream:
    """The answer to one request: `async for outputs in stream`, ended after every choice has finished.

    Each batch holds what came since the last one, at most one `Output` per choice: those of a reader that lags are
    merged. An `Output` with `error` is the last of a batch and ends the stream. `close()` in a `finally` tells the
    engine that nobody reads any more; it does nothing once the stream has ended.
    """

    __slots__ = ("_abort", "_error", "_pending", "_unfinished", "_waiter", "request_id")

    # `take` and `wait` are what `async for` is made of, for who cannot afford the coroutines in between.

    def __init__(self, request: Request, abort: Callable[[int], None]) -> None:
        self.request_id = request.id
        self._abort = abort
        self._unfinished = set(range(request.n))
        self._pending: dict[int, Output] = {}
        self._error: Output | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> AsyncIterator[list[Output]]:
        return self

    async def __anext__(self) -> list[Output]:
        while not (outputs := self.take()):
            if not self._unfinished:
                raise StopAsyncIteration
            await self.wait()
        return outputs

    @property
    def ended(self) -> bool:
        """Nothing comes any more, though something may still be there to `take`."""
        return not self._unfinished

    def take(self) -> list[Output]:
        """What has come since the last time; nothing where nothing has."""
        pending = self._pending
        outputs = list(pending.values())
        pending.clear()
        if self._error is not None:
            outputs.append(self._error)
            self._error = None
        return outputs

    def wait(self) -> asyncio.Future[None]:
        """Done once something has come, or the stream has ended. One reader waits at a time."""
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        return waiter

    def close(self) -> None:
        """Abort what has not finished; what was not read is dropped."""
        self._abort(self.request_id)

    def push(self, output: Output) -> bool:
        """Called by the client only. True when the stream has ended."""
        if output.error is not None:
            self._error = output
            self._unfinished.clear()
        elif output.choice in self._unfinished:
            earlier = self._pending.get(output.choice)
            if earlier is None:
                self._pending[output.choice] = output
            else:
                merge(earlier, output)
            if output.finish is not None:
                self._unfinished.discard(output.choice)
        self._wake()
        return not self._unfinished

    def push_token(self, choice: int, token: int, weight_version: int) -> None:
        """`push` of an output that says nothing else, at a third of the price."""
        earlier = self._pending.get(choice)
        if earlier is not None:
            if earlier.weight_version != weight_version:
                turn(earlier, weight_version)
            earlier.token_ids.append(token)
        elif choice in self._unfinished:
            self._pending[choice] = Output(self.request_id, choice, [token], weight_version=weight_version)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def drop(self, choice: int | None) -> bool:
        """Called by the client only. True when the stream has ended."""
        if choice is None:
            self._unfinished.clear()
            self._pending.clear()
        else:
            self._unfinished.discard(choice)
            self._pending.pop(choice, None)
        self._wake()
        return not self._unfinished

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge(earlier: Output, later: Output) -> None:
    """Make `earlier` say what both say, in place. They are of one choice, in order."""
    start = 0
    for version, count in later.runs():
        turn(earlier, version)
        earlier.token_ids += later.token_ids[start : start + count]
        start += count
    earlier.logprobs = _joined(earlier.logprobs, later.logprobs)
    earlier.prompt_logprobs = _joined(earlier.prompt_logprobs, later.prompt_logprobs)
    for name in ("finish", "stop_id", "cached_tokens", "scores", "pooled_index", "embedding", "values", "error"):
        value = getattr(later, name)
        if value is not None:
            setattr(earlier, name, value)


def turn(output: Output, version: int) -> None:
    """What is put behind its tokens from now on is of that version."""
    if output.weight_version == version:
        return
    *earlier, (before, count) = output.runs()
    if count:
        output.earlier_versions = [*earlier, (before, count)]
    output.weight_version = version


def _joined(earlier: Logprobs | None, later: Logprobs | None) -> Logprobs | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    earlier.values += later.values
    earlier.ranks += later.ranks
    earlier.top_ids += later.top_ids
    earlier.top_values += later.top_values
    earlier.policy += later.policy
    return earlier
