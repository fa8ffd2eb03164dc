"""API keys, the state routes that need none, and the options of a server that is strict or lenient."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


@pytest.fixture
def nobody(narrow_server: str):
    with httpx.Client(base_url=narrow_server) as client:
        yield client


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer first", "Bearer first-key2", "Basic first-key", "first-key", "Bearer ключ"],
)
def test_no_key_no_answer(nobody: httpx.Client, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/version"), ("GET", "/no")):
        answer = nobody.request(method, path, headers=headers, json=CHAT if method == "POST" else None)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.headers["x-request-id"]


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_any_key_opens(nobody: httpx.Client, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    assert nobody.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200


def test_the_sdk_says_so(narrow_server: str) -> None:
    with (
        openai.OpenAI(base_url=f"{narrow_server}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_state_needs_no_key(nobody: httpx.Client) -> None:
    health = nobody.get("/health")
    assert health.status_code == 200 and 0 <= health.json()["heartbeat_age"] < 10
    ready = nobody.get("/ready")
    assert ready.status_code == 200 and ready.json() == {"status": "ready", "models": ["policy"]}


def test_version(http: httpx.Client) -> None:
    assert http.get("/version").json()["version"].count(".") == 2


async def test_unknown_fields_may_be_let_pass(narrow_http: httpx.AsyncClient) -> None:
    answer = await narrow_http.post("/v1/chat/completions", json={**CHAT, "temperatur": 1, "größe": 2})
    assert answer.status_code == 200
    assert answer.headers["x-tandem-warning"] == r"ignored unknown fields: 'temperatur', 'gr\xf6\xdfe'"
    refused = await narrow_http.post("/v1/chat/completions", json={**CHAT, "echo": True, "x": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "echo"


async def test_a_small_limit_on_bodies(narrow_http: httpx.AsyncClient) -> None:
    body = json.dumps(CHAT)
    headers = {"Content-Type": "application/json"}
    assert (
        await narrow_http.post("/v1/chat/completions", content=body.ljust(4096), headers=headers)
    ).status_code == 200
    answer = await narrow_http.post("/v1/chat/completions", content=body.ljust(4097), headers=headers)
    assert answer.status_code == 413 and "4096 bytes" in answer.json()["error"]["message"]


async def test_the_sdk_raises_rate_limits(narrow_server: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{narrow_server}/v1", api_key="first-key", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="policy", prompt=["a"] * 16, max_tokens=200)
        answer = await client.completions.create(model="policy", prompt="a", max_tokens=1)
        assert answer.usage is not None and answer.usage.completion_tokens == 1
