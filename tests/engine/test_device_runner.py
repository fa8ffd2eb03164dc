"""The runner that is a step ahead of the host: the same answers as the one that keeps the host waiting."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import VOCAB, write_checkpoint
from hubs import Answer, assert_nothing_is_held, collect, generate, make_hub, prompt, score
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.attention import CHUNK
from tandem.server.engine.device_runner import DeviceRunner
from tandem.server.engine.hub import Hub
from tandem.server.engine.request import Request, Sampling

VARIANTS = ("llama", "gpt2", "bloom")


@pytest.fixture(scope="module", params=VARIANTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("device") / request.param, request.param)


def sampling(draw: random.Random) -> dict[str, Any]:
    """Every parameter now and then."""
    given: dict[str, Any] = {"temperature": draw.choice([0.0, 0.7, 1.0, 2.0]), "seed": draw.randrange(1 << 40)}
    given["max_tokens"] = draw.choice([1, 2, 7, 12, 20])
    choices: list[dict[str, Any]] = [
        {"top_p": 0.6},
        {"top_k": 4},
        {"min_p": 0.2},
        {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.25},
        {"logit_bias": ((5, 3.0), (7, -2.0))},
        {"allowed_ids": tuple(range(4, 20))},
        {"bad_words": ((9,), (4, 5))},
        {"min_tokens": 5, "stop_ids": (6, 8, 11)},
        {"stop_ids": tuple(range(3, 40, 2))},
        {"logprobs": 0},
        {"logprobs": 3, "logprobs_mode": "processed", "top_k": 2},
    ]
    for chosen in draw.sample(choices, draw.choice([0, 0, 1, 2])):
        given |= chosen
    return given


def mixed_requests(model: str, count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    shared = prompt(40, seed=9)
    requests: list[Request] = []
    for number in range(count):
        ids = shared[: draw.choice([0, 16, 33])] + prompt(draw.randrange(1, 30), seed=number)
        requests.append(generate(number, model, ids, n=draw.choice([1, 1, 1, 3]), **sampling(draw)))
    for number in range(count, count + 3):
        given = Sampling(max_tokens=4, temperature=0.0, seed=1)
        want = frozenset({"tokens", "prompt_logprobs"})
        requests.append(Request(number, model, prompt(30, seed=number), given, want, prompt_logprobs=2))  # pyright: ignore
    return requests


def answers(hub: Hub, requests: list[Request]) -> list[dict[int, Answer]]:
    """In waves, so that requests come while others run."""
    outputs: dict[int, list[Any]] = {request.id: [] for request in requests}
    waiting = list(requests)
    steps = 0
    while waiting or hub.has_work:
        if waiting and steps % 3 == 0:
            for request in [waiting.pop(0) for _ in range(min(4, len(waiting)))]:
                outputs[request.id] += hub.submit(request)
        for output in hub.step():
            outputs[output.request_id].append(output)
        steps += 1
    assert_nothing_is_held(hub)
    return [collect(outputs[request.id]) for request in requests]


def assert_same(one: list[dict[int, Answer]], other: list[dict[int, Answer]]) -> None:
    assert len(one) == len(other)
    for number, (left, right) in enumerate(zip(one, other, strict=True)):
        assert left.keys() == right.keys()
        for choice in left:
            a, b = left[choice], right[choice]
            assert (a.token_ids, a.finish, a.stop_id) == (b.token_ids, b.finish, b.stop_id), f"request {number}"
            for mine, theirs in ((a.logprobs, b.logprobs), (a.prompt_logprobs, b.prompt_logprobs)):
                assert (mine is None) == (theirs is None)
                if mine is not None and theirs is not None:
                    assert mine.ranks == theirs.ranks and mine.top_ids == theirs.top_ids
                    assert mine.values == pytest.approx(theirs.values, abs=2e-5)


@pytest.mark.parametrize("pages", [None, 8], ids=["roomy", "preempting"])
@pytest.mark.parametrize("caching", [True, False], ids=["cached", "uncached"])
def test_answers_are_those_of_the_runner_that_waits(checkpoint: Path, pages: int | None, caching: bool) -> None:
    hubs = [
        make_hub(checkpoint, pages=pages, run_ahead=ahead, enable_prefix_caching=caching, max_num_seqs=6)
        for ahead in (False, True)
    ]
    assert isinstance(hubs[1].engines[0].runner, DeviceRunner)
    requests = mixed_requests(checkpoint.name, 18, seed=3)
    waited, ran_ahead = (answers(hub, requests) for hub in hubs)
    assert_same(waited, ran_ahead)
    if pages:
        assert hubs[1].engines[0].stats.counts.preemptions > 0


def test_rows_are_filled_up_to_what_was_recorded(checkpoint: Path) -> None:
    """Three decodes run in 8 rows at first, later in 4; the answers stay the same and nobody's rows change nothing."""
    hub = make_hub(checkpoint, run_ahead=True, max_num_seqs=8)
    requests = [generate(number, checkpoint.name, prompt(9, seed=number), max_tokens=20) for number in range(3)]
    first = answers(hub, requests)
    while hub.idle():
        pass
    assert_same(first, answers(hub, requests))
    assert_same(first, answers(make_hub(checkpoint, run_ahead=False), requests))
    recorded = hub.engines[0].runner._recorded
    assert all(not graphs.missing for graphs in recorded.values())


def test_choices_of_a_long_prompt_are_read_together(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is told which rows share how much, also beside other prompts; the answers stay the same."""
    told: list[tuple[int, int, int]] = []  # decodes of the step, most tokens that a group shares, rows of that group
    work = ops.attention_work

    def attention_work(lengths: Tensor, decodes: int, capacity: int, prefixes: Tensor | None = None) -> Tensor:
        if prefixes is not None:
            shared = prefixes[1, :decodes]
            assert bool((shared < lengths[:decodes]).all())
            told.append((decodes, int(shared.max()), int((shared == shared.max()).sum())))
        return work(lengths, decodes, capacity, prefixes)

    monkeypatch.setattr(ops, "attention_work", attention_work)
    long = prompt(CHUNK + 40)
    given: dict[str, Any] = {"temperature": 1.0, "max_tokens": 12}
    requests = [
        generate(0, checkpoint.name, long, n=3, **given),
        *(generate(number, checkpoint.name, prompt(9, seed=number), **given) for number in range(1, 7)),
    ]
    options: dict[str, Any] = {"max_num_seqs": 12, "max_model_len": 400}
    ran_ahead, waited = (answers(make_hub(checkpoint, run_ahead=ahead, **options), requests) for ahead in (True, False))
    assert_same(waited, ran_ahead)
    assert {(shared, rows) for _, shared, rows in told} >= {(CHUNK + 32, 3)}
    assert len({decodes for decodes, _, _ in told}) > 1
    told.clear()
    answers(make_hub(checkpoint, run_ahead=True, deterministic=True, **options), requests[:1])
    assert not told


def test_idle_moments_between_requests_do_not_disturb_them(checkpoint: Path) -> None:
    hub = make_hub(checkpoint, run_ahead=True, max_num_seqs=8)
    request = generate(1, checkpoint.name, prompt(9), max_tokens=12, temperature=1.0)
    expected = answers(hub, [request])
    assert not hub.has_work
    while hub.idle():
        assert_same(expected, answers(hub, [request]))


def test_a_stop_token_costs_one_row_and_a_limit_none(checkpoint: Path) -> None:
    hub = make_hub(checkpoint, run_ahead=True)
    counts = hub.engines[0].scheduler.counts
    answers(hub, [generate(1, checkpoint.name, prompt(5, seed=1), max_tokens=8)])
    assert counts.computed_tokens == 5 + 7
    (stopped,) = answers(hub, [generate(2, checkpoint.name, prompt(9), max_tokens=8, stop_ids=tuple(range(VOCAB)))])
    assert stopped[0].finish == "stop" and len(stopped[0].token_ids) == 1
    assert counts.computed_tokens == 5 + 7 + 9 + 1


def test_scores(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "judge", "llama", labels=1)
    hubs = [make_hub(path, run_ahead=ahead) for ahead in (False, True)]
    requests = [score(number, path.name, prompt(5 + 7 * number, seed=number)) for number in range(9)]
    waited, ran_ahead = (answers(hub, requests) for hub in hubs)
    for one, other in zip(waited, ran_ahead, strict=True):
        assert one[0].scores == pytest.approx(other[0].scores, abs=1e-5)


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("when", ["launch", "wait"])
def test_a_failed_step_ends_its_own_requests(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    hub = make_hub(checkpoint, run_ahead=True)
    engine = hub.engines[0]
    launch, steps = engine.runner.launch, []

    def breaks(plan: Any) -> Any:
        steps.append(plan)
        if len(steps) == 4 and when == "launch":
            raise Broken("no memory")
        ticket = launch(plan)
        if len(steps) == 4:
            monkeypatch.setattr(type(ticket), "wait", lambda _: (_ for _ in ()).throw(Broken("lost")))
        return ticket

    monkeypatch.setattr(engine.runner, "launch", breaks)
    outputs = hub.run([generate(1, checkpoint.name, prompt(9), max_tokens=12)])[1]
    assert outputs[-1].finish == "error" and outputs[-1].error is not None and outputs[-1].error.kind == "internal"
    monkeypatch.undo()
    assert_nothing_is_held(hub)
    request = generate(2, checkpoint.name, prompt(9), max_tokens=12)
    assert_same(answers(hub, [request]), answers(make_hub(checkpoint, run_ahead=False), [request]))


@pytest.mark.gpu
def test_replayed_decodes_give_the_tokens_of_the_first_run(checkpoint: Path) -> None:
    """On a GPU: padded up to the largest graph at first, then in graphs of their own size, as on the CPU."""
    requests = [generate(n, checkpoint.name, prompt(9 + n, seed=n), max_tokens=20) for n in range(5)]
    hub = make_hub(checkpoint, device="cuda")
    first = answers(hub, requests)
    while hub.idle():
        pass
    assert_same(first, answers(hub, requests))
    assert_same(first, answers(make_hub(checkpoint), requests))
