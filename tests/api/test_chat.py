"""POST /v1/chat/completions through the SDK."""

from __future__ import annotations

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tandem.server.text.text import Text

USER: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the answer?"}]
LONG = {"ignore_eos": True}


def test_a_conversation(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": "Be brief."}]
    lengths: list[int] = []
    for turn in ("The cat sat.", "猫坐在垫子上", "And the dog?"):
        messages.append({"role": "user", "content": turn})
        answer = client.chat.completions.create(model="policy", messages=messages, max_tokens=8)
        message = answer.choices[0].message
        assert message.role == "assistant" and message.content is not None
        messages.append({"role": "assistant", "content": message.content})
        assert answer.usage is not None
        lengths.append(answer.usage.prompt_tokens)
    assert lengths == sorted(set(lengths))  # every turn was in the next prompt
    assert answer.object == "chat.completion" and answer.model == "policy" and answer.id.startswith("chatcmpl-")
    assert answer.model_extra == {"weight_version": 0}


def test_greedy_text_is_transformers(client: openai.OpenAI, greedy_text) -> None:
    answer = client.chat.completions.create(model="policy", messages=USER, max_tokens=40, temperature=0)
    ids = greedy_text(USER, 40)
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == ids


def test_choices_differ_and_are_reproducible(client: openai.OpenAI) -> None:
    def ask(n: int, seed: int) -> list[str | None]:
        answer = client.chat.completions.create(model="policy", messages=USER, max_tokens=12, n=n, seed=seed)
        assert [choice.index for choice in answer.choices] == list(range(n))
        assert answer.usage is not None and answer.usage.completion_tokens <= 12 * n
        return [choice.message.content for choice in answer.choices]

    four = ask(4, 7)
    assert len(set(four)) == 4
    assert ask(4, 7) == four
    assert ask(2, 7) == four[:2] and ask(1, 7) == four[:1]
    assert set(ask(4, 8)).isdisjoint(four)


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    texts = {
        client.chat.completions.create(model="policy", messages=USER, max_tokens=12).choices[0].message.content
        for _ in range(3)
    }
    assert len(texts) == 3


def test_the_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked = {"model": "policy", "messages": USER, "max_tokens": 40, "seed": 3, "n": 2, "logprobs": True}
    whole = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    chunks = list(
        client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"return_token_ids": True}
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1 and all(c.model_extra["weight_version"] == 0 for c in chunks)
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert chunks[0].model_extra["prompt_token_ids"] == whole.model_extra["prompt_token_ids"]
    assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == choice.index]
        assert "".join(part.delta.content or "" for part in own) == choice.message.content
        assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == choice.finish_reason
        tokens = [entry for part in own if part.logprobs for entry in part.logprobs.content or []]
        assert [entry.model_dump() for entry in tokens] == [entry.model_dump() for entry in choice.logprobs.content]
        ids = [token for part in own for token in part.model_extra.get("token_ids", [])]
        assert ids == choice.model_extra["token_ids"]


async def test_the_async_client(aclient: openai.AsyncOpenAI) -> None:
    asked = {"model": "policy", "messages": USER, "max_tokens": 10, "seed": 1}
    whole = await aclient.chat.completions.create(**asked)
    parts = [chunk async for chunk in await aclient.chat.completions.create(**asked, stream=True)]
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="policy", messages=USER, max_tokens=20, temperature=0, logprobs=True, top_logprobs=3, extra_body=LONG
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 20
    assert (
        b"".join(bytes(entry.bytes) for entry in content)
        .decode("utf-8", "replace")
        .startswith(answer.choices[0].message.content[:5])
    )
    for entry in content:
        assert -9999 <= entry.logprob <= 0
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert (entry.top_logprobs[0].token, values[0]) == (entry.token, entry.logprob)  # greedy
    none = client.chat.completions.create(model="policy", messages=USER, max_tokens=2)
    assert none.choices[0].logprobs is None


def test_processed_logprobs_leave_out_what_cannot_be_drawn(client: openai.OpenAI, text: Text) -> None:
    answer = client.chat.completions.create(
        model="policy",
        messages=USER,
        max_tokens=2,
        logprobs=True,
        top_logprobs=5,
        extra_body={"allowed_token_ids": [65, 66], "logprobs_mode": "processed", "ignore_eos": True},
    )
    for entry in answer.choices[0].logprobs.content:
        assert -9999 < entry.logprob <= 0
        assert {bytes(top.bytes) for top in entry.top_logprobs} == {text.token_bytes(65), text.token_bytes(66)}


def test_tokens_as_ids(client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True, "allowed_token_ids": [70], **LONG}
    answer = client.chat.completions.create(
        model="policy", messages=USER, max_tokens=3, logprobs=True, extra_body=extra
    )
    choice = answer.choices[0]
    assert [entry.token for entry in choice.logprobs.content] == ["token_id:70"] * 3
    assert choice.model_extra["token_ids"] == [70] * 3


def test_usage_counts_cached_tokens(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "a cached prefix " * 20}]
    first, second = (
        client.chat.completions.create(model="policy", messages=messages, max_tokens=1).usage for _ in range(2)
    )
    assert first.total_tokens == first.prompt_tokens + 1
    assert first.prompt_tokens_details.cached_tokens < 32 <= second.prompt_tokens_details.cached_tokens
    salted = client.chat.completions.create(
        model="policy", messages=messages, max_tokens=1, extra_body={"cache_salt": "mine"}
    )
    assert salted.usage.prompt_tokens_details.cached_tokens == 0


def test_finish_and_stop_reasons(client: openai.OpenAI) -> None:
    def ask(**fields: object) -> tuple[str, object, str]:
        answer = client.chat.completions.create(
            model="policy", messages=USER, max_tokens=4, extra_body={"allowed_token_ids": [70], **fields}
        )
        choice = answer.choices[0]
        return choice.finish_reason, choice.model_extra["stop_reason"], choice.message.content

    (text,) = {ask()[2][0]}
    assert ask() == ("length", None, text * 4)
    assert ask(stop_token_ids=[70]) == ("stop", 70, "")
    assert ask(stop_token_ids=[70], include_stop_str_in_output=True) == ("stop", 70, text)
    assert ask(stop_token_ids=[70], min_tokens=2, allowed_token_ids=[70, 71])[0] in ("stop", "length")
    assert ask(stop=text) == ("stop", text, "")
    assert ask(stop=text * 3, include_stop_str_in_output=True) == ("stop", text * 3, text * 3)
    assert ask(stop=text, min_tokens=3) == ("stop", text, text * 2)
    assert ask(allowed_token_ids=[2]) == ("stop", None, "")  # the model's own end


def test_continue_final_message(client: openai.OpenAI) -> None:
    def prompt_tokens(**extra: object) -> int:
        answer = client.chat.completions.create(
            model="policy",
            messages=[*USER, {"role": "assistant", "content": "The answer is"}],
            max_tokens=1,
            extra_body=extra,
        )
        return answer.usage.prompt_tokens

    started, continued = prompt_tokens(), prompt_tokens(continue_final_message=True)
    closed = prompt_tokens(add_generation_prompt=False)
    assert continued == closed - 1 == started - 2  # without </s>, without <|assistant|>


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_that_spans_tokens(client: openai.OpenAI, stream: bool) -> None:
    asked = {"model": "policy", "messages": USER, "max_tokens": 60, "temperature": 0, "logprobs": True}
    extra = {"return_token_ids": True, **LONG}
    free = client.chat.completions.create(**asked, extra_body=extra).choices[0]
    text, ids = free.message.content, free.model_extra["token_ids"]
    at = next(i for i in range(8, len(text)) if text.find(text[i : i + 4]) == i and "\ufffd" not in text[i : i + 4])
    stop = text[at : at + 4]
    if stream:
        chunks = list(
            client.chat.completions.create(
                **asked, stop=["never", stop], stream=True, stream_options={"include_usage": True}, extra_body=extra
            )
        )
        usage, parts = chunks[-1].usage, [chunk.choices[0] for chunk in chunks[:-1]]
        said = "".join(part.delta.content or "" for part in parts)
        kept = [token for part in parts for token in part.model_extra.get("token_ids", [])]
        scored = sum(len(part.logprobs.content) for part in parts if part.logprobs)
        last = parts[-1]
    else:
        answer = client.chat.completions.create(**asked, stop=["never", stop], extra_body=extra)
        usage, last = answer.usage, answer.choices[0]
        said, kept, scored = last.message.content, last.model_extra["token_ids"], len(last.logprobs.content)
    assert said == text[:at]
    assert (last.finish_reason, last.model_extra["stop_reason"]) == ("stop", stop)
    assert kept == ids[: len(kept)] and len(kept) == scored == usage.completion_tokens
    spelt = b"".join(bytes(entry.bytes) for entry in free.logprobs.content[: len(kept)]).decode("utf-8", "replace")
    before = b"".join(bytes(entry.bytes) for entry in free.logprobs.content[: len(kept) - 1]).decode("utf-8", "replace")
    assert stop in spelt and stop not in before  # cut at the very token that completed it


def test_models(client: openai.OpenAI, context: int) -> None:
    models = {model.id: model.model_extra for model in client.models.list()}
    assert list(models) == ["policy", "reward", "embed"]
    assert models["policy"]["role"] == "policy" and models["reward"]["role"] == "reward"
    one = client.models.retrieve("policy")
    assert one.model_extra["max_model_len"] == context and one.model_extra["weight_version"] == 0
    assert one.model_extra["sampling_defaults"]["temperature"] == 1.0
    assert one.owned_by == "tandem" and one.object == "model"
    assert client.models.retrieve("org/alias").id == "policy"  # an id with a slash, and an alias
    answer = client.chat.completions.create(model="org/alias", messages=USER, max_tokens=1)
    assert answer.model == "policy"


@pytest.mark.parametrize("stream", [False, True])
def test_weight_spans_are_told_to_who_asks(client: openai.OpenAI, stream: bool) -> None:
    extra = {"return_weight_spans": True, "ignore_eos": True}
    asked = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "extra_body": extra}
    answer = client.chat.completions.create(**asked, stream=stream)
    last = [chunk for chunk in answer if chunk.choices][-1] if stream else answer
    assert last.choices[0].model_extra["weight_spans"] == [{"version": 0, "start": 0, "end": 5}]
    asked = {"model": "policy", "prompt": "Hi", "max_tokens": 5, "extra_body": extra}
    answer = client.completions.create(**asked, stream=stream)
    last = [chunk for chunk in answer if chunk.choices][-1] if stream else answer
    assert last.choices[0].model_extra["weight_spans"] == [{"version": 0, "start": 0, "end": 5}]
