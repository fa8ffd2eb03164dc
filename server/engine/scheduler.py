"""Who computes what in the next step: waiting and running sequences of one model, on integers alone.

A step has a budget of tokens. Decodes go first, one token each; then prompts that are being computed, in chunks; then
waiting sequences, as far as slots and pages reach. A sequence that starts gets the pages of all its tokens at once, so
only decodes ask for more. When there is none left, the last running sequence (worst priority, then latest arrival)
gives up its pages and waits, keeps its tokens, and is computed again later.

Every admitted request is answered as long as steps are taken: the first running sequence is preempted only for one
of a better priority; it moves in every step, or when its turn comes where the budget is too small for all decodes (then
nobody joins them); it ends after at most `limit` tokens; alone it always fits, which `add` makes sure of; and the first
that waits starts at the latest when nothing else runs.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import repeat

from .pages import Pages
from .plan import Plan, PromptRows, Sampled
from .request import EngineError, Logprobs, Output, Request
from .running import Running, by_rank
from .sequence import Job, Rank, Sequence
from .waiting import Deadlines, Waiting, too_long


@dataclass(slots=True)
class Counts:
    """What happened since the start, for metrics."""

    started: int = 0  # requests that began to run
    prompt_tokens: int = 0  # of those
    cached_tokens: int = 0  # of which were found in the prefix cache
    computed_tokens: int = 0  # in all plans, recomputed ones included
    generated_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Plans the steps of one model. `plan`, run it, `commit` (or `fail`), and so on, from one thread.

    `pages` pages make up its KV cache; a slot is a place in the runner's buffers that a sequence keeps while it runs.
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
        weight_version: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pages = Pages(pages, page_size)
        self.weight_version = weight_version
        self.paused = False
        self.counts = Counts()
        self._max_tokens = max_batched_tokens
        self._context = context
        self._end_ids = frozenset(end_ids)
        self._clock = clock
        self._jobs: dict[int, Job] = {}
        self._arrivals = 0
        self._deadlines = Deadlines()
        self._waiting = Waiting(max_waiting_requests, max_waiting_tokens)
        self._running = Running(self.pages, max_seqs, prefix_caching)

        self._plan: Plan | None = None  # made, neither committed nor failed
        self._rows: list[Sequence] = []  # of the last plan
        self._sampling: list[Sequence] = []  # per entry of its `samples`
        self._forks: list[tuple[Sequence, Sequence]] = []  # (parent, child) of the last plan
        self._base: Plan | None = None  # a plan of one row for each decode, good until these change
        self._base_rows: list[Sequence] = []
        self._pure = False  # the last plan was that
        self._turn: Rank = (0, 0, 0)  # whose turn it was last when the budget did not reach all decodes

    @property
    def has_work(self) -> bool:
        """Whether `plan` would give a step; not while paused."""
        return bool(self._jobs) and not self.paused

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
        return len(self._running.decodes)

    def add(self, request: Request) -> EngineError | None:
        """Takes a request, or says why it cannot run: too long, or too many wait already."""
        assert request.id not in self._jobs, f"request {request.id} is known already"
        prompt, now = len(request.token_ids), self._clock()
        capacity = self.pages.count * self.pages.page_size
        error = too_long(request, self._context, capacity) or self._waiting.refusal(prompt, now)
        if error:
            return error
        job = self._jobs[request.id] = Job(request, now)
        self._arrivals += 1
        self._waiting.enlist(job)
        self._waiting.push(job.first_sequence(self._arrivals, self._context, self._end_ids))
        self._deadlines.add(job)
        return None

    def abort(self, request_id: int, choice: int | None = None) -> list[Output]:
        """Ends a request, or one choice of it, and frees its pages; what is unknown or finished is left alone."""
        job = self._jobs.get(request_id)
        ended: list[int] = []
        for sequence in list(job.sequences.values()) if job else []:
            if choice is None:
                ended += [sequence.choice, *sequence.siblings]
                self._end(sequence)
            elif choice in sequence.siblings:
                ended.append(choice)
                sequence.siblings.remove(choice)
            elif choice == sequence.choice:
                ended.append(choice)
                self._hand_over(sequence)
        return [Output(request_id, one, finish="abort", weight_version=self.weight_version) for one in ended]

    def expire(self, now: float) -> list[Output]:
        """Ends the requests whose deadline has come, waiting or running."""
        outputs: list[Output] = []
        for job in self._deadlines.due(now):
            message = f"the deadline came {now - job.arrived:.1f} s after the request"
            outputs.append(self._fail(job, EngineError("deadline", message)))
        return outputs

    def fail(self, plan: Plan, error: EngineError) -> list[Output]:
        """Instead of `commit` when a plan could not be run: its requests end with the error, their pages are free.

        What else runs is computed again, so that nothing depends on how far the runner came.
        """
        assert plan is self._plan, "not the plan that was made last"
        self._plan = None
        jobs = {sequence.id: sequence.job for sequence in [*self._rows, *self._sampling] if not sequence.gone}
        for sequence in self._running.all():
            sequence.chain = None
        outputs = [self._fail(job, error) for job in jobs.values()]
        for sequence in self._running.all():
            self._preempt(sequence)
        self._running.undelivered(plan)
        return outputs

    def set_version(self, version: int, keep: bool = True) -> None:
        """The weights have changed, between two steps. Prefixes that the old ones computed are forgotten.

        Running sequences go on with the keys and values they have and publish none of them from now on; with
        `keep=False` they give them up and are computed again.
        """
        assert self._plan is None, "weights change between steps"
        self.weight_version = version
        for sequence in self._running.all():
            sequence.chain = None
            if not keep:
                self._preempt(sequence)
        self.pages.drop()

    def plan(self, budget: int | None = None) -> Plan | None:
        """The next step, of at most `budget` tokens; None while paused, without work or without a budget."""
        assert self._plan is None, "the last plan is neither committed nor failed"
        tokens = self._max_tokens if budget is None else min(budget, self._max_tokens)
        if self.paused or tokens < 1 or not self._jobs:
            return None
        self._forks = []
        self._start_urgent()
        base = self._plan_decodes(tokens)
        while self._running.decodes and not base.slots:  # whoever had its turn gave up its pages
            base = self._plan_decodes(tokens)
        plan = self._plan_prompts(base, tokens - base.decodes)
        assert plan.slots, "no step although there is work"
        self._pure = plan is self._base
        self._running.deliver(plan)
        self.counts.computed_tokens += plan.tokens
        self._plan = plan
        return plan

    def commit(self, plan: Plan, sampled: Sampled) -> list[Output]:
        """What the plan's step brought: tokens, scores, finished choices. Their pages and slots are free at once."""
        assert plan is self._plan, "not the plan that was made last"
        assert len(sampled.tokens) == len(plan.samples)
        self._plan = None
        version = self.weight_version
        outputs = self._commit_prompts(plan, sampled)
        ended: list[tuple[Sequence, Output]] = []
        columns = sampled.logprobs or repeat(None)
        for sequence, token, logprobs in zip(self._sampling, sampled.tokens, columns, strict=False):
            if sequence.gone:
                continue
            token_ids = sequence.token_ids
            token_ids.append(token)
            output = Output(sequence.id, sequence.choice, [token], logprobs, None, None, None, None, None, version)
            outputs.append(output)
            if token in sequence.stops or len(token_ids) >= sequence.limit:
                ended.append((sequence, output))
        self.counts.generated_tokens += len(sampled.tokens)
        if plan.decodes < len(plan.slots):
            for output in outputs:
                if job := self._jobs.get(output.request_id):
                    job.announce(output)
        for sequence, output in ended:
            token, length = output.token_ids[0], len(sequence.token_ids)
            if token in sequence.stops and length > sequence.stops_from:
                output.finish, output.stop_id = "stop", token
                self._end(sequence)
            elif length >= sequence.limit:
                output.finish = "length"
                self._end(sequence)
        return outputs

    def _plan_decodes(self, budget: int) -> Plan:
        """One row for each decode, or for `budget` of them in turn. May preempt."""
        size, running, base = self.pages.page_size, self._running, self._base
        decodes = running.decodes
        if base is not None and not running.changed and len(decodes) <= budget:
            starts = [start + 1 for start in base.starts]
            needy = [decodes[row] for row, start in enumerate(starts) if start % size == 0]
        else:
            base = None
            if len(decodes) > budget:
                first = bisect_right(decodes, self._turn, key=by_rank)
                decodes = (decodes[first:] + decodes[:first])[:budget]
                self._turn = decodes[-1].rank
                decodes.sort(key=by_rank)
            else:
                decodes = list(decodes)
            starts = [len(sequence.token_ids) - 1 for sequence in decodes]
            needy = [one for one, start in zip(decodes, starts, strict=True) if one.forked or start % size == 0]
        for sequence in needy:  # by rank: whoever is preempted has not got anything from this plan yet
            while sequence.decoding and not running.grow(sequence):
                last = running.last()
                assert last is not None
                self._preempt(last)
        if base is not None and not running.changed:
            rows = len(starts)
            base = Plan(base.slots, starts, base.counts, rows, rows, base.samples, steady=self._pure)
        else:
            decodes = [sequence for sequence in decodes if sequence.decoding]
            slots = [sequence.slot for sequence in decodes]
            rows = len(slots)
            starts = [len(sequence.token_ids) - 1 for sequence in decodes]
            base = Plan(slots, starts, [1] * rows, rows, rows, list(enumerate(slots)))
            self._base_rows = decodes
        self._base = base if rows == len(running.decodes) else None
        running.changed = False
        self._rows = self._sampling = self._base_rows
        return base

    def _plan_prompts(self, base: Plan, budget: int) -> Plan:
        """Adds chunks of prompts to a copy of the plan: of those that run, then of as many waiting ones as fit."""
        plan = None
        prefills = iter(list(self._running.prefills))
        while budget and (sequence := next(prefills, None) or self._start_first()):
            if plan is None:
                plan = Plan([*base.slots], [*base.starts], [*base.counts], base.decodes, base.tokens, [*base.samples])
                self._rows, self._sampling = [*self._rows], [*self._sampling]
            count = min(budget, len(sequence.token_ids) - sequence.computed)
            budget -= count
            self._add_chunk(plan, sequence, count)
        return plan or base

    def _add_chunk(self, plan: Plan, sequence: Sequence, count: int) -> None:
        row, start, job = len(plan.slots), sequence.computed, sequence.job
        self._rows.append(sequence)
        plan.slots.append(sequence.slot)
        plan.starts.append(start)
        plan.counts.append(count)
        plan.tokens += count
        if sequence.rows_from is not None:
            first, end = max(start, sequence.rows_from), min(start + count, sequence.prompt - 1)
            if first < end:
                plan.prompt_logprobs.append(PromptRows(row, first, end))
        if start + count < len(sequence.token_ids):
            return
        if "score" in job.request.want and not job.announced:
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
            sequence.job.sequences[choice] = child
        return children

    def _commit_prompts(self, plan: Plan, sampled: Sampled) -> list[Output]:
        """Outputs of the sequences that end with their prompt; the others decode from now on."""
        outputs: list[Output] = []
        for wanted, found in zip(plan.prompt_logprobs, sampled.prompt_logprobs, strict=True):
            self._rows[wanted.row].collect(found)
        for (row, _), values in zip(plan.scores, sampled.scores, strict=True):
            self._rows[row].job.scores = values
        for row in range(plan.decodes, len(plan.slots)):
            sequence = self._rows[row]
            if sequence.gone:
                continue
            sequence.computed += plan.counts[row]
            self._running.publish(sequence)
            if sequence.computed < len(sequence.token_ids):
                continue
            job = sequence.job
            if sequence.rows_from is not None:
                job.prompt_logprobs = sequence.prompt_logprobs or Logprobs()
            if sequence.draws:
                self._running.join(sequence)
            else:
                finish = "length" if job.request.sampling else "stop"
                outputs.append(Output(sequence.id, finish=finish, weight_version=self.weight_version))
                job.announce(outputs[-1])
                self._end(sequence)
        for parent, child in self._forks:
            if not child.gone:
                self._running.join(child, parent)
        return outputs

    def _start_first(self) -> Sequence | None:
        """Starts the first that waits, if it fits."""
        sequence = None if self._waiting.stuck else self._waiting.first()
        if sequence is None:
            return None
        if not self._running.start(sequence, self.weight_version):
            self._waiting.stuck = True
            return None
        job = sequence.job
        if job.cached_tokens is None:
            job.cached_tokens = sequence.computed
            self._waiting.discharge(job)
            self.counts.started += 1
            self.counts.prompt_tokens += sequence.prompt
            self.counts.cached_tokens += sequence.computed
        return self._waiting.pop()

    def _start_urgent(self) -> None:
        """Starts what waits with a better priority than something that runs, ahead of everything else.

        The last running ones are preempted for it, unless even all of worse priority would not make enough room.
        """
        running = self._running
        while (first := self._waiting.first()) and (last := running.last()) and first.rank[0] < last.rank[0]:
            if self._start_first():
                continue
            lower = [sequence for sequence in running.all() if sequence.rank[0] > first.rank[0]]
            room = self.pages.available + sum(len(sequence.table) for sequence in lower)
            if running.pages_for(first) + len(running) - len(lower) > room:
                return
            self._preempt(last)

    def _preempt(self, sequence: Sequence) -> None:
        self.counts.preemptions += 1
        self._running.leave(sequence)
        self._waiting.push(sequence)
        self._waiting.stuck = False

    def _end(self, sequence: Sequence) -> None:
        """A choice, and what would have forked from it, is done with."""
        job = sequence.job
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        else:
            self._running.leave(sequence)
            sequence.gone = True
            self._waiting.stuck = False
        del job.sequences[sequence.choice]
        if not job.sequences:
            del self._jobs[sequence.id]
            if job.cached_tokens is None:
                self._waiting.discharge(job)

    def _hand_over(self, sequence: Sequence) -> None:
        """Ends a choice; if others wait for its prompt to be computed, the first of them takes its place."""
        if not sequence.siblings:
            self._end(sequence)
            return
        sequences = sequence.job.sequences
        del sequences[sequence.choice]
        sequence.choice = sequence.siblings.pop(0)
        sequences[sequence.choice] = sequence
        self._running.replace(sequence)

    def _fail(self, job: Job, error: EngineError) -> Output:
        for sequence in list(job.sequences.values()):
            self._end(sequence)
        return Output(job.request.id, finish="error", error=error, weight_version=self.weight_version)
