"""The model whose step is free answers like one that computes: tokens, ends, log-probabilities, refusals."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from hubs import answer, assert_nothing_is_held, collect, generate

from tandem.server.engine.hub import Hub
from tandem.server.engine.null_runner import CONTEXT, NullModel, plain_ids
from tandem.server.engine.options import EngineOptions, ModelSpec, OptionsError
from tandem.server.engine.request import Request, Sampling
from tandem.server.text.text import Text

SPEC = ModelSpec("null", "null")


def null_hub(spec: ModelSpec = SPEC, **options: Any) -> Hub:
    given: dict[str, Any] = {"kv_cache_memory_bytes": 16 << 20, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Hub.load([spec], EngineOptions(**(given | options)))


def requests(count: int = 20, **sampling: Any) -> list[Request]:
    return [
        generate(i, "null", [7 + i, 9, 11 + i % 3] * (1 + i % 5), max_tokens=5 + i, seed=i, temperature=1.0, **sampling)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What each of `requests` gets by itself."""
    return [answer(null_hub(), request)[0].token_ids for request in requests()]


def test_it_costs_no_memory_and_counts_pages() -> None:
    (engine,) = null_hub().engines
    assert (engine.weight_bytes, engine.card.role, engine.card.architecture) == (0, "policy", "Null")
    assert engine.card.context == CONTEXT and engine.kv_tokens == engine.kv_pages * 16 > 1000
    assert engine.kv_bytes <= 16 << 20


def test_an_answer_is_the_same_in_any_company(alone: list[list[int]]) -> None:
    assert [len(ids) for ids in alone] == [5 + i for i in range(20)]
    assert len({tuple(ids[:5]) for ids in alone}) > 10  # not all the same
    assert [one.token_ids for one in answer(null_hub(), *requests())] == alone
    assert [one.token_ids for one in answer(null_hub(run_ahead=True), *requests())] == alone


def test_an_answer_is_the_same_after_a_preemption(alone: list[list[int]]) -> None:
    hub = null_hub(kv_cache_memory_bytes=16 << 12, page_size=4, max_model_len=64)  # sixteen pages
    assert [one.token_ids for one in answer(hub, *requests())] == alone
    assert hub.engines[0].stats.counts.preemptions > 0


def test_every_token_shows_at_once() -> None:
    card = null_hub().catalog.models[0]
    text = Text.load(card.path)
    ids = NullModel(card.path).cycle
    assert len(set(ids)) > 500 and set(ids) <= set(plain_ids(Path(card.path))) and not set(ids) & set(card.end_ids)
    stream = text.detokenizer()
    assert all(stream.push([number]).text for number in ids)


def test_stop_ids_lengths_and_choices(alone: list[list[int]]) -> None:
    whole = alone[19]
    stop = whole[6]
    first = whole.index(stop)
    (ended,) = answer(null_hub(), requests(stop_ids=(stop,))[19])
    assert (ended.token_ids, ended.finish, ended.stop_id) == (whole[: first + 1], "stop", stop)
    hub = null_hub()
    both = collect(hub.run([generate(1, "null", [5, 6], n=3, temperature=1.0)])[1])
    assert {len(choice.token_ids) for choice in both.values()} == {16} and len(both) == 3
    assert len({tuple(choice.token_ids) for choice in both.values()}) == 3
    assert_nothing_is_held(hub)


def test_an_abort_frees_its_pages() -> None:
    hub = null_hub()
    hub.submit(generate(1, "null", [5, 6], max_tokens=1000))
    for _ in range(5):
        hub.step()
    assert [output.finish for output in hub.abort(1)] == ["abort"]
    assert_nothing_is_held(hub)


@pytest.mark.parametrize("run_ahead", [False, True])
def test_log_probabilities_are_uniform(run_ahead: bool) -> None:
    hub = null_hub(run_ahead=run_ahead)
    vocabulary = hub.catalog.models[0].vocab_size
    sampling = Sampling(max_tokens=4, seed=3, logprobs=2)
    want = frozenset({"tokens", "logprobs", "prompt_logprobs"})
    asked = Request(1, "null", [5, 6, 7, 8, 9], sampling, want, prompt_logprobs=1)  # pyright: ignore[reportArgumentType]
    found, plain = answer(hub, asked, generate(2, "null", [5, 6], max_tokens=4))
    uniform = pytest.approx(-math.log(vocabulary))
    assert found.logprobs.values == [uniform] * 4 and found.logprobs.ranks == [1] * 4
    assert [len(ids) for ids in found.logprobs.top_ids] == [2] * 4
    assert found.prompt_logprobs is not None and found.prompt_logprobs.values == [uniform] * 4
    assert plain.logprobs.values == []


@pytest.mark.parametrize(
    ("param", "sampling"),
    [
        ("allowed_token_ids", {"allowed_ids": (5, 6)}),
        ("bad_words", {"bad_words": ((5,),)}),
        ("logit_bias", {"logit_bias": ((5, 1.0),)}),
    ],
)
def test_what_it_cannot_do_is_refused(param: str, sampling: dict[str, Any]) -> None:
    (output,) = null_hub().submit(generate(1, "null", [5, 6], **sampling))
    assert output.error is not None and (output.error.kind, output.error.param) == ("invalid", param)


def test_it_is_no_reward_model() -> None:
    with pytest.raises(OptionsError, match="cannot be reward"):
        null_hub(ModelSpec("null", "null", role="reward"))
    (output,) = null_hub().submit(Request(1, "null", [5], None, frozenset({"score"})))
    assert output.error is not None and "no scores" in output.error.message


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_pace_takes_time_and_no_work(run_ahead: bool) -> None:
    hub = null_hub(ModelSpec("null", "null:20"), run_ahead=run_ahead)
    began, worked = time.perf_counter(), time.thread_time()
    (found,) = answer(hub, generate(1, "null", [5, 6], max_tokens=10))
    assert time.perf_counter() - began >= 10 * 0.020 and time.thread_time() - worked < 0.1
    assert found.token_ids == answer(null_hub(), generate(1, "null", [5, 6], max_tokens=10))[0].token_ids


@pytest.mark.parametrize("path", ["null:", "null:fast", "null:-1", "null:nan"])
def test_a_pace_is_a_number(path: str) -> None:
    with pytest.raises(OptionsError, match="milliseconds"):
        null_hub(ModelSpec("null", path))
