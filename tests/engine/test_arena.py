"""Slabs that go from model to model: the rules one by one, at random against a naive arena, and below schedulers."""

import random
from dataclasses import replace

import pytest
from arena_machine import arena_machine
from fake_engine import FakeEngine, sampled
from fake_runner import answer
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from scheduler_machine import CONTEXT, END, Ledger, random_request

from tandem.server.engine import arena as arena_module
from tandem.server.engine import pages as pages_module
from tandem.server.engine.arena import Arena, Lender
from tandem.server.engine.pages import Pages, Root

ROOT = Root("m", 1)


def pools(*own: int, slabs: int, each: int = 2, page_size: int = 1) -> tuple[Arena, list[Pages]]:
    """Pools with so many pages of their own over one arena, whose slabs are `each` pages for everybody."""
    arena = Arena([[range(n + each * s, n + each * (s + 1)) for s in range(slabs)] for n in own])
    return arena, [Pages(count, page_size, Lender(arena, number)) for number, count in enumerate(own)]


def cached(pool: Pages, *tokens: int) -> list[int]:
    """Leaves a prompt behind whose pages are cached."""
    table = pool.allocate(len(tokens))
    assert table is not None
    pool.publish(pool.chain(ROOT, []), table, tokens, len(tokens))
    pool.release(table)
    return table


def test_a_busy_model_borrows_and_one_that_is_idle_gives_back() -> None:
    arena, (one, two) = pools(2, 2, slabs=3)
    table = one.allocate(8) or []
    assert (one.held, one.used, one.free, len(one.slabs), arena.unlent) == (8, 8, 0, 3, 0)
    assert two.available == 2 and two.allocate(3) is None
    one.release(table)
    assert two.relieved and two.available == 8, "unused slabs may go over"
    assert len(two.allocate(5) or []) == 5
    assert (one.held, one.free, len(one.slabs), len(two.slabs)) == (4, 4, 1, 2)
    arena.check()


def test_pages_of_ones_own_are_taken_first_then_slabs_that_nobody_has_then_what_is_cached() -> None:
    arena, (one, two) = pools(2, 2, slabs=1)
    assert one.allocate(1) == [0] and not one.slabs
    cached(one, 7)
    assert one.cached == 1 and one.allocate(1) and one.cached == 1 and len(one.slabs) == 1, "rather than forget"
    assert one.allocate(2) and one.cached == 0
    assert two.available == 2 and arena.unlent == 0


def test_what_is_cached_on_a_slab_gives_way_to_another_model() -> None:
    _, (one, two) = pools(1, 1, slabs=1)
    cached(one, 5, 6, 7)
    assert one.cached == 3
    assert two.allocate(3) is not None
    assert (one.held, one.cached) == (1, 1)
    assert one.match(ROOT, [5, 6, 7, 8], 3) == [0]


def test_a_models_own_pages_never_leave_it() -> None:
    _, (one, two) = pools(3, 2, slabs=1)
    assert two.allocate(4) is not None and two.allocate(1) is None
    assert one.available == 3 and one.allocate(3) is not None


def test_a_used_slab_that_was_called_back_goes_when_its_last_sequence_ends() -> None:
    arena, (one, two) = pools(1, 1, slabs=2)
    tables = [one.allocate(1) or [] for _ in range(5)]
    assert two.allocate(2) is None
    leaving = next(slab for slab in one.slabs.values() if slab.leaving)
    assert one.allocate(1) is None
    first, last = [table for table in tables if table[0] in leaving.pages]
    one.release(first)
    assert (one.free, one.used, one.held, one.available) == (0, 4, 5, 0), "its page is not given out again"
    two.has_room(2)
    one.release(last)
    assert two.relieved and (one.held, two.held) == (3, 3)
    assert two.allocate(3) is not None
    arena.check()


def test_slabs_are_called_back_until_they_are_spread_evenly() -> None:
    _, (one, two, three) = pools(1, 1, 1, slabs=6)
    assert one.allocate(9) and two.allocate(5)
    assert three.allocate(20) is None and three.allocate(20) is None
    leaving = [sum(slab.leaving for slab in pool.slabs.values()) for pool in (one, two)]
    assert leaving == [2, 0], "two of four; then all have two"
    assert two.allocate(9) is None
    assert [sum(slab.leaving for slab in pool.slabs.values()) for pool in (one, two)] == [2, 0]


def test_pages_that_a_model_has_promised_stay() -> None:
    _, (one, two) = pools(1, 1, slabs=3)
    assert one.secure(5) and (one.held, one.used) == (5, 0)
    one.promise(5)
    assert two.available == 3 and two.secure(3) and not two.secure(4)
    one.promise(3)
    assert two.relieved and two.secure(5) and one.held == 3
    assert not one.secure(8)


def test_what_is_computed_on_a_slab_that_leaves_is_not_found_any_more() -> None:
    _, (one, two) = pools(1, 1, slabs=2)
    table = one.allocate(5) or []
    chain = one.chain(ROOT, [])
    one.publish(chain, table, [1, 2, 3, 4, 5], 3)
    assert two.allocate(2) is None
    one.publish(chain, table, [1, 2, 3, 4, 5], 5)
    found = one.match(ROOT, [1, 2, 3, 4, 5, 6], 5)
    assert not any(page in slab.pages for page in found for slab in one.slabs.values() if slab.leaving)
    one.check([table, found])


def test_random_use_agrees_with_a_naive_arena() -> None:
    run_state_machine_as_test(
        arena_machine(arena_module, pages_module),
        settings=settings(max_examples=250, stateful_step_count=30, deadline=None, derandomize=True, database=None),
    )


def shared_engines(own: int, slabs: int, each: int, size: int, caching: bool) -> tuple[Arena, list[FakeEngine]]:
    arena, found = pools(own, own, slabs=slabs, each=each, page_size=size)
    return arena, [
        FakeEngine(pool, size, 6, 16, CONTEXT, END, prefix_caching=caching, highest=own + slabs * each)
        for pool in found
    ]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_two_busy_models_answer_as_each_does_alone(seed: int, caching: bool) -> None:
    """Two schedulers on few pages, one after the other busier: every request is answered, and nothing is left over."""
    draw = random.Random(seed)
    arena, engines = shared_engines(10, 4, 2, 2, caching)
    ledgers = [Ledger(CONTEXT), Ledger(CONTEXT)]
    requests = [[replace(random_request(draw, n, 0.0), deadline=None) for n in range(80)] for _ in engines]
    arriving = [list(reversed(line)) for line in requests]
    most, steps = [0, 0], 0
    while any(arriving) or any(engine.scheduler.has_work for engine in engines):
        steps += 1
        assert steps < 20_000, "no end in sight"
        for number, (engine, ledger, line) in enumerate(zip(engines, ledgers, arriving, strict=True)):
            busy = steps // 60 % 2 == number
            for _ in range(min(len(line), draw.randrange(3) if busy else draw.random() < 0.1)):
                request = line.pop()
                assert engine.scheduler.add(request) is None
                ledger.add(request)
            if draw.random() < 0.02 and ledger.requests:
                ledger.take(engine.scheduler.abort(draw.choice(list(ledger.requests)), draw.choice([None, 0])))
            if (plan := engine.scheduler.plan()) is not None:
                ledger.take(engine.scheduler.commit(plan, engine.runner.execute(plan)))
            pages = engine.scheduler.pages
            pages.check([sequence.table for sequence in engine.scheduler._running.all()])
            most[number] = max(most[number], len(pages.slabs))
        arena.check()
    assert not any(any(ledger.open.values()) for ledger in ledgers) and min(most) >= 2
    for engine, ledger, line in zip(engines, ledgers, requests, strict=True):
        assert engine.scheduler.pages.used == 0
        complete = [key for key, got in ledger.tokens.items() if got == answer(line[key[0]], key[1], CONTEXT, END)[0]]
        assert len(complete) > 50


def test_a_model_that_waits_goes_on_when_another_gives_back() -> None:
    """It does not wait for something to happen in itself."""
    _, (one, two) = shared_engines(8, 2, 4, 2, caching=False)
    for token in (1, 2):
        one.add([token] * 14, sampled(2))
    one.step()
    assert len(one.scheduler.pages.slabs) == 2
    two.add([3] * 8, sampled(6))
    two.add([4] * 8, sampled(6))
    for _ in range(2):
        two.step()
        assert (two.scheduler.running, two.scheduler.waiting) == (1, 1)
    one.finish()
    two.step()
    assert (two.scheduler.running, two.scheduler.waiting) == (2, 0)
    two.finish()


def test_a_request_may_be_as_long_as_a_models_own_pages() -> None:
    _, (one, _) = shared_engines(4, 4, 2, 2, caching=True)
    assert "the KV cache holds 8" in one.refuse([1] * 6, sampled(3)).message
    one.add([1] * 6, sampled(2))
    one.finish()
