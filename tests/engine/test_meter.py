"""What the scheduler's meter says, on a clock that the test moves: a second per step."""

from __future__ import annotations

from collections.abc import Collection

import pytest
from fake_engine import FakeEngine, sampled

from tandem.server.engine.counts import NEXT_TOKEN, Counts, Histogram
from tandem.server.engine.plan import Sampled
from tandem.server.engine.request import EngineError


def run(engine: FakeEngine, budget: int | None = None) -> Counts:
    while engine.scheduler.has_work:
        engine.now += 1
        engine.step(budget)
    return engine.scheduler.counts


def seen(histogram: Histogram) -> tuple[int, float]:
    return histogram.count, histogram.sum


def test_a_histogram_puts_a_bound_into_its_own_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    histogram.observe(9, times=3)
    assert histogram.counts == [2, 2, 4] and histogram.sum == 7.5 + 27 and histogram.count == 8


def test_the_times_of_a_request() -> None:
    engine = FakeEngine(max_seqs=1)
    engine.add([5] * 6, sampled(4))
    engine.add([5] * 9, sampled(3))  # waits until the first has ended
    counts = run(engine)
    assert seen(counts.queue_seconds) == (2, 1 + 5)  # it starts in the step after the first one's last
    assert seen(counts.prefill_seconds) == (2, 0)
    assert seen(counts.first_token_seconds) == (2, 1 + 5)
    assert seen(counts.next_token_seconds) == (3 + 2, 5)
    assert seen(counts.token_seconds) == (2, 2) and seen(counts.decode_seconds) == (2, 3 + 2)
    assert seen(counts.request_seconds) == (2, 4 + 7) and seen(counts.inference_seconds) == (2, 5)
    assert seen(counts.request_prompt_tokens) == (2, 15) and seen(counts.generation_tokens) == (2, 7)
    assert counts.finished["length"] == 2


@pytest.mark.parametrize("apart", [(), (3, 4), (2, 5), range(1, 9)], ids=str)
def test_tokens_that_come_together_are_told_as_those_that_come_alone(
    apart: Collection[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps where somebody wants log-probabilities every row is told by itself."""
    engine = FakeEngine()
    execute = engine.runner.execute

    def with_logprobs(*arguments) -> Sampled:
        result = execute(*arguments)
        if engine.now in apart:
            result.logprobs = [None for _ in result.tokens]
        return result

    monkeypatch.setattr(engine.runner, "execute", with_logprobs)
    for length in (5, 6, 7):
        engine.add([length] * length, sampled(length))
    engine.add([9] * 9, sampled(4), n=2)
    counts = run(engine)
    tokens = 5 + 6 + 7 + 4 * 2
    assert seen(counts.next_token_seconds) == (tokens - 5, tokens - 5)
    assert counts.next_token_seconds.counts[NEXT_TOKEN.index(1.0)] == tokens - 5
    assert seen(counts.generation_tokens) == (5, tokens) and counts.generated_tokens == tokens
    assert seen(counts.request_longest) == (4, 5 + 6 + 7 + 4) and counts.forked_tokens == 9


def test_whoever_waits_for_its_turn_waits_longer() -> None:
    engine = FakeEngine()
    for _ in range(3):
        engine.add([5] * 3, sampled(5))
    engine.now += 1
    engine.step()  # all have their first token
    counts = run(engine, budget=1)
    assert seen(counts.next_token_seconds) == (12, 33)  # the first turn takes 1, 2 and 3 seconds, the others 3 each
    assert seen(counts.request_seconds) == (3, 11 + 12 + 13)


def test_preemptions_show_in_intervals() -> None:
    engine = FakeEngine(pages=8, page_size=4, prefix_caching=False)
    for number in range(2):
        engine.add([number + 3] * 12, sampled(12))
    counts = run(engine)
    assert counts.preemptions == counts.request_preemptions.sum > 0
    assert counts.next_token_seconds.count == 2 * 11 and counts.next_token_seconds.sum > 2 * 11
    assert counts.generated_tokens == 24


def test_what_is_refused_and_what_is_ended_from_outside() -> None:
    engine = FakeEngine(max_waiting_requests=2)
    ids = [engine.add([5] * 3) for _ in range(2)]
    assert engine.refuse([5] * 3).kind == "overloaded"
    counts = engine.scheduler.counts
    assert counts.rejected == {"max_waiting_requests": 1, "max_waiting_tokens": 0}
    engine.scheduler.abort(ids[0])
    assert counts.queue_seconds.count == counts.inference_seconds.count == 0  # it never ran
    engine.now = 2
    engine.step()
    engine.scheduler.abort(ids[1], 0, "stop")
    engine.add([5] * 3)
    plan = engine.scheduler.plan()
    assert plan is not None
    engine.scheduler.fail(EngineError("internal", "a bug"))
    assert counts.finished == {"stop": 1, "length": 0, "abort": 1, "error": 1}
    assert seen(counts.generation_tokens) == (3, 1)
