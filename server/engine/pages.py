"""Which page of the KV cache belongs to whom, and which pages hold a prefix that can be used again.

A page holds the keys and values of `page_size` consecutive positions. A *table* is a sequence's list of pages in
order of position; a page counts one reference per table it stands in. Every page is in one of three states:

    free      no reference, contents worthless
    used      at least one reference
    cached    no reference, but published: its contents are found again by `match` until the page is needed

A published page is full, was computed by one model version alone, and is never written again. Its digest covers
everything its contents depend on: model, weight version, adapter, salt and all tokens up to its end. 128 bits of
BLAKE2b keep two prefixes apart that differ by accident or on purpose.

Integers only, so that one model's pool can later take its pages from an arena that several models share.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple


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
    """A pool of `count` pages, named 0 … count - 1."""

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self._digests: list[bytes | None] = [None] * count  # of published pages
        self._published: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # published and unreferenced, least recently used first

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def cached(self) -> int:
        return len(self._idle)

    @property
    def used(self) -> int:
        return self.count - len(self._free) - len(self._idle)

    @property
    def available(self) -> int:
        """How many pages `allocate` can give."""
        return len(self._free) + len(self._idle)

    def match(self, root: Root, token_ids: Sequence[int], limit: int) -> list[int]:
        """The longest published prefix of `token_ids` in whole pages that end at or before position `limit`.

        The caller owns one reference to each page returned. Positions from `limit` on are never covered: their hidden
        states are needed.
        """
        found: list[int] = []
        digest = root.digest
        size = self.page_size
        for start in range(0, min(limit, len(token_ids)) - size + 1, size):
            digest = _digest(digest, token_ids[start : start + size])
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

        Free pages go first, then the cached ones that were not used for the longest time.
        """
        if number > self.available:
            return None
        pages: list[int] = []
        for _ in range(number):
            page = self._free.pop() if self._free else self._evict()
            self._references[page] = 1
            pages.append(page)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more reference to each of these used or cached pages."""
        references = self._references
        for page in pages:
            if references[page] == 0:
                del self._idle[page]
            references[page] += 1

    def release(self, table: Sequence[int]) -> None:
        """One reference less to each page. Those nobody uses any more become cached if published, else free.

        The end of the table counts as used longer ago than its beginning, which more prompts have in common.
        """
        references = self._references
        for page in reversed(table):
            assert references[page] > 0, f"page {page} released once too often"
            references[page] -= 1
            if references[page] == 0:
                if self._digests[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def freed_by(self, tables: Iterable[Sequence[int]]) -> int:
        """How many pages would be available in addition, were these tables released."""
        counts = Counter(page for table in tables for page in table)
        return sum(self._references[page] == count for page, count in counts.items())

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
            chain.digest = _digest(chain.digest, token_ids[index * size : (index + 1) * size])
            chain.pages = index + 1
            page = table[index]
            if self._digests[page] is None and chain.digest not in self._published:
                self._published[chain.digest] = page
                self._digests[page] = chain.digest

    def drop(self) -> int:
        """Forgets every published prefix: cached pages become free, used ones when they are released. Gives the number
        of pages that were published."""
        count = len(self._published)
        self._free.extend(self._idle)
        self._idle.clear()
        self._published.clear()
        self._digests = [None] * self.count
        return count

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless the books are right, `tables` being all references that are held."""
        expected = Counter(page for table in tables for page in table)
        for page in range(self.count):
            assert self._references[page] == expected[page], f"page {page}: references"
            states = self._free.count(page) + (page in self._idle) + (self._references[page] > 0)
            assert states == 1, f"page {page} is in {states} states"
            digest = self._digests[page]
            assert digest is None or self._published[digest] == page, f"page {page}: digest of another page"
            assert (page in self._idle) <= (digest is not None), f"page {page}: cached without a digest"
            assert page not in self._free or digest is None, f"page {page}: free with a digest"
        assert len(self._published) == sum(digest is not None for digest in self._digests)
        assert self.free + self.cached + self.used == self.count

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        digest = self._digests[page]
        assert digest is not None
        del self._published[digest]
        self._digests[page] = None
        return page


def _digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()
