"""Whatever goes wrong: the status, the shape, the SDK's exception, and a server that goes on serving."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

JSON = {"Content-Type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def error_of(answer: httpx.Response, status: int, kind: str) -> dict[str, str | None]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == kind and error["message"]
    return error


def test_the_sdk_raises_what_it_raises_for_openai(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="policy", messages=[{"role": "user", "content": "a"}], temperature=3)
    assert bad.value.param == "temperature" and "at most 2" in bad.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-5", messages=[{"role": "user", "content": "a"}])
    assert "policy" in missing.value.message and missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody/nothing")
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
        client.responses.create(model="policy", input="hi")
    with pytest.raises(openai.BadRequestError, match="reward model"):
        client.chat.completions.create(model="reward", messages=[{"role": "user", "content": "a"}])


def test_a_stream_that_is_refused_is_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has 4000 tokens"):
        client.completions.create(model="policy", prompt=[5] * 4000, stream=True)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "must be a JSON object, not a list of 0"),
        (b'"x"', "must be a JSON object, not a string"),
        (b"{}", "messages is missing"),
        (b'{"messages": "\\ud800"}', "surrogate"),
        (b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}", "deeper"),
        (json.dumps({**CHAT, "temperature": float("nan")}).encode(), "temperature is NaN"),
        (b'{"temperature": 1e999, ' + json.dumps(CHAT)[1:].encode(), "temperature is Infinity"),
    ],
    ids=range(10),
)
def test_bad_bodies(http: httpx.Client, body: bytes, words: str) -> None:
    error = error_of(http.post("/v1/chat/completions", content=body, headers=JSON), 400, "invalid_request_error")
    assert words in str(error["message"])
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {},
    ],
)
def test_other_media_types(http: httpx.Client, headers: dict[str, str]) -> None:
    answer = http.post("/v1/chat/completions", content=json.dumps(CHAT).encode(), headers=headers)
    error_of(answer, 415, "invalid_request_error")
    good = {"Content-Type": "application/json; charset=UTF-8"}
    assert http.post("/v1/chat/completions", content=json.dumps(CHAT).encode(), headers=good).status_code == 200


def test_routes_are_exact(http: httpx.Client) -> None:
    error_of(http.get("/nothing"), 404, "not_found_error")
    error_of(http.post("/v1/chat/completions/", json=CHAT), 404, "not_found_error")
    error_of(http.get("/v1/models/"), 404, "not_found_error")
    answer = http.get("/v1/chat/completions")
    error_of(answer, 405, "invalid_request_error")
    assert answer.headers["allow"] == "POST"
    for path in ("/v1/responses", "/v1/messages"):
        error = error_of(http.post(path, json={}), 404, "not_found_error")
        assert "/v1/chat/completions" in str(error["message"])


def test_a_body_over_the_limit(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "x" * (8 * 2**20)}).encode()
    error_of(http.post("/v1/completions", content=body, headers=JSON), 413, "invalid_request_error")

    def chunks():
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    error_of(http.post("/v1/completions", content=chunks(), headers=JSON), 413, "invalid_request_error")
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_request_past_its_deadline(http: httpx.Client) -> None:
    body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "timeout": 0.02}
    error = error_of(http.post("/v1/completions", json=body), 504, "timeout_error")
    assert error["code"] == "deadline"


def test_a_deadline_that_strikes_while_streaming(http: httpx.Client) -> None:
    """The status is out by then: an error event tells, and the stream ends as every stream."""
    body = {"prompt": "a", "max_tokens": 1900, "ignore_eos": True, "timeout": 0.1, "stream": True}
    lines = http.post("/v1/completions", json=body).text.strip().split("\n\n")
    assert len(lines) > 3 and json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] is not None
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "deadline"
    assert lines[-1] == "data: [DONE]"


def test_the_sdk_raises_the_error_of_a_running_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="policy", prompt="a", max_tokens=1900, stream=True, extra_body={"timeout": 0.3, "ignore_eos": True}
    )
    with pytest.raises(openai.APIError, match="deadline"):
        list(stream)


def test_request_ids(http: httpx.Client) -> None:
    assert http.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = {http.get("/version").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert http.get("/version", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"
    assert http.get("/nothing", headers={"x-request-id": "mine-2"}).headers["x-request-id"] == "mine-2"
