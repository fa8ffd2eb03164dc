"""Who computes what in the next step: waiting and running sequences of one model, on integers alone.

A step has a budget of tokens. Decodes go first, one token each; then prompts that are being computed, in chunks; then
waiting sequences, as far as slots and pages reach (`line.py`). A sequence that starts gets the pages of all its tokens
at once, so only decodes ask for more. When there is none left, the last running sequence (worst priority, then latest
arrival) gives up its pages and waits, keeps its tokens, and is computed again later.

The device may be one step ahead of the host: `advance` counts a launched plan's tokens in without knowing them, the
next plan is made from that, and `resolve` brings them in later. A sequence that turns out to have ended by a stop token
has one token too many in the step launched meanwhile; it is dropped. A sequence with a grammar sits out that step.

Every admitted request is answered as long as steps are taken: the first running sequence is preempted only for one
of a better priority; it moves in every step, or when its turn comes where the budget is too small for all decodes (then
nobody joins them); it ends after at most `limit` tokens; alone it always fits, which `add` makes sure of; and the first
that waits starts at the latest when nothing else runs. Prompts that groups have pinned (`groups.py`) can break the last
two. A decode that runs alone and finds no page beside them is further than when it started; it waits like all others. A
sequence that does not fit beside them lets their members pass, who always fit and end, and with the last of a group's
members its pages are free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial

from .columns import Columns
from .jobs import Jobs
from .meter import Meter
from .pages import Pages
from .plan import Plan, Sampled
from .prefixes import groups_of
from .request import EngineError, Finish, Group, Output, Outputs, Request
from .running import by_rank
from .sequence import UNKNOWN, Flight, Sequence


class Scheduler:
    """Plans the steps of one model, from one thread.

    Either `plan`, run it, `commit` (or `fail`), and so on. Or one step ahead: `plan`, launch it, `resolve` the flight
    before it, `advance` the plan to a flight, and so on.
    `pages`: of its KV cache, how many or a pool; a slot is a place in the runner's buffers that a sequence keeps.
    `ahead`: the runner runs ahead. `pools`: scores are made of all rows of a text. `shared_tokens`: plans name groups
    of decodes that share so many tokens or more.
    `paused` freezes everything: nothing is planned; requests are still taken, aborted and expired.
    """

    def __init__(
        self,
        *,
        pages: int | Pages,
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
        self.pages = pages if isinstance(pages, Pages) else Pages(pages, page_size)
        self.paused = False
        self.meter = Meter(clock)
        self.counts = self.meter.counts
        self._max_tokens, self._shared_tokens, self._pools = max_batched_tokens, shared_tokens, pools
        self._jobs = Jobs(
            self.pages,
            max_seqs=max_seqs,
            context=context,
            end_ids=end_ids,
            max_waiting_requests=max_waiting_requests,
            max_waiting_tokens=max_waiting_tokens,
            prefix_caching=prefix_caching,
            ahead=ahead,
            pools=pools,
            version=weight_version,
            meter=self.meter,
            clock=clock,
        )
        self._running, self._line = self._jobs.running, self._jobs.line
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
    def weight_version(self) -> int:
        return self._jobs.version

    @weight_version.setter
    def weight_version(self, version: int) -> None:
        self._jobs.version = version

    @property
    def has_work(self) -> bool:
        """Whether `plan` would give a step; not while paused."""
        return self._jobs.busy and not self.paused

    @property
    def requests(self) -> list[Request]:
        """Those that are not finished."""
        return [job.request for job in self._jobs]

    def uses(self, adapter: str) -> bool:
        """Whether a request that is not finished, or an open group, carries that adapter's key."""
        return self._jobs.uses(adapter)

    @property
    def waiting(self) -> int:
        """Sequences that wait for pages or a slot, preempted ones included."""
        return len(self._line)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def decoding(self) -> int:
        """Running sequences whose prompt is computed: each wants one token of every step."""
        return len(self._running.decodes) + len(self._running.synchronous)

    def add(self, request: Request) -> EngineError | None:
        """Takes a request, or says why it cannot run: too long, no such group, or too many wait already."""
        return self._jobs.add(request)

    def open(self, group: Group, error: EngineError | None = None) -> None:
        """Begins a group. Its members are told `error`, or what else keeps it from having any."""
        self._jobs.open(group, error)

    def close(self, group_id: int) -> list[Output]:
        """Ends a group; its members that are not finished are aborted. Unknown ones are left alone."""
        return self._jobs.close(group_id)

    def prompt_of(self, group_id: int) -> list[int]:
        """Of an open group; of any other nothing."""
        return self._jobs.prompt_of(group_id)

    def abort(self, request_id: int, choice: int | None = None, finish: Finish = "abort") -> list[Output]:
        """Ends a request, or one choice of it, and frees its pages; what is unknown or finished is left alone. Metrics
        count it as `finish`."""
        return self._jobs.abort(request_id, choice, finish)

    def expire(self, now: float) -> list[Output]:
        """Ends the requests and groups whose deadline has come."""
        return self._jobs.expire(now)

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
        outputs = [output for job in jobs.values() for output in self._jobs.fail(job, error)]
        self._jobs.start_over(self._running.all(), self._jobs.groups)
        if plan:
            self._running.undelivered(plan)
        return outputs

    def set_version(self, version: int, keep: bool = True) -> int:
        """The weights have changed, between two steps. What the old ones published, so many pages, is forgotten.

        Decodes go on with the keys and values they have and publish none of them from now on; with `keep=False` they
        give them up and are computed again, as prompts are in any case: those of groups, and those that are half
        computed, of which nothing is told.
        """
        assert self._plan is None and self._flight is None, "weights change between steps"
        self.weight_version = version
        self.counts.weight_updates += 1
        for sequence in self._running.all():
            sequence.chain = None
        self._jobs.start_over([one for one in self._running.all() if not (keep and one.decoding)], self._jobs.groups)
        return self.pages.drop()

    def set_adapter(self, before: str, now: str, keep: bool = True) -> None:
        """Requests that carry one adapter's key carry another one's: they are for other weights, from this step on.

        To those that run, and to groups' prompts, it happens as by `set_version`. `keep` is for keys of one place in
        the model's tensors."""
        assert self._plan is None and self._flight is None, "weights change between steps"
        self._jobs.readdress(before, now)
        affected = [one for one in self._running.all() if one.job.request.adapter == now]
        for sequence in affected:
            sequence.chain = None
        again = [one for one in affected if not (keep and one.decoding)]
        self._jobs.start_over(again, [one for one in self._jobs.groups if one.job.request.adapter == now])

    def plan(self, budget: int | None = None) -> Plan | None:
        """The next step, of at most `budget` tokens. None while paused, without a budget, and without anything to
        compute: no request is left, or all wait for what the flight brings."""
        assert self._plan is None, "the last plan is neither advanced nor failed"
        tokens = self._max_tokens if budget is None else min(budget, self._max_tokens)
        if self.paused or tokens < 1 or not self._jobs.busy:
            return None
        self._forks = []
        self._line.start_urgent(self.weight_version, self._flight)
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
                self._jobs.land(sequence)
        for sequence in drawing[len(columns.rows) if complete else 0 :]:
            if not sequence.gone:
                sequence.token_ids.append(UNKNOWN)
                if len(sequence.token_ids) >= sequence.limit:
                    self._jobs.land(sequence)
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
                self._jobs.end(sequence, "stop")
            elif length >= sequence.limit:
                output.finish = "length"
                self._jobs.end(sequence, "length")
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
        for sequence in [] if running.grow_all(needy) else needy:
            # By rank: whoever is preempted has not got anything from this plan yet.
            while sequence.decoding and not running.grow(sequence):
                if not self._line.make_room():
                    self._line.preempt(running.last() or sequence)
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
        start = partial(self._line.start_first, self.weight_version, self._flight)
        while budget and (sequence := next(prefills, None) or start()):
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
        if "embedding" in want or (self._pools and ("score" in want or sequence.anchors)):
            plan.pooled.append((row, complete and not sequence.anchors, sequence.pin_before(start)))
        if not complete:
            return
        if sequence.anchors:
            plan.pins.append((row, sequence.anchors.pin))
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
                self._line.push(child)
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
            elif sequence.anchors:
                self._jobs.pin(sequence.anchors)
            else:
                self._jobs.land(sequence)
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
            if not (sequence.draws or sequence.anchors or sequence.gone):
                finish: Finish = "length" if job.request.sampling else "stop"
                outputs.append(Output(sequence.id, finish=finish, weight_version=self.weight_version))
                job.announce(outputs[-1])
                self._jobs.end(sequence, finish)
        return outputs
