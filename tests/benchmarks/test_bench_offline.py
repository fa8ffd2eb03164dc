"""`tandem bench throughput | latency | score | kernels` on tiny models: lines, keys, figures that add up, errors."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint
from typer.testing import CliRunner

from tandem.benchmarks.bench import kernels, limits, local, offline, score, sides
from tandem.benchmarks.bench.cli import app
from tandem.benchmarks.bench.local import Local
from tandem.benchmarks.bench.sides import LocalSide, Setup
from tandem.server.engine.options import EngineOptions, ModelSpec

VLLM_THROUGHPUT = ["elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"]
VLLM_LATENCY = ["avg_latency", "latencies", "percentiles"]
NUMBER = r"\d+(\.\d+)?(e-\d+)?"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "llama"
    write_checkpoint(path, "llama-gqa", tokenizer=True)
    return str(path)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "judge"
    write_checkpoint(path, "llama-reward")
    return str(path)


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(limits, "READ_BYTES", 16 << 20)
    monkeypatch.setattr(limits, "SIZES", (128,))
    yield
    torch.set_num_threads(threads)


def bench(*words: str | Path | int, status: int = 0) -> str:
    """What the command says: on stdout, or, where it fails, on stderr."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exit_code == status, found.output
    return found.stderr if status else found.stdout


def measured(tmp_path: Path, *words: str | Path | int) -> tuple[list[str], dict[str, Any]]:
    """Lines and JSON."""
    file = tmp_path / "result.json"
    small = ("--threads", 1, "--kv-cache-memory-bytes", "16M")
    lines = bench(*words, *small, "--output-json", file).splitlines()
    return lines, json.loads(file.read_text())


# Throughput ---------------------------------------------------------------------------------------------------------


def test_throughput_says_what_vllm_says_and_more(tmp_path: Path, llama: str) -> None:
    words = ("--model", llama, "--num-prompts", 6, "--input-len", 20, "--output-len", 5, "--runs", 3)
    lines, found = measured(tmp_path, "throughput", *words)
    per_second = rf"{NUMBER} requests/s, {NUMBER} total tokens/s, {NUMBER} output tokens/s"
    assert re.fullmatch(f"Throughput: {per_second}", lines[0])
    assert lines[1:3] == ["Total num prompt tokens:  120", "Total num output tokens:  30"]
    assert lines[3].startswith("Tandem: ")
    assert list(found)[1:6] == VLLM_THROUGHPUT and next(iter(found)) == "model_id"
    own = found["engines"]["tandem"]
    assert found["elapsed_time"] == pytest.approx(np.median(own["elapsed_times"])) and len(own["elapsed_times"]) == 3
    assert found["num_requests"] == 6 and found["total_num_tokens"] == 150
    assert found["tokens_per_second"] == pytest.approx(150 / found["elapsed_time"])
    assert found["requests_per_second"] == pytest.approx(6 / found["elapsed_time"])
    assert found["output_tokens_per_second"] == pytest.approx(30 / found["elapsed_time"])
    assert own["output_tokens_per_second"]["median"] == pytest.approx(30 / found["elapsed_time"])
    assert own["fraction_of_limit"]["median"] == pytest.approx(own["least_seconds"] / found["elapsed_time"])
    assert own["cpu_seconds_per_output_token"]["median"] > 0
    assert own["steps"] == 5, "one step for the prompts, which gives the first tokens, and four more"
    assert 0 < own["first_token_seconds"]["median"] < found["elapsed_time"]
    assert own["prefix_cache_share"] == 0 and found["ratios"] == {}
    policy = own["roles"]["policy"]
    assert policy["output_tokens_per_second"]["median"] == pytest.approx(30 / found["elapsed_time"])
    assert policy["prompt_tokens_per_second"]["median"] == pytest.approx(120 / found["elapsed_time"])
    assert {"date", "command", "commit", "machine", "versions"} <= set(found)


def test_answers_of_several_choices_and_a_shared_prefix(tmp_path: Path, llama: str) -> None:
    words = ("--num-prompts", 4, "--input-len", 8, "--prefix-len", 32, "--output-len", 3, "--n", 2, "--runs", 2)
    cached = ("--enable-prefix-caching", "--max-num-seqs", 1)
    _, found = measured(tmp_path, "throughput", "--model", llama, *words, *cached)
    assert found["num_output_tokens"] == 4 * 2 * 3 and found["num_prompt_tokens"] == 4 * 40
    # two pages of 16 are common to all; the first prompt computes them in every run
    assert found["engines"]["tandem"]["prefix_cache_share"] == pytest.approx(3 * 32 / 160)


def test_a_reward_model_scores_every_answer_beside_the_policy(llama: str, judge: str) -> None:
    specs = [ModelSpec("policy", llama), ModelSpec("reward", judge)]
    side = LocalSide(Local(specs, EngineOptions(kv_cache_memory_bytes=32 << 20, max_waiting_requests=64)), reward=True)
    ids = [[7 + n] * 12 for n in range(5)]
    told: list[int] = []
    sample = side.generate(ids, [6] * 5, tick=told.append)
    assert sample.output_tokens == 30
    assert told == list(range(1, 11)), "five answers, then their five scores"
    assert sample.counted["reward"].prompt_tokens == 5 * (12 + 6) and sample.counted["reward"].generated_tokens == 0
    assert sample.counted["policy"].prompt_tokens == 60 and sample.counted["policy"].generated_tokens == 30
    roles = offline.roles_of([sample])
    reward = {name: rate["median"] for name, rate in roles["reward"].items() if name.endswith("second")}
    assert reward["prompt_tokens_per_second"] == pytest.approx(90 / sample.seconds)
    assert reward["requests_per_second"] == pytest.approx(5 / sample.seconds)


def test_a_chat_is_rendered_with_the_models_template(llama: str) -> None:
    setup = Setup(llama, EngineOptions())
    load = offline.prompts(setup, offline.Dataset("chat", count=3, input_len=10, output_len=4))
    assert len(load.token_ids) == 3 and load.output_lens == [4, 4, 4]
    assert all(ids[0] == 1 and ids[-1] == 4 for ids in load.token_ids), "<s> first, <|assistant|> last"


def test_what_others_use_is_told_apart(monkeypatch: pytest.MonkeyPatch, llama: str) -> None:
    """The machine works 5 s during each run, of which the engine has the least part."""
    clock = itertools.count(100.0, 5.0)
    monkeypatch.setattr(sides, "machine_seconds", lambda: next(clock))
    side = LocalSide(Local([ModelSpec("policy", llama)], EngineOptions(kv_cache_memory_bytes=16 << 20)))
    load = offline.Load([[5] * 8], [4])
    setup = Setup(llama, EngineOptions(), runs=2, warmups=0)
    samples = offline.run(setup, {"tandem": side}, load)["tandem"]
    assert [sample.others for sample in samples] == pytest.approx([5.0 - sample.cpu_seconds for sample in samples])
    cores = offline.figures(load, samples, None, None)["others_cpu_cores"]
    assert cores == pytest.approx(sum(s.others for s in samples) / sum(s.seconds for s in samples))
    own = offline.figures(load, samples, None, None)
    assert any("quiet machine" in line for line in offline.of_engine("", own))
    assert not any("quiet" in line for line in offline.of_engine("", own | {"others_cpu_cores": 0.0}))


def test_a_free_step_has_no_limit(tmp_path: Path) -> None:
    words = ("--model", "null", "--num-prompts", 20, "--input-len", 100, "--output-len", 10)
    lines, found = measured(tmp_path, "throughput", *words)
    assert found["num_output_tokens"] == 200 and found["engines"]["tandem"]["steps"] == 10
    assert "limits" not in found and "fraction_of_limit" not in found["engines"]["tandem"]
    assert not any("limit" in line for line in lines)


def test_the_same_load_in_int8(tmp_path: Path, llama: str) -> None:
    """Its limit is that of the bytes which are read then."""
    words = ("--model", llama, "--num-prompts", 2, "--input-len", 9, "--output-len", 3)
    _, found = measured(tmp_path, "throughput", *words, "--dtype", "int8", "--kv-cache-dtype", "int8")
    assert found["num_output_tokens"] == 6 and "weights int8, KV int8" in found["engines"]["tandem"]["dtype"]
    setup = Setup(llama, EngineOptions(), "int8", kv_cache_dtype="int8")
    held = sides.held_of(setup)
    assert held is not None and (held.matrices, held.pages) == (torch.int8, torch.int8)


def test_rates_by_role_are_said() -> None:
    rates = {f"{kind}_per_second": {"median": n} for n, kind in enumerate(("requests", "prompt_tokens"), 2)}
    rates |= {f"{kind}_tokens_per_second": {"median": n} for n, kind in enumerate(("computed", "output"), 4)}
    assert offline.role_text("policy", rates | {"preemptions": 0}) == "3 prompt, 4 computed, 5 output tokens/s"
    said = offline.role_text("reward", rates | {"preemptions": 7})
    assert said == "2 scores/s, 3 prompt, 4 computed tokens/s; 7 preemptions"


# Latency ------------------------------------------------------------------------------------------------------------


def test_latency_says_what_vllm_says_and_more(tmp_path: Path, llama: str) -> None:
    words = ("--input-len", 8, "--output-len", 6, "--batch-size", 2, "--num-iters", 7, "--num-iters-warmup", 1)
    lines, found = measured(tmp_path, "latency", "--model", llama, *words)
    taken = found["latencies"]
    assert next(iter(found)) == "model_id" and list(found)[1:4] == VLLM_LATENCY and len(taken) == 7
    assert found["avg_latency"] == pytest.approx(np.mean(taken))
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    for p, value in found["percentiles"].items():
        assert value == pytest.approx(np.percentile(taken, int(p)))
    assert lines[0] == f"Avg latency: {found['avg_latency']} seconds"
    assert lines[1] == f"10% percentile latency: {found['percentiles']['10']} seconds"
    assert lines[7].startswith("Tandem: ")
    own = found["engines"]["tandem"]
    first, after = (own[name]["median"] for name in ("first_token_seconds", "time_per_output_token_seconds"))
    assert first + 5 * after == pytest.approx(own["latency_seconds"]["median"], rel=0.5)
    assert 0 < after < own["latency_seconds"]["median"] and 0 < first < own["latency_seconds"]["median"]


def test_results_are_shown_and_kept(tmp_path: Path, llama: str) -> None:
    page, history = tmp_path / "new" / "page.html", tmp_path / "history.jsonl"
    words = ("--input-len", 4, "--output-len", 2, "--batch-size", 1, "--num-iters", 2, "--num-iters-warmup", 0)
    for _ in range(2):
        bench("latency", "--model", llama, "--threads", 1, *words, "--append-result", history, "--report", page)
    first, second = (json.loads(line) for line in history.read_text().splitlines())
    assert first["latencies"] != second["latencies"] and first["batch_size"] == second["batch_size"] == 1
    assert json.loads(page.with_suffix(".json").read_text()) == second
    assert "<img" in page.read_text() and second["model_id"] in page.read_text()


# Scores -------------------------------------------------------------------------------------------------------------


def test_shared_and_unshared_scores_are_equal(tmp_path: Path, judge: str) -> None:
    words = ("--groups", 3, "--answers", 4, "--prompt-len", 40, "--answer-len", 10, "--runs", 2, "--dtype", "float32")
    lines, found = measured(tmp_path, "score", "--model", judge, *words)
    shared, unshared = found["sides"]["shared"], found["sides"]["unshared"]
    assert found["max_score_difference"]["unshared"] < 1e-5 < found["score_spread"]
    assert unshared["computed_tokens"] == 12 * 50 and unshared["prefix_cache_share"] == 0
    # two whole pages of 16 of a prompt are found by three of the four answers
    assert shared["computed_tokens"] == 12 * 50 - 3 * 3 * 32
    assert shared["prefix_cache_share"] == pytest.approx(3 * 3 * 32 / 600)
    assert shared["scores_per_second"]["median"] == pytest.approx(np.median([12 / s for s in shared["elapsed_times"]]))
    tokens = shared["total_tokens_per_second"]["median"] / shared["scores_per_second"]["median"]
    assert tokens == pytest.approx(50)
    assert shared["least_seconds"] < unshared["least_seconds"]
    assert lines[0].startswith("Tandem: ") and any("largest difference, shared and unshared" in line for line in lines)


def test_the_bundled_reward_model_is_scored(tmp_path: Path) -> None:
    words = ("--groups", 2, "--answers", 2, "--prompt-len", 32, "--answer-len", 8, "--runs", 1, "--warmups", 0)
    _, found = measured(tmp_path, "score", *words)
    assert found["model_id"] == "demo" and found["max_score_difference"]["unshared"] < 0.1 * found["score_spread"] + 0.1


def test_a_difference_is_found() -> None:
    one, other = (score.Scored(1.0, 1.0, scores) for scores in ([1.0, 2.0], [1.5, 1.0]))
    assert score.difference([one], [other]) == 1.0


# Kernels ------------------------------------------------------------------------------------------------------------


def test_operations_at_the_models_shapes(tmp_path: Path, llama: str) -> None:
    file = tmp_path / "kernels.json"
    words = ("--rows", "1,3", "--tokens", 8, "--context", 24, "--dtype", "float32", "--threads", 1)
    said = bench("kernels", "--model", llama, *words, "--output-json", file)
    found = json.loads(file.read_text())
    rows = {one["operation"]: one for one in found["operations"]}
    for one in rows.values():
        assert one["median_us"] is not None, one
        assert one["share"] == pytest.approx(one["least_us"] / one["median_us"])
    read = found["limits"]["read_gb_per_second"] * 1e3  # bytes per microsecond
    assert rows["3 rows: rms_norm + residual"]["least_us"] == pytest.approx(4 * 3 * 64 * 4 / read)
    gate_up, rate = rows["1 rows: linear up, 64 → 192"], found["limits"]["float32_gflops"] * 1e3
    assert gate_up["least_us"] == pytest.approx(max(192 * 64 * 4 / read, 2 * 192 * 64 / rate))
    for scheme in ("int8", "w8a8"):
        least = rows[f"1 rows: {scheme} linear up, 64 → 192"]["least_us"]
        assert least == pytest.approx(max(192 * 64 / read, 2 * 192 * 64 / rate))
    for name in ("qkv, 64 → 128", "out, 64 → 64", "down, 96 → 64", "head, 64 → 320"):
        assert f"1 rows: linear {name}" in rows and f"prompt of 8: linear {name}" in rows
    for name in (
        "1 rows: paged_attention, 24 tokens each",
        "prompt of 8: paged_attention",
        "3 rows: sample, greedy, 320",
    ):
        assert name in rows
    assert said.startswith("Tandem: ") and "prompt of 8: logprobs_of, 320" in said


def test_matrices_hold_what_the_formula_counts(llama: str) -> None:
    from tandem.benchmarks.gpu.shapes import matrix_elements
    from tandem.model.config import read_config

    config = read_config(llama)
    sizes = {name: outs * ins for name, (outs, ins) in kernels.matrices(config).items()}
    assert config.layers * (sum(sizes.values()) - sizes["head"]) == matrix_elements(config)


# Wrong words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["throughput", "--model", "nowhere"], "--model nowhere: no such directory"),
        (["throughput", "--model", "random:7t"], "there is no model random:7t; there are random:125m"),
        (["throughput", "--engine", "sglang"], "there is no engine sglang; there are tandem, transformers"),
        (["throughput", "--kv-cache-dtype", "fp8"], "--kv-cache-dtype fp8: one of auto, int8, float32"),
        (["kernels", "--dtype", "int8"], "--dtype int8: give the model's own; matrices"),
        (["throughput", "--dtype", "fp8"], "--dtype fp8: one of auto, float32, bfloat16, float16, int8, w8a8"),
        (["throughput", "--input-len", "4000"], "the model's context is 2048: lower --input-len"),
        (["throughput", "--dataset", "sharegpt"], "needs a file: --dataset-path FILE"),
        (["throughput", "--engine", "transformers", "--reward", "demo"], "--reward is for --engine tandem alone"),
        (["throughput", "--engine", "tandem,transformers", "--model", "null"], "for --engine tandem alone"),
        (["latency", "--input-len", "2040", "--output-len", "9"], "exceed the model's context of 2048"),
        (["latency", "--max-num-batched-tokens", "0"], "a whole number above 0"),
        (["score", "--prompt-len", "2048"], "the model's context is 2048: ask for less"),
        (["score", "--model", "null"], "it gives no scores"),
        (["score", "--engine", "transformers"], "tandem comes first here"),
        (["kernels", "--rows", "1,x"], "--rows 1,x: whole numbers"),
        (["kernels", "--model", "null"], "has no operations"),
        (["startup", "--engine", "tandem,transformers"], "needs --model"),
        (["startup", "--engine", "transformers"], "tandem must be one of them"),
    ],
)
def test_wrong_words_are_answered_in_a_sentence(words: list[str], said: str) -> None:
    text = bench(*words, status=2)
    assert said in text and len(text.strip().splitlines()) == 1
    assert text.startswith(f"tandem bench {words[0]}: ")


def test_a_request_that_fails_ends_the_measurement(llama: str) -> None:
    engine = Local([ModelSpec("policy", llama)], EngineOptions(kv_cache_memory_bytes=16 << 20))
    with pytest.raises(ValueError, match="outside the vocabulary of 320"):
        engine.run([local.generate(0, "policy", [5] * 4, 100), local.generate(1, "policy", [320], 1)])
    assert not engine.hub.has_work, "nothing is left behind"
    assert engine.run([local.generate(2, "policy", [5] * 4, 3)]).answers[2].tokens == 3
