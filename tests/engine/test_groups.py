"""Groups in the scheduler: a prompt is computed once, kept while it is needed, and never in anybody's way for good."""

from __future__ import annotations

from typing import Any

import pytest
from fake_engine import FakeEngine, sampled

from tandem.server.engine.request import EngineError

LOGPROBS: dict[str, Any] = {"want": frozenset({"prompt_logprobs"}), "prompt_logprobs": 0}


def finished(engine: FakeEngine) -> list[int]:
    return [output.request_id for output in engine.outputs if output.finish]


def run(engine: FakeEngine) -> None:
    while engine.scheduler.has_work:
        engine.step()


# Computed once


@pytest.mark.parametrize("budget", [64, 7])
@pytest.mark.parametrize("caching", [True, False])
def test_prompt_and_members_are_computed_once_each(budget: int, caching: bool) -> None:
    engine = FakeEngine(page_size=16, context=200, max_batched_tokens=budget, prefix_caching=caching)
    group = engine.open(list(range(100)), 25)
    members = [engine.join(group, [member] * 25, **(LOGPROBS if member % 2 else {})) for member in range(9)]
    tokens = 0
    while engine.scheduler.has_work:
        tokens += engine.step().tokens
    counts = engine.scheduler.counts
    assert tokens == counts.computed_tokens == 100 + 9 * 25
    assert counts.prompt_tokens - counts.cached_tokens == tokens and counts.forked_tokens == 900
    assert counts.started == 9 and sorted(finished(engine)) == members
    assert engine.scheduler.pages.used == 7  # the prompt's
    engine.scheduler.close(group)
    assert engine.scheduler.pages.used == 0


def test_members_share_full_pages_and_copy_the_last() -> None:
    engine = FakeEngine()
    group = engine.open([1] * 10, 4)
    engine.step()
    for member in range(3):
        engine.join(group, [2, member])
    plan = engine.scheduler.plan()
    assert plan is not None and plan.counts == [2, 2, 2]
    assert [source for source, _ in plan.copies] == [engine.scheduler._jobs.groups.get(group).anchor.table[2]] * 3
    assert engine.scheduler.pages.used == 3 + 3


def test_a_prompt_that_fills_its_pages_is_not_copied() -> None:
    engine = FakeEngine()
    group = engine.open([1] * 8, 4)
    engine.step()
    engine.join(group, [2])
    assert engine.step().copies == []


def test_the_first_log_probability_comes_from_the_pinned_row() -> None:
    engine = FakeEngine(max_batched_tokens=4)
    group = engine.open([1] * 8, 4)
    first, second = engine.step(), engine.step()
    assert (first.pins, second.pins) == ([], [(0, 0)])
    engine.join(group, [5, 6, 7], **LOGPROBS)
    (rows,) = engine.step().prompt_logprobs
    assert (rows.first, rows.end, rows.pin) == (7, 10, 0)
    assert engine.outputs[-1].prompt_logprobs is not None and engine.outputs[-1].cached_tokens == 0
    assert engine.outputs[-1].prompt_logprobs.values == [5.0, 6.0, 7.0]


def test_a_known_prompt_is_found_except_for_its_last_row() -> None:
    engine = FakeEngine()
    for _ in range(2):
        group = engine.open([1] * 16, 4)
        engine.join(group, [2])
        run(engine)
    assert engine.scheduler.counts.computed_tokens == 17 + 4 + 1  # a page that ends before the last row may be used
    assert engine.scheduler.counts.cached_tokens == 12


def test_what_a_member_computed_is_found_by_others() -> None:
    engine = FakeEngine()
    group = engine.open([1] * 10, 8)
    engine.join(group, [2] * 8)
    run(engine)
    request = engine.add([1] * 10 + [2] * 8, sampled(1))
    run(engine)
    assert engine.cached(request) == 16


# Who goes first


def test_members_go_at_the_rank_of_their_group() -> None:
    engine = FakeEngine(max_seqs=1)
    group = engine.open([1, 2], 4)
    later, urgent = engine.add([3, 4], sampled(1)), engine.add([5, 6], sampled(1), priority=-1)
    members = [engine.join(group, [7]), engine.join(group, [8])]
    run(engine)
    assert finished(engine) == [urgent, *members, later]


def test_a_preempted_member_computes_its_own_tokens_again() -> None:
    engine = FakeEngine(max_seqs=1, max_batched_tokens=8)
    group = engine.open([1] * 16, 12)
    member = engine.join(group, [2] * 12, **LOGPROBS)
    for _ in range(3):
        engine.step()
    urgent = engine.add([3], sampled(1), priority=-1)
    run(engine)
    assert finished(engine) == [urgent, member] and engine.scheduler.counts.preemptions == 1
    assert engine.scheduler.counts.computed_tokens == 16 + 8 + 1 + 12
    assert engine.outputs[-1].prompt_logprobs is not None
    assert engine.outputs[-1].prompt_logprobs.values == [2.0] * 12


# Room


def test_members_pass_a_request_that_does_not_fit_beside_their_prompt() -> None:
    engine = FakeEngine(pages=8, page_size=4, max_seqs=1)
    group = engine.open([1] * 16, 4)
    engine.step()
    first = engine.join(group, [2])
    large, small = engine.add([3] * 20, sampled(4)), engine.add([4], sampled(1))
    members = [first, *(engine.join(group, [member]) for member in range(3))]
    run(engine)
    assert finished(engine) == [*members, large, small]


def test_a_decode_that_finds_no_page_beside_pinned_ones_waits_for_them() -> None:
    engine = FakeEngine(pages=6, page_size=2, max_seqs=1, context=12)
    answer = engine.add([1], sampled(11))
    engine.step()
    group = engine.open([2] * 6, 2, priority=-1)
    members = [engine.join(group, [member]) for member in range(4)]
    run(engine)
    assert finished(engine) == [*members, answer] and len(engine.tokens(answer)) == 11


def test_an_idle_group_gives_its_pages_to_who_needs_them_and_is_computed_again() -> None:
    engine = FakeEngine(pages=8, page_size=4, prefix_caching=False)
    group = engine.open([1] * 16, 4)
    run(engine)
    assert engine.scheduler.pages.used == 4
    request = engine.add([2] * 20, sampled(4))
    run(engine)
    assert len(engine.tokens(request)) == 4 and engine.scheduler.pages.used == 0
    member = engine.join(group, [3, 4])
    run(engine)
    assert finished(engine)[-1] == member
    assert engine.scheduler.counts.computed_tokens == 16 + 20 + 3 + 16 + 2


def test_an_idle_group_is_given_up_for_a_prompt_and_not_for_want_of_a_slot() -> None:
    engine = FakeEngine(pages=8, page_size=4, max_seqs=1)
    idle = engine.open([1] * 12, 4)
    run(engine)
    engine.add([2], sampled(3))
    engine.add([3], sampled(3))
    run(engine)
    assert engine.scheduler._jobs.groups.get(idle).pinned
    engine.open([4] * 16, 4)
    run(engine)
    assert not engine.scheduler._jobs.groups.get(idle).pinned


def test_prompts_that_would_leave_no_room_for_a_member_wait_their_turn() -> None:
    engine = FakeEngine(pages=7, page_size=4)
    groups = [engine.open([number] * 12, 8) for number in range(3)]
    members = [[engine.join(group, [9] * 8) for _ in range(2)] for group in groups]
    engine.step()
    assert engine.scheduler.pages.used == 3
    for group, own in zip(groups, members, strict=True):
        while not set(own) <= set(finished(engine)):
            engine.step()
        engine.scheduler.close(group)
    assert engine.scheduler.counts.computed_tokens == 3 * (12 + 16)


# What cannot be


def refused(engine: FakeEngine, group: int, tokens: list[int]) -> EngineError:
    error = engine.scheduler.add(engine.member(group, tokens))
    assert error is not None
    return error


@pytest.mark.parametrize(
    ("prompt", "longest", "says"),
    [
        (0, 4, "no tokens"),
        (30, 11, "41 tokens, the context 40"),
        (13, 6, "6 pages of 4 tokens, the KV cache has 5"),
        (3, 0, "0"),
    ],
)
def test_a_group_that_cannot_be_is_told_to_its_members(prompt: int, longest: int, says: str) -> None:
    engine = FakeEngine(pages=5 if prompt == 13 else 64, context=40)
    group = engine.open([1] * prompt, longest)
    error = refused(engine, group, [1])
    assert error.kind == "invalid" and says in error.message
    assert not engine.scheduler.has_work and engine.scheduler.close(group) == []


def test_members_that_cannot_be() -> None:
    engine = FakeEngine()
    group = engine.open([1] * 5, 3)
    assert "4 tokens" in refused(engine, group, [1] * 4).message
    assert "0 tokens" in refused(engine, group, []).message
    assert "no open group 77" in refused(engine, 77, [1]).message
    engine.scheduler.close(group)
    assert f"no open group {group}" in refused(engine, group, [1]).message


def test_the_bound_on_what_waits_holds_for_groups_and_members() -> None:
    engine = FakeEngine(max_seqs=1, max_waiting_requests=2)
    engine.add([1], sampled(9))
    engine.step()
    group = engine.open([1] * 5, 3)
    engine.join(group, [1])
    assert refused(engine, group, [1]).kind == "overloaded"
    another = engine.open([1] * 5, 3)
    run(engine)
    assert refused(engine, another, [1]).kind == "overloaded"  # as it was when the group was opened
    engine.join(group, [1])


# Ends


def test_closing_aborts_what_is_not_finished() -> None:
    engine = FakeEngine(max_seqs=1, max_batched_tokens=4)
    group = engine.open([1] * 6, 8)
    members = [engine.join(group, [2] * 8) for _ in range(3)]
    for closed_after in (3, 1, 0):
        for _ in range(closed_after):
            engine.step()
        outputs = engine.scheduler.close(group)
        assert [(output.request_id, output.finish) for output in outputs] == [(member, "abort") for member in members]
        assert engine.scheduler.pages.used == 0 and not engine.scheduler.has_work and not engine.scheduler.waiting
        group = engine.open([1] * 6, 8)
        members = [engine.join(group, [2] * 8) for _ in range(3)]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_deadline_ends_a_group_and_its_members(steps: int) -> None:
    engine = FakeEngine(max_seqs=1, max_batched_tokens=8)
    group = engine.open([1] * 6, 12, deadline=5.0)
    members = [engine.join(group, [2] * 12), engine.join(group, [3] * 8, deadline=4.0)]
    for _ in range(steps):
        engine.step()
    (early,) = engine.scheduler.expire(4.0)
    (late,) = engine.scheduler.expire(5.0)
    assert [early.request_id, late.request_id] == members[::-1]
    assert early.error is not None and late.error is not None and "the group was opened" in late.error.message
    assert {early.error.kind, late.error.kind} == {"deadline"}
    assert "no open group" in refused(engine, group, [1]).message
    assert not engine.scheduler.has_work and engine.scheduler.pages.used == 0


def test_a_step_that_fails_with_the_prompt_in_it_fails_the_members() -> None:
    engine = FakeEngine()
    group = engine.open([1] * 6, 8)
    member = engine.join(group, [2])
    assert engine.scheduler.plan() is not None
    error = EngineError("internal", "out of memory")
    assert [(output.request_id, output.error) for output in engine.scheduler.fail(error)] == [(member, error)]
    assert refused(engine, group, [1]) == error
    assert not engine.scheduler.has_work and engine.scheduler.pages.used == 0


def test_a_step_that_fails_with_a_member_in_it_fails_no_other() -> None:
    engine = FakeEngine(max_seqs=1, prefix_caching=False)
    group = engine.open([1] * 6, 8)
    members = [engine.join(group, [2]), engine.join(group, [3, 4])]
    engine.step()
    assert engine.scheduler.plan() is not None
    failed = engine.scheduler.fail(EngineError("internal", "out of memory"))
    assert [output.request_id for output in failed] == members[:1]
    run(engine)
    assert finished(engine) == members[1:]
    assert engine.scheduler.counts.computed_tokens == 6 + 1 + 6 + 2


# New weights


@pytest.mark.parametrize("keep", [True, False])
def test_new_weights_compute_the_prompt_again_before_the_next_member(keep: bool) -> None:
    engine = FakeEngine(max_seqs=1, max_batched_tokens=8)
    group = engine.open([1] * 8, 12)
    members = [engine.join(group, [number] * 12, **LOGPROBS) for number in range(2)]
    engine.step()
    engine.step()  # eight tokens of the first member
    engine.runner.version = 1
    engine.scheduler.set_version(1, keep)
    run(engine)
    assert finished(engine) == members
    assert engine.scheduler.counts.computed_tokens == 8 + 8 + 8 + 12 + 12
    assert [output.weight_version for output in engine.outputs] == [1, 1]


def test_new_weights_make_an_idle_group_wait_for_its_next_member() -> None:
    engine = FakeEngine()
    group = engine.open([1] * 8, 12)
    run(engine)
    engine.runner.version = 1
    engine.scheduler.set_version(1)
    assert not engine.scheduler.has_work and engine.scheduler.pages.used == 0
    engine.join(group, [2], **LOGPROBS)
    run(engine)
    assert engine.scheduler.counts.computed_tokens == 8 + 8 + 1
