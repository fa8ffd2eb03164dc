"""Memory that the hosted models' page pools have in common, lent to them in slabs.

Each pool has pages of its own, which never leave it; a request that needs more of them is refused (`waiting.too_long`).
The rest is cut into slabs of equal bytes. A slab lent to a pool is so many pages more, and it stays where it was last
needed until another pool asks:

    unlent                     goes to whoever asks first
    lent, no page of it used   goes to whoever asks next; what is cached on it is forgotten
    lent and used              may be called back: no page of it is given out any more, and when the last sequence that
                               has one is done, it goes to the pool that called

A pool that lacks pages calls back slabs of the pool that has the most, as long as that one has at least two more than
itself: under load the slabs are spread evenly, and none wanders to and fro. Pages that a pool has promised to keep
(`Pages.promise`) stay, used or not.

No model can wait for another for ever. Nobody waits while it holds what another needs: a sequence that gets no page
gives all its pages up and waits in line (`Scheduler`), so who waits holds nothing. And the first in line needs no slab:
once nothing else of its model runs it fits in the model's own pages, whatever other models do. Slabs only let more
sequences run at once.

Integers only; where the bytes of a slab lie is told by `arena_layout`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .pages import Pages

OWN = -1  # number of the slab that a pool has for good


@dataclass(slots=True)
class Slab:
    """Pages of one pool that come and go together."""

    number: int
    pages: range
    used: int = 0  # of them
    leaving: bool = False  # called back


class Arena:
    """`pages[m][s]` are the pages that slab s is for model m. A slab that was in use goes over after `settle`, which
    waits for what still computes with it."""

    def __init__(self, pages: Sequence[Sequence[range]], settle: Callable[[], None] | None = None) -> None:
        assert len({len(slabs) for slabs in pages}) == 1, "every model may get every slab"
        self._pages = pages
        self._settle = settle
        self._pools: dict[int, Pages] = {}  # by model
        self._unlent = deque(range(len(pages[0])))
        self._heirs: dict[int, int] = {}  # slabs that were called back: by whom

    @property
    def unlent(self) -> int:
        """Slabs that no pool has."""
        return len(self._unlent)

    def join(self, model: int, pool: Pages) -> None:
        self._pools[model] = pool

    def pages(self, model: int) -> int:
        return sum(map(len, self._pages[model]))

    def lendable(self, model: int) -> int:
        slabs = [*self._unlent, *(slab.number for _, slab in self._unused(model))]
        return sum(len(self._pages[model][slab]) for slab in slabs)

    def lend(self, model: int, unlent: bool) -> bool:
        if self._unlent:
            number = self._unlent.popleft()
        elif unlent or not (unused := self._unused(model)):
            return False
        else:
            giver, slab = max(unused, key=lambda pair: len(pair[0].slabs))
            giver.leave(slab.number)
            number = self._take_from(giver, slab)
        self._pools[model].take(number, self._pages[model][number])
        return True

    def call_back(self, model: int, missing: int) -> None:
        coming = [slab for slab, heir in self._heirs.items() if heir == model]
        missing -= sum(len(self._pages[model][slab]) for slab in coming)
        others = [pool for other, pool in self._pools.items() if other != model]
        mine = len(_staying(self._pools[model])) + len(coming)
        while missing > 0:
            givers = [pool for pool in others if len(_staying(pool)) >= mine + 2 and any(_callable(pool))]
            if not givers:
                return
            giver = max(givers, key=lambda pool: len(_staying(pool)))
            slab = min(_callable(giver), key=lambda slab: slab.used)
            giver.leave(slab.number)
            self._heirs[slab.number] = model
            missing -= len(self._pages[model][slab.number])
            mine += 1

    def unused(self, model: int, number: int) -> None:
        heir = self._heirs.pop(number, None)
        if heir is None:
            self.eased(model)
        else:
            giver = self._pools[model]
            self._pools[heir].take(self._take_from(giver, giver.slabs[number]), self._pages[heir][number])

    def eased(self, model: int) -> None:
        for other, pool in self._pools.items():
            pool.relieved |= other != model

    def check(self) -> None:
        """Raises AssertionError unless every slab is in one place."""
        lent = [number for pool in self._pools.values() for number in pool.slabs]
        assert sorted([*lent, *self._unlent]) == list(range(len(self._pages[0]))), "a slab is lost, or lent twice"
        leaving = [slab.number for pool in self._pools.values() for slab in pool.slabs.values() if slab.leaving]
        assert sorted(leaving) == sorted(self._heirs), "a slab leaves for nobody"
        for model, pool in self._pools.items():
            for number, slab in pool.slabs.items():
                assert (slab.number, slab.pages) == (number, self._pages[model][number]), f"slab {number}: other pages"

    def _unused(self, model: int) -> list[tuple[Pages, Slab]]:
        """What other pools have, do not use and have not promised."""
        found: list[tuple[Pages, Slab]] = []
        for pool in (pool for other, pool in self._pools.items() if other != model):
            spare = pool.staying - pool.promised
            for slab in pool.slabs.values():
                if not slab.used and len(slab.pages) <= spare:
                    spare -= len(slab.pages)
                    found.append((pool, slab))
        return found

    def _take_from(self, giver: Pages, slab: Slab) -> int:
        giver.give(slab.number)
        if self._settle:
            self._settle()
        return slab.number


def _staying(pool: Pages) -> list[Slab]:
    return [slab for slab in pool.slabs.values() if not slab.leaving]


def _callable(pool: Pages) -> list[Slab]:
    """Used slabs that it can do without."""
    return [slab for slab in _staying(pool) if slab.used and len(slab.pages) <= pool.staying - pool.promised]


@dataclass(frozen=True, slots=True)
class Lender:
    """The arena as the pool of one model sees it."""

    arena: Arena
    model: int

    @property
    def pages(self) -> int:
        """Of all slabs."""
        return self.arena.pages(self.model)

    @property
    def lendable(self) -> int:
        """Pages that `lend` would bring, one call after another."""
        return self.arena.lendable(self.model)

    def join(self, pool: Pages) -> None:
        """From now on this is the model's pool."""
        self.arena.join(self.model, pool)

    def lend(self, unlent: bool) -> bool:
        """Gives the pool one more slab, if there is one; with `unlent`, one that no pool has."""
        return self.arena.lend(self.model, unlent)

    def call_back(self, missing: int) -> None:
        """The pool lacks so many pages: others with more slabs have to give some back as soon as they can."""
        self.arena.call_back(self.model, missing)

    def unused(self, slab: int) -> None:
        """No page of the slab, which the pool has, is used any more."""
        self.arena.unused(self.model, slab)

    def eased(self) -> None:
        """The pool has promised less than before."""
        self.arena.eased(self.model)
