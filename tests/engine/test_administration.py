"""Commands at a hub: pausing, aborting, forgetting prefixes, normalising; with both runners where steps matter."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from hubs import answer, assert_nothing_is_held, collect, generate, make_hub, prompt, score

from tandem.server.engine.commands import AbortAll, Normalize, Pause, Refused, ResetPrefixCache, Resume
from tandem.server.engine.hub import Hub
from tandem.server.engine.request import Output
from tandem.server.engine.standing import restore

ahead = pytest.mark.parametrize("run_ahead", [False, True], ids=["waits", "ahead"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    write_checkpoint(directory / "policy", "llama-gqa", tokenizer=False)
    write_checkpoint(directory / "reward", "llama-reward", tokenizer=False)
    return directory


def policy(checkpoints: Path, run_ahead: bool = False) -> Hub:
    return make_hub(checkpoints / "policy", run_ahead=run_ahead)


def steps(hub: Hub, count: int) -> list[Output]:
    return [output for _ in range(count) for output in hub.step()]


def until_idle(hub: Hub) -> list[Output]:
    outputs: list[Output] = []
    while hub.has_work:
        outputs += hub.step()
    return outputs


@ahead
def test_what_ended_during_a_command_is_still_told(checkpoints: Path, run_ahead: bool) -> None:
    """Nothing is left to compute, but there is something to say."""
    hub = policy(checkpoints, run_ahead)
    assert hub.submit(generate(1, "policy", prompt(20), max_tokens=4, ignore_eos=True)) == []
    outputs = steps(hub, 2)
    hub.execute(Pause("policy", "wait"))  # takes the steps that are left
    assert hub.has_work
    outputs += until_idle(hub)
    assert len(collect(outputs)[0].token_ids) == 4 and outputs[-1].finish == "length"


@ahead
def test_keep_freezes_what_runs_and_queues_what_comes(checkpoints: Path, run_ahead: bool) -> None:
    hub = policy(checkpoints, run_ahead)
    first, second = (generate(i, "policy", prompt(20, i), max_tokens=30, ignore_eos=True) for i in (1, 2))
    expected = [one.token_ids for one in answer(policy(checkpoints, run_ahead), first, second)]
    assert hub.submit(first) == []
    outputs = steps(hub, 8)
    version = hub.catalog.version
    paused = hub.execute(Pause("policy"))
    assert (paused.models, paused.aborted, paused.frozen) == (("policy",), 0, 1)
    assert hub.catalog.models[0].paused and hub.catalog.version == version + 1 and hub.stats()[0].paused
    outputs += hub.step()  # what the last step had brought
    assert hub.submit(second) == [] and not hub.has_work
    assert len(hub.step()) == 0
    assert hub.execute(Resume()).models == ("policy",) and not hub.catalog.models[0].paused
    outputs += until_idle(hub)
    for request, tokens in zip((first, second), expected, strict=True):
        mine = collect(output for output in outputs if output.request_id == request.id)
        assert mine[0].token_ids == tokens
    assert_nothing_is_held(hub)


@ahead
def test_abort_ends_requests_with_what_they_have(checkpoints: Path, run_ahead: bool) -> None:
    hub = policy(checkpoints, run_ahead)
    running = generate(1, "policy", prompt(20), n=2, max_tokens=300, ignore_eos=True)
    whole = collect(hub.run([running])[1])
    assert hub.submit(replace(running, id=2)) == []
    outputs = steps(hub, 10)
    paused = hub.execute(Pause("policy", "abort"))
    assert (paused.aborted, paused.frozen) == (1, 0)
    outputs += hub.step()
    found = collect(outputs)
    assert sorted(found) == [0, 1]
    for choice, one in found.items():
        assert one.finish == "abort" and one.token_ids == whole[choice].token_ids[: len(one.token_ids)]
        assert len(one.token_ids) >= 8
    (refused,) = hub.submit(replace(running, id=3))
    assert refused.error is not None and refused.error.kind == "unavailable" and "is paused" in refused.error.message
    hub.execute(Resume("policy"))
    assert collect(hub.run([replace(running, id=4)])[4])[1].token_ids == whole[1].token_ids
    assert_nothing_is_held(hub)


@ahead
def test_wait_lets_requests_finish_and_none_in(checkpoints: Path, run_ahead: bool) -> None:
    hub = policy(checkpoints, run_ahead)
    running = generate(1, "policy", prompt(20), max_tokens=25, ignore_eos=True)
    assert hub.submit(running) == []
    outputs = steps(hub, 3)
    task = hub.order(Pause(mode="wait"))
    hub.turn()
    assert not task.done and not hub.catalog.models[0].paused
    (refused,) = hub.submit(replace(running, id=2))
    assert refused.error is not None and "finishes what it has" in refused.error.message
    while not task.done:
        outputs += hub.step()
        hub.turn()
    outputs += hub.step()
    assert len(collect(outputs)[0].token_ids) == 25 and hub.catalog.models[0].paused
    assert hub.submit(replace(running, id=3))[0].error is not None
    hub.execute(Resume())
    assert len(answer(hub, replace(running, id=4))[0].token_ids) == 25


def test_wait_ends_where_nothing_will_finish(checkpoints: Path) -> None:
    hub = policy(checkpoints)
    running = generate(1, "policy", prompt(20), max_tokens=300, ignore_eos=True)
    assert hub.submit(running) == []
    steps(hub, 3)
    waiting = hub.order(Pause(mode="wait"))
    hub.turn()
    hub.execute(Resume())
    hub.turn()
    with pytest.raises(Refused, match="was resumed") as refused:
        waiting.result()
    assert refused.value.error.kind == "conflict"
    hub.execute(Pause())
    with pytest.raises(Refused, match="paused with 1 requests"):
        hub.execute(Pause(mode="wait"))


def test_deadlines_expire_while_paused(checkpoints: Path) -> None:
    hub = policy(checkpoints)
    late = replace(generate(1, "policy", prompt(20), max_tokens=300, ignore_eos=True), deadline=10.0)
    assert hub.submit(late) == []
    steps(hub, 3)
    hub.execute(Pause())
    (output,) = hub.expire(10.1)
    assert output.error is not None and output.error.kind == "deadline"
    hub.execute(Resume())
    assert not hub.has_work
    assert_nothing_is_held(hub)


def test_one_model_pauses_and_others_go_on(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "policy", checkpoints / "reward")
    hub.execute(Pause("policy"))
    assert [card.paused for card in hub.catalog.models] == [True, False]
    assert hub.submit(generate(1, "policy", prompt(5))) == []
    assert answer_of_score(hub) is not None
    assert hub.execute(Pause()).models == ("policy", "reward")


def answer_of_score(hub: Hub) -> list[float] | None:
    return collect(hub.run([score(9, "reward", prompt(30))])[9])[0].scores


def test_a_score_that_is_aborted_is_an_error(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "policy", checkpoints / "reward", max_num_batched_tokens=16)
    assert hub.submit(score(1, "reward", prompt(100))) == []
    assert hub.submit(generate(2, "policy", prompt(5), ignore_eos=True, max_tokens=50)) == []
    steps(hub, 2)
    assert hub.execute(AbortAll("reward")).requests == 1
    (error,) = [output.error for output in hub.step() if output.request_id == 1]
    assert error is not None and error.kind == "unavailable" and "aborted" in error.message
    assert hub.execute(AbortAll()).requests == 1
    assert [output.finish for output in hub.step() if output.request_id == 2] == ["abort"]
    assert_nothing_is_held(hub)


def test_prefixes_are_forgotten(checkpoints: Path) -> None:
    hub = policy(checkpoints)
    request = generate(1, "policy", prompt(64))
    cached = [answer(hub, replace(request, id=i))[0].cached_tokens for i in (1, 2)]
    assert cached[0] == 0 and cached[1] == 48
    reset = hub.execute(ResetPrefixCache())
    assert reset.pages >= 4 and reset.requests == 0 and hub.stats()[0].pages_cached == 0
    assert answer(hub, replace(request, id=3))[0].cached_tokens == 0
    hub.execute(Pause(clear_cache=True))
    hub.execute(Resume())
    assert answer(hub, replace(request, id=4))[0].cached_tokens == 0


def test_rewards_are_normalised_by_the_card_alone(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "policy", checkpoints / "reward")
    before = answer_of_score(hub)
    assert hub.execute(Normalize("reward", 0.5, 2.0, "mean_std")).std == 2.0
    again = make_hub(checkpoints / "policy", checkpoints / "reward")
    restore(again, hub.standing)
    for card in (hub.catalog.models[1], again.engines[1].card):
        assert (card.reward_mean, card.reward_std, card.reward_normalization) == (0.5, 2.0, "mean_std")
    assert answer_of_score(hub) == before
    for wrong in (Normalize("policy", 0.0, 1.0), Normalize("reward", math.nan, 1.0), Normalize("reward", 0.0, 0.0)):
        with pytest.raises(Refused, match=r"policy gives text|mean is nan|std is 0"):
            hub.execute(wrong)


def test_a_model_that_is_not_there(checkpoints: Path) -> None:
    hub = policy(checkpoints)
    with pytest.raises(Refused, match=r"no model .other..*policy") as refused:
        hub.execute(Pause("other"))
    assert refused.value.error.kind == "not_found"
