"""Several models in one process: loading, memory, whose turn it is, and how long a turn may be."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EOS_ID, make_model, write_checkpoint
from hubs import answer, assert_nothing_is_held, collect, generate, make_hub, prompt, score

from tandem.model.errors import CheckpointError
from tandem.server.engine import memory
from tandem.server.engine.engine import Step
from tandem.server.engine.hub import Hub, StepCost
from tandem.server.engine.options import EngineOptions, ModelSpec, OptionsError
from tandem.server.engine.request import ModelCard, Output
from tandem.server.engine.warm_memory import WarmMemory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(directory / "llama-gqa", "llama-gqa")
    write_checkpoint(directory / "llama-reward", "llama-reward", tokenizer=False)
    return directory


def test_policy_and_reward_model_share_a_process(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "llama-gqa", checkpoints / "llama-reward")
    policy, reward = hub.catalog.models
    assert (policy.role, policy.labels, reward.role, reward.labels) == ("policy", 0, "reward", 1)
    texts = [generate(i, "llama-gqa", prompt(20, i), max_tokens=10) for i in range(5)]
    pairs = [score(10 + i, "llama-reward", prompt(30, i)) for i in range(5)]
    together = answer(hub, *texts, *pairs)
    alone = make_hub(checkpoints / "llama-gqa")
    model = make_model("llama-reward")
    for request, found in zip([*texts, *pairs], together, strict=True):
        if request.sampling:
            assert found.token_ids == answer(alone, request)[0].token_ids
        else:
            with torch.inference_mode():
                expected = model(torch.tensor([request.token_ids])).logits[0].tolist()
            assert found.scores == pytest.approx(expected, abs=1e-4)


def test_idle_moments_provide_memory_behind_the_pages_in_use(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    provide = WarmMemory.provide

    def noting(warm: WarmMemory, used: int) -> bool:
        asked.append(used)
        return provide(warm, used)

    monkeypatch.setattr(WarmMemory, "provide", noting)
    hub = make_hub(checkpoints / "llama-gqa")
    while hub.idle():
        pass
    assert asked and set(asked) == {0}
    asked.clear()
    hub.submit(generate(1, "llama-gqa", prompt(40), max_tokens=8))
    while hub.has_work:
        assert not hub.idle()
        hub.step()
    assert not asked
    hub.idle()
    (engine,) = hub.engines
    pages = -(-(40 + 8 - 1) // engine.scheduler.pages.page_size)  # the last token's keys are never written
    assert asked == [pages * engine.kv_bytes // engine.kv_pages]


def test_abort_and_deadline_reach_every_model(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "llama-gqa", checkpoints / "llama-reward")
    assert hub.submit(generate(1, "llama-gqa", prompt(5), max_tokens=200)) == []
    hub.step()
    assert [(o.request_id, o.finish) for o in hub.abort(1)] == [(1, "abort")]
    late = score(2, "llama-reward", prompt(5))
    object.__setattr__(late, "deadline", 10.0)
    assert hub.submit(late) == []
    assert hub.expire(9.9) == []
    (output,) = hub.expire(10.1)
    assert output.error is not None and output.error.kind == "deadline"
    assert not hub.has_work and not hub.step()
    assert_nothing_is_held(hub)


# Loading


def load(*specs: ModelSpec, **options: Any) -> Hub:
    return Hub.load(specs, EngineOptions(**({"kv_cache_memory_bytes": 4 << 20} | options)))


def test_cards_and_the_division_of_memory(checkpoints: Path) -> None:
    policy = ModelSpec("chat", str(checkpoints / "llama-gqa"), aliases=("gpt-4",), kv_share=0.75, max_model_len=200)
    reward = ModelSpec("judge", str(checkpoints / "llama-reward"), role="reward")
    hub = load(policy, reward, max_num_seqs=200, max_num_batched_tokens=500)
    chat, judge = hub.catalog.models
    assert (chat.name, chat.aliases, chat.context, chat.vocab_size) == ("chat", ("gpt-4",), 200, 320)
    assert (chat.dtype, chat.architecture, chat.weight_version) == ("float32", "LlamaForCausalLM", 0)
    assert chat.end_ids == (EOS_ID,) and judge.context == 512
    assert hub.engine("gpt-4") is hub.engine("chat") is hub.engines[0] and hub.engine("gpt-5") is None
    page = 2 * 2 * 2 * 16 * 16 * 4  # K and V, layers, kv heads, tokens, head size, float32
    first, second = hub.engines
    assert first.kv_pages == (3 << 20) // page and second.kv_pages == 512 // 16 + 1, (
        "a share, and one request at full length and a page"
    )
    assert (first.kv_bytes, first.kv_tokens) == (first.kv_pages * page, first.kv_pages * 16)
    assert first.weight_bytes > 0 and first.digest != second.digest
    assert chat.max_request_tokens == 200 and judge.max_request_tokens == min(512, second.kv_tokens)
    assert "4 MiB" in hub.division


def test_pages_that_nobody_could_fill_are_not_taken(checkpoints: Path) -> None:
    hub = load(ModelSpec("m", str(checkpoints / "llama-gqa"), max_model_len=64), max_num_seqs=3)
    assert hub.engines[0].kv_pages == memory.FULL_SEQUENCES * 3 * 4


def test_memory_by_formula() -> None:
    options = EngineOptions()
    assert memory.kv_cache_bytes(options, 8 << 30) == 2 << 30
    assert memory.kv_cache_bytes(options, 80 << 30) == 4 << 30
    assert memory.kv_cache_bytes(EngineOptions(kv_cache_memory_bytes=77), 8 << 30) == 77
    assert 1 << 20 < memory.available_memory() < 1 << 50


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_control_group(version: int, tmp_path: Path) -> None:
    """What the checkpoint's files take there gives way."""
    names, prefix = {
        1: (("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"), "total_"),
        2: (("memory.max", "memory.current", "memory.stat"), ""),
    }[version]

    def group(*contents: str) -> float:
        for name, content in zip(names, contents, strict=True):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        return memory.group_memory(tmp_path)

    assert memory.group_memory(tmp_path) == math.inf
    assert group("1000\n", "900\n", f"anon 300\n{prefix}inactive_file 500\n") == 600
    assert group("1000\n", "1001\n", "anon 300\n") == 0
    assert group("max\n", "900\n", "anon 300\n") == math.inf


def test_shares() -> None:
    def shares(*given: float | None) -> list[float]:
        return memory.shares([ModelSpec(f"m{i}", "", kv_share=share) for i, share in enumerate(given)])

    assert shares(None) == [1.0] and shares(None, None) == [0.5, 0.5]
    assert shares(0.6, None, None) == pytest.approx([0.6, 0.2, 0.2])
    assert shares(0.6, 0.4) == [0.6, 0.4] and shares(0.5, 0.1) == [0.5, 0.1]
    for wrong in ((0.6, 0.5), (1.0, None), (0.0, None), (-0.1,)):
        with pytest.raises(OptionsError, match="kv shares"):
            shares(*wrong)


def test_what_cannot_be_hosted_says_which_model_and_why(checkpoints: Path, tmp_path: Path) -> None:
    llama, reward = str(checkpoints / "llama-gqa"), str(checkpoints / "llama-reward")
    with pytest.raises(CheckpointError, match=r"model chat: .*nowhere"):
        load(ModelSpec("chat", str(tmp_path / "nowhere")))
    shutil.copytree(llama, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="model chat: "):
        load(ModelSpec("chat", str(tmp_path / "broken")))
    for role in ("reward", "value"):
        with pytest.raises(
            CheckpointError, match=r"model a: .*no head that gives a score or a value: none of score\.w"
        ):
            load(ModelSpec("a", llama, role=role))
    cases: list[tuple[list[ModelSpec], dict[str, Any], str]] = [
        ([ModelSpec("a", reward, role="policy")], {}, "model a: .*score head.*policy"),
        ([ModelSpec("a", llama), ModelSpec("b", reward, aliases=("a",))], {}, "two hosted models are called a"),
        ([ModelSpec("a", llama, max_model_len=1000)], {}, "model a: max_model_len 1000 exceeds its context of 512"),
        ([ModelSpec("a", llama)], {"kv_cache_memory_bytes": 10_000}, "KV cache of model a"),
    ]
    for specs, options, message in cases:
        with pytest.raises(OptionsError, match=message):
            load(*specs, **options)
    with pytest.raises(OptionsError, match="max_num_batched_tokens is 10"):
        EngineOptions(max_num_batched_tokens=10)
    with pytest.raises(OptionsError, match="page_size is 0"):
        EngineOptions(page_size=0)


def test_end_ids_are_those_of_config_and_tokenizer(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "llama-gqa", tmp_path / "m")
    file = tmp_path / "m" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"eos_token": {"content": "<|user|>"}}))
    hub = load(ModelSpec("m", str(tmp_path / "m")))
    assert hub.catalog.models[0].end_ids == (EOS_ID, 3)
    plain = tmp_path / "m" / "tokenizer.json"  # a token of the vocabulary that nothing lists as added
    word = next(iter(json.loads(plain.read_text())["model"]["vocab"].items()))
    file.write_text(json.dumps({"eos_token": word[0]}))
    assert load(ModelSpec("m", str(tmp_path / "m"))).catalog.models[0].end_ids == tuple(sorted({EOS_ID, word[1]}))
    file.write_text("{broken")
    assert load(ModelSpec("m", str(tmp_path / "m"))).catalog.models[0].end_ids == (EOS_ID,)


# Whose turn it is


class FakeEngine:
    """Takes `fixed + per_token * tokens` seconds a step; wants `prompt` tokens, then decodes `rows` for ever."""

    waits = False

    def __init__(self, name: str, clock: list[float], *, rows: int = 0, prompt: int = 0, limit: int = 1000) -> None:
        self.card = ModelCard(name, "policy", "", "", "", 1, 1, (), 0, 0, 0)
        self.clock, self.rows, self.prompt, self.limit = clock, rows, prompt, limit
        self.decoding, self.last_step, self.steps = 0, Step(), list[int]()
        self.used = 0.0
        self.scheduler = type("S", (), {"pages": type("P", (), {"page_size": 16})})
        self.fixed, self.per_token = 0.010, 0.001

    @property
    def has_work(self) -> bool:
        return self.rows > 0 or self.prompt > 0

    def step(self, budget: int | None) -> list[Output]:
        limit = self.limit if budget is None else min(budget, self.limit)
        rows = min(self.rows, limit)
        chunk = min(self.prompt, limit - rows)
        self.prompt -= chunk
        self.last_step = Step(rows + chunk, chunk == 0)
        self.decoding = self.rows
        self.steps.append(rows + chunk)
        seconds = self.fixed + self.per_token * (rows + chunk)
        self.clock[0] += seconds
        self.used += seconds
        return []


def fake_hub(*engines: FakeEngine, weights: list[float] | None = None, target: float | None = None) -> Hub:
    given: Any = engines
    return Hub(given, weights=weights, step_target=target, clock=lambda: engines[0].clock[0])


def test_device_time_goes_by_weight() -> None:
    clock = [0.0]
    slow, quick, heavy = (FakeEngine(name, clock, rows=rows) for name, rows in (("s", 60), ("q", 1), ("h", 10)))
    hub = fake_hub(slow, quick, heavy, weights=[1.0, 1.0, 2.0])
    for _ in range(2000):
        hub.step()
    total = slow.used + quick.used + heavy.used
    assert slow.used / total == pytest.approx(0.25, abs=0.02)
    assert quick.used / total == pytest.approx(0.25, abs=0.02)
    assert heavy.used / total == pytest.approx(0.5, abs=0.02)


def test_who_was_idle_has_nothing_saved_up() -> None:
    clock = [0.0]
    steady, idler = FakeEngine("s", clock, rows=10), FakeEngine("i", clock)
    hub = fake_hub(steady, idler)
    for _ in range(1000):
        hub.step()
    idler.rows = 10
    before = steady.used
    for _ in range(20):
        hub.step()
    assert idler.used == pytest.approx(steady.used - before, abs=0.03)
    # nor does having worked count against a model once the others have slept
    steady.rows, idler.rows = 0, 0
    hub.step()
    steady.rows = idler.rows = 10
    marks = steady.used, idler.used
    for _ in range(20):
        hub.step()
    assert steady.used - marks[0] == pytest.approx(idler.used - marks[1], abs=0.03)


def test_weights_hold_beside_decodes_too() -> None:
    clock = [0.0]
    chat, judge = FakeEngine("c", clock, rows=50), FakeEngine("j", clock, prompt=1 << 40)
    hub = fake_hub(chat, judge, weights=[1.0, 3.0])
    for _ in range(1000):
        hub.step()
    assert judge.used / (chat.used + judge.used) == pytest.approx(0.75, abs=0.03)


def test_a_prompt_beside_decodes_takes_no_longer_than_one_of_their_steps() -> None:
    clock = [0.0]
    chat, judge = FakeEngine("c", clock, rows=50), FakeEngine("j", clock)
    hub = fake_hub(chat, judge)
    judge.prompt = 4000
    for _ in range(10):
        hub.step()
    assert max(judge.steps) < 200  # begins small, before anything is known
    judge.prompt, judge.steps = 20_000, []
    waits: list[float] = []
    last = clock[0]
    while judge.prompt:
        count = len(chat.steps)
        hub.step()
        if len(chat.steps) > count:
            waits.append(clock[0] - last)
            last = clock[0]
    decode = chat.fixed + 50 * chat.per_token
    waits = sorted(waits[3:])
    assert len(waits) > 300 and waits[-1] <= 2 * decode  # its own step, and never more than one of the other's
    assert 30 <= judge.steps[-2] <= 45  # the budget converges on a chunk of most of a decode step's time


def test_without_decodes_beside_it_a_prompt_has_the_whole_step() -> None:
    clock = [0.0]
    one, other = FakeEngine("a", clock, prompt=5000), FakeEngine("b", clock, prompt=5000)
    hub = fake_hub(one, other)
    while hub.has_work:
        hub.step()
    assert set(one.steps) == set(other.steps) == {1000}


def test_the_step_target_can_be_given_and_decodes_are_never_cut() -> None:
    clock = [0.0]
    chat, judge = FakeEngine("c", clock, rows=5), FakeEngine("j", clock, rows=40, prompt=100_000)
    hub = fake_hub(chat, judge, target=0.100)
    for _ in range(200):
        hub.step()
    assert judge.steps[-1] == pytest.approx(90, abs=3)
    tight = fake_hub(chat, judge, target=0.001)
    for _ in range(200):
        tight.step()
    assert judge.steps[-1] == 40 + 16


def test_step_cost_is_the_line_through_both_kinds_of_steps() -> None:
    cost = StepCost()
    assert cost.tokens_within(1.0) is None and cost.decode_seconds is None
    cost.observe(10, True, 0.02)
    assert cost.tokens_within(0.04) == 20 and cost.decode_seconds == 0.02
    for _ in range(60):
        cost.observe(110, False, 0.07)
    assert cost.tokens_within(0.04) == pytest.approx(50, abs=1)
    for _ in range(60):
        cost.observe(5, False, 0.07)  # prompts no longer than the decodes: no line, but their rate
    assert cost.tokens_within(0.14) == pytest.approx(10, abs=1)


def test_choices_and_requests_of_several_models_stay_apart(checkpoints: Path) -> None:
    hub = load(ModelSpec("a", str(checkpoints / "llama-gqa")), ModelSpec("b", str(checkpoints / "llama-gqa")))
    outputs = hub.run([generate(1, "a", prompt(9), n=2, temperature=1.0), generate(2, "b", prompt(9), temperature=1.0)])
    first, second = collect(outputs[1]), collect(outputs[2])
    assert set(first) == {0, 1} and first[0].token_ids == second[0].token_ids != first[1].token_ids
