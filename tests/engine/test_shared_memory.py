"""Two models in one arena of real memory: each answers as it does alone, whoever had the pages before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from hubs import Answer, assert_nothing_is_held, collect, generate, prompt, score

from tandem.model.kv_cache import KVCache
from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec
from tandem.server.engine.request import Group, Request

OPTIONS: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "page_size": 8, "max_model_len": 48}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for variant in ("llama-gqa", "bloom-reward", "gpt2"):
        write_checkpoint(directory / variant, variant, tokenizer=False)
    return directory


def hub_of(checkpoints: Path, *names: str, memory: int, **options: Any) -> Hub:
    specs = [ModelSpec(name, str(checkpoints / name)) for name in names]
    return Hub.load(specs, EngineOptions(**(OPTIONS | {"kv_cache_memory_bytes": memory} | options)))


def requests(first: int, model: str, count: int) -> list[Request]:
    if model == "bloom-reward":
        return [score(first + n, model, prompt(20 + n % 10, seed=n)) for n in range(count)]
    return [
        generate(first + n, model, prompt(12 + n % 10, seed=n), n=1 + n % 2, max_tokens=20, temperature=0.8, seed=n)
        for n in range(count)
    ]


def run(
    hub: Hub, waiting: list[Request], per_step: int, watch: Callable[[], None] = lambda: None
) -> list[dict[int, Answer]]:
    """Submits a few with each step."""
    outputs: dict[int, list[Any]] = {request.id: [] for request in waiting}
    line = list(waiting)
    while line or hub.has_work:
        for request in line[:per_step]:
            outputs[request.id] += hub.submit(request)
        del line[:per_step]
        for output in hub.step():
            outputs[output.request_id].append(output)
        watch()
    return [collect(outputs[request.id]) for request in waiting]


def poison(hub: Hub) -> None:
    """NaN in all pages: what was not written by who reads it shows."""
    for engine in hub.engines:
        for layer in engine.runner._cache.layers:
            layer.k.fill_(torch.nan)
            layer.v.fill_(torch.nan)


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "ahead"])
def test_models_that_borrow_in_turns_answer_as_alone(checkpoints: Path, ahead: bool) -> None:
    """One is busy and takes the slabs; then the other needs them."""
    names = ("llama-gqa", "bloom-reward")
    hub = hub_of(checkpoints, *names, memory=270 << 10, page_size=4, max_num_seqs=16, run_ahead=ahead)
    poison(hub)
    policy = hub.engines[0]
    page = KVCache.bytes_per_page(policy.runner.model.config, 4, torch.float32)
    assert policy.kv_pages == 13 and policy.kv_bytes == 13 * page and policy.card.max_request_tokens == 48
    had: dict[int, set[str]] = {}  # by slab

    def watch() -> None:
        for engine in hub.engines:
            for slab in engine.scheduler.pages.slabs:
                had.setdefault(slab, set()).add(engine.card.name)
        policy.scheduler.pages._lender.arena.check()

    waves = [(0, names[0], 20), (100, names[1], 20), (200, names[0], 10), (300, names[1], 10)]
    asked = [request for wave in waves for request in requests(*wave)]
    found = run(hub, asked, 1, watch)
    assert_nothing_is_held(hub)
    assert len(had) == 3 and set(names) in had.values(), "a slab that both had"
    for name in names:
        alone = hub_of(checkpoints, name, memory=8 << 20, page_size=4, run_ahead=ahead)
        mine = [(request, answers) for request, answers in zip(asked, found, strict=True) if request.model == name]
        for (request, answers), expected in zip(mine, run(alone, [request for request, _ in mine], 4), strict=True):
            for choice, one in answers.items():
                assert one.error is None and one.token_ids == expected[choice].token_ids, f"request {request.id}"
                if one.scores is not None:
                    assert one.scores == pytest.approx(expected[choice].scores, abs=1e-5)


def test_nothing_is_held_after_aborts(checkpoints: Path) -> None:
    hub = hub_of(checkpoints, "llama-gqa", "gpt2", memory=300 << 10)
    for number, name in enumerate(("llama-gqa", "gpt2", "llama-gqa", "gpt2")):
        for request in requests(100 * number, name, 8):
            assert not hub.submit(request)
        for _ in range(6):
            hub.step()
        for request in range(100 * number, 100 * number + 8, 1 + number % 2):
            hub.abort(request)
    while hub.has_work:
        hub.step()
    assert_nothing_is_held(hub)
    for engine in hub.engines:
        engine.scheduler.pages.check([])


def test_what_is_each_models_own_and_what_they_share_is_said(checkpoints: Path) -> None:
    hub = hub_of(checkpoints, "llama-gqa", "gpt2", memory=1 << 20)
    policy, other = hub.engines
    assert policy.kv_tokens == other.kv_tokens == 48 + 8, "a request at full length each, and a page"
    assert policy.kv_most_tokens > 5 * 48 and policy.stats.pages == 7 and policy.stats.slabs == 0
    assert policy.stats.pages_available * 8 == policy.kv_most_tokens
    assert "for good llama-gqa 0.0, gpt2 0.1, and 0.9 to be lent in 4 slabs of 0.23 MiB;" in hub.division
    alone = hub_of(checkpoints, "llama-gqa", memory=1 << 20)
    assert alone.engines[0].kv_most_tokens == alone.engines[0].kv_tokens and "for good" not in alone.division


def test_a_group_of_one_whole_context_fits(checkpoints: Path) -> None:
    """Its prompt ends within a page, which is there twice; there is nothing to borrow."""
    specs = [ModelSpec(name, str(checkpoints / "llama-gqa")) for name in ("one", "two")]
    hub = Hub.load(specs, EngineOptions(**OPTIONS, kv_cache_memory_bytes=14 * 4096))
    assert [engine.kv_most_tokens for engine in hub.engines] == [56, 56]
    whole = prompt(48)
    hub.open(Group(1, "one", whole[:44], longest=4))
    member = Request(2, "one", whole[44:], None, frozenset({"prompt_logprobs"}), prompt_logprobs=0, group=1)
    found = collect(hub.run([member])[2])[0]
    assert found.error is None and found.prompt_logprobs is not None and len(found.prompt_logprobs.values) == 4
    hub.close(1)
    assert_nothing_is_held(hub)


def test_a_share_is_what_a_model_has_for_good(checkpoints: Path) -> None:
    def load(*shares: float) -> Hub:
        specs = [ModelSpec(f"m{n}", str(checkpoints / "llama-gqa"), kv_share=share) for n, share in enumerate(shares)]
        return Hub.load(specs, EngineOptions(**(OPTIONS | {"kv_cache_memory_bytes": 1 << 20, "max_num_seqs": 64})))

    one, two = load(0.5, 0.25).engines
    page = one.kv_bytes // one.kv_pages
    assert (one.kv_pages, two.kv_pages) == ((1 << 19) // page, (1 << 18) // page)
    assert one.kv_most_tokens + two.kv_tokens == pytest.approx((1 << 20) // page * 8, rel=0.1)
    assert "nothing is left to be lent" in load(0.5, 0.5).division
