"""The scheduler's rules, one by one."""

import pytest
from fake_engine import FakeEngine, sampled

from tandem.server.engine.request import EngineError

# The budget


def test_decodes_go_first_and_a_prompt_takes_the_rest_in_chunks():
    engine = FakeEngine(max_batched_tokens=8)
    engine.add([1] * 5)
    engine.step()
    engine.add([2] * 17)
    plans = [engine.step() for _ in range(4)]
    assert [plan.counts for plan in plans] == [[1, 7], [1, 7], [1, 3], [1, 1]]
    assert [plan.decodes for plan in plans] == [1, 1, 1, 2]
    assert [len(plan.samples) for plan in plans] == [1, 1, 2, 2]


def test_a_step_takes_no_more_than_its_budget():
    engine = FakeEngine()
    engine.add([1] * 30)
    assert engine.step(budget=10).counts == [10]
    assert engine.scheduler.plan(budget=0) is None
    assert engine.step().counts == [20]


def test_decodes_take_turns_when_the_budget_does_not_reach_all():
    engine = FakeEngine()
    for _ in range(5):
        engine.add([1, 2, 3])
    engine.step()
    served = [slot for _ in range(5) for slot in engine.step(budget=2).slots]
    assert sorted(served) == sorted([*range(5)] * 2)


def test_steady_decoding_says_so():
    engine = FakeEngine()
    engine.add([1, 2, 3])
    engine.step()
    assert [engine.step().steady for _ in range(3)] == [False, True, True]
    engine.add([4, 5, 6])
    assert [engine.step().steady for _ in range(3)] == [False, False, True]


# Who goes first


def test_arrival_decides_among_equals_and_priority_before_it():
    engine = FakeEngine(max_seqs=1)
    first, second, urgent = (engine.add([1, 2], sampled(2), priority=priority) for priority in (0, 0, -1))
    engine.finish()
    assert [output.request_id for output in engine.outputs if output.finish] == [urgent, first, second]


def test_a_request_of_better_priority_takes_the_place_of_the_last_that_runs():
    engine = FakeEngine(max_seqs=2)
    early, late = engine.add([1, 2], sampled(9)), engine.add([1, 3], sampled(9))
    engine.step()
    urgent = engine.add([1, 4], sampled(3), priority=-1)
    assert engine.running(engine.step()) == [early, urgent]
    engine.finish()
    assert [output.request_id for output in engine.outputs if output.finish] == [urgent, early, late]


def test_equals_are_not_preempted_for_equals():
    engine = FakeEngine(max_seqs=1)
    engine.add([1, 2], sampled(5))
    engine.step()
    engine.add([1, 3], sampled(5))
    engine.finish()
    assert engine.scheduler.counts.preemptions == 0


def test_the_latest_gives_up_its_pages_and_goes_on_later_with_the_same_tokens():
    engine = FakeEngine(pages=6, page_size=2, context=12, max_seqs=3)
    requests = [engine.add([number, 1], sampled(8)) for number in range(3)]
    engine.finish()
    assert engine.scheduler.counts.preemptions > 0
    finished = [output.request_id for output in engine.outputs if output.finish]
    assert finished[0] == requests[0]
    for request in requests:
        alone = FakeEngine(pages=6, page_size=2, context=12)
        again = alone.add([request, 1], sampled(8))
        alone.finish()
        assert engine.tokens(request) == alone.tokens(again)


def test_a_preempted_sequence_finds_its_own_pages_again():
    engine = FakeEngine(max_seqs=1, pages=64)
    engine.add([7] * 20)
    engine.step()
    urgent = engine.add([1], sampled(1), priority=-1)
    assert engine.running(engine.step()) == [urgent]
    assert engine.step().starts == [20]


# Admission


def test_what_is_too_long_is_refused_with_numbers():
    engine = FakeEngine(pages=4, page_size=4, context=20)
    error = engine.refuse([1] * 21)
    assert error.kind == "invalid" and "21" in error.message and "20" in error.message
    error = engine.refuse([1] * 20)
    assert error.kind == "invalid" and "no room" in error.message
    error = engine.refuse([1] * 10, sampled(7))
    assert error.kind == "invalid" and "17" in error.message and "16" in error.message
    assert engine.refuse([], sampled(7)).kind == "invalid"
    engine.add([1] * 10, sampled(6))
    engine.add([1] * 16, None, want=frozenset({"score"}))
    engine.finish()


def test_the_context_ends_an_answer():
    engine = FakeEngine(context=10)
    request = engine.add([1] * 6, sampled(50))
    engine.finish()
    assert len(engine.tokens(request)) == 4 and engine.outputs[-1].finish == "length"


def test_a_full_line_is_an_error_that_says_when_to_come_back():
    engine = FakeEngine(max_seqs=1, max_waiting_requests=2, max_waiting_tokens=30)
    engine.add([1] * 5)
    engine.step()
    engine.add([1] * 10)
    engine.now = 7.5
    error = engine.refuse([1] * 21)
    assert error.kind == "overloaded" and error.retry_after == 8 and "30 tokens" in error.message
    engine.add([1] * 20)
    error = engine.refuse([1])
    assert error.kind == "overloaded" and "2 requests" in error.message
    engine.scheduler.abort(1)
    engine.add([1])


def test_a_request_longer_than_the_line_may_be_still_runs_when_nobody_waits():
    engine = FakeEngine(max_waiting_tokens=3)
    engine.add([1] * 9, sampled(1))
    engine.finish()


# Ends


def test_stop_ids_end_an_answer_and_are_named():
    free = FakeEngine()
    free.add([5, 6], sampled(30))
    free.finish()
    tokens = free.tokens(0)
    stop = next(token for token in tokens[4:] if token not in tokens[:4])
    place = tokens.index(stop)
    engine = FakeEngine(end_ids=[stop])
    own, model, ignored, late = (
        engine.add([5, 6], sampling)
        for sampling in (
            sampled(30, stop_ids=(stop,)),
            sampled(30, ignore_eos=False),
            sampled(30),
            sampled(30, ignore_eos=False, min_tokens=place + 1),
        )
    )
    engine.finish()
    ends = {output.request_id: output for output in engine.outputs if output.finish}
    assert engine.tokens(own) == engine.tokens(model) == tokens[: place + 1]
    assert (ends[own].finish, ends[own].stop_id) == (ends[model].finish, ends[model].stop_id) == ("stop", stop)
    assert engine.tokens(ignored) == tokens and (ends[ignored].finish, ends[ignored].stop_id) == ("length", None)
    assert len(engine.tokens(late)) > place + 1


def test_an_aborted_request_frees_its_pages_at_once_waiting_or_running():
    engine = FakeEngine(max_seqs=1)
    running, waiting = engine.add([1] * 9), engine.add([2] * 9)
    engine.step()
    assert engine.scheduler.abort(waiting)[0].finish == "abort"
    assert engine.scheduler.waiting == 0
    assert [output.finish for output in engine.scheduler.abort(running)] == ["abort"]
    assert engine.scheduler.pages.used == 0 and not engine.scheduler.has_work
    assert engine.scheduler.abort(running) == [] and engine.scheduler.abort(99) == []


def test_deadlines_end_what_waits_and_what_runs():
    engine = FakeEngine(max_seqs=1)
    requests = [engine.add([1, 2], deadline=deadline) for deadline in (5.0, 4.0, None)]
    engine.step()
    assert engine.scheduler.expire(3.9) == []
    outputs = engine.scheduler.expire(5.0)
    assert [output.request_id for output in outputs] == [requests[1], requests[0]]
    assert {output.error.kind for output in outputs if output.error} == {"deadline"}
    assert engine.running(engine.step()) == [requests[2]]


def test_many_deadlines_of_finished_requests_are_forgotten():
    engine = FakeEngine()
    for _ in range(300):
        engine.add([1], sampled(1), deadline=1e9)
        engine.finish()
    assert len(engine.scheduler._jobs._deadlines._heap) <= 65


def test_a_pause_freezes_and_goes_on():
    engine = FakeEngine()
    request = engine.add([1, 2], sampled(5))
    engine.step()
    engine.scheduler.paused = True
    assert engine.scheduler.plan() is None and not engine.scheduler.has_work
    engine.add([3], sampled(1))
    engine.scheduler.paused = False
    engine.finish()
    assert len(engine.tokens(request)) == 5


def test_a_failed_step_ends_its_requests_and_computes_the_others_again():
    engine = FakeEngine()
    requests = [engine.add([number, 2], sampled(9)) for number in range(4)]
    engine.step()
    plan = engine.scheduler.plan(budget=2)
    assert plan is not None
    failed = engine.scheduler.fail(EngineError("internal", "out of memory"))
    assert [output.request_id for output in failed] == requests[:2]
    assert engine.scheduler.pages.used == 0
    engine.finish()
    assert [len(engine.tokens(request)) for request in requests] == [1, 1, 9, 9]


# The prefix cache


def test_a_prompt_is_computed_once():
    engine = FakeEngine()
    prompt = list(range(18))
    requests = []
    for _ in range(2):
        requests.append(engine.add(prompt, sampled(3)))
        engine.finish()
    assert [engine.cached(request) for request in requests] == [0, 16]
    assert engine.tokens(requests[0]) == engine.tokens(requests[1])


def test_an_answer_is_found_as_part_of_the_next_prompt():
    engine = FakeEngine()
    first = engine.add([1, 2, 3], sampled(10))
    engine.finish()
    second = engine.add([1, 2, 3, *engine.tokens(first), 4], sampled(1))
    engine.finish()
    assert engine.cached(second) == 12


def test_at_least_one_token_is_computed():
    engine = FakeEngine()
    for _ in range(2):
        request = engine.add([1] * 16, sampled(1))
        engine.finish()
    assert engine.cached(request) == 12


def test_rows_that_are_needed_are_computed():
    engine = FakeEngine()
    engine.add([1] * 20, sampled(1))
    engine.finish()
    request = engine.add([1] * 20, None, want=frozenset({"prompt_logprobs"}), prompt_logprobs=0, first_needed_row=9)
    engine.finish()
    assert engine.cached(request) == 8
    logprobs = engine.outputs[-1].prompt_logprobs
    assert logprobs is not None and len(logprobs.values) == 10


def test_without_the_cache_nothing_is_reused():
    engine = FakeEngine(prefix_caching=False)
    for _ in range(2):
        request = engine.add([1] * 20, sampled(1))
        engine.finish()
        assert engine.cached(request) == 0
    assert engine.scheduler.pages.cached == 0


@pytest.mark.parametrize("keep", [True, False])
def test_new_weights_reuse_nothing_of_the_old(keep: bool):
    engine = FakeEngine()
    prompt = [3] * 20
    before = engine.add(prompt, sampled(4))
    engine.finish()
    in_flight = engine.add(prompt, sampled(30))
    engine.step()
    engine.scheduler.set_version(1, keep)
    engine.runner.version = 1
    assert engine.scheduler.pages.cached == 0
    engine.finish()
    after = engine.add(prompt, sampled(4))
    engine.finish()
    assert (engine.cached(before), engine.cached(in_flight)) == (0, 16)
    # kept in flight, it was partly computed by the old weights and published nothing
    assert engine.cached(after) == (0 if keep else 16)
    assert {output.weight_version for output in engine.outputs if output.request_id == after} == {1}


# Choices


def test_choices_share_the_prompt_and_copy_only_its_last_page():
    engine = FakeEngine()
    request = engine.add([1] * 10, sampled(4), n=3)
    first = engine.step()
    assert first.counts == [10] and [row for row, _ in first.samples] == [0, 0, 0]
    assert engine.scheduler.pages.used == 3
    second = engine.step()
    assert second.counts == [1, 1, 1] and len(second.copies) == 2
    assert engine.scheduler.pages.used == 5
    engine.finish()
    assert len({tuple(engine.tokens(request, choice)) for choice in range(3)}) == 3
    assert [output.cached_tokens for output in engine.outputs[:3]] == [0, None, None]


def test_a_prompt_that_fills_its_pages_is_not_copied():
    engine = FakeEngine()
    engine.add([1] * 8, sampled(4), n=3)
    engine.step()
    assert engine.step().copies == []


def test_choices_without_a_slot_start_later_from_the_cache():
    engine = FakeEngine(max_seqs=2)
    request = engine.add([1] * 10, sampled(4), n=5)
    engine.finish()
    assert [len(engine.tokens(request, choice)) for choice in range(5)] == [4] * 5
    assert sum(output.finish == "length" for output in engine.outputs) == 5
    assert engine.scheduler.counts.computed_tokens < 10 + 3 * 2 + 5 * 4


def test_one_choice_can_be_aborted_before_and_after_they_part():
    engine = FakeEngine(max_batched_tokens=6)
    request = engine.add([1] * 10, sampled(4), n=3)
    engine.step()
    assert [output.choice for output in engine.scheduler.abort(request, 0)] == [0]
    engine.step()
    assert {output.choice for output in engine.outputs} == {1, 2}
    assert engine.scheduler.abort(request, 0) == []
    engine.scheduler.abort(request, 1)
    engine.finish()
    whole = FakeEngine()
    again = whole.add([1] * 10, sampled(4), n=3)
    whole.finish()
    assert engine.tokens(request, 2) == whole.tokens(again, 2)


# Scores


def test_a_score_ends_with_the_prompt_and_takes_its_last_row():
    engine = FakeEngine(max_batched_tokens=8)
    request = engine.add([1] * 20, None, want=frozenset({"score"}))
    plans = [engine.step() for _ in range(3)]
    assert [plan.scores for plan in plans] == [[], [], [(0, plans[2].slots[0])]]
    (output,) = engine.outputs
    assert (output.request_id, output.finish, output.cached_tokens) == (request, "stop", 0)
    assert output.scores is not None and not output.token_ids
    assert engine.scheduler.pages.used == 0


def test_prompt_logprobs_are_collected_over_chunks_and_survive_preemption():
    engine = FakeEngine(max_batched_tokens=8, max_seqs=1)
    prompt = list(range(20))
    request = engine.add(prompt, sampled(0), want=frozenset({"prompt_logprobs"}), prompt_logprobs=0)
    engine.step()
    engine.add([1], sampled(1), priority=-1)
    engine.finish()
    (output,) = [output for output in engine.outputs if output.request_id == request]
    assert output.finish == "length" and output.prompt_logprobs is not None
    assert output.prompt_logprobs.values == [float(token) for token in prompt[1:]]
