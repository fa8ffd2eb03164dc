"""Which page of the KV cache belongs to whom, and which pages hold a prefix that can be used again.

A page holds the keys and values of `page_size` consecutive positions. A *table* is a sequence's list of pages in
order of position; a page counts one reference per table it stands in. Every page is in one of four states:

    free      no reference, contents worthless
    used      at least one reference
    cached    no reference, but published: its contents are found again by `match` until the page is needed
    leaving   no reference, and about to go back with its slab

A published page is full, was computed by one model version alone, and is never written again. Its digest covers
everything its contents depend on: model, weight version, adapter, salt and all tokens up to its end. 128 bits of
BLAKE2b keep two prefixes apart that differ by accident or on purpose.

A pool has `count` pages for good. With a `Lender` it gets more as it needs them, in slabs, and loses slabs that another
pool needs: unused ones at once, used ones when their last sequence ends. No used page is ever moved.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from struct import Struct, error
from typing import NamedTuple

from .arena import OWN, Lender, Slab


class Root(NamedTuple):
    """What keys and values depend on besides the tokens. Equal roots share pages, different ones never do."""

    model: str
    version: int
    adapter: str = ""
    salt: str = ""

    @property
    def digest(self) -> bytes:
        return blake2b(repr(tuple(self)).encode(), digest_size=16).digest()


@dataclass(slots=True)
class Chain:
    """How far a table has been offered to the cache: `pages` of them, the last one with this digest."""

    digest: bytes
    pages: int


class Pages:
    """A pool whose own pages are named 0 … count - 1; a slab brings pages with higher names."""

    def __init__(self, count: int, page_size: int, lender: Lender | None = None) -> None:
        self.count = count  # its own: what it can count on
        self.page_size = page_size
        self.held = count  # with those of slabs
        self.used = 0
        self.slabs: dict[int, Slab] = {}  # lent to it, by number
        self.staying = count  # of those held, without slabs that leave
        self.promised = 0  # so many stay, whoever calls
        self.reached = 0  # pages from here on were never given out
        self.relieved = False  # other pools have made room; whoever looks resets it
        self._packed, self._packed_wide = Struct(f"{page_size}i").pack, Struct(f"{page_size}q").pack  # a page's tokens
        self._lender = lender
        if lender:
            lender.join(self)
        self._own = Slab(OWN, range(count))
        self._slab_of = [self._own] * count  # by page; of one that never came it means nothing
        self._free = list(range(count))  # a heap, so that its own go first, and slabs may become unused
        self._references = [0] * count
        self._digests: list[bytes | None] = [None] * count  # of published pages
        self._published: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unreferenced, least recently used first

    @property
    def most(self) -> int:
        """Pages that it can have at once, with every slab there is."""
        return self.count + (self._lender.pages if self._lender else 0)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._idle)

    @property
    def available(self) -> int:
        """How many pages `allocate` can give, those of slabs that would be lent included."""
        return len(self._free) + len(self._idle) + (self._lender.lendable if self._lender else 0)

    def has_room(self, number: int) -> bool:
        """Whether `allocate` can give so many pages. If not, the lender is told what is missing."""
        missing = number - len(self._free) - len(self._idle)
        if missing <= 0 or self._lender is None:
            return missing <= 0
        missing -= self._lender.lendable
        if missing > 0:
            self._lender.call_back(missing)
        return missing <= 0

    def secure(self, number: int) -> bool:
        """Whether so many pages can be promised: they are the pool's now, used or not."""
        missing = number - self.staying
        if missing <= 0 or self._lender is None:
            return missing <= 0
        missing -= self._lender.lendable
        if missing > 0:
            self._lender.call_back(missing)
            return False
        while self.staying < number:
            self._lender.lend(unlent=False)
        return True

    def promise(self, number: int) -> None:
        """So many pages, that `secure` found, stay until another number is promised."""
        assert number <= self.staying, f"{number} pages are promised, and {self.staying} stay"
        if number < self.promised and self._lender:
            self._lender.eased()
        self.promised = number

    def match(self, root: Root, token_ids: Sequence[int], limit: int) -> list[int]:
        """The longest published prefix of `token_ids` in whole pages that end at or before position `limit`.

        The caller owns one reference to each page returned. Positions from `limit` on are never covered: their hidden
        states are needed.
        """
        found: list[int] = []
        digest = root.digest
        size = self.page_size
        for start in range(0, min(limit, len(token_ids)) - size + 1, size):
            digest = self._digest(digest, token_ids[start : start + size])
            page = self._published.get(digest)
            if page is None:
                break
            found.append(page)
        self.retain(found)
        return found

    def chain(self, root: Root, matched: list[int]) -> Chain:
        """Where publishing goes on for a table that begins with the pages `match` gave for `root`."""
        digest = self._digests[matched[-1]] if matched else root.digest
        assert digest is not None
        return Chain(digest, len(matched))

    def allocate(self, number: int) -> list[int] | None:
        """`number` pages with one reference each, contents unknown; None, and nothing taken, when there are fewer.

        Free pages go first, then slabs that nobody has, then the cached pages that were not used for the longest time,
        then slabs that other pools have and do not use.
        """
        if not self.has_room(number):
            return None
        if self._lender:
            while len(self._free) < number and self._lender.lend(unlent=True):
                pass
            while len(self._free) + len(self._idle) < number and self._lender.lend(unlent=False):
                pass
        free, references, slab_of, pages = self._free, self._references, self._slab_of, list[int]()
        for _ in range(number):
            page = heappop(free) if free else self._evict()
            references[page] = 1
            slab_of[page].used += 1
            pages.append(page)
        self.used += number
        if pages:
            self.reached = max(self.reached, max(pages) + 1)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each of these used or cached pages."""
        references = self._references
        for page in pages:
            if references[page] == 0:
                del self._idle[page]
                self._slab_of[page].used += 1
                self.used += 1
            references[page] += 1

    def release(self, table: Sequence[int], told: bool = True) -> None:
        """One reference less to each page. Those nobody uses any more become cached if published, else free.

        The end of the table counts as used longer ago than its beginning, which more prompts have in common. Other
        pools are told of room, except of pages that were only just matched.
        """
        references = self._references
        for page in reversed(table):
            assert references[page] > 0, f"page {page} released once too often"
            references[page] -= 1
            if references[page] == 0:
                slab = self._slab_of[page]
                slab.used -= 1
                self.used -= 1
                if self._digests[page] is not None:
                    self._idle[page] = None
                elif not slab.leaving:
                    heappush(self._free, page)
                if told and not slab.used and self._lender and slab is not self._own:
                    self._lender.unused(slab.number)

    def freed_by(self, tables: Iterable[Sequence[int]]) -> int:
        """How many pages would be available in addition, were these tables released."""
        counts = Counter(page for table in tables for page in table)
        return sum(
            self._references[page] == count and not self._slab_of[page].leaving for page, count in counts.items()
        )

    def fork(self, table: Sequence[int]) -> list[int]:
        """A second table with the same pages. Before either writes into a shared page it asks `writable`."""
        self.retain(table)
        return list(table)

    def shared(self, page: int) -> bool:
        """Whether writing into the page would change what another table or the cache holds."""
        return self._references[page] > 1 or self._digests[page] is not None

    def writable(self, table: list[int], index: int) -> tuple[int, int] | None:
        """Makes page `index` of `table` its own; a pair (source, destination) says what must be copied first.

        Takes one available page if the page is shared; the caller sees to it that there is one.
        """
        source = table[index]
        if not self.shared(source):
            return None
        fresh = self.allocate(1)
        assert fresh is not None, "copy on write without an available page"
        table[index] = fresh[0]
        self.release([source])
        return source, fresh[0]

    def publish(self, chain: Chain, table: Sequence[int], token_ids: Sequence[int], computed: int) -> None:
        """Offers the pages of `table` that the first `computed` positions fill, from where `chain` stands.

        All those positions must have been computed under the chain's root. Where the same prefix is published
        already, the page that came first stays and this one remains the table's alone.
        """
        size = self.page_size
        for index in range(chain.pages, computed // size):
            digest = chain.digest = self._digest(chain.digest, token_ids[index * size : (index + 1) * size])
            chain.pages = index + 1
            page = table[index]
            if self._digests[page] is not None or digest in self._published or self._slab_of[page].leaving:
                continue
            self._published[digest] = page
            self._digests[page] = digest

    def drop(self) -> int:
        """Forgets every published prefix: cached pages become free, used ones when they are released. Gives the number
        of pages that were published."""
        count = len(self._published)
        self._free.extend(self._idle)
        heapify(self._free)
        self._idle.clear()
        self._published.clear()
        self._digests = [None] * len(self._digests)
        return count

    def take(self, number: int, pages: range) -> None:
        """A slab comes, with free pages."""
        new = pages.stop - len(self._references)
        self._references += [0] * new
        self._digests += [None] * new
        self._slab_of += [self._own] * new
        slab = self.slabs[number] = Slab(number, pages)
        self._slab_of[pages.start : pages.stop] = [slab] * len(pages)
        for page in pages:
            heappush(self._free, page)
        self.held += len(pages)
        self.staying += len(pages)
        self.relieved = True

    def leave(self, number: int) -> None:
        """No page of the slab is given out or found any more, and it goes when the last one is released."""
        slab = self.slabs[number]
        slab.leaving = True
        self.staying -= len(slab.pages)
        assert self.staying >= self.promised, f"slab {number} leaves, although its pages are promised"
        for page in slab.pages:
            self._idle.pop(page, None)
            self._forget(page)
        self._free = [page for page in self._free if page not in slab.pages]
        heapify(self._free)

    def give(self, number: int) -> None:
        """The slab, which is leaving and unused, is gone."""
        slab = self.slabs.pop(number)
        assert slab.leaving and not slab.used, f"slab {number} is in use"
        self.held -= len(slab.pages)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the books are right, `tables` being all references that are held."""
        expected = Counter(page for table in tables for page in table)
        slabs = {page: slab for slab in (self._own, *self.slabs.values()) for page in slab.pages}
        leaving = 0
        for page, count in enumerate(self._references):
            assert count == expected[page], f"page {page}: references"
            slab = slabs.get(page)
            unused = bool(slab and slab.leaving and not count)
            leaving += unused
            states = self._free.count(page) + (page in self._idle) + (count > 0) + unused
            assert states == (slab is not None), f"page {page} is in {states} states"
            assert slab is None or self._slab_of[page] is slab, f"page {page}: another slab's"
            digest = self._digests[page]
            assert digest is None or self._published[digest] == page, f"page {page}: digest of another page"
            assert (page in self._idle) <= (digest is not None), f"page {page}: cached without a digest"
            assert page not in self._free or digest is None, f"page {page}: free with a digest"
        for slab in (self._own, *self.slabs.values()):
            assert slab.used == sum(self._references[page] > 0 for page in slab.pages), "used pages of a slab"
        assert len(self._published) == sum(digest is not None for digest in self._digests)
        assert self.free + self.cached + self.used + leaving == self.held == len(slabs)
        assert self.promised <= self.staying == sum(not slab.leaving for slab in slabs.values())

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        """What the page holds is not found any more."""
        digest = self._digests[page]
        if digest is not None:
            del self._published[digest]
            self._digests[page] = None

    def _digest(self, parent: bytes, token_ids: Sequence[int]) -> bytes:
        try:
            page = self._packed(*token_ids)
        except error:  # ids beyond 32 bits; as the other is shorter, no two pages look alike
            assert len(token_ids) == self.page_size, f"a page of {self.page_size} with {len(token_ids)} tokens"
            page = self._packed_wide(*token_ids)
        return blake2b(parent + page, digest_size=16).digest()
