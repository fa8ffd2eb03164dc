"""One model through scheduler, runner and sampler: the answers are transformers', whatever happens on the way."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model, write_checkpoint
from hubs import Answer, answer, assert_nothing_is_held, collect, generate, make_hub, prompt, score

from tandem.model.model import Model
from tandem.server.engine.hub import Hub
from tandem.server.engine.request import Request
from tandem.server.engine.sampler import Sampler

TEXTS = ["llama-gqa", "gpt2", "bloom", "qwen3"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for variant in [*TEXTS, "llama-reward", "bloom-reward"]:
        write_checkpoint(directory / variant, variant, tokenizer=False)
    return directory


@pytest.fixture
def llama(checkpoints: Path) -> Hub:
    return make_hub(checkpoints / "llama-gqa")


def reference(variant: str, ids: list[int], tokens: int) -> list[int]:
    model = make_model(variant)
    out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def log_softmax(variant: str, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return make_model(variant)(torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("variant", TEXTS)
def test_greedy_text_is_transformers(checkpoints: Path, variant: str) -> None:
    """Prompts around the page size, together, in chunks of 11 tokens."""
    hub = make_hub(checkpoints / variant, max_num_batched_tokens=11, max_num_seqs=4)
    prompts = [prompt(length) for length in (1, 5, 16, 17, 40)]
    found = answer(hub, *(generate(i, variant, ids, max_tokens=24) for i, ids in enumerate(prompts)))
    for ids, one in zip(prompts, found, strict=True):
        expected = reference(variant, ids, 24)
        assert one.token_ids == expected
        ended = 2 in expected
        assert (one.finish, one.stop_id) == (("stop", 2) if ended else ("length", None))


SAMPLED: dict[str, Any] = {
    "max_tokens": 24,
    "temperature": 1.0,
    "seed": 77,
    "top_p": 0.95,
    "top_k": 200,
    "presence_penalty": 0.6,
    "frequency_penalty": 0.2,
    "repetition_penalty": 1.1,
    "logit_bias": ((9, 1.5),),
    "bad_words": ((12,), (9, 9)),
    "min_tokens": 10,
}
PROMPT = prompt(37)


def others(count: int) -> list[Request]:
    """Requests of all kinds, to run beside the one that is looked at."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 9},
        {"presence_penalty": 1.0},
    ]
    return [
        generate(100 + i, "llama-gqa", prompt(3 + i % 50, i), max_tokens=5 + i % 30, seed=i, **kinds[i % 4])
        for i in range(count)
    ]


def sampled(hub: Hub, *beside: Request) -> list[int]:
    found = answer(hub, generate(1, "llama-gqa", PROMPT, **SAMPLED), *beside)[0]
    assert found.finish in ("length", "stop")
    return found.token_ids


def test_a_seeded_request_gives_the_same_tokens_however_it_is_run(checkpoints: Path) -> None:
    path = checkpoints / "llama-gqa"
    alone = sampled(make_hub(path))
    assert len(alone) >= 10 and len(set(alone)) > 5
    other_seed = answer(make_hub(path), generate(1, "llama-gqa", PROMPT, **(SAMPLED | {"seed": 78})))[0]
    assert other_seed.token_ids != alone
    assert sampled(make_hub(path, max_num_seqs=65), *others(64)) == alone
    assert sampled(make_hub(path, enable_prefix_caching=False), *others(5)) == alone
    for budget in (7, 13):
        assert sampled(make_hub(path, max_num_batched_tokens=budget, max_num_seqs=5), *others(9)) == alone
    for page_size in (1, 5):
        assert sampled(make_hub(path, page_size=page_size), *others(5)) == alone
    again = make_hub(path)
    first = answer(again, generate(1, "llama-gqa", PROMPT, **SAMPLED))[0]
    second = answer(again, generate(2, "llama-gqa", PROMPT, **SAMPLED))[0]
    assert (first.cached_tokens, second.cached_tokens) == (0, 32)
    assert first.token_ids == second.token_ids == alone


def test_preemption_changes_no_token(checkpoints: Path) -> None:
    """Pages for one and a half sequences: the later one is preempted again and again."""
    path = checkpoints / "llama-gqa"
    alone = sampled(make_hub(path))
    hub = make_hub(path, pages=14, page_size=8, max_num_seqs=4)
    first = [generate(100 + i, "llama-gqa", prompt(40, i), max_tokens=30, temperature=1.0, seed=i) for i in range(3)]
    outputs = hub.run([*first, generate(1, "llama-gqa", PROMPT, **SAMPLED)])
    assert hub.engines[0].stats.counts.preemptions > 0
    assert collect(outputs[1])[0].token_ids == alone
    big = make_hub(path)
    for request in first:
        assert collect(outputs[request.id])[0].token_ids == answer(big, request)[0].token_ids
    assert_nothing_is_held(hub)


def test_choices_differ_and_the_prompt_is_computed_once(llama: Hub) -> None:
    together = collect(llama.run([generate(1, "llama-gqa", PROMPT, n=4, **SAMPLED)])[1])
    texts = [together[choice].token_ids for choice in range(4)]
    assert len({tuple(text) for text in texts}) == 4
    counts = llama.engines[0].stats.counts
    drawn = sum(map(len, texts))
    assert counts.computed_tokens == len(PROMPT) + drawn - 4  # the last token of a choice is never computed
    again = collect(llama.run([generate(2, "llama-gqa", PROMPT, n=4, **SAMPLED)])[2])
    assert [again[choice].token_ids for choice in range(4)] == texts
    assert answer(llama, generate(3, "llama-gqa", PROMPT, **SAMPLED))[0].token_ids == texts[0]
    assert_nothing_is_held(llama)


def test_choices_that_wait_for_a_slot_are_the_same(checkpoints: Path, llama: Hub) -> None:
    expected = collect(llama.run([generate(1, "llama-gqa", PROMPT, n=6, **SAMPLED)])[1])
    narrow = make_hub(checkpoints / "llama-gqa", max_num_seqs=2)
    got = collect(narrow.run([generate(1, "llama-gqa", PROMPT, n=6, **SAMPLED)])[1])
    assert {choice: one.token_ids for choice, one in got.items()} == {c: one.token_ids for c, one in expected.items()}


@pytest.mark.parametrize("variant", TEXTS)
def test_logprobs_are_transformers(checkpoints: Path, variant: str) -> None:
    hub = make_hub(checkpoints / variant, max_num_batched_tokens=24)
    ids = prompt(30)
    found = answer(hub, generate(1, variant, ids, max_tokens=12, temperature=0.9, seed=4, logprobs=3))[0]
    everything = log_softmax(variant, ids + found.token_ids)[len(ids) - 1 : -1]
    for row, token, value, rank, top_ids, top_values in zip(
        everything,
        found.token_ids,
        found.logprobs.values,
        found.logprobs.ranks,
        found.logprobs.top_ids,
        found.logprobs.top_values,
        strict=True,
    ):
        assert value == pytest.approx(float(row[token]), abs=1e-4)
        assert rank == 1 + int((row > row[token]).sum())
        assert top_ids == row.topk(3).indices.tolist()
        assert top_values == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def check_prompt_logprobs(found: Answer, ids: list[int], first: int, top: int) -> None:
    rows = log_softmax("llama-gqa", ids)
    logprobs = found.prompt_logprobs
    assert logprobs is not None and len(logprobs.values) == len(ids) - 1 - first
    for place, value in enumerate(logprobs.values):
        row, token = rows[first + place], ids[first + place + 1]
        assert value == pytest.approx(float(row[token]), abs=1e-4)
        assert logprobs.ranks[place] == 1 + int((row > row[token]).sum())
        assert logprobs.top_ids[place] == row.topk(top).indices.tolist()


def test_prompt_logprobs_with_and_without_a_cached_prefix(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "llama-gqa", max_num_batched_tokens=23, max_num_seqs=8)
    ids = prompt(70)
    want = frozenset({"prompt_logprobs"})
    whole = Request(1, "llama-gqa", ids, None, want, prompt_logprobs=2)
    check_prompt_logprobs(answer(hub, whole)[0], ids, 0, 2)
    cut = replace(whole, id=2, first_needed_row=40)
    found = answer(hub, cut)[0]
    assert found.cached_tokens == 32  # whole pages before the first row that is needed
    check_prompt_logprobs(found, ids, 40, 2)
    mixed = replace(generate(3, "llama-gqa", ids, max_tokens=4), want=want | {"tokens"}, prompt_logprobs=5)
    first, second, plain = answer(hub, mixed, replace(whole, id=4), generate(5, "llama-gqa", ids, max_tokens=4))
    check_prompt_logprobs(first, ids, 0, 5)
    check_prompt_logprobs(second, ids, 0, 2)
    assert first.token_ids == plain.token_ids and plain.prompt_logprobs is None


@pytest.mark.parametrize("variant", ["llama-reward", "bloom-reward"])
def test_scores_are_transformers_alone_and_together(checkpoints: Path, variant: str) -> None:
    model = make_model(variant)
    hub = make_hub(checkpoints / variant, max_num_batched_tokens=33)
    prompts = [prompt(length, 5) for length in (1, 2, 15, 16, 33, 60)]
    together = answer(hub, *(score(i, variant, ids) for i, ids in enumerate(prompts)))
    for i, ids in enumerate(prompts):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].tolist()
        assert together[i].scores == pytest.approx(expected, abs=1e-4)
        alone = answer(make_hub(checkpoints / variant), score(1, variant, ids))[0]
        assert alone.scores == pytest.approx(together[i].scores, abs=1e-5) and alone.finish == "stop"


def test_no_page_is_lost_in_a_mix_of_ends_and_aborts(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "llama-gqa", pages=40, page_size=4, max_num_seqs=6, max_num_batched_tokens=32)
    generator = torch.Generator().manual_seed(0)
    number, alive = 0, set()
    for turn in range(150):
        if turn < 120 and torch.rand((), generator=generator) < 0.5:
            number += 1
            length, tokens, n = torch.randint(1, 30, (3,), generator=generator).tolist()
            ids = prompt(length, number % 3)
            request = generate(number, "llama-gqa", ids, n=1 + n % 3, max_tokens=tokens, temperature=1.0, seed=number)
            assert hub.submit(request) == []
            alive.add(number)
        if alive and torch.rand((), generator=generator) < 0.2:
            hub.abort(max(alive), None if turn % 2 else 0)
        hub.step()
    hub.run([])
    assert number > 30 and hub.engines[0].stats.counts.preemptions > 0
    assert_nothing_is_held(hub)


def test_a_step_that_raises_ends_its_own_requests_alone(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two run, one is admitted only after the step that fails; it and later ones are answered as ever."""
    path = checkpoints / "llama-gqa"
    hub = make_hub(path, max_num_seqs=2)
    requests = [generate(i, "llama-gqa", prompt(20, i), **(SAMPLED | {"seed": i})) for i in range(3)]
    sample, calls = Sampler.sample, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("the device fell off")
        return sample(*arguments)

    monkeypatch.setattr(Sampler, "sample", failing)
    with caplog.at_level(logging.CRITICAL, "tandem.server.engine.engine"):
        outputs = hub.run(requests)
    for number in (0, 1):
        last = outputs[number][-1]
        assert last.finish == "error" and last.error is not None and last.error.kind == "internal"
        assert "RuntimeError" in last.error.message
    survivor = collect(outputs[2])[0]
    assert survivor.token_ids == answer(make_hub(path), requests[2])[0].token_ids
    again = answer(hub, replace(requests[0], id=9))[0]
    assert again.token_ids == answer(make_hub(path), requests[0])[0].token_ids
    assert_nothing_is_held(hub)


def test_a_step_that_raises_is_survived_by_those_that_sat_it_out(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A budget of one token: every step has one row. One fails; the other request goes on with its tokens."""
    path = checkpoints / "llama-gqa"
    requests = [generate(i, "llama-gqa", prompt(9, i), **(SAMPLED | {"seed": i})) for i in range(2)]
    hub = make_hub(path, max_num_seqs=4)
    for request in requests:
        assert hub.submit(request) == []
    outputs = [*hub.step(), *hub.step()]
    forward = Model.forward
    monkeypatch.setattr(Model, "forward", lambda *_: 1 / 0)
    with caplog.at_level(logging.CRITICAL, "tandem.server.engine.engine"):
        outputs += hub.engines[0].step(1)
    monkeypatch.setattr(Model, "forward", forward)
    for rest in hub.run([]).values():
        outputs += rest
    answers = [collect(o for o in outputs if o.request_id == i)[0] for i in range(2)]
    assert [one.finish for one in answers].count("error") == 1
    for request, one in zip(requests, answers, strict=True):
        if one.finish != "error":
            assert one.token_ids == answer(make_hub(path), request)[0].token_ids
    assert_nothing_is_held(hub)


def test_numbers_that_are_not_finite_are_errors(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    """NaN in the row of one token poisons requests that read it, and no others."""
    hub = make_hub(checkpoints / "llama-gqa", checkpoints / "llama-reward")
    for engine in hub.engines:
        weight = engine.runner.model.decoder.embedding  # [V, D]
        weight[5] = torch.nan
    bad, good = [7, 5, 9], [7, 6, 9]
    with caplog.at_level(logging.CRITICAL, "tandem.server.engine.engine"):
        outputs = hub.run(
            [
                generate(1, "llama-gqa", bad),
                generate(2, "llama-gqa", good),
                score(3, "llama-reward", bad),
                score(4, "llama-reward", good),
                Request(5, "llama-gqa", bad, None, frozenset({"prompt_logprobs"}), prompt_logprobs=0),
            ]
        )
    for number in (1, 3, 5):
        error = outputs[number][-1].error
        assert error is not None and error.kind == "internal" and "not finite" in error.message
        assert outputs[number][-1].scores is None
    assert collect(outputs[2])[0].token_ids == reference("llama-gqa", good, 16)
    assert collect(outputs[4])[0].scores is not None
    assert_nothing_is_held(hub)


def test_parameters_that_leave_no_token_are_the_callers_error(llama: Hub) -> None:
    both = [generate(1, "llama-gqa", PROMPT, allowed_ids=(7,), bad_words=((7,),)), generate(2, "llama-gqa", PROMPT)]
    outputs = llama.run(both)
    error = outputs[1][-1].error
    assert error is not None and error.kind == "invalid"
    assert collect(outputs[2])[0].token_ids == reference("llama-gqa", PROMPT, 16)


REFUSED = [
    (score(1, "llama-gqa", [3, 4]), "invalid", "language model", "model"),
    (generate(1, "llama-reward", [3, 4]), "invalid", "reward model", "model"),
    (Request(1, "llama-reward", [3], None, frozenset({"prompt_logprobs"})), "invalid", "reward model", "model"),
    (replace(score(1, "llama-reward", [3]), prompt_logprobs=0), "invalid", "reward model", "model"),
    (Request(1, "llama-gqa", [3], None), "invalid", "sampling", "sampling"),
    (replace(generate(1, "llama-gqa", [3]), want=frozenset({"tokens", "logprobs"})), "invalid", "logp", "logprobs"),
    (Request(1, "llama-gqa", [3], None, frozenset({"prompt_logprobs"})), "invalid", "how many", "prompt_logprobs"),
    (generate(1, "llama-gqa", [3], n=0), "invalid", "n is 0", "n"),
    (generate(1, "llama-gqa", [3], n=2, max_tokens=0), "invalid", "n is 2", "n"),
    (replace(score(1, "llama-reward", [3]), n=3), "invalid", "n is 3", "n"),
    (Request(1, "llama-gqa", [3], None, frozenset({"values"})), "invalid", "values", "model"),
    (generate(1, "llama-gqa", [3, 320]), "invalid", "320", "prompt"),
    (generate(1, "llama-gqa", [3, -1]), "invalid", "-1", "prompt"),
    (generate(1, "llama-gqa", [3], stop_ids=(999,)), "invalid", "999", "stop_token_ids"),
    (generate(1, "llama-gqa", [3], logit_bias=((400, 1.0),)), "invalid", "400", "logit_bias"),
    (generate(1, "llama-gqa", [3], allowed_ids=(-7,)), "invalid", "-7", "allowed_token_ids"),
    (generate(1, "llama-gqa", [3], bad_words=((3, 4), (5, 321))), "invalid", "321", "bad_words"),
    (generate(1, "llama-gqa", prompt(600)), "invalid", "600", None),
    (generate(1, "llama-gqa", []), "invalid", "no tokens", None),
    (generate(1, "nobody", [3]), "not_found", "llama-gqa, llama-reward", "model"),
    (replace(generate(1, "llama-gqa", [3]), adapter="poet"), "not_found", "poet", "model"),
]


@pytest.mark.parametrize(("request_", "kind", "says", "param"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_cannot_be_answered_is_refused_by_name(
    checkpoints: Path, request_: Request, kind: str, says: str, param: str | None
) -> None:
    hub = make_hub(checkpoints / "llama-gqa", checkpoints / "llama-reward")
    (output,) = hub.submit(request_)
    assert output.finish == "error" and output.error is not None
    assert (output.error.kind, output.error.param) == (kind, param) and says in output.error.message
    assert not hub.has_work


def test_context_ends_an_answer(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "llama-gqa", max_model_len=40)
    found = answer(hub, generate(1, "llama-gqa", PROMPT, max_tokens=50, logprobs=0))[0]
    assert found.finish == "length" and len(found.token_ids) == 3
    assert found.token_ids == reference("llama-gqa", PROMPT, 3)
