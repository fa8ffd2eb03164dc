"""POST /v1/completions through the SDK."""

from __future__ import annotations

import json

import httpx
import openai
from checkpoints import VOCAB
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tandem.server.text.text import Text


def test_prompts_of_every_kind(client: openai.OpenAI, text: Text) -> None:
    ids = text.encode("The cat")
    asked = {"model": "policy", "max_tokens": 8, "temperature": 0}
    one = client.completions.create(prompt="The cat", **asked)
    assert one.object == "text_completion" and one.id.startswith("cmpl-")
    assert client.completions.create(prompt=ids, **asked).choices[0].text == one.choices[0].text
    many = client.completions.create(prompt=["The cat", "a dog", "The cat"], **asked)
    assert [choice.text for choice in many.choices][::2] == [one.choices[0].text] * 2
    assert [c.text for c in client.completions.create(prompt=[ids, ids], **asked).choices] == [one.choices[0].text] * 2
    bare = client.completions.create(prompt="The cat", **asked, extra_body={"add_special_tokens": False})
    assert bare.usage.prompt_tokens == one.usage.prompt_tokens - 1 == len(ids) - 1


def test_the_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="policy", prompt="a", extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16 and answer.choices[0].finish_reason == "length"


def test_choices_of_several_prompts_are_numbered_through(client: openai.OpenAI) -> None:
    asked = {"model": "policy", "max_tokens": 6, "seed": 5}
    both = client.completions.create(prompt=["One, two", "The dog"], n=3, **asked)
    assert [choice.index for choice in both.choices] == list(range(6))
    for index, prompt in enumerate(["One, two", "The dog"]):
        alone = client.completions.create(prompt=prompt, n=3, **asked)
        assert [c.text for c in alone.choices] == [c.text for c in both.choices[3 * index : 3 * index + 3]]
    chunks = list(client.completions.create(prompt=["One, two", "The dog"], n=3, stream=True, **asked))
    texts = [""] * 6
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in both.choices]


def test_without_a_seed_prompts_of_one_request_are_drawn_independently(client: openai.OpenAI) -> None:
    """A trainer may send a prompt several times and wants several answers."""
    answer = client.completions.create(model="policy", prompt=["The cat"] * 4, max_tokens=12)
    assert len({choice.text for choice in answer.choices}) == 4


def test_logprobs(client: openai.OpenAI, text: Text) -> None:
    printing = [i for i in range(6, VOCAB) if text.token_bytes(i).isascii()]
    asked = {"model": "policy", "prompt": "The", "max_tokens": 30, "seed": 1, "logprobs": 2}
    asked["extra_body"] = {"allowed_token_ids": printing, "logprobs_mode": "processed"}
    answer = client.completions.create(**asked)
    choice = answer.choices[0]
    columns = choice.logprobs
    count = answer.usage.completion_tokens
    assert len(columns.tokens) == len(columns.token_logprobs) == len(columns.top_logprobs) == count
    assert len(columns.text_offset) == count and columns.text_offset[0] == 0
    for token, value, top in zip(columns.tokens, columns.token_logprobs, columns.top_logprobs, strict=True):
        assert top[token] == value
        assert len(top) <= 3
    for token, offset in zip(columns.tokens, columns.text_offset, strict=True):
        assert choice.text.startswith(token, offset)
    zero = client.completions.create(model="policy", prompt="The", max_tokens=3, logprobs=0)
    assert all(len(top) == 1 for top in zero.choices[0].logprobs.top_logprobs)
    streamed = list(client.completions.create(**asked, stream=True))
    offsets = [offset for chunk in streamed for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == columns.text_offset


def test_prompt_logprobs_are_those_of_generation(client: openai.OpenAI) -> None:
    """What was drawn with a log-probability has the same one as part of a prompt."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    drawn = client.completions.create(
        model="policy", prompt="The cat", max_tokens=12, logprobs=0, seed=2, extra_body=extra
    ).choices[0]
    prompt = drawn.model_extra["prompt_token_ids"] + drawn.model_extra["token_ids"]
    scored = client.completions.create(
        model="policy", prompt=prompt, max_tokens=0, extra_body={"prompt_logprobs": 2}
    ).choices[0]
    entries = scored.model_extra["prompt_logprobs"]
    assert scored.text == "" and entries[0] is None and len(entries) == len(prompt)
    own = [entry[str(token)]["logprob"] for entry, token in zip(entries[1:], prompt[1:], strict=True)]
    assert len(own[-12:]) == 12
    for again, first in zip(own[-12:], drawn.logprobs.token_logprobs, strict=True):
        assert abs(again - first) < 1e-3
    for entry in entries[1:]:
        by_rank = sorted(entry.values(), key=lambda item: item["rank"])
        assert [item["rank"] for item in by_rank][:2] == [1, 2]
        values = [item["logprob"] for item in by_rank]
        assert values == sorted(values, reverse=True)


def test_truncation_keeps_the_end(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="policy",
        prompt=list(range(10, 90)),
        max_tokens=1,
        extra_body={"truncate_prompt_tokens": 7, "return_token_ids": True},
    )
    assert answer.choices[0].model_extra["prompt_token_ids"] == list(range(83, 90))


def test_bad_words_and_bias(client: openai.OpenAI) -> None:
    asked = {"model": "policy", "prompt": "The", "max_tokens": 10, "seed": 4}
    free = client.completions.create(**asked, extra_body={"return_token_ids": True, "ignore_eos": True}).choices[0]
    first = free.model_extra["token_ids"][0]
    pushed = client.completions.create(**asked, logit_bias={str(first): -100}, extra_body={"return_token_ids": True})
    assert first not in pushed.choices[0].model_extra["token_ids"]
    pulled = client.completions.create(
        **asked, temperature=0, logit_bias={"71": 100}, extra_body={"return_token_ids": True}
    )
    assert pulled.choices[0].model_extra["token_ids"] == [71] * 10
    letter = pulled.choices[0].text[0]
    banned = client.completions.create(
        **asked, logit_bias={"71": 100}, extra_body={"bad_words": [letter * 2], "return_token_ids": True}
    )
    assert letter * 2 not in banned.choices[0].text


def test_usage_while_streaming(client: openai.OpenAI) -> None:
    asked = {
        "model": "policy",
        "prompt": "The cat",
        "max_tokens": 400,  # five came in one event every other time
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }
    at_end = list(client.completions.create(**asked, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in at_end] == [True] * (len(at_end) - 1) + [False]
    always = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": True}
    counted = [chunk.usage.completion_tokens for chunk in client.completions.create(**asked, stream_options=always)]
    assert counted == sorted(counted) and counted[-1] == 400 == at_end[-1].usage.completion_tokens
    assert counted[0] < 400
    assert not any("usage" in chunk.model_fields_set for chunk in client.completions.create(**asked))


def test_old_sdks_route(http: httpx.Client) -> None:
    answer = http.post("/v1/engines/org/alias/completions", json={"prompt": "a", "max_tokens": 1})
    assert answer.status_code == 200 and answer.json()["model"] == "policy"


def test_answers_validate_as_the_sdks_types(http: httpx.Client) -> None:
    length = {"max_tokens": 400, "ignore_eos": True}  # under load tokens share an event
    chat = {"messages": [{"role": "user", "content": "a"}], **length, "logprobs": True, "top_logprobs": 2}
    ChatCompletion.model_validate(http.post("/v1/chat/completions", json=chat).json())
    completion = {"prompt": "a", **length, "logprobs": 2}
    Completion.model_validate(http.post("/v1/completions", json=completion).json())
    for path, body, model in (
        ("/v1/chat/completions", chat, ChatCompletionChunk),
        ("/v1/completions", completion, Completion),
    ):
        streamed = http.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        assert streamed.headers["content-type"].startswith("text/event-stream")
        events = streamed.text.strip().split("\n\n")
        assert events.pop() == "data: [DONE]" and len(events) >= 4
        for event in events:
            chunk = json.loads(event.removeprefix("data: "))
            for choice in chunk["choices"] if model is Completion else ():
                choice["finish_reason"] = choice["finish_reason"] or "length"  # null until then, which the type forgot
            model.model_validate(chunk)
