"""Members of a group get what their whole sequences get alone, and the prompt is computed once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model, write_checkpoint
from hubs import Answer, answer, assert_nothing_is_held, collect, make_hub, prompt, score
from reward_formats import write_format

from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec
from tandem.server.engine.request import Group, Output, Request, ScorePoolingMode

GROUP = 1 << 30
PROMPT = prompt(100)
MEMBERS = [prompt(25, seed) for seed in range(1, 10)]
LOGPROBS = frozenset({"prompt_logprobs"})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for variant in ("llama-gqa", "llama-reward"):
        write_checkpoint(directory / variant, variant, tokenizer=False)
    write_format(directory / "judge", "score", pad_token_id=0, eos_token_id=2, reward_token_id=7)
    return directory


def members(hub: Hub, requests: list[Request], prompt_ids: list[int] = PROMPT) -> list[Answer]:
    """One answer each, of an engine that is given the group, its members, and all of it at once."""
    hub.open(Group(GROUP, requests[0].model, prompt_ids, max(len(request.token_ids) for request in requests)))
    outputs = hub.run([replace(request, group=GROUP) for request in requests])
    assert hub.close(GROUP) == []
    assert_nothing_is_held(hub)
    return [collect(outputs[request.id])[0] for request in requests]


def evaluate(number: int, token_ids: list[int], **given: Any) -> Request:
    return Request(number, "llama-gqa", token_ids, None, LOGPROBS, prompt_logprobs=2, **given)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_log_probabilities(checkpoints: Path, ahead: bool, deterministic: bool) -> None:
    """In chunks of other sizes, several members in a step, with a temperature each."""
    options: dict[str, Any] = {"run_ahead": ahead, "deterministic": deterministic, "max_num_batched_tokens": 60}
    hub, temperatures = make_hub(checkpoints / "llama-gqa", **options), (1.0, 0.7, 0.0)
    requests = [evaluate(number, tokens, temperature=temperatures[number % 3]) for number, tokens in enumerate(MEMBERS)]
    found = members(hub, requests)
    assert hub.engines[0].stats.counts.computed_tokens == 100 + 9 * 25
    for request, one in zip(requests, found, strict=True):
        whole = replace(request, token_ids=PROMPT + request.token_ids, first_needed_row=99)
        alone = answer(make_hub(checkpoints / "llama-gqa", **(options | {"run_ahead": False})), whole)[0]
        assert one.prompt_logprobs is not None and alone.prompt_logprobs is not None
        assert len(one.prompt_logprobs.values) == 25 and one.finish == "stop"
        assert one.prompt_logprobs.ranks == alone.prompt_logprobs.ranks
        if deterministic:
            assert one.prompt_logprobs == alone.prompt_logprobs
        else:
            assert one.prompt_logprobs.values == pytest.approx(alone.prompt_logprobs.values, abs=1e-5)


@pytest.mark.parametrize("ahead", [False, True])
def test_scores(checkpoints: Path, ahead: bool) -> None:
    hub = make_hub(checkpoints / "llama-reward", run_ahead=ahead)
    found = members(hub, [score(number, "llama-reward", tokens) for number, tokens in enumerate(MEMBERS)])
    counts = hub.engines[0].stats.counts
    assert counts.computed_tokens == counts.prompt_tokens - counts.cached_tokens == 100 + 9 * 25
    assert (counts.started, counts.forked_tokens, counts.scores) == (9, 900, 9)
    alone = make_hub(checkpoints / "llama-reward")
    for number, tokens in enumerate(MEMBERS):
        (whole,) = answer(alone, score(number, "llama-reward", PROMPT + tokens))
        assert found[number].scores == pytest.approx(whole.scores, abs=1e-5)


POOLINGS = {"last": 99 + 25, "first_eos": 99 + 21, "token_id": 99 + 23, "mean": None}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_of_every_pooling(checkpoints: Path, pooling: ScorePoolingMode, ahead: bool) -> None:
    """The prompt has neither an end token nor the marking one; what is behind a member's own is not computed."""
    hub = pooled_hub(checkpoints, pooling, run_ahead=ahead, max_num_batched_tokens=40)
    texts = [[*unmarked(tokens[:20]), 2, 11, 7, 12, 13] for tokens in MEMBERS]
    prompt_ids = unmarked(PROMPT)
    found = members(hub, [score(number, "judge", tokens) for number, tokens in enumerate(texts)], prompt_ids)
    place = POOLINGS[pooling]
    assert hub.engines[0].stats.counts.computed_tokens == 100 + 9 * (25 if place is None else place - 99)
    alone = pooled_hub(checkpoints, pooling)
    for number, tokens in enumerate(texts):
        (whole,) = answer(alone, score(number, "judge", prompt_ids + tokens))
        assert found[number].scores == pytest.approx(whole.scores, abs=1e-5)
        assert found[number].pooled_index == whole.pooled_index == place


def unmarked(tokens: list[int]) -> list[int]:
    return [9 if token == 7 else token for token in tokens]


def pooled_hub(checkpoints: Path, pooling: ScorePoolingMode, **options: Any) -> Hub:
    given: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4} | options
    return Hub.load([ModelSpec("judge", str(checkpoints / "judge"), pooling=pooling)], EngineOptions(**given))


def test_a_score_that_would_be_the_prompts_is_refused(checkpoints: Path) -> None:
    hub = pooled_hub(checkpoints, "first_eos")
    hub.open(Group(GROUP, "judge", [5, 2, 6], 5))
    (output,) = hub.submit(replace(score(1, "judge", [8, 2]), group=GROUP))
    assert (
        output.error is not None and output.error.kind == "invalid" and "token 1 of the group's" in output.error.message
    )
    hub.close(GROUP)


@pytest.mark.parametrize("ahead", [False, True])
def test_values(checkpoints: Path, ahead: bool) -> None:
    """One before each token of a member, and one behind its last."""
    spec = ModelSpec("judge", str(checkpoints / "judge"), "value")
    options: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 4, "max_num_batched_tokens": 40}
    hub, alone = (Hub.load([spec], EngineOptions(**options, run_ahead=way)) for way in (ahead, False))
    requests = [Request(n, "judge", tokens, None, frozenset({"values"})) for n, tokens in enumerate(MEMBERS)]
    found = members(hub, requests)
    assert hub.engines[0].stats.counts.computed_tokens == 100 + 9 * 25
    for request, one in zip(requests, found, strict=True):
        (whole,) = answer(alone, replace(request, token_ids=PROMPT + request.token_ids, first_needed_row=99))
        assert one.values is not None and len(one.values) == 26
        assert one.values == pytest.approx(whole.values, abs=1e-5)


def test_a_temperature_is_that_of_the_logits(checkpoints: Path) -> None:
    hub, ids = make_hub(checkpoints / "llama-gqa"), prompt(30)
    with torch.inference_mode():
        logits = make_model("llama-gqa")(torch.tensor([ids])).logits[0].double()
    for number, temperature in enumerate((1.0, 0.5, 3.0, 0.0)):
        expected = (logits / (temperature or 1)).log_softmax(-1)
        found = answer(hub, evaluate(number, ids, temperature=temperature))[0].prompt_logprobs
        assert found is not None
        own = expected[torch.arange(29), torch.tensor(ids[1:])]
        assert found.values == pytest.approx(own.tolist(), abs=1e-4)
        likely = [row.topk(2).values.tolist() for row in expected[:-1]]
        assert found.top_values == [pytest.approx(values, abs=1e-4) for values in likely]


def test_members_that_come_later_find_the_prompt(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "llama-gqa")
    hub.open(Group(GROUP, "llama-gqa", PROMPT, 25))
    hub.run([])
    for number, tokens in enumerate(MEMBERS[:3]):
        assert collect(hub.run([evaluate(number, tokens, group=GROUP)])[number])[0].finish == "stop"
    assert hub.engines[0].stats.counts.computed_tokens == 100 + 3 * 25
    assert hub.engines[0].stats.waiting == 0 and not hub.has_work
    hub.close(GROUP)
    assert_nothing_is_held(hub)


REFUSED: list[tuple[Group, Request, str, str]] = [
    (Group(GROUP, "llama-gqa", [3, 999], 5), evaluate(1, [4]), "invalid", "999"),
    (Group(GROUP, "llama-gqa", prompt(500), 50), evaluate(1, [4]), "invalid", "550 tokens, the context 512"),
    (Group(GROUP, "llama-gqa", [3], 5, adapter="poet"), evaluate(1, [4]), "not_found", "poet"),
    (Group(GROUP, "llama-gqa", [3], 5), evaluate(1, [999]), "invalid", "999"),
    (Group(GROUP, "llama-gqa", [3], 5), evaluate(1, prompt(6)), "invalid", "6 tokens"),
    (Group(GROUP, "llama-gqa", [3], 5), evaluate(1, [4], n=2), "invalid", "nor n"),
    (Group(GROUP, "llama-gqa", [3], 5), score(1, "llama-gqa", [4]), "invalid", "language model"),
    (Group(GROUP + 1, "llama-gqa", [3], 5), evaluate(1, [4]), "invalid", f"no open group {GROUP}"),
    (Group(GROUP, "nobody", [3], 5), evaluate(1, [4]), "invalid", f"no open group {GROUP}"),
]


@pytest.mark.parametrize(("group", "member", "kind", "says"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_cannot_be_is_told_to_the_member(
    checkpoints: Path, group: Group, member: Request, kind: str, says: str
) -> None:
    hub = make_hub(checkpoints / "llama-gqa")
    hub.open(group)
    outputs: list[Output] = hub.submit(replace(member, group=GROUP))
    (output,) = outputs
    assert output.error is not None and output.error.kind == kind and says in output.error.message
    hub.run([])
    hub.close(group.id)
    assert_nothing_is_held(hub)
