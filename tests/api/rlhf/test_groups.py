"""What becomes of a group and its members, however they end, before an engine that only takes notes."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tandem.server.api.errors import ApiError
from tandem.server.api.rlhf.groups import PromptGroup, Terms, together
from tandem.server.engine.link import EngineUnavailable
from tandem.server.engine.request import EngineError, Group, Logprobs, ModelCard, Output, Request
from tandem.server.engine.stream import Stream


class Notes:
    """In the place of an `EngineClient`."""

    def __init__(self) -> None:
        self.ids = itertools.count(1)
        self.opened: list[Group] = []
        self.closed: list[int] = []
        self.aborted: list[int] = []
        self.streams: dict[int, Stream] = {}
        self.requests: list[Request] = []
        self.goes_on: list[bool] = []

    def next_id(self) -> int:
        return next(self.ids)

    def open_group(self, group: Group, goes_on: bool) -> None:
        self.opened.append(group)
        self.goes_on.append(goes_on)

    def close_group(self, group_id: int) -> None:
        self.closed.append(group_id)

    def submit(self, request: Request, goes_on: bool) -> Stream:
        self.requests.append(request)
        self.goes_on.append(goes_on)
        stream = self.streams[request.id] = Stream(request, self.aborted.append)
        return stream

    def say(self, index: int, **output: Any) -> None:
        request = self.requests[index]
        self.streams[request.id].push(Output(request.id, **{"finish": "stop", "weight_version": 4, **output}))


@pytest.fixture
def notes() -> Notes:
    return Notes()


@pytest.fixture
def group(notes: Notes) -> Callable[..., PromptGroup]:
    def make(prompt: list[int], pooling: str = "last", seconds: float = 60.0) -> PromptGroup:
        card = cast(ModelCard, SimpleNamespace(name="rm", pooling=pooling))
        return PromptGroup(Terms(cast(Any, notes), "id", time.monotonic() + seconds), card, prompt, 9)

    return make


async def test_a_group_is_open_while_members_run(notes: Notes, group: Callable[..., PromptGroup]) -> None:
    prompt = group([5, 6])
    tasks = [asyncio.create_task(prompt.run([7 + i], "score")) for i in range(2)]
    await asyncio.sleep(0)
    (opened,) = notes.opened
    assert (opened.token_ids, opened.longest) == ([5, 6], 9)
    assert [(one.token_ids, one.group, one.want) for one in notes.requests] == [
        ([7], opened.id, {"score"}),
        ([8], opened.id, {"score"}),
    ]
    notes.say(1, scores=[0.5], pooled_index=2)
    found = await tasks[1]
    assert (found.score, found.pooled_index, found.weight_version) == (0.5, 2, 4) and not notes.closed
    notes.say(0, scores=[0.25])
    await tasks[0]
    assert notes.closed == [opened.id]
    again = asyncio.create_task(prompt.run([9], "score"))
    await asyncio.sleep(0)
    assert len(notes.opened) == 2 and notes.opened[1].id != opened.id
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)
    assert notes.closed[1] == notes.opened[1].id and notes.aborted[-1] == notes.requests[-1].id


@pytest.mark.parametrize("goes_on", [False, True])
async def test_what_belongs_to_an_open_answer_is_told(notes: Notes, goes_on: bool) -> None:
    card = cast(ModelCard, SimpleNamespace(name="rm", pooling="last"))
    terms = Terms(cast(Any, notes), "id", time.monotonic() + 60, goes_on=goes_on)
    running = asyncio.create_task(PromptGroup(terms, card, [5], 9).run([7], "score"))
    await asyncio.sleep(0)
    notes.say(0, scores=[1.5])
    assert (await running).score == 1.5 and notes.goes_on == [goes_on] * 2


@pytest.mark.parametrize(("prompt", "pooling"), [([], "last"), ([5, 6], "mean")])
async def test_where_nothing_is_shared_there_is_no_group(
    notes: Notes, group: Callable[..., PromptGroup], prompt: list[int], pooling: str
) -> None:
    task = asyncio.create_task(group(prompt, pooling).run([7], "score"))
    await asyncio.sleep(0)
    assert notes.requests[0].token_ids == [*prompt, 7] and notes.requests[0].group == 0
    notes.say(0, scores=[1.0])
    assert (await task).pooled_index is None and not notes.opened and not notes.closed


@pytest.mark.parametrize(
    ("want", "output", "status", "words"),
    [
        ("score", {"scores": [float("nan")]}, 500, "score"),
        ("score", {}, 500, "gave 0 numbers where 1"),
        ("score", {"scores": [1.0, 2.0]}, 500, "gave 2 numbers"),
        ("values", {"values": [1.0]}, 500, "gave 1 numbers where 2"),
        ("prompt_logprobs", {"prompt_logprobs": Logprobs([float("-inf")], [1])}, 500, "log-probability"),
        ("score", {"finish": "abort"}, 503, "aborted"),
        ("score", {"finish": "error", "error": EngineError("invalid", "too long", "prompt")}, 400, "too long"),
        ("score", {"finish": "error", "error": EngineError("overloaded", "full")}, 429, "full"),
    ],
)
async def test_what_cannot_be_found_is_an_error(
    notes: Notes, group: Callable[..., PromptGroup], want: Any, output: dict[str, Any], status: int, words: str
) -> None:
    task = asyncio.create_task(group([5]).run([7], want))
    await asyncio.sleep(0)
    notes.say(0, **output)
    with pytest.raises(ApiError) as caught:
        await task
    assert caught.value.status == status and words in caught.value.message
    assert notes.closed == [notes.opened[0].id]


async def test_an_engine_that_hangs(
    notes: Notes, group: Callable[..., PromptGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.server.api.rlhf.groups.GRACE_SECONDS", 0.01)
    with pytest.raises(ApiError) as caught:
        await group([5], seconds=0.0).run([7], "score")
    assert caught.value.status == 504 and notes.closed and notes.aborted


async def test_an_engine_that_is_gone(
    notes: Notes, group: Callable[..., PromptGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineUnavailable("the engine died")

    for name in ("open_group", "submit"):
        with monkeypatch.context() as patch:
            patch.setattr(notes, name, refuse)
            with pytest.raises(ApiError, match="died") as caught:
                await group([5]).run([7], "score")
            assert caught.value.status == 503
    assert notes.closed == [one.id for one in notes.opened]


async def test_the_first_failure_ends_the_others() -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        await together([wait(), fail(), wait()])
    assert ended == ["cancelled"] * 2
