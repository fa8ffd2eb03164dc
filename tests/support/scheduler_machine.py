"""A Hypothesis state machine that plays with a `Scheduler` and a runner that checks every page it touches."""

from __future__ import annotations

import random
from dataclasses import replace
from types import ModuleType
from typing import Any

from fake_runner import VOCABULARY, FakeRunner, answer, follow, state_of
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.server.engine.arena import Arena, Lender
from tandem.server.engine.plan import Plan
from tandem.server.engine.request import EngineError, Group, Output, Request, Sampling

END = frozenset({0})
CONTEXT = 20


def random_request(draw: random.Random, number: int, now: float) -> Request:
    """Short prompts over few tokens, so that they have prefixes in common."""
    prompt = [draw.randrange(1, 3) for _ in range(draw.choice([1, 2, 3, 5, 8, 12]))]
    want, sampling, n = {"tokens"}, None, 1
    kind = draw.random()
    if kind < 0.18:
        want = {"score"} if kind < 0.06 else {"embedding"} if kind < 0.12 else {"values"}
    elif kind < 0.25:
        want = {"prompt_logprobs"}
    else:
        n = draw.choice([1, 1, 1, 2, 3, 5])
        sampling = Sampling(
            max_tokens=draw.choice([1, 2, 5, 9, 20]),
            seed=draw.randrange(4),
            min_tokens=draw.choice([0, 0, 3]),
            stop_ids=(draw.randrange(VOCABULARY),) if draw.random() < 0.3 else (),
            ignore_eos=draw.random() < 0.5,
            grammar="any" if draw.random() < 0.25 else "",
        )
        if draw.random() < 0.1:
            want.add("score")
    logprobs = 0 if "prompt_logprobs" in want or ("values" not in want and draw.random() < 0.1) else None
    rows = logprobs is not None or "values" in want
    return Request(
        id=number,
        model="m",
        token_ids=prompt,
        sampling=sampling,
        want=frozenset(want),  # pyright: ignore[reportArgumentType]
        n=n,
        prompt_logprobs=logprobs,
        first_needed_row=0 if "embedding" in want else draw.choice([None, 0, 2]) if rows else None,
        priority=draw.choice([0, 0, 0, 1, -1]),
        deadline=now + draw.randrange(1, 30) if draw.random() < 0.1 else None,
        cache_salt=draw.choice(["", "", "other"]),
    )


def random_group(draw: random.Random, number: int, now: float, room: int) -> Group:
    """One that takes much of the `room` for tokens, or little."""
    return Group(
        id=number,
        model="m",
        token_ids=[draw.randrange(1, 3) for _ in range(draw.choice([1, 5, room // 3, room // 2, 2 * room // 3]))],
        longest=draw.choice([1, 3, 6]),
        priority=draw.choice([0, 0, 0, 1, -1]),
        deadline=now + draw.randrange(1, 30) if draw.random() < 0.1 else None,
        cache_salt=draw.choice(["", "", "other"]),
    )


def random_member(draw: random.Random, number: int, group: Group, now: float) -> Request:
    want = draw.choice(["score", "values", "prompt_logprobs"])
    return Request(
        id=number,
        model="m",
        token_ids=[draw.randrange(1, 3) for _ in range(draw.randrange(1, group.longest + 1))],
        want=frozenset({want}),  # pyright: ignore[reportArgumentType]
        prompt_logprobs=0 if want == "prompt_logprobs" else None,
        deadline=now + draw.randrange(1, 30) if draw.random() < 0.1 else None,
        group=group.id,
    )


class Ledger:
    """What every request has got so far, against what it must get."""

    def __init__(self, context: int) -> None:
        self.context = context
        self.groups: dict[int, Group] = {}  # closed ones, too
        self.requests: dict[int, Request] = {}
        self.open: dict[int, set[int]] = {}  # choices not finished
        self.tokens: dict[tuple[int, int], list[int]] = {}
        self.begun: set[int] = set()

    def add(self, request: Request) -> None:
        self.requests[request.id] = request
        self.open[request.id] = set(range(request.n if request.sampling else 1))

    def take(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.take_one(output)

    def take_one(self, output: Output) -> None:
        number, choice = output.request_id, output.choice
        request = self.requests[number]
        if output.error:  # ends all choices
            assert output.finish == "error" and self.open[number]
            self.open[number] = set()
            return
        assert choice in self.open[number], "an output after the last one"
        if output.finish == "abort":
            self.open[number].discard(choice)
            return
        first = number not in self.begun
        self.begun.add(number)
        assert (output.cached_tokens is not None) == first
        if first:
            assert 0 <= (output.cached_tokens or 0) < len(request.token_ids)
            assert (output.scores is not None) == ("score" in request.want)
            assert output.embedding == ([float(len(request.token_ids))] if "embedding" in request.want else None)
            assert (output.prompt_logprobs is not None) == (request.prompt_logprobs is not None)
            prompt = self.groups[request.group].token_ids if request.group else []
            whole, row = [*prompt, *request.token_ids], request.first_needed_row or 0
            row = len(prompt) - 1 if prompt else min(row, len(whole) - 1)
            assert output.pooled_index == (len(whole) - 1 if "score" in request.want else None)
            assert output.values == ([float(token) for token in whole[row:]] if "values" in request.want else None)
            if output.prompt_logprobs is not None:
                assert output.prompt_logprobs.values == [float(token) for token in whole[row + 1 :]]
            if prompt:
                assert output.cached_tokens == 0 and output.scores in (None, [float(state_of(whole))])
        if request.sampling:
            known = self.tokens.setdefault((number, choice), [])
            known += output.token_ids
            tokens, finish = answer(request, choice, self.context, END)
            assert known == tokens[: len(known)], "other tokens than alone"
            assert output.finish == (finish if len(known) == len(tokens) else None)
            assert output.stop_id == (tokens[-1] if output.finish == "stop" else None)
        else:
            assert output.finish == "stop" and not output.token_ids
        if output.finish:
            self.open[number].discard(choice)


def scheduler_machine(scheduler_module: ModuleType, lending: bool = True) -> type[RuleBasedStateMachine]:
    """The machine for the module given, which may come with a mutant below `tandem.server.engine.scheduler`. `lending`:
    some of its pools share an arena with a rival's."""

    class SchedulerMachine(RuleBasedStateMachine):
        @initialize(
            pages=st.integers(4, 14),
            size=st.sampled_from([2, 3, 4, 1]),
            seqs=st.integers(1, 6),
            budget=st.sampled_from([1, 3, 8, 20]),
            caching=st.sampled_from([True, True, False]),
            ahead=st.booleans(),
            shared=st.sampled_from([None, 1, 4]),
            slabs=st.sampled_from([0, 0, 1, 3] if lending else [0]),
        )
        def engine(
            self,
            pages: int,
            size: int,
            seqs: int,
            budget: int,
            caching: bool,
            ahead: bool,
            shared: int | None = None,
            slabs: int = 0,
        ) -> None:
            """`ahead`: results come in only after the next step was launched. `shared`: tokens that make a group.
            `slabs`: of two pages, which a rival pool borrows as well."""
            ranges = [range(pages + 2 * slab, pages + 2 * slab + 2) for slab in range(slabs)]
            arena = Arena([ranges, ranges], self.wipe)
            pool = scheduler_module.Pages(pages, size, Lender(arena, 0))
            self.rival, self.taken = scheduler_module.Pages(pages, size, Lender(arena, 1)), list[list[int]]()
            self.slabs = dict(enumerate(ranges))
            self.now = 0.0
            self.ahead, self.flight = ahead, None
            self.bound = 6
            self.scheduler = scheduler_module.Scheduler(
                pages=pool if slabs else pages,
                page_size=size,
                max_seqs=seqs,
                max_batched_tokens=budget,
                context=CONTEXT,
                end_ids=END,
                max_waiting_requests=self.bound,
                max_waiting_tokens=40,
                prefix_caching=caching,
                ahead=ahead,
                shared_tokens=shared,
                clock=lambda: self.now,
            )
            self.runner = FakeRunner(pages + 2 * slabs, size, seqs, budget, shared or 0, ahead)
            self.ledger = Ledger(CONTEXT)
            self.capacity = pages * size

        def wipe(self) -> None:
            """A slab goes over: what it holds is somebody else's from now on."""
            for slab, pages in self.slabs.items():
                if slab not in self.scheduler.pages.slabs:
                    for page in pages:
                        self.runner.contents[page] = [None] * self.runner.size

        @precondition(lambda self: self.slabs)
        @rule(number=st.integers(1, 8))
        def rival_borrows(self, number: int) -> None:
            self.taken.append(self.rival.allocate(self.rival.free + number) or [])

        @precondition(lambda self: any(self.taken))
        @rule(which=st.integers(0, 3))
        def rival_gives_back(self, which: int) -> None:
            self.rival.release(self.taken.pop(which % len(self.taken)))

        @rule(seed=st.integers(0, 1 << 20), groups=st.integers(1, 3))
        def crowd(self, seed: int, groups: int) -> None:
            """Groups with members, and between them a request that takes as many pages as one may."""
            self.open_group(seed, 2)
            self.add(seed, whole=True)
            for number in range(1, groups):
                self.open_group(seed + number, 2)

        @rule(seed=st.integers(0, 1 << 20))
        def add(self, seed: int, whole: bool = False) -> None:
            request = random_request(random.Random(seed), len(self.ledger.requests), self.now)
            if whole:
                sampling = request.sampling and replace(request.sampling, max_tokens=1)
                tokens = (request.token_ids * CONTEXT)[: min(self.capacity, CONTEXT) - 1]
                request = replace(request, token_ids=tokens, sampling=sampling, n=1)
            answer = request.sampling.max_tokens if request.sampling else 0
            error = self.scheduler.add(request)
            if error is None:
                self.ledger.add(request)
                assert min(len(request.token_ids) + answer, CONTEXT) <= self.capacity
            else:
                self.ledger.requests[request.id] = request
                if error.kind == "invalid":
                    assert min(len(request.token_ids) + answer, CONTEXT) > self.capacity
                else:
                    assert error.kind == "overloaded" and 1 <= error.retry_after <= 60
                    assert self.scheduler.waiting > 0

        @rule(seed=st.integers(0, 1 << 20), members=st.integers(0, 5))
        def open_group(self, seed: int, members: int) -> None:
            draw = random.Random(seed)
            number = 1_000_000 + len(self.ledger.groups)
            group = random_group(draw, number, self.now, min(self.capacity, CONTEXT))
            self.ledger.groups[group.id] = group
            self.scheduler.open(group)
            for _ in range(members):
                self.add_to(group, draw)

        @precondition(lambda self: self.ledger.groups)
        @rule(seed=st.integers(0, 1 << 20), which=st.integers(0, 3))
        def add_member(self, seed: int, which: int) -> None:
            groups = list(self.ledger.groups.values())
            self.add_to(groups[-1 - which % len(groups)], random.Random(seed))

        def add_to(self, group: Group, draw: random.Random) -> None:
            member = random_member(draw, len(self.ledger.requests), group, self.now)
            opened = self.scheduler._jobs.groups.get(group.id)
            error = self.scheduler.add(member)
            self.ledger.requests[member.id] = member
            if error is None:
                assert opened is not None and opened.error is None
                self.ledger.add(member)
            elif opened is None:
                assert error.kind == "invalid" and str(group.id) in error.message
            else:
                assert error == opened.error or error.kind == "overloaded"

        @precondition(lambda self: self.ledger.groups)
        @rule(which=st.integers(0, 3), amid=st.booleans())
        def close_group(self, which: int, amid: bool) -> None:
            groups = list(self.ledger.groups)
            number = groups[-1 - which % len(groups)]
            plan = self.scheduler.plan() if amid else None
            self.ledger.take(self.scheduler.close(number))
            assert self.scheduler.close(number) == []
            for request_id, choices in self.ledger.open.items():
                assert not choices or self.ledger.requests[request_id].group != number
            if plan is not None:
                self.launch(plan)

        @rule(steps=st.integers(1, 4), budget=st.sampled_from([None, None, None, 1, 2]))
        def step(self, steps: int, budget: int | None) -> None:
            for _ in range(steps):
                plan = self.scheduler.plan(budget)
                if plan is None:
                    assert self.flight or self.scheduler.paused or not self.scheduler.has_work
                    self.settle()
                    return
                self.launch(plan, budget)

        def launch(self, plan: Plan, budget: int | None = None) -> None:
            sampled = self.runner.execute(plan, budget)
            if self.ahead:
                self.settle()
                self.flight = (self.scheduler.advance(plan), sampled)
            else:
                self.ledger.take(self.scheduler.commit(plan, sampled))

        def settle(self) -> None:
            if self.flight:
                (flight, sampled), self.flight = self.flight, None
                self.ledger.take(self.scheduler.resolve(flight, sampled))
                self.runner.told(flight.plan)

        @precondition(lambda self: any(self.ledger.open.values()))
        @rule(which=st.integers(0, 20), choice=st.sampled_from([None, 0, 1, 2]), amid=st.booleans())
        def abort(self, which: int, choice: int | None, amid: bool) -> None:
            """Between two steps, or while one runs."""
            numbers = [number for number, choices in self.ledger.open.items() if choices]
            number = numbers[-1 - which % len(numbers)]
            plan = self.scheduler.plan() if amid else None
            before = set(self.ledger.open[number])
            outputs = self.scheduler.abort(number, choice)
            assert {output.choice for output in outputs} == (before if choice is None else before & {choice})
            self.ledger.take(outputs)
            if plan is not None:
                self.launch(plan)

        @rule(seconds=st.integers(1, 9))
        def time_passes(self, seconds: int) -> None:
            self.now += seconds
            outputs = self.scheduler.expire(self.now)
            for output in outputs:
                assert output.error is not None and output.error.kind == "deadline"
            self.ledger.take(outputs)
            for number, choices in self.ledger.open.items():
                deadline = self.ledger.requests[number].deadline
                assert not choices or deadline is None or deadline > self.now

        @rule(keep=st.booleans())
        def new_weights(self, keep: bool) -> None:
            self.settle()
            self.runner.version += 1
            self.scheduler.set_version(self.runner.version, keep)

        @rule()
        def pause(self) -> None:
            self.scheduler.paused = not self.scheduler.paused

        @rule(at_launch=st.booleans(), launched=st.booleans())
        def device_fails(self, at_launch: bool, launched: bool) -> None:
            """When a step is launched, or before the step ahead of it is over, with it or without."""
            plan = self.scheduler.plan() if launched else None
            if plan is not None:
                self.runner.execute(plan)
            if at_launch:
                self.settle()
            if plan is not None or self.flight:
                self.flight = None
                self.ledger.take(self.scheduler.fail(EngineError("internal", "boom")))

        @invariant()
        def books(self) -> None:
            if not hasattr(self, "scheduler"):
                return
            running, groups = self.scheduler._running, self.scheduler._jobs.groups
            pinned = [opened for opened in groups if opened.pinned]
            tables = [sequence.table for sequence in running.all()]
            self.scheduler.pages.check([*tables, *(opened.anchor.table for opened in pinned)])
            for opened in pinned:
                self.check_pinned(opened)
            assert len({opened.pin for opened in pinned}) == len(pinned)
            assert len(running) <= self.runner.max_seqs
            slots = [sequence.slot for sequence in running.all()] + running._slots
            assert sorted(slots) == list(range(self.runner.max_seqs))
            for line in (running.prefills, running.decodes, running.synchronous):
                assert line == sorted(line, key=lambda sequence: sequence.rank)
            known = sum(len(choices) for choices in self.ledger.open.values())
            held = [sequence for job in self.scheduler._jobs for sequence in job.sequences.values()]
            assert known == sum(1 + len(sequence.siblings) for sequence in held)
            landed = sum(sequence.landed for sequence in held)
            assert not landed or self.flight
            coming = sum(opened.coming for opened in groups)
            assert self.scheduler.waiting + self.scheduler.running + landed == len(held) + coming
            assert coming == groups.coming and self.scheduler._jobs._waiting._requests <= self.bound
            assert {number for opened in groups for number in opened.members} == {
                job.request.id for job in self.scheduler._jobs if job.request.group
            }

        def check_pinned(self, opened: Any) -> None:
            """All of a prompt is there, by the weights of now, and so is its last hidden state."""
            state, version = 0, self.runner.version
            for position, token in enumerate(opened.group.token_ids):
                state = follow(state, token)
                page = opened.anchor.table[position // self.runner.size]
                assert self.runner.contents[page][position % self.runner.size] == (state, version)
            assert self.runner.pinned[opened.pin] == (state, version)

        def teardown(self) -> None:
            """Every request is answered though groups stay open and a rival keeps what it has; nothing is left over."""
            if not hasattr(self, "scheduler"):
                return
            self.scheduler.paused = False
            # generous: one step each for every recomputed token, and one for the flight
            prompts = sum(len(choices) for choices in self.ledger.open.values()) + len(self.ledger.groups)
            work = 1 + 2 * prompts * (CONTEXT + 1) ** 2
            while (plan := self.scheduler.plan()) is not None or self.flight:
                work -= 1
                assert work >= 0, "no end in sight"
                if plan is None:
                    self.settle()
                else:
                    self.launch(plan)
            assert not any(self.ledger.open.values())
            assert not self.scheduler.has_work and not self.scheduler.waiting and not self.scheduler.running
            for number in self.ledger.groups:
                assert self.scheduler.close(number) == []
            self.scheduler.pages.check([])
            assert len(self.scheduler._jobs.groups._pins) == self.runner.max_seqs

    return SchedulerMachine
