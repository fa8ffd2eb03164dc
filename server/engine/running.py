"""The sequences that run: which slot and which pages each has, and what the runner must be told of it."""

from __future__ import annotations

from bisect import bisect_right, insort
from itertools import repeat
from operator import attrgetter

from .pages import Chain, Pages, Root
from .plan import Entered, Plan
from .sequence import Rank, Sequence

by_rank = attrgetter("rank")


class Running:
    """Sequences with a slot, by rank: `prefills`, whose known tokens are being computed; `decodes`; and `synchronous`,
    decodes that sit out while their last token is on its way.

    Between two plans it collects the changes that the next plan carries to the runner.
    """

    def __init__(self, pages: Pages, slots: int, prefix_caching: bool) -> None:
        self.pages = pages
        self.prefills: list[Sequence] = []
        self.decodes: list[Sequence] = []
        self.synchronous: list[Sequence] = []
        self.changed = True  # `decodes` has changed since somebody reset this
        self._prefix_caching = prefix_caching
        self._turn: Rank = (0, 0, 0)  # of the last that had a row when there was not one for each
        self._slots = list(range(slots - 1, -1, -1))  # free ones
        self._left: list[int] = []
        self._entered: list[Entered] = []
        self._page_updates: list[tuple[int, int, int]] = []
        self._copies: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.prefills) + len(self.decodes) + len(self.synchronous)

    def all(self) -> list[Sequence]:
        return [*self.prefills, *self.decodes, *self.synchronous]

    def last(self) -> Sequence | None:
        """The one that is preempted first."""
        lines = (self.prefills, self.decodes, self.synchronous)
        return max((line[-1] for line in lines if line), key=by_rank, default=None)

    def ready(self) -> list[Sequence]:
        """The synchronous ones that may have a row."""
        return [sequence for sequence in self.synchronous if sequence.known]

    def in_turn(self, decodes: list[Sequence], count: int) -> list[Sequence]:
        """`count` of them by rank, beginning behind those that it gave the last time."""
        ordered = sorted(decodes, key=by_rank)
        first = bisect_right(ordered, self._turn, key=by_rank)
        chosen = (ordered[first:] + ordered[:first])[:count]
        self._turn = chosen[-1].rank
        return sorted(chosen, key=by_rank)

    def beginning(self, decodes: list[Sequence]) -> list[Sequence]:
        """Those whose next position may lie in a page that they do not have, or not for themselves."""
        size = self.pages.page_size
        return [one for one in decodes if one.forked or (len(one.token_ids) - 1) % size == 0]

    @property
    def full(self) -> bool:
        """No slot is free."""
        return not self._slots

    def needed(self, sequence: Sequence) -> int:
        """The most pages that must be available for it to start alone."""
        size = self.pages.page_size
        return -(-len(sequence.token_ids) // size) - sequence.shared // size

    def start(self, sequence: Sequence, version: int) -> bool:
        """Gives a waiting sequence a slot and pages for all its tokens, reusing what is computed; or changes nothing.

        One available page for each running sequence is left, so that their very next steps do not preempt it.
        """
        pages, job = self.pages, sequence.job
        anew = not job.announced and len(sequence.token_ids) == sequence.prompt
        table, chain = self._prefix(sequence, version, anew)
        missing = -(-len(sequence.token_ids) // pages.page_size) - len(table)
        if not pages.has_room(missing + len(self)):
            pages.release(table, told=False)
            return False
        sequence.chain = chain
        sequence.computed = sequence.shared or len(table) * pages.page_size
        sequence.table = table + (pages.allocate(missing) or [])
        if sequence.group and sequence.computed % pages.page_size:  # a member's; what is looked up are whole pages
            self._copies.append((sequence.group.anchor.table[len(table)], sequence.table[len(table)]))
        sequence.rows_from = job.needed_row if anew and job.wants_rows else None
        sequence.prompt_logprobs, sequence.values = None, []
        self._enter(sequence)
        insort(self.prefills, sequence, key=by_rank)
        return True

    def _prefix(self, sequence: Sequence, version: int, anew: bool) -> tuple[list[int], Chain | None]:
        """Whole pages that hold its first tokens, with a reference to each, and how they are published: a member's are
        its group's, others are looked up."""
        pages, request = self.pages, sequence.job.request
        if sequence.member and sequence.group:
            anchor = sequence.group.anchor
            chain = anchor.chain and Chain(anchor.chain.digest, anchor.chain.pages)
            return pages.fork(anchor.table[: anchor.prompt // pages.page_size]), chain
        if not self._prefix_caching:
            return [], None
        root = Root(request.model, version, request.adapter, request.cache_salt)
        needed = sequence.job.needed_row if anew else len(sequence.token_ids) - 1
        table = pages.match(root, sequence.token_ids, needed)
        return table, pages.chain(root, table)

    def fork(self, sequence: Sequence, choice: int, reserved: int) -> Sequence | None:
        """Another choice on the same pages, in a slot of its own, that `join`s later; None if there is no room.

        It will soon need one page of its own; `reserved` of the available ones are spoken for.
        """
        if not self._slots or not self.pages.has_room(reserved + 1):
            return None
        child = sequence.sibling(choice)
        child.table = self.pages.fork(sequence.table)
        child.forked = sequence.forked = True
        self._enter(child)
        return child

    def join(self, sequence: Sequence, parent: Sequence | None = None) -> None:
        """Its known tokens (or those of the parent that it forked from) are computed: from now on it decodes."""
        if parent is None:
            self.prefills.remove(sequence)
        elif parent.chain:
            sequence.chain = Chain(parent.chain.digest, parent.chain.pages)
        sequence.decoding = True
        if sequence.synchronous:
            insort(self.synchronous, sequence, key=by_rank)
        else:
            insort(self.decodes, sequence, key=by_rank)
            self.changed = True

    def replace(self, sequence: Sequence) -> None:
        """The sequence has become another choice of its request; its slot and pages stay."""
        if sequence.slot >= 0:
            self._entered.append(Entered(sequence.slot, sequence.job.request, sequence.choice, []))

    def publish(self, sequence: Sequence) -> None:
        if sequence.chain:
            self.pages.publish(sequence.chain, sequence.table, sequence.token_ids, sequence.done)

    def grow(self, sequence: Sequence) -> bool:
        """Makes the position that a decode computes next writable; False if that takes a page and there is none.

        Within a plan no copy's source becomes another copy's destination. A group's last page is pinned; of choices
        that share a page the last one keeps it without asking for another, and is preempted only for an earlier one
        that shares it, which keeps it then. Nor is a page copied to twice: what starts or grows in a plan is not
        preempted in it.
        """
        pages, table = self.pages, sequence.table
        index = (len(sequence.token_ids) - 1) // pages.page_size
        if index == len(table):
            if not self._begin_pages([sequence]):
                return False
        elif pages.shared(table[index]):
            if not pages.has_room(1):
                return False
            copy = pages.writable(table, index)
            assert copy is not None
            self._copies.append(copy)
            self._page_updates.append((sequence.slot, index, table[index]))
        sequence.forked = False
        return True

    def grow_all(self, sequences: list[Sequence]) -> bool:
        """`grow` of each, in one go. False, and nobody has grown, unless all need a page of their own and there are as
        many."""
        size = self.pages.page_size
        if any(one.forked or len(one.token_ids) <= len(one.table) * size for one in sequences):
            return False
        return self._begin_pages(sequences)

    def _begin_pages(self, sequences: list[Sequence]) -> bool:
        """A page more for each of these decodes, or, if there are not as many, for none."""
        for sequence in sequences:
            self.publish(sequence)
        fresh = self.pages.allocate(len(sequences))
        if fresh is None:
            return False
        for sequence, page in zip(sequences, fresh, strict=True):
            self._page_updates.append((sequence.slot, len(sequence.table), page))
            sequence.table.append(page)
        return True

    def leave(self, sequence: Sequence) -> None:
        """Takes slot and pages of a running sequence; what it computed stays published."""
        self.publish(sequence)
        self.pages.release(sequence.table)
        self._vacate(sequence)
        sequence.table = []
        sequence.chain = None
        sequence.computed = 0

    def pin(self, sequence: Sequence) -> None:
        """Takes the slot of a sequence that is computed, and leaves it its pages."""
        self.publish(sequence)
        self._vacate(sequence)

    def _vacate(self, sequence: Sequence) -> None:
        slot = sequence.slot
        if sequence.decoding and sequence.synchronous:
            self.synchronous.remove(sequence)
        elif sequence.decoding:
            self.decodes.remove(sequence)
            self.changed = True
        elif sequence in self.prefills:
            self.prefills.remove(sequence)
        sequence.decoding = sequence.forked = False
        sequence.slot = -1
        self._slots.append(slot)
        self._left.append(slot)
        self._entered = [entry for entry in self._entered if entry.slot != slot]
        self._page_updates = [update for update in self._page_updates if update[0] != slot]

    def undelivered(self, plan: Plan) -> None:
        """The plan did not run: the slots that it emptied are named again by the next one."""
        self._left = plan.left + self._left

    def deliver(self, plan: Plan) -> None:
        """Hands the collected changes to the plan."""
        plan.left, self._left = self._left, []
        plan.entered, self._entered = self._entered, []
        plan.page_updates, self._page_updates = self._page_updates, []
        plan.copies, self._copies = self._copies, []

    def _enter(self, sequence: Sequence) -> None:
        slot = sequence.slot = self._slots.pop()
        generated = sequence.token_ids[sequence.prompt :]
        self._entered.append(Entered(slot, sequence.job.request, sequence.choice, generated))
        self._page_updates += zip(repeat(slot), range(len(sequence.table)), sequence.table, strict=False)
