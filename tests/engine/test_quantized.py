"""Models in int8, and K and V in int8, through the engine: both runners, the memory, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from hubs import Answer, answer, assert_nothing_is_held, generate, prompt, score

from tandem.model.kv_cache import KVCache
from tandem.model.load import load_model
from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec, OptionsError
from tandem.server.engine.request import Request, Sampling

NARROW: dict[str, Any] = {"quantization": "int8", "kv_dtype": "int8"}
PROMPT = frozenset({"tokens", "prompt_logprobs"})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for variant in ("llama-gqa", "bloom", "llama-reward"):
        write_checkpoint(directory / variant, variant, tokenizer=False)
    write_checkpoint(directory / "deep", "llama", tokenizer=False, hidden_size=256, num_hidden_layers=8)  # heads of 64
    return directory


def hub_of(*specs: ModelSpec, **options: Any) -> Hub:
    given: dict[str, Any] = {"kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    return Hub.load(specs, EngineOptions(**(given | options)))


def spec(path: Path, **given: Any) -> ModelSpec:
    return ModelSpec(path.name, str(path), **given)


def requests(model: str) -> list[Request]:
    """Greedy and drawn, with a shared beginning, two choices, and log-probabilities of a prompt."""
    shared = prompt(20, seed=9)
    scored = Request(0, model, shared, Sampling(max_tokens=2, temperature=0.0, seed=1), PROMPT, prompt_logprobs=2)  # pyright: ignore
    drawn = generate(1, model, shared + prompt(3), n=2, max_tokens=6, temperature=1.0, seed=3, logprobs=1)
    return [scored, drawn, *(generate(n, model, shared[: 8 * n] + prompt(5, seed=n), max_tokens=6) for n in (2, 3))]


def values(one: Answer) -> tuple[list[int], list[float], list[float]]:
    return one.token_ids, one.logprobs.values, one.prompt_logprobs.values if one.prompt_logprobs else []


@pytest.mark.parametrize(("variant", "scheme"), [("llama-gqa", "int8"), ("llama-gqa", "w8a8"), ("bloom", "w8a8")])
def test_both_runners_give_the_same(checkpoints: Path, variant: str, scheme: Any) -> None:
    given = NARROW | {"quantization": scheme}
    found: list[list[Any]] = []
    for ahead in (False, True):
        hub = hub_of(spec(checkpoints / variant, **given), run_ahead=ahead)
        found.append([values(one) for one in answer(hub, *requests(variant))])
        assert_nothing_is_held(hub)
    for (tokens, *logprobs), (others, *their) in zip(*found, strict=True):
        assert tokens == others and tokens
        for mine, other in zip(logprobs, their, strict=True):
            assert mine == pytest.approx(other, abs=2e-5)


def test_tokens_are_the_model_s_with_such_pages(checkpoints: Path) -> None:
    """Greedy text, token by token, with K and V in int8; in another dtype it would go on in another way."""
    path = checkpoints / "llama-gqa"
    texts: dict[str, list[int]] = {}
    for kept in ("int8", "auto", "float16"):
        hub = hub_of(spec(path, quantization="int8", kv_dtype=kept))
        card = hub.engines[0].card
        assert card.kv_dtype == ("float32" if kept == "auto" else kept) and card.quantization == "int8"
        layer = hub.engines[0].runner._cache.layers[0]  # type: ignore[attr-defined]
        assert layer.k.dtype == getattr(torch, card.kv_dtype) and (layer.k_scale is not None) == (kept == "int8")
        (one,) = answer(hub, generate(0, path.name, prompt(40), max_tokens=40))
        texts[kept] = one.token_ids
    assert len(texts["int8"]) > 20 and texts["int8"] != texts["auto"]


def test_deterministic_bits(checkpoints: Path) -> None:
    """What is told of tokens while they are drawn is what their scoring tells, alone and in company."""
    name = "llama-gqa"
    hub = hub_of(spec(checkpoints / name, dtype="bfloat16", **NARROW), deterministic=True)
    ids = prompt(21)
    first = generate(0, name, ids, max_tokens=8, temperature=1.0, seed=5, logprobs=0)
    drawn, *_ = answer(hub, first, *requests(name)[1:])
    told = drawn.logprobs.values
    asked = Sampling(max_tokens=1, temperature=0.0, seed=1)
    scoring = Request(77, name, ids + drawn.token_ids, asked, PROMPT, prompt_logprobs=0)  # pyright: ignore
    (scored,) = answer(hub, scoring)
    assert scored.prompt_logprobs is not None and len(told) == 8
    assert scored.prompt_logprobs.values[-len(told) :] == told


def test_reward_models_too(checkpoints: Path) -> None:
    path = checkpoints / "llama-reward"
    hub = hub_of(spec(path, **NARROW))
    plain = hub_of(spec(path))
    ids = prompt(30)
    (found,), (exact,) = answer(hub, score(0, path.name, ids)), answer(plain, score(0, path.name, ids))
    assert found.scores is not None and exact.scores is not None
    assert found.scores != exact.scores and found.scores == pytest.approx(exact.scores, abs=0.5)


def test_the_same_memory_holds_nearly_twice_the_tokens(checkpoints: Path) -> None:
    path = checkpoints / "deep"
    hubs = [hub_of(spec(path, dtype="bfloat16", kv_dtype=kept)) for kept in ("auto", "int8")]
    wide, narrow = (hub.engines[0] for hub in hubs)
    assert narrow.kv_tokens >= 1.9 * wide.kv_tokens
    assert max(wide.kv_bytes, narrow.kv_bytes) <= 8 << 20
    config = load_model(path).config
    assert narrow.kv_bytes == narrow.kv_pages * KVCache.bytes_per_page(config, 16, torch.int8)


def test_a_reference_has_pages_of_its_own_kind(checkpoints: Path) -> None:
    """It shares the weights, whatever they are kept in."""
    path = checkpoints / "llama-gqa"
    policy = spec(path, **NARROW)
    hub = hub_of(policy, ModelSpec("reference", "", base_of=policy.name), kv_cache_memory_bytes=16 << 20)
    cards = [engine.card for engine in hub.engines]
    assert [(card.quantization, card.lm_head) for card in cards] == [("int8", "int8")] * 2
    assert [card.kv_dtype for card in cards] == ["int8", "float32"]
    assert [engine.weight_bytes > 0 for engine in hub.engines] == [True, False]


def test_what_cannot_be_is_said(checkpoints: Path) -> None:
    policy = spec(checkpoints / "llama-gqa", quantization="int8")
    cases: list[tuple[list[ModelSpec], str]] = [
        (
            [policy, ModelSpec("r", "", base_of=policy.name, quantization="w8a8")],
            "quantization is w8a8, but the weights",
        ),
        ([policy, ModelSpec("r", "", base_of=policy.name, lm_head="fp16")], "lm_head is fp16, but the weights are"),
        ([ModelSpec("null", "null", quantization="int8")], "the null model has no weights to quantize"),
        ([spec(checkpoints / "llama-reward", lm_head="int8")], "model llama-reward: lm_head is int8, but it has no"),
    ]
    for specs, message in cases:
        with pytest.raises(ValueError, match=message):
            hub_of(*specs)
    flash = spec(checkpoints / "llama-gqa", dtype="float16", kv_dtype="int8")
    with pytest.raises(OptionsError, match=r"attention_backend is flash: .*(int8 KV pages|is not installed)"):
        hub_of(flash, attention_backend="flash", page_size=256)
