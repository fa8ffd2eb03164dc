"""Embeddings are transformers' pooled hidden states, and the same however a text's rows are cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_model, write_checkpoint
from hubs import answer, collect, generate, make_hub, prompt, score

from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec, OptionsError
from tandem.server.engine.request import PoolingMode, Request

LENGTHS = (1, 2, 15, 16, 33, 60)
POOLED: dict[PoolingMode, Callable[[torch.Tensor], torch.Tensor]] = {
    "last": lambda rows: rows[-1],
    "mean": lambda rows: rows.mean(0),
    "cls": lambda rows: rows[0],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "model", "qwen3", tokenizer=False)


def hidden(ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return make_model("qwen3").model(torch.tensor([ids])).last_hidden_state[0]


def embed(number: int, ids: list[int], model: str = "model") -> Request:
    return Request(number, model, ids, None, frozenset({"embedding"}))


def load(path: Path, pooling: PoolingMode | None, role: str | None = "embedding", **options: object) -> Hub:
    given = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "max_num_batched_tokens": 256} | options
    spec = ModelSpec("model", str(path), role, pooling=pooling)  # type: ignore[arg-type]
    return Hub.load([spec], EngineOptions(**given))  # type: ignore[arg-type]


def vectors(hub: Hub, *texts: list[int]) -> list[list[float]]:
    found = [one.embedding for one in answer(hub, *(embed(number, ids) for number, ids in enumerate(texts)))]
    assert all(found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pooling", POOLED)
def test_in_chunks_and_together_they_are_transformers(path: Path, pooling: PoolingMode, ahead: bool) -> None:
    texts = [prompt(length) for length in LENGTHS]
    together = vectors(load(path, pooling, max_num_batched_tokens=11, run_ahead=ahead), *texts)
    for ids, found in zip(texts, together, strict=True):
        assert found == pytest.approx(POOLED[pooling](hidden(ids)).tolist(), abs=1e-4)
        (alone,) = vectors(load(path, pooling, run_ahead=ahead), ids)
        assert alone == pytest.approx(found, abs=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_deterministic_mode_they_have_the_same_bits(path: Path, dtype: str) -> None:
    texts = [prompt(length) for length in LENGTHS]
    spec = ModelSpec("model", str(path), "embedding", dtype=dtype, pooling="mean")  # type: ignore[arg-type]
    given = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "deterministic": True}
    cut, whole = (
        Hub.load([spec], EngineOptions(**given, max_num_batched_tokens=budget))  # type: ignore[arg-type]
        for budget in (11, 256)
    )
    assert vectors(cut, *texts) == [vectors(whole, ids)[0] for ids in texts]


@pytest.mark.parametrize(("pooling", "reused"), [("last", 32), ("mean", 0)])
def test_cached_pages_are_used_where_no_earlier_row_counts(path: Path, pooling: PoolingMode, reused: int) -> None:
    hub = load(path, pooling)
    ids = prompt(45)
    first, again = answer(hub, embed(1, ids))[0], answer(hub, embed(2, ids))[0]
    assert (first.cached_tokens, again.cached_tokens) == (0, reused)
    assert again.embedding == pytest.approx(first.embedding, abs=2e-6)


def test_a_preempted_text_starts_its_sum_again(path: Path) -> None:
    """The second text is stopped after its first chunk by one of a better priority that needs its pages."""
    loaded = load(path, "mean", max_num_batched_tokens=16, page_size=8)
    hub = make_hub_of(loaded, pages=8, max_num_batched_tokens=16, page_size=8)
    late, urgent = prompt(60, 1), prompt(60, 2)
    assert not hub.submit(embed(1, late))
    outputs = list(hub.step())
    assert not outputs
    assert not hub.submit(Request(2, "model", urgent, None, frozenset({"embedding"}), priority=-1))
    while hub.has_work:
        outputs += hub.step()
    assert hub.engines[0].stats.counts.preemptions == 1
    for number, ids in ((1, late), (2, urgent)):
        found = collect(output for output in outputs if output.request_id == number)[0].embedding
        assert found == pytest.approx(hidden(ids).mean(0).tolist(), abs=1e-4)


def make_hub_of(hub: Hub, pages: int, **options: object) -> Hub:
    from tandem.server.engine.engine import Engine

    small = EngineOptions(max_num_seqs=8, **options)  # type: ignore[arg-type]
    return Hub([Engine(engine.card, engine.runner.model, pages=pages, options=small) for engine in hub.engines])


def test_the_engine_s_pooling_is_that_of_models_that_name_none(path: Path) -> None:
    options = EngineOptions(kv_cache_memory_bytes=16 << 20, pooling="cls")
    specs = [ModelSpec(name, str(path), "embedding", pooling=own) for name, own in (("a", None), ("b", "last"))]
    assert [engine.card.pooling for engine in Hub.load(specs, options).engines] == ["cls", "last"]


def test_the_card_says_what_it_gives(path: Path) -> None:
    card = load(path, None).engines[0].card
    assert (card.role, card.gives, card.embedding_size, card.pooling, card.normalized) == (
        *("embedding", "embeddings", 64, "last"),
        True,
    )


def test_only_embedding_models_embed_and_they_do_nothing_else(path: Path) -> None:
    hub, policy = load(path, "mean"), make_hub(path)
    for request in (
        generate(1, "model", [5]),
        score(2, "model", [5]),
        Request(3, "model", [5], None, frozenset({"embedding", "score"})),
    ):
        error = hub.submit(request)[0].error
        assert error is not None and error.kind == "invalid" and "gives embeddings, nothing else" in error.message
    error = policy.submit(embed(4, [5]))[0].error
    assert error is not None and "it gives no embeddings" in error.message


def test_roles_that_a_checkpoint_cannot_have(path: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionsError, match="pooling=mean is for roles embedding and reward, not policy"):
        load(path, "mean", role="policy")
    with pytest.raises(OptionsError, match="pooling is mean, but no hosted model embeds"):
        make_hub(path, pooling="mean")
    reward = write_checkpoint(tmp_path / "reward", "llama-reward", tokenizer=False)
    with pytest.raises(OptionsError, match="a score head with 1 outputs, so its role cannot be embedding"):
        load(reward, None)
    make_model("llama").model.save_pretrained(tmp_path / "bare")
    assert load(tmp_path / "bare", None, role=None).engines[0].card.role == "embedding"
    with pytest.raises(OptionsError, match="has no head, so its role cannot be policy"):
        load(tmp_path / "bare", None, role="policy")
