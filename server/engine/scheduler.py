"""Who computes what in the next step: waiting and running sequences of one model, on integers alone.

A step has a budget of tokens. Decodes go first, one token each; then prompts that are being computed, in chunks; then
waiting sequences, as far as slots and pages reach. A sequence that starts gets the pages of all its tokens at once, so
only decodes ask for more. When there is none left, the last running sequence (worst priority, then latest arrival)
gives up its pages and waits, keeps its tokens, and is computed again later.

The device may be one step ahead of the host: `advance` counts a launched plan's tokens in without knowing them, the
next plan is made from that, and `resolve` brings them in later. A sequence that turns out to have ended by a stop token
has one token too many in the step launched meanwhile; it is dropped. A sequence with a grammar sits out that step.

Every admitted request is answered as long as steps are taken: the first running sequence is preempted only for one
of a better priority; it moves in every step, or when its turn comes where the budget is too small for all decodes (then
nobody joins them); it ends after at most `limit` tokens; alone it always fits, which `add` makes sure of; and the first
that waits starts at the latest when nothing else runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from .columns import Columns
from .meter import Meter
from .pages import Pages
from .plan import Plan, Sampled
from .prefixes import groups_of
from .request import EngineError, Finish, Output, Outputs, Request
from .running import Running, by_rank
from .sequence import UNKNOWN, Flight, Job, Sequence
from .waiting import Deadlines, Waiting, too_long


class Scheduler:
    """Plans the steps of one model, from one thread.

    Either `plan`, run it, `commit` (or `fail`), and so on. Or one step ahead: `plan`, launch it, `resolve` the flight
    before it, `advance` the plan to a flight, and so on.
    `pages` pages make up its KV cache; a slot is a place in the runner's buffers that a sequence keeps while it runs.
    `ahead`: the runner runs ahead. `pools`: scores are made of all rows of a text. `shared_tokens`: plans name groups
    of decodes that share so many tokens or more.
    `paused` freezes everything: nothing is planned; requests are still taken, aborted and expired.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_size: int,
        max_seqs: int,
        max_batched_tokens: int,
        context: int,
        end_ids: Iterable[int] = (),
        max_waiting_requests: int = 4096,
        max_waiting_tokens: int = 1 << 22,
        prefix_caching: bool = True,
        ahead: bool = False,
        pools: bool = False,
        shared_tokens: int | None = None,
        weight_version: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pages = Pages(pages, page_size)
        self.weight_version, self.paused = weight_version, False
        self.meter, self._clock = Meter(clock), clock
        self.counts = self.meter.counts
        self._max_tokens, self._shared_tokens, self._ahead = max_batched_tokens, shared_tokens, ahead
        self._context, self._end_ids, self._pools = context, frozenset(end_ids), pools
        self._jobs, self._arrivals = dict[int, Job](), 0
        self._deadlines = Deadlines()
        self._waiting = Waiting(max_waiting_requests, max_waiting_tokens, self.meter.refused)
        self._running = Running(self.pages, max_seqs, prefix_caching)
        self._plan: Plan | None = None  # made, neither advanced nor failed
        self._flight: Flight | None = None  # advanced, neither resolved nor failed
        self._rows: list[Sequence] = []  # of the last plan
        self._sampling: list[Sequence] = []  # per entry of its `samples`
        self._forks: list[tuple[Sequence, Sequence]] = []  # (parent, child) of the last plan
        self._base: Plan | None = None  # a plan of one row for each decode, good until these change
        self._columns = Columns([], page_size)  # of that plan
        self._pure = False  # the last plan was that

    @property
    def planned(self) -> Plan | None:
        """The plan that was made, but neither advanced nor failed yet."""
        return self._plan

    @property
    def has_work(self) -> bool:
        """Whether `plan` would give a step; not while paused."""
        return bool(self._jobs) and not self.paused

    @property
    def requests(self) -> list[Request]:
        """Those that are not finished."""
        return [job.request for job in self._jobs.values()]

    @property
    def waiting(self) -> int:
        """Sequences that wait for pages or a slot, preempted ones included."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def decoding(self) -> int:
        """Running sequences whose prompt is computed: each wants one token of every step."""
        return len(self._running.decodes) + len(self._running.synchronous)

    def add(self, request: Request) -> EngineError | None:
        """Takes a request, or says why it cannot run: too long, or too many wait already."""
        assert request.id not in self._jobs, f"request {request.id} is known already"
        prompt, now = len(request.token_ids), self._clock()
        capacity = self.pages.count * self.pages.page_size
        error = too_long(request, self._context, capacity) or self._waiting.refusal(prompt, now)
        if error:
            return error
        self.meter.admitted(request)
        job = self._jobs[request.id] = Job(request, now)
        self._arrivals += 1
        self._waiting.enlist(job)
        self._waiting.push(job.first_sequence(self._arrivals, self._context, self._end_ids, self._ahead))
        self._deadlines.add(job)
        return None

    def abort(self, request_id: int, choice: int | None = None, finish: Finish = "abort") -> list[Output]:
        """Ends a request, or one choice of it, and frees its pages; what is unknown or finished is left alone. Metrics
        count it as `finish`."""
        job = self._jobs.get(request_id)
        ended: list[int] = []
        for sequence in list(job.sequences.values()) if job else []:
            if choice is None:
                ended += [sequence.choice, *sequence.siblings]
                self._end(sequence, finish)
            elif choice in sequence.siblings:
                ended.append(choice)
                sequence.siblings.remove(choice)
            elif choice == sequence.choice:
                ended.append(choice)
                self._hand_over(sequence, finish)
        return [Output(request_id, one, finish="abort", weight_version=self.weight_version) for one in ended]

    def expire(self, now: float) -> list[Output]:
        """Ends the requests whose deadline has come, waiting or running."""
        outputs: list[Output] = []
        for job in self._deadlines.due(now):
            message = f"the deadline came {now - job.arrived:.1f} s after the request"
            outputs.append(self._fail(job, EngineError("deadline", message)))
        return outputs

    def fail(self, error: EngineError) -> list[Output]:
        """Instead of `advance` and `resolve`, when the plan or the flight could not be run: the requests of both end
        with the error. What else runs is computed again, so that nothing depends on how far the runner came."""
        plan, flight = self._plan, self._flight
        assert plan or flight, "nothing that could fail"
        self._plan = self._flight = None
        sequences = [*self._rows, *self._sampling] if plan else []
        sequences += [*flight.rows, *flight.sampling] if flight else []
        jobs = {sequence.id: sequence.job for sequence in sequences if not sequence.gone}
        for sequence in self._running.all():
            sequence.chain = None
        outputs = [self._fail(job, error) for job in jobs.values()]
        for sequence in self._running.all():
            self._preempt(sequence)
        if plan:
            self._running.undelivered(plan)
        return outputs

    def set_version(self, version: int, keep: bool = True) -> int:
        """The weights have changed, between two steps. What the old ones published, so many pages, is forgotten.

        Decodes go on with the keys and values they have and publish none of them from now on; with `keep=False` they
        give them up and are computed again, as prompts that are half computed are in any case: nothing of them is told.
        """
        assert self._plan is None and self._flight is None, "weights change between steps"
        self.weight_version = version
        self.counts.weight_updates += 1
        for sequence in self._running.all():
            sequence.chain = None
            if not (keep and sequence.decoding):
                self._preempt(sequence)
        return self.pages.drop()

    def set_adapter(self, before: str, now: str, keep: bool = True) -> None:
        """Requests that carry one adapter's key carry another one's: they are for other weights, from this step on.

        To those that run it happens as by `set_version`. `keep` is for keys of one place in the model's tensors."""
        assert self._plan is None and self._flight is None, "weights change between steps"
        for job in self._jobs.values():
            if job.request.adapter == before:
                job.request = replace(job.request, adapter=now)
        for sequence in self._running.all():
            if sequence.job.request.adapter == now:
                sequence.chain = None
                if not (keep and sequence.decoding):
                    self._preempt(sequence)

    def plan(self, budget: int | None = None) -> Plan | None:
        """The next step, of at most `budget` tokens. None while paused, without a budget, and without anything to
        compute: no request is left, or all wait for what the flight brings."""
        assert self._plan is None, "the last plan is neither advanced nor failed"
        tokens = self._max_tokens if budget is None else min(budget, self._max_tokens)
        if self.paused or tokens < 1 or not self._jobs:
            return None
        self._forks = []
        self._start_urgent()
        plan = self._plan_decodes(tokens)
        while not plan.slots and (self._running.decodes or self._running.ready()):
            plan = self._plan_decodes(tokens)  # whoever had its turn gave up its pages
        plan = self._plan_prompts(plan, tokens - plan.decodes)
        if not plan.slots:
            assert self._flight, "no step although there is work"
            return None
        self._pure = self._base is not None and plan.decodes == len(plan.slots)
        self._running.deliver(plan)
        self.meter.planned(plan)
        self._plan = plan
        return plan

    def commit(self, plan: Plan, sampled: Sampled) -> Outputs:
        """`advance` and `resolve`, for a runner that keeps the host waiting."""
        return self.resolve(self.advance(plan), sampled)

    def advance(self, plan: Plan) -> Flight:
        """The plan is launched: from now on its positions count as computed, and its tokens as drawn but unknown."""
        assert plan is self._plan, "not the plan that was made last"
        assert self._flight is None, "the flight before is not resolved"
        self._plan = None
        columns, drawing = self._columns, self._sampling
        complete = not self._running.changed  # nobody has left since the plan was made
        flight = self._flight = Flight(plan, self._rows, drawing, columns)
        if plan.decodes < len(plan.slots):
            self._advance_prompts(flight)
        if complete:
            for sequence in columns.advance():
                self._land(sequence)
        for sequence in drawing[len(columns.rows) if complete else 0 :]:
            if not sequence.gone:
                sequence.token_ids.append(UNKNOWN)
                if len(sequence.token_ids) >= sequence.limit:
                    self._land(sequence)
        return flight

    def resolve(self, flight: Flight, sampled: Sampled) -> Outputs:
        """What the flight's step brought: tokens, scores, finished choices. Their pages and slots are free at once."""
        assert flight is self._flight, "not the plan that was advanced last"
        plan, version = flight.plan, self.weight_version
        assert len(sampled.tokens) == len(plan.samples)
        self._flight = None
        outputs = Outputs(self._resolve_prompts(flight, sampled))
        columns, first, apart = flight.columns, 0, list[int]()
        if sampled.logprobs is None:  # of most decodes there is nothing to say but a token
            moved = columns is not self._columns or self._running.changed or self._base is None
            first, apart = len(columns.rows), columns.tell(sampled.tokens, moved, version, outputs)
        self.meter.told_all(columns if first else None)
        for number in (*apart, *range(first, len(sampled.tokens))):
            sequence, token = flight.sampling[number], sampled.tokens[number]
            if sequence.gone:
                continue
            sequence.token_ids[-1], length = token, len(sequence.token_ids)
            logprobs = sampled.logprobs[number] if sampled.logprobs else None
            output = Output(sequence.id, sequence.choice, [token], logprobs, None, None, None, None, None, version)
            outputs.others.append(output)
            sequence.job.announce(output)
            if number >= first:
                self.meter.told(sequence)
            if token in sequence.stops and length > sequence.stops_from:
                output.finish, output.stop_id = "stop", token
                self._end(sequence, "stop")
            elif length >= sequence.limit:
                output.finish = "length"
                self._end(sequence, "length")
        self.counts.generated_tokens += len(sampled.tokens)
        return outputs

    def _plan_decodes(self, budget: int) -> Plan:
        """One row for each decode, or for `budget` of them in turn. May preempt."""
        size, running, base = self.pages.page_size, self._running, self._base
        decodes, ready = running.decodes, running.ready() if running.synchronous else []
        whole = len(decodes) + len(ready) <= budget
        if base is not None and not running.changed and whole:
            needy = self._columns.further()
        else:
            turn = None if whole else running.in_turn([*decodes, *ready], budget)
            base, decodes, ready = (None, list(decodes), ready) if turn is None else (None, turn, [])
            needy = running.beginning(decodes)
        needy = sorted([*needy, *running.beginning(ready)], key=by_rank)
        for sequence in needy:  # by rank: whoever is preempted has not got anything from this plan yet
            while sequence.decoding and not running.grow(sequence):
                self._preempt(running.last() or sequence)
        if base is not None and not running.changed:
            base = self._columns.plan(base.prefixes, self._pure and bool(decodes))
        else:
            decodes = [sequence for sequence in decodes if sequence.decoding]
            self._columns, shared = Columns(decodes, size), self._shared_tokens
            base = self._columns.plan(None if shared is None else groups_of([s.table for s in decodes], size, shared))
        self._base, running.changed = base if whole else None, False
        self._rows = self._sampling = self._columns.rows
        if ready := [sequence for sequence in ready if sequence.decoding]:  # beside them the others' steps stay steady
            base = base.with_synchronous([(one.slot, len(one.token_ids) - 1) for one in ready])
            self._rows = self._sampling = [*self._rows, *ready]
        return base

    def _plan_prompts(self, base: Plan, budget: int) -> Plan:
        """Adds chunks of prompts to a copy of the plan: of those that run, then of as many waiting ones as fit."""
        plan = None
        prefills = iter(list(self._running.prefills))
        while budget and (sequence := next(prefills, None) or self._start_first()):
            if plan is None:
                plan = base.copy()
                plan.steady = False
                self._rows, self._sampling = [*self._rows], [*self._sampling]
            count = min(budget, len(sequence.token_ids) - sequence.computed)
            budget -= count
            self._add_chunk(plan, sequence, count)
        return plan or base

    def _add_chunk(self, plan: Plan, sequence: Sequence, count: int) -> None:
        start, job, want = sequence.computed, sequence.job, sequence.job.request.want
        row = plan.add_row(sequence.slot, start, count)
        self._rows.append(sequence)
        sequence.name_rows(plan, row, start, start + count)
        complete = start + count == len(sequence.token_ids)
        if "embedding" in want or (self._pools and "score" in want):
            plan.pooled.append((row, complete))
        if not complete:
            return
        if "score" in want and not self._pools and not job.announced:
            plan.scores.append((row, sequence.slot))
        if sequence.draws:
            for one in [sequence, *self._fork(sequence)]:
                plan.samples.append((row, one.slot))
                self._sampling.append(one)

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Starts the sequence's siblings on its pages; those for which there is no room wait in line."""
        children: list[Sequence] = []
        siblings, sequence.siblings = sequence.siblings, []
        for choice in siblings:
            child = self._running.fork(sequence, choice, reserved=len(children))
            if child is None:
                child = sequence.sibling(choice)
                self._waiting.push(child)
            else:
                children.append(child)
                self._forks.append((sequence, child))
                self.meter.forked(child)
            sequence.job.sequences[choice] = child
        return children

    def _advance_prompts(self, flight: Flight) -> None:
        """Counts the chunks in. Where a prompt is complete its choices decode from now on, or nothing is left to do."""
        plan = flight.plan
        for row in range(plan.decodes, len(plan.slots)):
            sequence = flight.rows[row]
            complete = plan.starts[row] + plan.counts[row] == len(sequence.token_ids)
            if complete:  # even if it is gone: choices that forked from it tell its prompt's log-probabilities
                flight.complete.append(sequence)
            if sequence.gone:
                continue
            sequence.computed += plan.counts[row]
            self._running.publish(sequence)
            if not complete:
                continue
            if sequence.draws:
                self._running.join(sequence)
            else:
                self._land(sequence)
        for parent, child in self._forks:
            if not child.gone:
                self._running.join(child, parent)

    def _resolve_prompts(self, flight: Flight, sampled: Sampled) -> list[Output]:
        """Outputs of the sequences that end with their prompt."""
        outputs: list[Output] = []
        flight.keep(sampled)
        for sequence in flight.complete:
            job = sequence.job
            if job.scores is not None and not job.announced:
                self.meter.scored(job.scores)
            sequence.hand_rows()
            if not sequence.draws and not sequence.gone:
                finish: Finish = "length" if job.request.sampling else "stop"
                outputs.append(Output(sequence.id, finish=finish, weight_version=self.weight_version))
                job.announce(outputs[-1])
                self._end(sequence, finish)
        return outputs

    def _start_first(self) -> Sequence | None:
        """Starts the first that waits, if it fits."""
        sequence = None if self._waiting.stuck else self._waiting.first()
        if sequence is None or (self._flight and self._flight.holds(sequence)):
            return None  # one that this plan preempted: its last token is not known yet
        if not self._running.start(sequence, self.weight_version):
            self._waiting.stuck = True
            return None
        job = sequence.job
        if job.cached_tokens is None:
            job.cached_tokens = sequence.computed
            self._waiting.discharge(job)
            self.meter.started(sequence)
        return self._waiting.pop()

    def _start_urgent(self) -> None:
        """Starts what waits with a better priority than something that runs, ahead of everything else. The last running
        ones are preempted for it, unless even all of worse priority would not make enough room."""
        running = self._running
        while (first := self._waiting.first()) and (last := running.last()) and first.rank[0] < last.rank[0]:
            if self._start_first():
                continue
            if self._flight and self._flight.holds(first):
                return
            lower = [sequence for sequence in running.all() if sequence.rank[0] > first.rank[0]]
            room = self.pages.available + sum(len(sequence.table) for sequence in lower)
            if running.pages_for(first) + len(running) - len(lower) > room:
                return
            self._preempt(last)

    def _preempt(self, sequence: Sequence) -> None:
        self.meter.preempted(sequence)
        self._running.leave(sequence)
        self._waiting.push(sequence)
        self._waiting.stuck = False

    def _land(self, sequence: Sequence) -> None:
        """All of it is computed; only what the flight brings is still to be told. Its slot and pages are free."""
        self._running.leave(sequence)
        self._waiting.stuck = False
        sequence.landed = True

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        """A choice, and what would have forked from it, is done with."""
        job = sequence.job
        if sequence.slot >= 0:
            self._running.leave(sequence)
            self._waiting.stuck = False
        elif not sequence.landed:
            self._waiting.remove(sequence)
        sequence.gone = True
        del job.sequences[sequence.choice]
        if not job.sequences:
            del self._jobs[sequence.id]
            if job.cached_tokens is None:
                self._waiting.discharge(job)
        self.meter.ended(sequence, finish)

    def _hand_over(self, sequence: Sequence, finish: Finish) -> None:
        """Ends a choice; if others wait for its prompt to be computed, the first of them takes its place."""
        if not sequence.siblings:
            self._end(sequence, finish)
            return
        sequences = sequence.job.sequences
        del sequences[sequence.choice]
        sequence.choice = sequence.siblings.pop(0)
        sequences[sequence.choice] = sequence
        self._running.replace(sequence)

    def _fail(self, job: Job, error: EngineError) -> Output:
        for sequence in list(job.sequences.values()):
            self._end(sequence, "error")
        return Output(job.request.id, finish="error", error=error, weight_version=self.weight_version)
