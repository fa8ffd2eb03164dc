"""A Hypothesis state machine that plays with a `Pages` beside a naive pool that remembers what was really written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

ROOTS = [("model", 1, "", ""), ("model", 2, "", ""), ("model", 1, "", "salt"), ("model", 1, "adapter", "")]
Prefix = tuple[Any, tuple[int, ...]]  # root and all tokens up to a position: what keys and values depend on


@dataclass(eq=False)
class Writer:
    """A sequence that computes its positions in order, all under one root."""

    root: Any
    tokens: list[int]
    table: list[int]
    chain: Any
    computed: int
    offered: int = 0  # pages that were published, or found to be known already


def page_machine(pages_module: ModuleType) -> type[RuleBasedStateMachine]:
    """The machine for the module given, which may be a mutant of `tandem.server.engine.pages`."""

    class PageMachine(RuleBasedStateMachine):
        @initialize(count=st.integers(3, 9), size=st.integers(1, 3))
        def pool(self, count: int, size: int) -> None:
            self.pages = pages_module.Pages(count, size)
            self.size, self.count = size, count
            self.writers: list[Writer] = []
            self.contents: list[list[Prefix | None]] = [[None] * size for _ in range(count)]
            # the naive pool: who holds what, what can be found, and in which order it would be thrown out
            self.references: Counter[int] = Counter()
            self.findable: dict[Prefix, int] = {}
            self.idle: list[int] = []

        # what the naive pool does

        def take(self, page: int) -> None:
            if page in self.idle:
                self.idle.remove(page)
            self.references[page] += 1

        def give(self, table: list[int]) -> None:
            for page in reversed(table):
                self.references[page] -= 1
                if not self.references[page] and page in self.findable.values():
                    self.idle.append(page)

        def taken(self, number: int, pages: list[int] | None) -> bool:
            """Checks what `allocate` gave against what a pool must do."""
            unused = {page for page in range(self.count) if not self.references[page]} - set(self.idle)
            if number > len(unused) + len(self.idle):
                assert pages is None
                return False
            assert pages is not None and len(set(pages)) == number
            for page in pages:
                if unused:
                    assert page in unused, "a cached page was thrown out while another was free"
                    unused.remove(page)
                else:
                    assert page == self.idle.pop(0), "not the least recently used page"
                    self.findable = {prefix: found for prefix, found in self.findable.items() if found != page}
                self.references[page] += 1
                self.contents[page] = [None] * self.size
            return True

        # rules

        @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9), root=st.sampled_from(ROOTS))
        def start(self, tokens: list[int], root: tuple[str, int, str, str]) -> None:
            root = pages_module.Root(*root)
            limit = len(tokens) - 1
            expected: list[int] = []
            while (end := (len(expected) + 1) * self.size) <= limit:
                page = self.findable.get((root, tuple(tokens[:end])))
                if page is None:
                    break
                expected.append(page)
            table = self.pages.match(root, tokens, limit)
            assert table == expected
            for page in table:
                self.take(page)
            computed = len(table) * self.size
            for position in range(computed):
                written = self.contents[table[position // self.size]][position % self.size]
                assert written == (root, tuple(tokens[: position + 1])), "the page holds another prefix"
            self.writers.append(Writer(root, tokens, table, self.pages.chain(root, table), computed, len(table)))

        @precondition(lambda self: self.writers)
        @rule(which=st.integers(0, 9), more=st.lists(st.integers(0, 1), max_size=3), publish=st.booleans())
        def write(self, which: int, more: list[int], publish: bool) -> None:
            """Computes everything the sequence knows so far, offers it to others, then learns `more`."""
            writer = self.writers[which % len(self.writers)]
            for position in range(writer.computed, len(writer.tokens)):
                index, offset = divmod(position, self.size)
                if index == len(writer.table):
                    fresh = self.pages.allocate(1)
                    if not self.taken(1, fresh):
                        break
                    writer.table += fresh
                else:
                    source = writer.table[index]
                    shared = self.references[source] > 1
                    if shared and self.pages.available == 0:
                        break
                    copy = self.pages.writable(writer.table, index)
                    assert (copy is not None) == shared
                    if copy is not None:
                        assert copy == (source, writer.table[index])
                        saved = list(self.contents[source])
                        self.taken(1, [copy[1]])
                        self.contents[copy[1]] = saved
                        self.give([source])
                page = writer.table[index]
                others = [one for one in self.writers if one is not writer and page in one.table]
                assert not others, "two sequences write into one page"
                self.contents[page][offset] = (writer.root, tuple(writer.tokens[: position + 1]))
                writer.computed = position + 1
            for position in range(writer.computed):  # what it attends to is what it wrote or was given
                root, prefix = self.contents[writer.table[position // self.size]][position % self.size] or (None, ())
                assert root == writer.root and prefix == tuple(writer.tokens[: position + 1])
            if publish:
                self.publish(writer)
            writer.tokens = writer.tokens + more

        def publish(self, writer: Writer) -> None:
            self.pages.publish(writer.chain, writer.table, writer.tokens, writer.computed)
            for index in range(writer.offered, writer.computed // self.size):
                page, prefix = writer.table[index], (writer.root, tuple(writer.tokens[: (index + 1) * self.size]))
                if page not in self.findable.values():
                    self.findable.setdefault(prefix, page)
            writer.offered = max(writer.offered, writer.computed // self.size)

        @precondition(lambda self: self.writers)
        @rule(which=st.integers(0, 9))
        def fork(self, which: int) -> None:
            writer = self.writers[which % len(self.writers)]
            table = self.pages.fork(writer.table)
            assert table == writer.table and table is not writer.table
            for page in table:
                self.take(page)
            chain = pages_module.Chain(writer.chain.digest, writer.chain.pages)
            self.writers.append(Writer(writer.root, list(writer.tokens), table, chain, writer.computed, writer.offered))

        @precondition(lambda self: self.writers)
        @rule(which=st.integers(0, 9))
        def finish(self, which: int) -> None:
            writer = self.writers.pop(which % len(self.writers))
            self.pages.release(writer.table)
            self.give(writer.table)

        @rule(number=st.integers(1, 4))
        def borrow(self, number: int) -> None:
            """Pages that go round: what was cached on them is thrown out."""
            pages = self.pages.allocate(number)
            if self.taken(number, pages):
                self.pages.release(pages)
                self.give(pages)

        @rule()
        def drop(self) -> None:
            """What is published is forgotten; those that still write go on publishing from where they are."""
            self.pages.drop()
            self.findable.clear()
            self.idle.clear()

        @invariant()
        def books(self) -> None:
            if not hasattr(self, "pages"):
                return
            self.pages.check([writer.table for writer in self.writers])
            used = sum(count > 0 for count in self.references.values())
            assert (self.pages.used, self.pages.cached) == (used, len(self.idle))
            assert self.pages.free == self.count - used - len(self.idle)

        def teardown(self) -> None:
            if hasattr(self, "pages"):
                for writer in self.writers:
                    self.pages.release(writer.table)
                assert self.pages.used == 0

    return PageMachine
