"""Decodes that are replayed from recordings: bit by bit those that are computed, for every family, and with whatever
weights, adapters and pages there are by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import LANGUAGE_MODELS, write_checkpoint
from hubs import Answer, answer, assert_nothing_is_held, collect, generate, prompt

from tandem.kernels.cpu.native import native
from tandem.server.engine import decodes
from tandem.server.engine.commands import UpdateWeights
from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec
from tandem.server.engine.request import Request
from tandem.server.engine.runner import Runner

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ kernels were not built, or this CPU lacks AVX2")


def hub_of(path: Path, **given: Any) -> Hub:
    options = {"kv_cache_memory_bytes": 8 << 20, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    return Hub.load([ModelSpec("m", str(path), **given)], EngineOptions(**options))


def recorded(hub: Hub) -> list[int]:
    """The numbers of rows."""
    runner = hub.engines[0].runner
    assert isinstance(runner, Runner)
    return sorted(runner._decodes._recordings)


def requests() -> list[Request]:
    """Rows come and go, pages are added and shared, tokens are drawn and told of."""
    shared = prompt(20, seed=9)
    pair = generate(1, "m", shared + prompt(3), n=2, max_tokens=30, temperature=1.0, seed=3, logprobs=1)
    lengths = (8, 12, 17, 40)
    return [pair, *(generate(n + 2, "m", shared + prompt(n), max_tokens=m, logprobs=0) for n, m in enumerate(lengths))]


def values(answers: list[Answer]) -> list[tuple[list[int], list[float]]]:
    return [(one.token_ids, one.logprobs.values) for one in answers]


def both(path: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> Hub:
    """Asserts that a hub answers as one that records nothing; the first, whose recordings are made by now."""
    hub = hub_of(path, **given)
    found = [values(answer(hub, *requests())) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(decodes, "native", lambda: None)
        plain = hub_of(path, **given)
    expected = values(answer(plain, *requests()))
    assert found == [expected, expected] and not recorded(plain)
    assert_nothing_is_held(hub)
    return hub


@pytest.mark.parametrize("variant", LANGUAGE_MODELS)
def test_replayed_and_computed_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    path = write_checkpoint(tmp_path / "m", variant, tokenizer=False)
    hub = both(path, monkeypatch, dtype="bfloat16")
    assert len(recorded(hub)) > 3, "a family whose decodes cannot be recorded is a quarter slower"


@pytest.mark.parametrize("given", [{"dtype": "float32"}, {"quantization": "int8", "kv_dtype": "int8"}])
def test_in_other_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]) -> None:
    path = write_checkpoint(tmp_path / "m", "llama-gqa", tokenizer=False)
    assert recorded(both(path, monkeypatch, **given))


def test_what_the_kernels_cannot_compute_is_never_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in float16 is the definition's, which looks at the lengths of the step."""
    path = write_checkpoint(tmp_path / "m", "llama-gqa", tokenizer=False)
    assert not recorded(both(path, monkeypatch, dtype="float16"))


def test_new_weights_are_used_at_once(tmp_path: Path) -> None:
    """While rows go on that are replayed, and after."""
    paths = [write_checkpoint(tmp_path / str(seed), "llama-gqa", seed=seed, tokenizer=False) for seed in (1, 2)]
    expected = [values(answer(hub_of(path), *requests())) for path in paths]
    hub = hub_of(paths[0])
    for turn in (0, 1, 0):
        assert values(answer(hub, *requests())) == expected[turn] and recorded(hub)
        running = generate(50, "m", prompt(9), max_tokens=60, ignore_eos=True)
        assert hub.submit(running) == []
        outputs = [output for _ in range(20) for output in hub.step()]
        hub.execute(UpdateWeights("m", "disk", str(paths[1 - turn])))
        outputs += hub.run([])[50]
        assert len(collect(outputs)[0].token_ids) == 60


def test_the_least_used_recordings_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decodes, "MOST_RECORDINGS", 2)
    hub = hub_of(write_checkpoint(tmp_path / "m", "llama-gqa", tokenizer=False))
    for rows in (1, 2, 1, 3):
        answer(hub, *(generate(n, "m", prompt(5, n), max_tokens=8) for n in range(rows)))
    assert recorded(hub) == [1, 3]


def test_a_step_too_large_for_the_memory_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "m", "llama-gqa", tokenizer=False)
    monkeypatch.setattr(decodes, "MEMORY", 1 << 12)
    hub = both(path, monkeypatch)
    assert recorded(hub) in ([], [1], [1, 2])
