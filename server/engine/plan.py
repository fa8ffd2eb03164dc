"""What one step computes, and what came of it: the integers that pass between `scheduler.py` and `runner.py`.

A `Plan` is all that the runner is told. The runner mirrors per slot what it needs (tokens, page table, sampling
parameters) and applies a plan in this order:

1. `left`: these slots are empty. A slot may leave and be entered again in one plan.
2. `entered`: load `prompt + generated` as the slot's token history and the request's sampling parameters. A slot may be
   entered again without having left (another choice takes over the prompt that is being computed); its pages stay.
3. `page_updates`: entries of the slots' page tables. Entries past a sequence's length are stale and never read.
4. `copies`: whole pages, before anything is written. No page is both a source and a destination, destinations differ.
5. the forward pass over the rows, then `samples`, `scores`, `values`, `prompt_logprobs` and `pooled` from its hidden
   states: of a text whose embedding or score is pooled every chunk is named, because that may have to be carried on. A
   token sampled for a slot from row r stands at position `starts[r] + counts[r]` of *that slot's* history; the slot's
   next row starts exactly there, so the runner writes it into the history without being told.
6. `pins`: the hidden states of these rows' last positions, and what is pooled up to there, are kept, each in the place
   of what was kept under its number before.

Lists of a plan may be reused by the next one: read them before `Scheduler.plan` is called again; do not change them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from .request import Logprobs, Request


@dataclass(frozen=True, slots=True)
class Entered:
    """A sequence takes a slot: one choice of a request, fresh, forked or recomputed after a preemption.

    `generated` holds the tokens that were drawn before a preemption; the choice's next token is number
    `len(generated)` of its answer (counted from 0), whatever was recomputed. Its position in the history is
    `len(request.token_ids) + len(generated)`.
    """

    slot: int
    request: Request
    choice: int
    generated: list[int]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Positions `first <= p < end` of row `row` (all inside it) of which something is wanted.

    In `prompt_logprobs` that is the next token's log-probability: entry i of the answer is that of prompt token
    `first + i + 1` given the tokens up to `first + i`, so `end` never exceeds the prompt's length - 1. In `values` it
    is the position's value, given the tokens up to and including its own. With `pin`, position `first` is the one
    before the row, and its hidden state what an earlier plan pinned under that number.
    """

    row: int
    first: int
    end: int
    pin: int | None = None


@dataclass(slots=True)
class Plan:
    """One step of one model. `slots`, `starts`, `counts` have one entry per row; the first `decodes` rows are decodes.

    Row r computes positions `starts[r] .. starts[r] + counts[r] - 1` of the sequence in slot `slots[r]`; a slot has at
    most one row per plan. `counts` is 1 for decodes.
    """

    slots: list[int]
    starts: list[int]
    counts: list[int]
    decodes: int
    tokens: int  # sum of counts
    samples: list[tuple[int, int]]  # (row, slot); several slots sample from one row where a prompt forks into choices
    scores: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (row, slot): the row's last position
    prompt_logprobs: list[PromptRows] = field(default_factory=list[PromptRows])
    values: list[PromptRows] = field(default_factory=list[PromptRows])
    # (row, whether it is the last, the pin under which lies what is pooled before it)
    pooled: list[tuple[int, bool, int | None]] = field(default_factory=list[tuple[int, bool, int | None]])
    pins: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (row, pin)
    left: list[int] = field(default_factory=list[int])
    entered: list[Entered] = field(default_factory=list[Entered])
    page_updates: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])  # (slot, index, page)
    copies: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # (source page, destination page)
    prefixes: list[tuple[int, int]] | None = None  # per decode (first row of its group, tokens that the group shares)
    synchronous: int = 0  # so many of the decodes, the last of them, sat out until their last token was known
    steady: bool = False  # all rows are decodes; those not synchronous are the plan before's, starts one further

    def copy(self) -> Plan:
        """One that rows can be added to. It carries no changes of slots."""
        columns = [*self.slots], [*self.starts], [*self.counts], self.decodes, self.tokens, [*self.samples]
        return Plan(*columns, prefixes=self.prefixes, synchronous=self.synchronous, steady=self.steady)

    def add_row(self, slot: int, start: int, count: int) -> int:
        """Gives its number."""
        self.slots.append(slot)
        self.starts.append(start)
        self.counts.append(count)
        self.tokens += count
        return len(self.slots) - 1

    def with_synchronous(self, decodes: list[tuple[int, int]]) -> Plan:
        """A copy with these (slot, start) behind all other decodes."""
        plan = self.copy()
        for slot, start in decodes:
            plan.samples.append((plan.add_row(slot, start, 1), slot))
        plan.decodes += len(decodes)
        plan.synchronous += len(decodes)
        return plan


@dataclass(slots=True)
class Sampled:
    """What the runner gives back, entry by entry of the plan's lists of the same name.

    `tokens[i]` was drawn for `plan.samples[i]`. `logprobs` is None where no sample wants any; else entry i is None or
    one token's columns. `scores[i]` has one float per label, `values[i]` one per position. `pooled` has an entry, an
    embedding or scores, for each last row of the plan's.
    `failures[i]` says why `tokens[i]` is -1, where a grammar is the reason.
    """

    tokens: list[int]
    logprobs: list[Logprobs | None] | None = None
    scores: list[list[float]] = field(default_factory=list[list[float]])
    prompt_logprobs: list[Logprobs] = field(default_factory=list[Logprobs])
    failures: dict[int, str] = field(default_factory=dict[int, str])
    values: list[list[float]] = field(default_factory=list[list[float]])
    pooled: list[list[float]] = field(default_factory=list[list[float]])


class Ticket(Protocol):
    """A launched step."""

    def wait(self) -> Sampled:
        """What came of it, once it is done. Raises what went wrong on the device."""
        ...

    @property
    def seconds(self) -> float | None:
        """How long the device worked on it, once `wait` has returned; None where the host waited all the while."""
        ...


class Executor(Protocol):
    """What carries plans out, in the order in which they are launched."""

    ahead: bool  # launch returns at once, and what it needs of the step before is on the device

    def launch(self, plan: Plan) -> Ticket: ...

    def prepare(self) -> None:
        """What must be done before the first step, all of its memory included."""
        ...

    def idle(self) -> bool:
        """Uses a moment without work for what makes later steps faster; whether more of that is left."""
        ...

    def write(self, work: Callable[[], None]) -> None:
        """Does work on the model's tensors behind the steps that are launched, and before those to come."""
        ...

    def renew(self) -> None:
        """The model's weights are others, and its matrices may lie elsewhere; nothing is launched."""
        ...
