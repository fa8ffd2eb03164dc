"""Watches a scheduler: when requests start, get tokens and end becomes `Counts`.

Most tokens come to many decodes at once, and all of them got their last one in the step before; their intervals are one
observation. A sequence remembers when it last got a token only while it is not among those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import TYPE_CHECKING

from .counts import Counts

if TYPE_CHECKING:
    from .columns import Columns
    from .plan import Plan
    from .request import Finish, Request
    from .sequence import Job, Sequence


class Meter:
    def __init__(self, clock: Callable[[], float]) -> None:
        self.counts = Counts()
        self._clock = clock
        self._columns: Columns | None = None  # whose rows all got their last token at `_told`
        self._told = 0.0

    def admitted(self, request: Request) -> None:
        self.counts.request_n.observe(request.n)
        if request.sampling is not None:
            self.counts.request_max_tokens.observe(request.sampling.max_tokens)

    def refused(self, bound: str) -> None:
        self.counts.rejected[bound] += 1

    def started(self, sequence: Sequence) -> None:
        """For the first time; `computed` tokens of it were in the prefix cache, or are its group's. What computes a
        group's prompt is no request; its tokens count once, and none of them for the members."""
        counts, job = self.counts, sequence.job
        job.started = self._clock()
        cached = sequence.computed - sequence.shared
        counts.prompt_tokens += job.own
        counts.cached_tokens += cached
        counts.forked_tokens += sequence.shared
        if sequence.anchors:
            return
        counts.started += 1
        counts.request_prompt_tokens.observe(job.own)
        counts.request_computed_tokens.observe(job.own - cached)
        counts.queue_seconds.observe(job.started - job.arrived)

    def preempted(self, sequence: Sequence) -> None:
        self.counts.preemptions += 1
        sequence.job.preemptions += 1

    def planned(self, plan: Plan) -> None:
        self.counts.computed_tokens += plan.tokens
        self.counts.step_tokens.observe(plan.tokens)

    def forked(self, sequence: Sequence) -> None:
        self.counts.forked_tokens += sequence.prompt

    def told_all(self, columns: Columns | None) -> None:
        """Every row of the columns got a token. None: whoever gets one is `told` by itself."""
        now, intervals = self._clock(), self.counts.next_token_seconds
        if columns is not None and columns is self._columns:
            intervals.observe(now - self._told, len(columns.rows))
        else:
            for row in self._columns.rows if self._columns else ():
                row.told = self._told
            for row in columns.rows if columns else ():
                intervals.observe(now - row.told)
            self._columns = columns
        self._told = now

    def told(self, sequence: Sequence) -> None:
        """It got a token, and stands in no columns that did."""
        now, counts, job = self._clock(), self.counts, sequence.job
        if sequence.began:
            counts.next_token_seconds.observe(now - sequence.told)
        else:
            sequence.began = now
        sequence.told = now
        if not job.first_token:
            job.first_token = now
            counts.first_token_seconds.observe(now - job.arrived)
            counts.prefill_seconds.observe(now - job.started)

    def scored(self, values: Several[float]) -> None:
        self.counts.scores += 1
        if len(values) == 1 and math.isfinite(values[0]):
            self.counts.score.observe(values[0])

    def ended(self, sequence: Sequence, finish: Finish) -> None:
        """A choice, and with it its request where it was the last."""
        counts, job, now = self.counts, sequence.job, self._clock()
        counts.finished[finish] += 1
        if sequence.draws:
            tokens = len(sequence.token_ids) - sequence.prompt
            tokens -= tokens > 0 and sequence.token_ids[-1] < 0  # drawn, but never told
            counts.generation_tokens.observe(tokens)
            job.longest = max(job.longest, tokens)
            if tokens > 1 and finish in ("stop", "length"):
                counts.token_seconds.observe((now - sequence.began) / (tokens - 1))
        if not job.sequences:
            self._finished(job, now)

    def _finished(self, job: Job, now: float) -> None:
        counts = self.counts
        counts.request_seconds.observe(now - job.arrived)
        if job.cached_tokens is None:
            return
        counts.inference_seconds.observe(now - job.started)
        counts.request_preemptions.observe(job.preemptions)
        if job.first_token:
            counts.decode_seconds.observe(now - job.first_token)
            counts.request_longest.observe(job.longest)
