"""A Hypothesis state machine that plays with several pools over one arena beside a memory that everybody writes into.

A page holds one token. A slab is UNITS units of memory, of which a page of one model covers more than one of another:
whoever writes a page that somebody else still reads is seen at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

UNITS = 6
GAP = 2  # page numbers between a model's own pages and its slabs that are nobody's


@dataclass(eq=False)
class Writer:
    """Tokens whose pages are computed and offered to others as far as `table` goes."""

    tokens: tuple[int, ...]
    table: list[int]
    chain: Any
    offered: int  # pages that were published, or found to be known already


@dataclass
class Model:
    """What a pool must do, kept in the most naive way."""

    pool: Any
    own: int
    slabs: list[range]
    sequences: list[Writer] = field(default_factory=list)
    findable: dict[tuple[int, ...], int] = field(default_factory=dict)
    idle: list[int] = field(default_factory=list)  # cached pages, in the order in which they are thrown out
    refused: int = 0  # pages that it asked for in vain since it last got or gave any
    promised: int = 0

    def references(self) -> Counter[int]:
        return Counter(page for sequence in self.sequences for page in sequence.table)

    def slab_of(self, page: int) -> int | None:
        return next((number for number, pages in enumerate(self.slabs) if page in pages), None)

    def staying(self) -> int:
        return sum(not slab.leaving for slab in self.pool.slabs.values())

    def forget(self, pages: Sequence[int]) -> None:
        self.idle = [page for page in self.idle if page not in pages]
        self.findable = {prefix: page for prefix, page in self.findable.items() if page not in pages}


def arena_machine(arena_module: ModuleType, pages_module: ModuleType) -> type[RuleBasedStateMachine]:
    """The machine for the modules given, which may be mutants."""

    class ArenaMachine(RuleBasedStateMachine):
        @initialize(
            own=st.lists(st.integers(1, 3), min_size=2, max_size=3),
            count=st.integers(0, 7),
            sizes=st.lists(st.sampled_from([1, 2, 3]), min_size=3, max_size=3),
        )
        def begin(self, own: list[int], count: int, sizes: list[int]) -> None:
            ranges = [
                [range(pages + GAP + size * slab, pages + GAP + size * (slab + 1)) for slab in range(count)]
                for pages, size in zip(own, sizes, strict=False)
            ]
            self.settled = 0
            self.arena = arena_module.Arena(ranges, self.settle)
            self.count = count
            self.models = [
                Model(pages_module.Pages(pages, 1, arena_module.Lender(self.arena, number)), pages, slabs)
                for number, (pages, slabs) in enumerate(zip(own, ranges, strict=True))
            ]
            self.memory: dict[tuple[int, int], object] = {}  # by (slab, unit); own pages by (-1 - model, page)
            self.owners: dict[int, int] = {}

        def settle(self) -> None:
            self.settled += 1

        # what the naive arena knows

        def places(self, model: int, page: int) -> list[tuple[int, int]]:
            known = self.models[model]
            slab = known.slab_of(page)
            if slab is None:
                assert 0 <= page < known.own, "a page that no memory belongs to"
                return [(-1 - model, page)]
            width = UNITS // len(known.slabs[slab])
            first = (page - known.slabs[slab].start) * width
            return [(slab, unit) for unit in range(first, first + width)]

        def readable(self, model: int, sequence: Writer) -> None:
            for index, page in enumerate(sequence.table):
                for place in self.places(model, page):
                    assert self.memory[place] == (model, sequence.tokens[: index + 1]), "somebody else wrote there"

        def lendable(self, model: int) -> int:
            """Pages of slabs that nobody has, and of those that others neither use nor have promised."""
            count = self.count - len(self.owners)
            for number, one in enumerate(self.models):
                used = {one.slab_of(page) for page in one.references()}
                unused = [slab for slab, owner in self.owners.items() if owner == number and slab not in used]
                if number != model and self.count:
                    count += min(len(unused), (self.staying_pages(number) - one.promised) // len(one.slabs[0]))
            return count * len(self.models[model].slabs[0]) if self.count else 0

        def staying_pages(self, model: int) -> int:
            one = self.models[model]
            return one.own + sum(len(one.slabs[slab]) for slab, state in one.pool.slabs.items() if not state.leaving)

        def look(self) -> None:
            """Follows slabs that went from one model to another, and forgets what was cached on them."""
            owners = {slab: number for number, one in enumerate(self.models) for slab in one.pool.slabs}
            for slab, owner in self.owners.items():
                if owners[slab] != owner:
                    one = self.models[owner]
                    assert not any(one.slab_of(page) == slab for page in one.references()), "a used slab was taken away"
                    one.forget(one.slabs[slab])
            for one in self.models:
                for slab, state in one.pool.slabs.items():
                    if state.leaving:
                        one.forget(one.slabs[slab])
            self.owners = owners

        def allocate(self, model: int, number: int) -> list[int] | None:
            """Asks the pool, and checks that it gives what it must and calls back what it may."""
            one = self.models[model]
            references = one.references()
            held = [*range(one.own)]
            held += [page for slab, state in one.pool.slabs.items() if not state.leaving for page in one.slabs[slab]]
            free = [page for page in held if not references[page] and page not in one.idle]
            lendable = self.lendable(model)
            assert one.pool.available == len(free) + len(one.idle) + lendable
            unlent = [slab for slab in range(self.count) if slab not in self.owners]
            before, leaving = [other.staying() for other in self.models], self.leaving(model)
            owners, settled, kept = dict(self.owners), self.settled, list(one.idle)
            one.pool.relieved = False
            pages = one.pool.allocate(number)
            self.look()
            called = self.leaving(model) - leaving
            missing = number - len(free) - len(kept) - lendable
            if missing > 0:
                assert pages is None and owners == self.owners
                one.refused = number
                self.fair(model, before, len(leaving), called, missing)
                return None
            assert pages is not None and len(set(pages)) == number and not called
            moved = [slab for slab, owner in self.owners.items() if owners.get(slab, owner) != owner]
            assert self.settled - settled == len(moved), "taken over while the device may compute with it"
            fresh = [page for slab in self.owners if slab in unlent for page in one.slabs[slab]]
            assert not moved or len(free) + len(fresh) + len(kept) < number, "another model's slab, and no need of it"
            for page in pages:
                assert not references[page], "a used page is given once more"
                assert page in held or one.slab_of(page) in self.owners, "a page of a slab that it does not have"
                if page in kept:
                    assert len(free) + len(fresh) < number, "a cached page was thrown out while others were free"
                    assert page == kept.pop(0), "not the least recently used page"
                one.forget([page])
            one.refused = 0
            return pages

        def leaving(self, model: int) -> set[int]:
            """Slabs that others will give to the model."""
            return {slab for slab, heir in self.arena._heirs.items() if heir == model}

        def fair(self, model: int, before: list[int], coming: int, called: set[int], missing: int) -> None:
            """So many slabs are called back as are missing, from models that have more, and they still do then."""
            givers = {self.owners[slab] for slab in called}
            size = len(self.models[model].slabs[0]) if self.count else 0
            mine = before[model] + coming
            assert all(giver != model and before[giver] >= mine + 2 for giver in givers), "called back from who has few"
            mine += len(called)
            after = [other.staying() for other in self.models]
            assert not givers or max(after[giver] for giver in givers) >= mine, "more than the givers have now"
            assert not called or (coming + len(called) - 1) * size < missing, "more than is missing"
            if (coming + len(called)) * size < missing:
                for number, other in enumerate(self.models):
                    spare = self.staying_pages(number) - other.promised
                    staying = [slab for slab in other.pool.slabs.values() if not slab.leaving]
                    more = any(slab.used and len(slab.pages) <= spare for slab in staying)
                    assert number == model or not more or after[number] < mine + 2, "there was more to call back"

        # rules

        @rule(which=st.integers(0, 2), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
        def start(self, which: int, tokens: list[int]) -> None:
            """A sequence with these tokens, as far as pages reach, all of it computed and offered to others."""
            model = which % len(self.models)
            one = self.models[model]
            expected: list[int] = []
            for end in range(1, len(tokens)):
                if (page := one.findable.get(tuple(tokens[:end]))) is None:
                    break
                expected.append(page)
            root = pages_module.Root("m", 1)
            table = one.pool.match(root, tokens, len(tokens) - 1)
            assert table == expected
            one.idle = [page for page in one.idle if page not in table]
            sequence = Writer(tuple(tokens), table, one.pool.chain(root, table), len(table))
            one.sequences.append(sequence)
            self.readable(model, sequence)
            self.grow(model, sequence)

        def grow(self, model: int, sequence: Writer) -> None:
            one = self.models[model]
            fresh = self.allocate(model, len(sequence.tokens) - len(sequence.table))
            for page in fresh or []:
                sequence.table.append(page)
                for place in self.places(model, page):
                    self.memory[place] = (model, sequence.tokens[: len(sequence.table)])
            one.pool.publish(sequence.chain, sequence.table, list(sequence.tokens), len(sequence.table))
            for index in range(sequence.offered, len(sequence.table)):
                page = sequence.table[index]
                slab = one.slab_of(page)
                leaving = slab is not None and one.pool.slabs[slab].leaving
                if not leaving and page not in one.findable.values():
                    one.findable.setdefault(sequence.tokens[: index + 1], page)
            sequence.offered = len(sequence.table)

        @precondition(lambda self: any(one.sequences for one in self.models))
        @rule(which=st.integers(0, 30), more=st.lists(st.integers(0, 1), min_size=1, max_size=3))
        def go_on(self, which: int, more: list[int]) -> None:
            running = [(number, s) for number, one in enumerate(self.models) for s in one.sequences]
            model, sequence = running[which % len(running)]
            self.readable(model, sequence)
            if len(sequence.table) == len(sequence.tokens):
                sequence.tokens += tuple(more)
            self.grow(model, sequence)

        @precondition(lambda self: any(one.sequences for one in self.models))
        @rule(which=st.integers(0, 30))
        def finish(self, which: int) -> None:
            running = [(number, s) for number, one in enumerate(self.models) for s in one.sequences]
            self.end(*running[which % len(running)])

        def end(self, model: int, sequence: Writer) -> None:
            one = self.models[model]
            self.readable(model, sequence)
            one.sequences.remove(sequence)
            references = one.references()
            one.pool.release(sequence.table)
            for page in reversed(sequence.table):
                if not references[page] and page in one.findable.values():
                    one.idle.append(page)
            one.refused = 0
            self.look()

        @rule(which=st.integers(0, 2))
        def all_end(self, which: int) -> None:
            """Whatever the others do, a model that uses nothing can have all pages that are its own."""
            model = which % len(self.models)
            one = self.models[model]
            for sequence in list(one.sequences):
                self.end(model, sequence)
            pages = self.allocate(model, one.own)
            assert pages is not None
            one.pool.release(pages)
            one.refused = 0
            self.look()

        @rule(which=st.integers(0, 2), number=st.integers(0, 12))
        def promise(self, which: int, number: int) -> None:
            model = which % len(self.models)
            one = self.models[model]
            possible = number <= self.staying_pages(model) + self.lendable(model)
            assert one.pool.secure(number) == possible
            self.look()
            if possible:
                one.pool.promise(number)
                one.promised, one.refused = number, 0

        @rule(which=st.integers(0, 2))
        def drop(self, which: int) -> None:
            one = self.models[which % len(self.models)]
            one.pool.drop()
            one.findable.clear()
            one.idle.clear()

        @invariant()
        def books(self) -> None:
            if not hasattr(self, "arena"):
                return
            self.arena.check()
            for one in self.models:
                one.pool.check([sequence.table for sequence in one.sequences])
                used = sum(count > 0 for count in one.references().values())
                assert (one.pool.used, one.pool.cached) == (used, len(one.idle))
                assert one.pool.held == one.own + sum(len(one.slabs[slab]) for slab in one.pool.slabs)
                assert one.promised <= one.pool.staying, "a promise is broken"
                assert all(slab.used for slab in one.pool.slabs.values() if slab.leaving), "an unused slab does not go"
                assert not 0 < one.refused <= one.pool.available or one.pool.relieved, "nobody said that there is room"

        def teardown(self) -> None:
            if not hasattr(self, "arena"):
                return
            for model, one in enumerate(self.models):
                for sequence in list(one.sequences):
                    self.end(model, sequence)
                assert one.pool.used == 0

    return ArenaMachine
