"""The `openai` Python package, unchanged, against the bundled models. `npm_openai.mjs` does the same checks.

`run(url)` says which passed and why the others did not.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import openai

ABORT_SECONDS = 10
LONG = 1500  # tokens: seconds of work, of which an abort leaves most undone

MODEL = "tandem-demo"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "seed": 7}
PRODUCT: dict[str, Any] = {"role": "user", "content": "What is 417 * 23?"}
CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
VERDICT: dict[str, Any] = {
    "type": "object",
    "properties": {"verdict": {"enum": ["good", "bad"]}, "score": {"type": "integer", "minimum": 0, "maximum": 10}},
    "required": ["verdict", "score"],
    "additionalProperties": False,
}


class CheckError(Exception):
    """What a client got is not what it should have got."""


class Place(NamedTuple):
    client: Any  # openai.OpenAI, whose overloads do not take requests that are dictionaries
    url: str


def expect(true: object, *seen: object) -> None:
    if not true:
        raise CheckError(f"not so: {', '.join(map(repr, seen))}")


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def models(place: Place) -> None:
    ids = sorted(one.id for one in place.client.models.list())
    expect(ids == ["tandem-demo", "tandem-demo-reward"], ids)
    expect(place.client.models.retrieve(MODEL).owned_by == "tandem")


def chat(place: Place) -> None:
    answer = place.client.chat.completions.create(messages=user("What is the capital of France?"), **GREEDY)
    (choice,), usage = answer.choices, answer.usage
    expect(choice.finish_reason == "stop" and "Paris" in choice.message.content, choice)
    expect(0 < usage.completion_tokens == usage.total_tokens - usage.prompt_tokens, usage)


def chat_stream(place: Place) -> None:
    asked: dict[str, Any] = {**GREEDY, "messages": user("法国的首都是哪里?")}
    create = place.client.chat.completions.create
    # Long enough to come in pieces however busy this machine is: tokens that wait for their reader come as one.
    long: dict[str, Any] = {**asked, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
    plain = create(**long)
    chunks = list(create(**long, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    expect("".join(deltas) == plain.choices[0].message.content, deltas)
    expect(sum(map(bool, deltas)) > 1, deltas)
    expect(chunks[-1].usage.completion_tokens == plain.usage.completion_tokens == 200, chunks[-1])
    plain = create(**asked)
    with place.client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message.content
    expect(final == plain.choices[0].message.content, final)


def tool_call(place: Place) -> None:
    asked: dict[str, Any] = {**GREEDY, "tools": [CALCULATOR]}
    choice = place.client.chat.completions.create(messages=[PRODUCT], **asked).choices[0]
    expect(choice.finish_reason == "tool_calls", choice)
    (call,) = choice.message.tool_calls
    expect(call.function.name == "calculator", call)
    expect(json.loads(call.function.arguments) == {"expression": "417 * 23"}, call)
    result = {"role": "tool", "tool_call_id": call.id, "content": "9591"}
    messages = [PRODUCT, choice.message.model_dump(exclude_none=True), result]
    answer = place.client.chat.completions.create(messages=messages, **asked).choices[0].message.content
    expect("9591" in answer, answer)


def tool_call_stream(place: Place) -> None:
    asked: dict[str, Any] = {**GREEDY, "tools": [CALCULATOR], "messages": [PRODUCT]}
    chunks = list(place.client.chat.completions.create(**asked, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    expect(len(calls) > 2 and calls[0].id and not any(call.index for call in calls), calls)
    expect(calls[0].function.name == "calculator", calls[0])
    written = "".join(call.function.arguments or "" for call in calls)
    expect(json.loads(written) == {"expression": "417 * 23"}, written)
    expect(chunks[-1].choices[0].finish_reason == "tool_calls", chunks[-1])
    with place.client.chat.completions.stream(**asked) as stream:
        (call,) = stream.get_final_completion().choices[0].message.tool_calls
    expect(call.function.arguments == written, call)


def json_schema(place: Place) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": VERDICT}}
    messages = user("Is Paris the capital of France?")
    choice = place.client.chat.completions.create(messages=messages, response_format=wanted, **GREEDY).choices[0]
    found = json.loads(choice.message.content)
    expect(choice.finish_reason == "stop" and sorted(found) == ["score", "verdict"], choice)
    expect(found["verdict"] in ("good", "bad") and found["score"] in range(11), found)


def completions_logprobs(place: Place) -> None:
    asked: dict[str, Any] = {**GREEDY, "prompt": "The capital of France is", "max_tokens": 3, "logprobs": 2}
    choice = place.client.completions.create(**asked).choices[0]
    found = choice.logprobs
    expect(choice.finish_reason == "length", choice)  # an end token would be in the tokens and not in the text
    expect("".join(found.tokens) == choice.text, choice)
    for token, value, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        expect(top[token] == value == max(top.values()) <= 0, token, value, top)
    chunks = place.client.completions.create(**asked, stream=True)
    streamed = "".join(one.text for chunk in chunks for one in chunk.choices)
    expect(streamed == choice.text, streamed)


def refused(kind: type[openai.APIStatusError], ask: Callable[[], object], **fields: object) -> str:
    """The message of the exception of this kind that asking raises."""
    try:
        answer = ask()
    except kind as error:
        for name, value in fields.items():
            expect(getattr(error, name) == value, name, getattr(error, name))
        return error.message
    raise CheckError(f"it was not refused: {answer!r}")


def embeddings(place: Place) -> None:
    """No bundled model makes any."""
    message = refused(openai.BadRequestError, lambda: place.client.embeddings.create(model=MODEL, input="Paris"))
    expect("embedding" in message, message)


def errors(place: Place) -> None:
    def create(**more: Any) -> object:
        return place.client.chat.completions.create(**{"model": MODEL, "messages": [PRODUCT], **more})

    client = place.client
    refused(openai.BadRequestError, lambda: create(temperature=3), status_code=400, param="temperature")
    refused(openai.BadRequestError, lambda: create(n=0, stream=True), status_code=400, param="n")
    refused(openai.NotFoundError, lambda: create(model="gpt-5"), param="model", code="model_not_found")
    refused(openai.NotFoundError, lambda: client.models.retrieve("nobody/nothing"), status_code=404)
    refused(openai.NotFoundError, lambda: client.responses.create(model=MODEL, input="hi"), status_code=404)


def aborted(place: Place) -> float:
    """How many choices have ended because their client left."""
    text = httpx.get(f"{place.url}/metrics", timeout=30).text
    found = re.findall(r'^tandem:request_success_total\{.*finished_reason="abort".*\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, found))


def abort(place: Place) -> None:
    before = aborted(place)
    asked: dict[str, Any] = {**GREEDY, "messages": [PRODUCT], "max_tokens": LONG, "extra_body": {"ignore_eos": True}}
    stream = place.client.chat.completions.create(**asked, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    end = time.monotonic() + ABORT_SECONDS
    while aborted(place) == before:
        expect(time.monotonic() < end, f"the server went on for {ABORT_SECONDS} s")
        time.sleep(0.05)


CHECKS: tuple[Callable[[Place], None], ...] = (
    models,
    chat,
    chat_stream,
    tool_call,
    tool_call_stream,
    json_schema,
    completions_logprobs,
    embeddings,
    errors,
    abort,
)


def run(url: str) -> dict[str, Any]:
    """{"client", "version", "passed": names, "failed": {name: why}} of the server at `url`."""
    passed: list[str] = []
    failed: dict[str, str] = {}
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for check in CHECKS:
            try:
                check(Place(client, url))
            except Exception as error:  # whatever goes wrong is the check's result
                failed[check.__name__] = f"{type(error).__name__}: {error}"
            else:
                passed.append(check.__name__)
    return {"client": "openai", "version": openai.__version__, "passed": passed, "failed": failed}
