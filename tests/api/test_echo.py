"""Echoed prompts, their log-probabilities, and the best of several answers: as lm-eval reads them."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tandem.server.api.echo import echo_of
from tandem.server.text.text import Text

IDS = [1, 70, 75, 80, 71, 72, 90, 101, 33, 40, 57, 300]


@pytest.fixture(scope="module")
def hf_logprobs(policy: Path) -> Callable[[list[int]], Any]:
    """transformers' log-probabilities [T, V] of what follows each token."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).eval()

    def logprobs(ids: list[int]) -> Any:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return logprobs


def test_echoed_logprobs_are_transformers(client: openai.OpenAI, hf_logprobs) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = client.completions.create(
        model="policy", prompt=IDS, echo=True, max_tokens=3, logprobs=2, temperature=0, extra_body=extra
    )
    choice = answer.choices[0]
    assert choice.model_extra["prompt_token_ids"] == IDS
    every = IDS + choice.model_extra["token_ids"]
    columns = choice.logprobs
    assert columns.tokens == [f"token_id:{token}" for token in every]
    assert columns.token_logprobs[0] is None and columns.top_logprobs[0] is None
    expected = hf_logprobs(every)
    for place, token in enumerate(every[1:], 1):
        row = expected[place - 1]
        top, own = columns.top_logprobs[place], columns.token_logprobs[place]
        assert own == pytest.approx(row[token].item(), abs=1e-4) and top[f"token_id:{token}"] == own
        likely = [f"token_id:{i}" for i in row.topk(2).indices.tolist()]
        assert set(top) == {f"token_id:{token}", *likely}
        assert max(top.values()) == pytest.approx(row.max().item(), abs=1e-4)
    assert answer.usage.prompt_tokens == len(IDS) and answer.usage.completion_tokens == 3


def test_a_text_is_echoed_as_it_was_sent(client: openai.OpenAI, text: Text) -> None:
    for prompt in ("The cat", " <|user|> Hi\n", "猫🙂 é", "a"):
        free = client.completions.create(model="policy", prompt=prompt, max_tokens=4, temperature=0).choices[0]
        choice = client.completions.create(
            model="policy", prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=0
        ).choices[0]
        assert choice.text == prompt + free.text
        columns = choice.logprobs
        assert len(columns.text_offset) == len(columns.tokens) == len(columns.token_logprobs)
        assert columns.text_offset == sorted(columns.text_offset)
        count = len(text.encode(prompt))
        for token, offset in zip(columns.tokens[:count], columns.text_offset, strict=False):
            if "\ufffd" not in token and token not in text.tokens.values():
                assert choice.text.startswith(token, offset), (token, offset)


def test_nothing_but_the_prompt(client: openai.OpenAI, hf_logprobs) -> None:
    answer = client.completions.create(model="policy", prompt=[IDS, IDS[:1]], echo=True, max_tokens=0, logprobs=1)
    whole, single = answer.choices
    assert answer.usage.completion_tokens == 0 and whole.finish_reason == single.finish_reason == "length"
    expected = hf_logprobs(IDS)
    for place, value in enumerate(whole.logprobs.token_logprobs[1:], 1):
        assert value == pytest.approx(expected[place - 1, IDS[place]].item(), abs=1e-4)
    assert single.logprobs.token_logprobs == [None] and len(single.logprobs.tokens) == 1
    bare = client.completions.create(model="policy", prompt="The cat", echo=True, max_tokens=0).choices[0]
    assert bare.text == "The cat" and bare.logprobs is None


def test_prompt_logprobs_name_the_token_itself_first(http: httpx.Client, hf_logprobs) -> None:
    body = {"prompt": IDS, "max_tokens": 0, "prompt_logprobs": 1, "echo": True, "logprobs": 3}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    expected = hf_logprobs(IDS)
    for place, entry in enumerate(choice["prompt_logprobs"][1:], 1):
        ids, row = [int(token) for token in entry], expected[place - 1]
        best = row.argmax().item()
        assert ids == [IDS[place]] + [best] * (best != IDS[place])  # one beside it, whatever logprobs asks for
        own = entry[str(IDS[place])]
        assert own["rank"] == 1 + (row > row[IDS[place]]).sum().item()
        assert set(own) == {"logprob", "rank", "decoded_token"}
    assert max(map(len, choice["logprobs"]["top_logprobs"][1:])) >= 3


@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_streamed_echo_says_what_the_whole_answer_says(client: openai.OpenAI, logprobs: int | None) -> None:
    asked = {"model": "policy", "prompt": ["The cat", "Two 猫"], "n": 2, "max_tokens": 5, "seed": 3, "echo": True}
    asked |= {"logprobs": logprobs, "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True))
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in own) == choice.text
        assert own[0].text.startswith("The cat") or choice.index > 1
        assert own[0].model_extra["prompt_token_ids"] == choice.model_extra["prompt_token_ids"]
        assert not any("prompt_token_ids" in part.model_extra for part in own[1:])
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if logprobs else ():
            streamed = [value for part in own if part.logprobs for value in getattr(part.logprobs, name)]
            assert streamed == getattr(choice.logprobs, name), name


def test_an_echo_alone_can_be_streamed(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="policy", prompt="The cat", echo=True, max_tokens=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The cat"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_what_is_cut_off_is_not_echoed(client: openai.OpenAI, text: Text) -> None:
    choice = client.completions.create(
        model="policy", prompt="The cat sat", echo=True, max_tokens=0, extra_body={"truncate_prompt_tokens": 2}
    ).choices[0]
    assert choice.text == text.decode(text.encode("The cat sat")[-2:])


def test_offsets_of_an_echo(text: Text) -> None:
    ids = text.encode("The 猫")
    echo = echo_of(text, "The 猫", ids, True, True)
    assert echo.text == "The 猫" and list(echo.offsets)[:2] == [0, 0]  # <s> stands where the text begins
    spelt = echo_of(text, "<s>The", text.encode("<s>The"), True, True)
    assert spelt.text == "<s>The" and list(spelt.offsets)[:2] == [0, 3]
    assert echo_of(text, ids, ids, True, False).text == "<s>The 猫"
    assert echo_of(text, ids[:-1], ids[:-1], True, True).text == "The "  # the answer may complete the character


@pytest.mark.parametrize("rows", [1, 3])
def test_the_parsing_that_lm_eval_does(http: httpx.Client, hf_logprobs, rows: int) -> None:
    """Its request, and its reading of the answer: sums over [context:-1], greedy where own equals the largest."""
    greedy = [*IDS[:4], hf_logprobs(IDS[:4])[-1].argmax().item()]
    prompts, contexts = [IDS, greedy, IDS[:7]][:rows], [5, 4, 3][:rows]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = http.post("/v1/completions", json=body).json()
    found = []
    for choice, length in zip(sorted(answer["choices"], key=itemgetter("index")), contexts, strict=True):
        values = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(values), all(own == max(top.values()) for own, top in zip(values, tops, strict=True))))
    for (total, is_greedy), ids, length in zip(found, prompts, contexts, strict=True):
        expected = hf_logprobs(ids)
        places = range(length, len(ids))
        assert total == pytest.approx(sum(expected[p - 1, ids[p]].item() for p in places), abs=1e-3)
        assert is_greedy == all(expected[p - 1].argmax().item() == ids[p] for p in places)
    assert [is_greedy for _, is_greedy in found] == [False, True, False][:rows]


def test_the_best_of_several(client: openai.OpenAI) -> None:
    asked = {"model": "policy", "prompt": ["The cat", "One"], "max_tokens": 7, "seed": 9}
    every = client.completions.create(**asked, n=6, logprobs=0)
    best = client.completions.create(**asked, n=2, best_of=6)
    for place in range(2):
        drawn = every.choices[6 * place : 6 * place + 6]
        means = [sum(c.logprobs.token_logprobs) / len(c.logprobs.token_logprobs) for c in drawn]
        ranked = [drawn[i].text for i in sorted(range(6), key=lambda i: -means[i])]
        assert [c.text for c in best.choices[2 * place : 2 * place + 2]] == ranked[:2]
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage.completion_tokens == every.usage.completion_tokens  # all that was drawn
    same = client.completions.create(**asked, n=6, best_of=6)
    assert [c.text for c in same.choices] == [c.text for c in every.choices]  # nothing to choose from


def test_prompts_whose_logprobs_are_wanted_fill_the_cache_and_read_nothing_from_it(client: openai.OpenAI) -> None:
    prompt = list(range(6, 290))
    asked = {"model": "policy", "prompt": prompt, "max_tokens": 1, "temperature": 0, "extra_body": {"cache_salt": "e"}}
    first, again = (client.completions.create(**asked, echo=True, logprobs=1) for _ in range(2))
    plain = client.completions.create(**asked)
    cached = [one.usage.prompt_tokens_details.cached_tokens for one in (first, again, plain)]
    assert cached == [0, 0, 272]  # every row of an echoed prompt must be computed; whole pages serve the others
    assert first.choices[0].logprobs == again.choices[0].logprobs
    assert first.choices[0].text.endswith(plain.choices[0].text)
