"""What the scheduler knows of a request and of each of its choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .pages import Chain
from .plan import Plan, PromptRows, Sampled
from .request import Logprobs, Output, Request

if TYPE_CHECKING:
    from .columns import Columns
    from .groups import OpenGroup

UNKNOWN = -1  # a token that is drawn, but has not come back from the device yet
Rank = tuple[int, int, int]  # priority, arrival, choice: the lower goes first; no two sequences have the same


@dataclass(slots=True, eq=False)
class Job:
    """A request that is not finished: `sequences` are its choices; `Sequence.siblings` names those yet to fork."""

    request: Request
    arrived: float
    shared: int = 0  # tokens of the prompt that are its group's
    sequences: dict[int, Sequence] = field(default_factory=dict[int, "Sequence"])
    cached_tokens: int | None = None  # None until it runs for the first time
    prompt_logprobs: Logprobs | None = None
    scores: list[float] | None = None
    pooled_index: int | None = None
    values: list[float] | None = None
    embedding: list[float] | None = None
    announced: bool = False  # the first output is out, and these with it
    # For `meter`: moments (0: not yet), and what is told of it at its end.
    started: float = 0.0
    first_token: float = 0.0
    preemptions: int = 0
    longest: int = 0  # tokens of the longest choice that has ended

    @property
    def prompt(self) -> int:
        """Its length in tokens."""
        return len(self.request.token_ids)

    @property
    def own(self) -> int:
        """Tokens of the prompt that are not its group's."""
        return self.prompt - self.shared

    @property
    def needed_row(self) -> int:
        """The request's, and 0 where rows of the prompt are wanted and nothing says from which on."""
        return 0 if self.wants_rows and self.request.first_needed_row is None else self.request.needed_row

    @property
    def wants_rows(self) -> bool:
        """Whether something of each row of the prompt is wanted: values, or log-probabilities."""
        return "values" in self.request.want or self.request.prompt_logprobs is not None

    def first_sequence(
        self, rank: Rank, context: int, end_ids: frozenset[int] = frozenset(), ahead: bool = False
    ) -> Sequence:
        """The one that computes the prompt; with n > 1 the other choices fork from it.

        `ahead`: the device runs ahead of the host, which a grammar cannot do.
        """
        request, sampling, prompt = self.request, self.request.sampling, self.prompt
        answer = sampling.max_tokens if sampling else 0
        stops = frozenset[int]() if sampling and sampling.ignore_eos else end_ids
        first = self.sequences[0] = Sequence(
            self,
            request.id,
            choice=0,
            rank=rank,
            token_ids=list(request.token_ids),
            prompt=prompt,
            draws=answer > 0,
            limit=min(prompt + answer, context),
            stops=stops | frozenset(sampling.stop_ids) if sampling and sampling.stop_ids else stops,
            stops_from=prompt + (sampling.min_tokens if sampling else 0),
            siblings=list(range(1, request.n)) if answer else [],
            synchronous=ahead and sampling is not None and bool(sampling.grammar),
        )
        return first

    def announce(self, output: Output) -> None:
        """Puts into the request's first output what only that one carries."""
        if not self.announced:
            self.announced = True
            output.cached_tokens = self.cached_tokens
            output.prompt_logprobs = self.prompt_logprobs
            output.scores, output.pooled_index = self.scores, self.pooled_index
            output.values = self.values
            output.embedding = self.embedding


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request. Waiting: slot -1, no pages. Running: a slot, and pages for all its tokens but the last.

    `computed` counts the positions whose keys and values stand in its pages. Once `decoding`, that is all but the last
    token and `computed` is not kept up to date.
    """

    job: Job
    id: int  # the request's
    choice: int
    rank: Rank
    token_ids: list[int]  # prompt and answer
    prompt: int  # length of the prompt
    draws: bool  # whether tokens are drawn at all
    limit: int  # the most tokens it may reach, prompt included
    stops: frozenset[int]
    stops_from: int  # a stop counts once there are more tokens than this
    synchronous: bool = False  # it has a row only once its last token is known, because its mask follows from that
    siblings: list[int] = field(default_factory=list[int])  # choices that fork from this one at the prompt's end
    group: OpenGroup | None = None  # whose anchor or member it is
    slot: int = -1
    table: list[int] = field(default_factory=list[int])
    computed: int = 0
    decoding: bool = False
    forked: bool = False  # the page it writes next may be shared
    chain: Chain | None = None  # None: its pages are not published
    rows_from: int | None = None  # the prompt row from which log-probabilities or values are collected; None: no such
    prompt_logprobs: Logprobs | None = None
    values: list[float] = field(default_factory=list[float])
    gone: bool = False
    landed: bool = False  # nothing is left to compute; it has neither slot nor pages and does not wait
    began: float = 0.0  # when its first token was told, and
    told: float = 0.0  # when its last one was, as far as `meter` does not know it better

    @property
    def anchors(self) -> OpenGroup | None:
        """The group whose prompt it computes."""
        return None if self.member else self.group

    @property
    def member(self) -> bool:
        return self.shared > 0

    @property
    def shared(self) -> int:
        """So many of its tokens, the first ones, are computed by its group's anchor."""
        return self.job.shared

    @property
    def known(self) -> bool:
        """Whether its last token has come back."""
        return self.token_ids[-1] != UNKNOWN

    @property
    def done(self) -> int:
        """How many positions are computed."""
        return len(self.token_ids) - 1 if self.decoding else self.computed

    def name_rows(self, plan: Plan, row: int, start: int, end: int) -> None:
        """Tells the plan of which positions in its row, from `start` to before `end`, something is wanted."""
        if self.rows_from is None:
            return
        values = "values" in self.job.request.want
        first, end = max(start, self.rows_from), min(end, self.prompt if values else self.prompt - 1)
        pin = self.pin_before(start)
        if pin is not None:
            first = start - 1
        if first < end:
            (plan.values if values else plan.prompt_logprobs).append(PromptRows(row, first, end, pin))

    def pin_before(self, start: int) -> int | None:
        """Where the runner keeps the hidden state of the position before `start`, if that is the end of its group's
        prompt."""
        return self.group.pin if self.member and self.group and start == self.shared else None

    def hand_rows(self) -> None:
        """All of the prompt is computed: what was collected of it is the request's."""
        if "values" in self.job.request.want:
            self.job.values = self.values
        elif self.rows_from is not None:
            self.job.prompt_logprobs = self.prompt_logprobs or Logprobs()

    def collect(self, found: Logprobs) -> None:
        """More of the prompt's log-probabilities."""
        known = self.prompt_logprobs = self.prompt_logprobs or Logprobs()
        known.values += found.values
        known.ranks += found.ranks
        known.top_ids += found.top_ids
        known.top_values += found.top_values

    def sibling(self, choice: int) -> Sequence:
        """Another choice of the same request, with the same tokens so far."""
        return Sequence(
            self.job,
            self.id,
            choice,
            rank=(*self.rank[:2], choice),
            token_ids=list(self.token_ids),
            prompt=self.prompt,
            draws=self.draws,
            limit=self.limit,
            stops=self.stops,
            stops_from=self.stops_from,
            synchronous=self.synchronous,
        )


@dataclass(slots=True)
class Flight:
    """A plan whose step is launched and whose results are not known yet: whom they belong to."""

    plan: Plan
    rows: list[Sequence]  # one per row of the plan
    sampling: list[Sequence]  # one per entry of its `samples`
    columns: Columns  # of its decodes, its first rows
    complete: list[Sequence] = field(default_factory=list[Sequence])  # whose prompt it completes

    def keep(self, sampled: Sampled) -> None:
        """Hands what came of prompts to those who asked for it."""
        plan = self.plan
        for wanted, found in zip(plan.prompt_logprobs, sampled.prompt_logprobs, strict=True):
            self.rows[wanted.row].collect(found)
        for wanted, values in zip(plan.values, sampled.values, strict=True):
            self.rows[wanted.row].values += values
        for (row, _), scores in zip(plan.scores, sampled.scores, strict=True):
            job = self.rows[row].job
            job.scores, job.pooled_index = scores, plan.starts[row] + plan.counts[row] - 1
        last = [row for row, complete, _ in plan.pooled if complete]
        for row, found in zip(last, sampled.pooled, strict=True):
            job = self.rows[row].job
            if "score" in job.request.want:
                job.scores = found
            else:
                job.embedding = found

    def holds(self, sequence: Sequence) -> bool:
        """Whether something of the sequence is still to come."""
        return sequence in self.rows or sequence in self.sampling
