"""The state routes and the refusals of a server whose engine starts, hangs, died or drains.

`tests/process` makes a real engine do these things; here its client says so, to see the words of each answer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tandem.server.api import generation
from tandem.server.api.app import create_app
from tandem.server.api.options import ApiOptions
from tandem.server.engine.link import EngineUnavailable
from tandem.server.engine.request import Catalog, ModelCard, Request
from tandem.server.engine.stream import Stream

CARD = ModelCard("m", "policy", "/m", "L", "float32", 128, 300, (2,), 0, 0, 1)
RESTARTING = "the engine was killed by signal 9; it restarts"


@dataclass
class Client:
    """An `EngineClient` as the state routes see it."""

    state: str
    age: float
    cause: str | None = None
    catalog: Catalog | None = None
    ids: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def heartbeat_age(self) -> float:
        return self.age

    def next_id(self) -> int:
        return next(self.ids)

    def submit(self, request: Request) -> None:
        raise EngineUnavailable(self.cause or "the engine is starting")


class NoText:
    def encode(self, *_: object, **__: object) -> list[int]:
        return [5]

    def detokenizer(self, *_: object, **__: object) -> None:
        return None


CATALOG = Catalog(1, 1, (CARD,))
STATES = {
    "serves": (Client("ready", 0.3, None, CATALOG), 200, 200),
    "starts": (Client("starting", math.inf), 200, 503),
    "hangs": (Client("ready", 10.2, None, CATALOG), 503, 503),
    "died": (Client("down", math.inf, RESTARTING, CATALOG), 503, 503),
    "starts again": (Client("starting", math.inf, RESTARTING, CATALOG), 503, 503),
    "drains": (Client("down", 0.3, "the server is shutting down", CATALOG), 200, 503),
}


async def call(client: Client, method: str, path: str, **fields: Any) -> httpx.Response:
    app = create_app(client, lambda card: NoText(), ApiOptions())  # pyright: ignore[reportArgumentType]
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tandem") as http:
        return await http.request(method, path, **fields)


@pytest.mark.parametrize("state", STATES)
async def test_health_and_readiness(state: str) -> None:
    client, healthy, ready = STATES[state]
    for path, status in (("/health", healthy), ("/ready", ready)):
        answer = await call(client, "GET", path)
        assert answer.status_code == status, (path, answer.text)
        if status == 503:
            assert answer.json()["error"]["type"] == "service_unavailable_error"
            assert int(answer.headers["retry-after"]) >= 1


async def test_the_cause_is_said() -> None:
    assert "10.2 s ago" in (await call(STATES["hangs"][0], "GET", "/health")).text
    assert RESTARTING in (await call(STATES["died"][0], "GET", "/ready")).text


@pytest.mark.parametrize("state", ["starts", "died", "drains"])
@pytest.mark.parametrize("stream", [False, True])
async def test_requests_are_refused_with_the_cause(state: str, stream: bool) -> None:
    client = STATES[state][0]
    for prompt in ("a", ["a", "b"]):
        answer = await call(client, "POST", "/v1/completions", json={"prompt": prompt, "stream": stream})
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["message"] == (client.cause or "the engine is starting")


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_never_answers(prompt: object, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ends what is past its deadline; should it hang, the worker does, a little later."""
    monkeypatch.setattr(generation, "GRACE_SECONDS", 0.1)
    client = Client("ready", 0.1, None, CATALOG)
    streams: dict[int, Stream] = {}

    def submit(request: Request) -> Stream:
        return streams.setdefault(request.id, Stream(request, lambda number: streams[number].drop(None)))

    client.submit = submit  # type: ignore[method-assign]
    answer = await call(client, "POST", "/v1/completions", json={"prompt": prompt, "stream": stream, "timeout": 0.05})
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline"


async def test_a_bug_is_a_500_that_names_the_request_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    client = Client("ready", 0.1, None, CATALOG)
    client.submit = lambda request: 1 / 0  # type: ignore[method-assign]
    answer = await call(client, "POST", "/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "r-1"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "r-1"
    error = answer.json()["error"]
    assert error["type"] == "server_error" and "r-1" in error["message"] and "division" not in answer.text
    assert "ZeroDivisionError" in caplog.text and "r-1" in caplog.text
