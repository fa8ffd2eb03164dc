"""How a GPU's memory is divided, checked by hand on a LLaMA-3-8B's numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tandem.model.config import ModelConfig
from tandem.server.engine.device_memory import (
    MIB,
    RESERVE,
    divide,
    graph_bytes,
    kv_bytes,
    logits_bytes,
    row_bytes,
    step_bytes,
)
from tandem.server.engine.options import EngineOptions, OptionsError

GIB = 1 << 30
WEIGHTS = 15 * GIB
OPTIONS = EngineOptions(device="cuda", max_num_seqs=256, max_num_batched_tokens=8192)


def config(**given: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "head_size": 128,
        "intermediate_size": 14336,
        "context": 8192,
        "norm_eps": 1e-5,
        "dtype": "bfloat16",
        "labels": 0,
        "end_ids": (),
        "tied": False,
        "activation": "silu",
    }
    return ModelConfig(**(shape | given))


def models(*labels: int) -> list[tuple[ModelConfig, int, int, int]]:
    return [(config(labels=count), 2, WEIGHTS, 8192) for count in labels]


def test_a_row_holds_the_widest_place_of_a_layer() -> None:
    assert row_bytes(config(), 2) == 2 * (2 * 4096 + 4096 + 3 * 14336)
    attention = config(intermediate_size=100)
    assert row_bytes(attention, 2) == 2 * (2 * 4096 + 4096 + (32 + 16) * 128 + 2 * 4096)


def test_logits_count_in_steps_and_graphs_of_language_models_only() -> None:
    assert logits_bytes(config(), 2, 256) == 256 * 128256 * 10
    judge = config(labels=1)
    assert step_bytes(config(), 2, OPTIONS, 8192) - step_bytes(judge, 2, OPTIONS, 8192) >= 256 * 128256 * 10
    assert graph_bytes(judge, 2, OPTIONS, 8192) == 0
    assert graph_bytes(config(), 2, OPTIONS, 8192) > 2 * 256 * 128256 * 10
    assert graph_bytes(config(), 2, replace(OPTIONS, run_ahead=False), 8192) == 0


def test_kv_caches_get_all_that_is_left() -> None:
    total = 140 * GIB
    division = divide(models(0, 1), OPTIONS, total, free=total - 31 * GIB, own=31 * GIB)
    taken = 2 * WEIGHTS + division.steps + division.graphs + RESERVE
    assert kv_bytes(division, OPTIONS) == int(total * 0.9) - taken
    assert division.steps < 3 * GIB and division.graphs < 3 * GIB
    for term in ("30,720 weights", f"{division.steps / MIB:,.0f} steps", "1,024 reserve", "143,360 MiB"):
        assert term in str(division)


def test_an_absolute_size_is_taken_where_it_fits() -> None:
    total = 80 * GIB
    division = divide(models(0), OPTIONS, total, free=total - WEIGHTS, own=WEIGHTS)
    assert kv_bytes(division, replace(OPTIONS, kv_cache_memory_bytes=40 * GIB)) == 40 * GIB
    with pytest.raises(OptionsError, match=r"kv_cache_memory_bytes is 85,899,345,920, but .* left; of 81,920 MiB"):
        kv_bytes(division, replace(OPTIONS, kv_cache_memory_bytes=80 * GIB))


def test_too_small_a_gpu_says_what_to_change() -> None:
    total = 16 * GIB
    division = divide(models(0), OPTIONS, total, free=total - WEIGHTS, own=WEIGHTS)
    with pytest.raises(
        OptionsError, match=r"15,360 weights.*Raise gpu_memory_utilization \(0.9\), lower max_num_batched"
    ):
        kv_bytes(division, OPTIONS)


def test_what_others_hold_is_not_promised() -> None:
    total = 80 * GIB
    division = divide(models(0), OPTIONS, total, free=total - WEIGHTS - 20 * GIB, own=WEIGHTS)
    assert division.others == 20 * GIB
    with pytest.raises(OptionsError, match=r"other processes hold 20,480 of 81,920 MiB; lower it to 0\.7[0-9]"):
        kv_bytes(division, OPTIONS)
    modest = replace(OPTIONS, gpu_memory_utilization=0.7)
    assert kv_bytes(divide(models(0), modest, total, free=total - WEIGHTS - 20 * GIB, own=WEIGHTS), modest) > 0


@pytest.mark.parametrize("value", [0.0, -1.0, 1.5])
def test_a_share_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(OptionsError, match="gpu_memory_utilization"):
        EngineOptions(gpu_memory_utilization=value)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "mps", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(OptionsError, match="device"):
        EngineOptions(device=device)
