"""Bytes and operations by formula, counted here by hand for a model small enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import LLAMA

from tandem.benchmarks.bench import limits
from tandem.benchmarks.bench.limits import Asked, Held, Limits, least_seconds, prefill_flops
from tandem.benchmarks.gpu.rows import Report
from tandem.benchmarks.gpu.shapes import config_of

LAYER = 64 * (64 + 32 + 32) + 64 * 64 + 2 * 96 * 64 + 64 * 96  # q k v, out, gate and up, down
MATRICES = 2 * LAYER
HEAD = 320 * 64
KV = 2 * 2 * 2 * 16 * 4  # K and V, layers, kv heads, head size, bytes of float32
PAIR = 4 * 2 * 4 * 16  # two products, two operations, layers, heads, head size
FAST = 1e300

FLOAT32 = torch.float32
CONFIG = config_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"} | LLAMA)
HELD = Held(CONFIG, FLOAT32)


def by_bytes(load: list[Asked], held: Held = HELD) -> float:
    """Bytes that must be read."""
    return least_seconds(held, load, Limits(1.0, {held.dtype: FAST}))


def by_operations(load: list[Asked]) -> float:
    return least_seconds(HELD, load, Limits(FAST, {FLOAT32: 1.0}))


def test_weights_are_read_once_per_step_and_every_key_and_value() -> None:
    weights = 4 * (MATRICES + HEAD)
    assert HELD.weight_bytes == weights == 4 * 81920
    assert by_bytes([Asked(3, 1)]) == weights, "the prompt's step gives the first token"
    assert by_bytes([Asked(3, 2)]) == 2 * weights + 4 * KV
    # one and two sequences; the shorter one has left after the first decode step
    assert by_bytes([Asked(3, 2), Asked(5, 4)]) == 4 * weights + KV * ((4 + 6) + 7 + 8)


def test_answers_to_one_prompt_read_it_once() -> None:
    weights = 4 * (MATRICES + HEAD)
    assert by_bytes([Asked(5, 3, n=2)]) == 3 * weights + KV * ((5 + 2 * 1) + (5 + 2 * 2))


def test_operations_of_prompts_and_answers() -> None:
    prompt = 2 * MATRICES * 3 + PAIR * (1 + 2 + 3) + 2 * HEAD
    assert prefill_flops(CONFIG, [Asked(3, 1)]) == prompt == by_operations([Asked(3, 1)])
    row = 2 * (MATRICES + HEAD)
    assert by_operations([Asked(3, 3)]) == prompt + 2 * row + PAIR * (4 + 5)
    assert by_operations([Asked(3, 2, n=2)]) == prompt + 2 * row + PAIR * 2 * 4
    assert prefill_flops(CONFIG, [Asked(5, 0, cached=3)]) == 2 * MATRICES * 2 + PAIR * (4 + 5) + 2 * HEAD


def test_a_step_takes_the_longer_of_both() -> None:
    read, rate = 1000.0, 5000.0
    found = least_seconds(HELD, [Asked(100, 2)], Limits(read, {FLOAT32: rate}))
    prompt = prefill_flops(CONFIG, [Asked(100, 0)]) / rate
    decode = (4 * (MATRICES + HEAD) + 101 * KV) / read
    assert prompt > 4 * (MATRICES + HEAD) / read and decode > (2 * (MATRICES + HEAD) + 101 * PAIR) / rate
    assert found == pytest.approx(prompt + decode)


def test_matrices_may_be_narrower_than_what_is_computed() -> None:
    narrow = Held(CONFIG, FLOAT32, torch.bfloat16)
    assert narrow.weight_bytes == 2 * (MATRICES + HEAD)
    assert by_bytes([Asked(3, 2)], narrow) == 2 * narrow.weight_bytes + 4 * KV


def test_a_reward_head_is_small() -> None:
    shape = {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "num_labels": 1} | LLAMA
    assert Held(config_of(shape), FLOAT32).weight_bytes == 4 * (MATRICES + 64)


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "READ_BYTES", 32 << 20)
    monkeypatch.setattr(limits, "SIZES", (256,))
    found = limits.measure("cpu", [FLOAT32, torch.bfloat16, FLOAT32])
    assert set(found.rates) == {FLOAT32, torch.bfloat16}
    assert 1e8 < found.read < 1e13 and all(1e8 < rate < 1e14 for rate in found.rates.values())
    assert set(found.as_json()) == {"read_gb_per_second", "float32_gflops", "bfloat16_gflops"}


def test_on_cuda_the_gpu_suite_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(setting: Any, report: Report) -> None:
        assert setting.cuda and not setting.tiny
        for name, figure in (("read", 4.0), ("copy", 3.0), ("float16", 700.0), ("bfloat16", 800.0), ("int8", 1500.0)):
            report.add(name, figure, "T")

    monkeypatch.setattr(limits.cuda, "run", run)
    monkeypatch.setattr(limits, "release", lambda device: None)
    found = limits.measure("cuda", [torch.bfloat16, torch.float16])
    assert found == Limits(4e12, {torch.bfloat16: 8e14, torch.float16: 7e14})


def test_the_better_of_two_measurements_counts() -> None:
    one, other = Limits(1.0, {FLOAT32: 5.0}), Limits(2.0, {FLOAT32: 4.0})
    assert one.best(other) == other.best(one) == Limits(2.0, {FLOAT32: 5.0})
