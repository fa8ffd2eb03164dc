"""Every answer of chat and completions against the openai package's own types, strictly: a field may hold what the SDK
says, and fields that the SDK does not know are those that Tandem adds on purpose."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import httpx
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

# By type of the SDK: what http.md adds to it.
ADDED: Mapping[str, frozenset[str]] = {
    "Completion": frozenset({"weight_version"}),
    "CompletionChoice": frozenset(
        {"stop_reason", "token_ids", "prompt_token_ids", "prompt_logprobs", "weight_spans", "reward"}
    ),
    "ChatCompletion": frozenset({"weight_version", "prompt_token_ids", "prompt_logprobs"}),
    "ChatCompletionMessage": frozenset({"reasoning_content"}),
    "ChatCompletionChunk": frozenset({"weight_version", "prompt_token_ids"}),
    "Choice": frozenset({"stop_reason", "token_ids", "weight_spans", "reward"}),
    "ChoiceDelta": frozenset({"reasoning_content"}),
}
PATHS: Mapping[str, tuple[type[BaseModel], type[BaseModel]]] = {  # whole, chunk
    "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
    "/v1/completions": (Completion, Completion),
}


def check_response(response: httpx.Response) -> None:
    """An event hook of an httpx client: looks at what the server says, and at nothing else."""
    types = PATHS.get(response.request.url.path)
    if types is None or response.status_code != 200:
        return
    response.read()
    whole, chunk = types
    if not response.headers["content-type"].startswith("text/event-stream"):
        return check(whole, response.json())
    *events, done = [event for event in response.text.strip().split("\n\n") if not event.startswith(":")]
    assert done == "data: [DONE]", done
    for event in events:
        value = json.loads(event.removeprefix("data: "))
        if "error" not in value:
            check(chunk, value)


def check(model: type[BaseModel], value: dict[str, Any]) -> None:
    _look(model.model_validate(_as_typed(model, value), strict=True))


def _as_typed(model: type[BaseModel], value: dict[str, Any]) -> dict[str, Any]:
    """What the API sends and the SDK's types of completions leave out: no end yet, and nothing before a first token."""
    if model is not Completion:
        return value
    value = copy.deepcopy(value)
    for choice in value["choices"]:
        assert "finish_reason" in choice
        choice["finish_reason"] = choice["finish_reason"] or "length"
        columns = choice["logprobs"]
        if columns and columns["token_logprobs"][0] is None:
            assert columns["top_logprobs"][0] is None
            columns["token_logprobs"][0], columns["top_logprobs"][0] = 0.0, {}
    return value


def _look(node: object) -> None:
    if isinstance(node, list):
        for child in node:
            _look(child)
    elif isinstance(node, BaseModel):
        name = type(node).__name__
        unknown = set(node.model_extra or ()) - ADDED.get(name, frozenset())
        assert not unknown, f"{name} has {unknown}"
        for field in type(node).model_fields:
            _look(getattr(node, field))
