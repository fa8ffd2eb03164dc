"""Sequences that are drawn, and judged as soon as they are finished, while others are still written."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.request import Sampling
from ..choices import Choice, Delta
from ..errors import ApiError, invalid
from ..generation import Generation
from ..logprobs import finite
from .evaluator import JudgedPrompt
from .groups import Found
from .judgement import Judgement


@dataclass(frozen=True, slots=True)
class Rolled:
    """A sequence, finished and judged. `error`: why there is nothing to be had of those models that judge it."""

    prompt_index: int
    sample_index: int
    choice: Choice
    delta: Delta
    judgement: Judgement
    error: ApiError | None = None


class Rollout:
    """Submitted on construction; `step` until it gives nothing, and `close` in a `finally`.

    A sequence that a model refuses, such as one too long for the reward model, comes without a judgement; whatever
    else fails ends the rollout.
    """

    def __init__(self, generation: Generation, prompts: Sequence[JudgedPrompt]) -> None:
        self._generation, self._prompts = generation, prompts
        self._left = len(generation.choices)
        self._done: asyncio.Queue[Rolled | Exception] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._generate())

    async def step(self) -> list[Rolled]:
        """Raises ApiError."""
        if not self._left:
            return []
        news = [await self._done.get()]
        while not self._done.empty():
            news.append(self._done.get_nowait())
        finished = [one for one in news if isinstance(one, Rolled)]
        for one in news:
            if isinstance(one, Exception):
                raise one
        self._left -= len(finished)
        return finished

    async def all(self) -> list[Rolled]:
        """In the prompts' order. Raises ApiError."""
        finished: list[Rolled] = []
        while news := await self.step():
            finished += news
        return sorted(finished, key=lambda one: (one.prompt_index, one.sample_index))

    def close(self) -> None:
        """Abort what is not finished. May be called again."""
        for task in self._tasks:
            task.cancel()
        self._generation.close()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(self._reported(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reported(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except Exception as error:
            self._done.put_nowait(error)

    async def _generate(self) -> None:
        while changed := await self._generation.step():
            for choice in changed:
                if choice.finish_reason is not None:
                    self._start(self._judge(choice))

    async def _judge(self, choice: Choice) -> None:
        place = choice.index // self._generation.parts[0].request.n
        delta, version = choice.take(), self._generation.weight_version
        sampling = self._generation.parts[place].request.sampling
        assert sampling is not None
        judgement, error = Judgement(), None
        logprobs = delta.logprobs
        try:
            if logprobs is None:
                raise invalid("the sequence was aborted before its first token")
            policy = Found(version, logprobs=[finite(value) for value in logprobs.policy])
            where = f"sequence {choice.number} of prompt {place}"
            judgement = await self._prompts[place].judge(delta.token_ids, choice.finish_reason, where, policy)
        except ApiError as failure:
            if failure.status != 400:
                raise
            error = failure
        if logprobs is not None:
            judgement.arrays["policy_logprobs"] = [finite(value) for value in logprobs.policy]
            if is_truncated(sampling):
                judgement.arrays["sampling_logprobs"] = [finite(value) for value in logprobs.values]
        self._done.put_nowait(Rolled(place, choice.number, choice, delta, judgement, error))


def is_truncated(sampling: Sampling) -> bool:
    """Whether the log-probabilities of what is drawn from are others than the policy's."""
    return bool(
        sampling.top_p < 1
        or sampling.top_k
        or sampling.min_p
        or sampling.penalises
        or sampling.min_tokens
        or sampling.logit_bias
        or sampling.allowed_ids
        or sampling.bad_words
        or sampling.grammar
    )
