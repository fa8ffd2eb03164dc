"""A runner without a model: remembers what every position of every page holds, and draws tokens from a hash.

The hash of a position covers all tokens up to it. A row checks that the pages it attends to hold exactly the hashes of
its own tokens, so that a wrong page, a lost copy or a write by somebody else shows at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.server.engine.plan import Plan, PromptRows, Sampled
from tandem.server.engine.request import Logprobs, Request

VOCABULARY = 12


def follow(state: int, token: int) -> int:
    return hash((state, token))


def state_of(tokens: list[int]) -> int:
    state = 0
    for token in tokens:
        state = follow(state, token)
    return state


def draw(state: int, seed: int, choice: int, number: int) -> int:
    """Token `number` of a choice's answer after tokens that hash to `state`."""
    return hash((state, seed, choice, number)) % VOCABULARY


def answer(request: Request, choice: int, context: int, end_ids: frozenset[int]) -> tuple[list[int], str]:
    """What a request must get, by the plainest way: tokens and why they end."""
    sampling = request.sampling
    assert sampling is not None
    state = state_of(request.token_ids)
    stops = set(sampling.stop_ids) | (set() if sampling.ignore_eos else end_ids)
    tokens: list[int] = []
    while True:
        token = draw(state, sampling.seed, choice, len(tokens))
        state = follow(state, token)
        tokens.append(token)
        if token in stops and len(tokens) > sampling.min_tokens:
            return tokens, "stop"
        if len(tokens) == sampling.max_tokens or len(tokens) + len(request.token_ids) == context:
            return tokens, "length"


@dataclass
class Slot:
    request: Request
    choice: int
    tokens: list[int]
    table: dict[int, int]
    since: int  # weight version when it was (re)loaded: nothing older may be attended to


class FakeRunner:
    def __init__(
        self, pages: int, page_size: int, max_seqs: int, budget: int, shared_tokens: int = 1, ahead: bool = False
    ) -> None:
        self.ahead = ahead  # results are told to the scheduler only after the next plan is made
        self.size = page_size
        self.max_seqs = max_seqs
        self.budget = budget
        self.shared_tokens = shared_tokens
        self.grouped = 0  # plans with groups
        self.version = 0
        self.contents: list[list[tuple[int, int] | None]] = [
            [None] * page_size for _ in range(pages)
        ]  # (hash, version)
        self.slots: dict[int, Slot] = {}
        self.previous: Plan | None = None
        self.unknown: set[int] = set()  # slots whose last token the scheduler has not been told
        self.pinned: dict[int, tuple[int, int]] = {}  # by pin: (hash, version) of a prompt
        self.pooled: dict[int, tuple[int, int]] = {}  # by slot: whose rows are pooled, and how many

    def execute(self, plan: Plan, budget: int | None = None) -> Sampled:
        self.check_rows(plan, budget)
        for slot in plan.left:
            self.slots.pop(slot, None)
            self.unknown.discard(slot)
        for entry in plan.entered:
            assert 0 <= entry.slot < self.max_seqs
            before = self.slots.get(entry.slot)
            assert before is None or before.request is entry.request, "a slot is taken twice"
            table = before.table if before else {}
            since = before.since if before else self.version
            for row, drawer in plan.samples:
                if drawer == entry.slot and plan.slots[row] != drawer:  # forked: as old as what it forks from
                    since = self.slots[plan.slots[row]].since
            tokens = entry.request.token_ids + entry.generated
            assert min(tokens) >= 0, "a token that is not known yet"
            self.slots[entry.slot] = Slot(entry.request, entry.choice, tokens, table, since)
        assert len({(slot, index) for slot, index, _ in plan.page_updates}) == len(plan.page_updates)
        for slot, index, page in plan.page_updates:
            self.slots[slot].table[index] = page
        sources, destinations = [pair[0] for pair in plan.copies], [pair[1] for pair in plan.copies]
        assert len(set(destinations)) == len(destinations) and not set(sources) & set(destinations)
        for source, destination in plan.copies:
            self.contents[destination] = list(self.contents[source])
        self.check_groups(plan)
        groups = [*(plan.prefixes or []), *[(0, 0)] * len(plan.slots)]
        states = [
            self.compute(slot, start, count, self.slots[plan.slots[first]].table, shared)
            for slot, start, count, (first, shared) in zip(plan.slots, plan.starts, plan.counts, groups, strict=False)
        ]
        self.check_writes(plan)
        for slot in plan.slots:
            sampling = self.slots[slot].request.sampling
            assert not (sampling and sampling.grammar and slot in self.unknown), "no mask without its last token"
        sampled = Sampled([])
        last = [start + count for start, count in zip(plan.starts, plan.counts, strict=True)]
        for row, slot in plan.samples:
            known = self.slots[slot]
            assert last[row] == len(known.tokens), "draws from a position that is not its last"
            sampling = known.request.sampling
            assert sampling is not None
            number = len(known.tokens) - len(known.request.token_ids)
            token = draw(states[row], sampling.seed, known.choice, number)
            sampled.tokens.append(token)
            known.tokens = [*known.tokens, token]
        for row, slot in plan.scores:
            assert slot == plan.slots[row] and last[row] == len(self.slots[slot].request.token_ids)
            sampled.scores.append([float(states[row])])
        for rows in plan.prompt_logprobs:
            start, stop = plan.starts[rows.row], last[rows.row]
            known = self.slots[plan.slots[rows.row]]
            self.check_first(rows, known, start)
            assert rows.first < rows.end <= stop and rows.end < len(known.request.token_ids)
            sampled.prompt_logprobs.append(
                Logprobs([float(known.tokens[position + 1]) for position in range(rows.first, rows.end)])
            )
        for rows in plan.values:
            start, stop = plan.starts[rows.row], last[rows.row]
            known = self.slots[plan.slots[rows.row]]
            self.check_first(rows, known, start)
            assert rows.first < rows.end <= stop
            sampled.values.append([float(known.tokens[position]) for position in range(rows.first, rows.end)])
        self.pool(plan, sampled)
        for row, pin in plan.pins:
            self.pinned[pin] = states[row], self.version
        self.previous = plan
        if self.ahead:
            self.unknown |= {slot for _, slot in plan.samples}
        return sampled

    def check_first(self, rows: PromptRows, known: Slot, start: int) -> None:
        """Rows that are asked for lie in the step, or begin with the right pinned one."""
        if rows.pin is None:
            assert start <= rows.first
            return
        assert rows.first == start - 1
        state, version = self.pinned[rows.pin]
        assert state == state_of(known.tokens[:start]), "the hidden state of another prompt"
        assert version >= known.since, "a hidden state by old weights"

    def told(self, plan: Plan) -> None:
        """The scheduler has been given what this plan, the last or the one before it, brought."""
        later = self.previous if self.previous is not plan else None
        self.unknown = {slot for _, slot in later.samples} if later else set()

    def pool(self, plan: Plan, sampled: Sampled) -> None:
        """Every row of a text that is embedded comes once and in order, whatever else its slot was used for."""
        wanted = [row for row, slot in enumerate(plan.slots) if "embedding" in self.slots[slot].request.want]
        assert [row for row, _, _ in plan.pooled] == wanted
        for row, complete, _ in plan.pooled:
            slot, start = plan.slots[row], plan.starts[row]
            request, end = self.slots[slot].request, start + plan.counts[row]
            assert start == 0 or self.pooled[slot] == (request.id, start), "rows that were not pooled"
            self.pooled[slot] = (request.id, end)
            assert complete == (end == len(request.token_ids))
            if complete:
                sampled.pooled.append([float(end)])

    def compute(self, slot: int, start: int, count: int, prefix: dict[int, int], shared: int) -> int:
        """Attends to what the pages hold, writes the row's positions, gives the hash at its last one.

        The first `shared` positions are read from the pages `prefix`, another sequence's.
        """
        known, request = self.slots[slot], self.slots[slot].request
        assert start + count <= len(known.tokens)
        most = len(request.token_ids) + (max(1, request.sampling.max_tokens) - 1 if request.sampling else 0)
        assert start + count <= most, "a position that nobody needs"
        state = 0
        for position in range(start + count):
            state = follow(state, known.tokens[position])
            table = prefix if position < shared else known.table
            page = self.contents[table[position // self.size]]
            if position < start:
                held = page[position % self.size]
                assert held is not None and held[0] == state, f"slot {slot}, position {position}: other contents"
                assert held[1] >= known.since, f"slot {slot}, position {position}: by old weights"
            else:
                page[position % self.size] = (state, self.version)
        return state

    def check_rows(self, plan: Plan, budget: int | None) -> None:
        rows = len(plan.slots)
        assert rows == len(plan.starts) == len(plan.counts) and rows
        assert len(set(plan.slots)) == rows, "two rows of one slot"
        assert plan.tokens == sum(plan.counts) <= (self.budget if budget is None else min(budget, self.budget))
        assert min(plan.counts) > 0 and plan.counts[: plan.decodes] == [1] * plan.decodes
        assert plan.samples[: plan.decodes] == list(enumerate(plan.slots[: plan.decodes]))
        if plan.steady:
            last = self.previous
            own = rows - plan.synchronous
            assert last is not None and last.decodes == len(last.slots) and last.decodes - last.synchronous == own
            assert (plan.slots[:own], plan.samples[:own]) == (last.slots[:own], last.samples[:own])
            assert plan.starts[:own] == [start + 1 for start in last.starts[:own]] and plan.decodes == rows

    def check_groups(self, plan: Plan) -> None:
        if plan.prefixes is None:
            return
        self.grouped += 1
        assert len(plan.prefixes) == plan.decodes - plan.synchronous and any(shared for _, shared in plan.prefixes)
        for row, (first, shared) in enumerate(plan.prefixes):
            assert first == row or (plan.prefixes[row - 1] == (first, shared) and first < row)
            assert shared % self.size == 0 and shared <= plan.starts[row]
            assert not shared or shared >= self.shared_tokens

    def check_writes(self, plan: Plan) -> None:
        """No page that this step wrote belongs to anybody else."""
        for slot, start, count in zip(plan.slots, plan.starts, plan.counts, strict=True):
            table = self.slots[slot].table
            written = {table[position // self.size] for position in range(start, start + count)}
            for other, known in self.slots.items():
                if other != slot and known.table:
                    reach = (len(known.tokens) - 1) // self.size  # further entries may be stale
                    kept = {page for index, page in known.table.items() if index <= reach}
                    shares_prompt = plan_forks(plan, slot, other)
                    assert shares_prompt or not written & kept, f"slots {slot} and {other} share a page that is written"


def plan_forks(plan: Plan, slot: int, other: int) -> bool:
    """Whether `other` forks from `slot` in this plan: it has no row of its own and draws from the other's."""
    return any(plan.slots[row] == slot and drawer == other for row, drawer in plan.samples)
