"""All of the scheduler's rules at once: random use, and mixes of requests against each request alone."""

import random
from dataclasses import replace

import pytest
from fake_engine import FakeEngine
from fake_runner import answer
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from scheduler_machine import CONTEXT, END, Ledger, random_request, scheduler_machine

from tandem.server.engine import scheduler as scheduler_module


def test_random_use_keeps_every_promise():
    run_state_machine_as_test(
        scheduler_machine(scheduler_module),
        settings=settings(max_examples=1500, stateful_step_count=25, deadline=None, derandomize=True, database=None),
    )


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_requests_get_in_a_mix_what_they_get_alone(seed: int, caching: bool):
    """Many requests on few pages: forks, preemptions, aborts and small budgets on the way."""
    draw = random.Random(seed)
    pages, size, seqs = draw.choice([(10, 4, 4), (21, 2, 8), (60, 1, 16), (40, 4, 16)])
    engine = FakeEngine(pages, size, seqs, 16, CONTEXT, END, prefix_caching=caching)
    ledger = Ledger(CONTEXT)
    requests = [replace(random_request(draw, number, 0.0), deadline=None) for number in range(150)]
    arriving, steps = list(reversed(requests)), 0
    while arriving or engine.scheduler.has_work:
        for _ in range(min(len(arriving), draw.randrange(3))):
            request = arriving.pop()
            assert engine.scheduler.add(request) is None
            ledger.add(request)
        if draw.random() < 0.02:
            number = draw.randrange(len(ledger.requests) or 1)
            ledger.take(engine.scheduler.abort(number, draw.choice([None, 0, 1])))
        budget = draw.choice([None, None, None, 1, 5])
        if (plan := engine.scheduler.plan(budget)) is not None:
            ledger.take(engine.scheduler.commit(plan, engine.runner.execute(plan, budget)))
            steps += 1
    assert not any(ledger.open.values())
    engine.scheduler.pages.check([])
    assert engine.scheduler.counts.preemptions > 0
    complete = [
        key for key, tokens in ledger.tokens.items() if tokens == answer(requests[key[0]], key[1], CONTEXT, END)[0]
    ]
    assert len(complete) > 100


def test_nothing_starts_again_before_its_last_token_is_known():
    """A plan that preempts a sequence may have room for it once more while its token is on the way."""
    machine = scheduler_machine(scheduler_module)()
    machine.engine(pages=12, size=1, seqs=2, budget=3, caching=True, ahead=True)
    machine.add(seed=2111)
    machine.add(seed=2111)
    machine.teardown()


@pytest.mark.parametrize("ahead", [False, True])
def test_a_choice_tells_the_prompts_logprobs_when_the_one_it_forked_from_is_gone(ahead: bool):
    machine = scheduler_machine(scheduler_module)()
    machine.engine(pages=4, size=2, seqs=2, budget=3, caching=True, ahead=ahead)
    machine.add(seed=5764)
    machine.abort(which=0, choice=0, amid=True)
    machine.teardown()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_groups_and_requests_in_each_others_way(seed: int, ahead: bool) -> None:
    """Long lines of both on so few pages that prompts, members and decodes take them from each other all the time."""
    draw = random.Random(seed)
    machine = scheduler_machine(scheduler_module)()
    pages, size = draw.choice([(6, 3), (9, 2), (7, 4), (18, 1)])
    machine.engine(pages, size, seqs=draw.choice([1, 2, 5]), budget=draw.choice([2, 8]), caching=seed > 0, ahead=ahead)
    for _ in range(300):
        kind = draw.random()
        if kind < 0.25:
            machine.add(seed=draw.randrange(1 << 20))
        elif kind < 0.4:
            machine.open_group(seed=draw.randrange(1 << 20), members=draw.randrange(4))
        elif kind < 0.5 and machine.ledger.groups:
            machine.add_member(seed=draw.randrange(1 << 20), which=draw.randrange(4))
        elif kind < 0.56 and machine.ledger.groups:
            machine.close_group(which=draw.randrange(9), amid=draw.random() < 0.5)
        elif kind < 0.57:
            machine.new_weights(keep=draw.random() < 0.5)
        else:
            machine.step(steps=1, budget=None)
        machine.books()
    assert machine.scheduler.counts.preemptions > 0


def test_what_takes_turns_ends_at_its_limit_when_no_step_follows():
    """Decodes with a grammar, too, take turns where the budget is too small for all; one has its last token on the way
    when somebody waits for that."""
    machine = scheduler_machine(scheduler_module)()
    machine.engine(pages=4, size=2, seqs=2, budget=1, caching=True, ahead=True)
    machine.add(seed=327)
    machine.step(budget=None, steps=2)
    machine.step(budget=None, steps=1)
    machine.settle()
    machine.teardown()
