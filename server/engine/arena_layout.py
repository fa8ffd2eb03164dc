"""Which bytes of an arena are whose: first every model's own pages, then the slabs.

    | own pages of A | own pages of B | … | slab | slab | … | a page that is nobody's |

A model's pages lie one behind another from its first own page to the end of the arena, whoever they belong to, so that
a page is found by its number alone: page p of model m begins at byte begin[m] + p · page_bytes[m]. A slab is those
pages that lie in it whole. With the first slab a page of every model begins, and the largest page divides slabs; of
others' pages less than two are lost in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

ALIGNED = 256  # bytes that the first slab begins at a multiple of
LEAST_PAGES = 16  # of the largest kind, in a slab
MOST_SLABS = 256
TRIED = 32  # sizes of a slab


@dataclass(frozen=True, slots=True)
class Place:
    """Where one model's pages lie. Pages 0 … own - 1 are its own; the last of `pages` is nobody's."""

    begin: int
    page_bytes: int
    own: int
    pages: int
    slabs: tuple[range, ...]

    @property
    def end(self) -> int:
        return self.begin + self.pages * self.page_bytes


@dataclass(frozen=True, slots=True)
class Layout:
    """`places` in the order of the models. `bytes`: of the whole buffer, the page that is nobody's included."""

    bytes: int
    slabs: int
    slab_bytes: int
    places: tuple[Place, ...]

    @property
    def shared(self) -> int:
        """Bytes of all slabs."""
        return self.slabs * self.slab_bytes

    def usable(self, model: int) -> float:
        """The part of a slab that a model can use, on average."""
        place = self.places[model]
        return sum(map(len, place.slabs)) * place.page_bytes / self.shared


def lay_out(memory: int, page_bytes: Sequence[int], own: Sequence[int]) -> Layout:
    """Of `memory` bytes model m gets own[m] pages; what is left is cut into slabs of the size that wastes least."""
    before = [0] * len(own)  # bytes from a model's first page to the first slab: whole pages
    most = 0
    for model in sorted(range(len(own)), key=lambda model: -page_bytes[model]):
        pages = own[model] + -(-most // page_bytes[model])
        most = before[model] = pages * page_bytes[model]
    begin = -(-most // ALIGNED) * ALIGNED  # of the first slab
    size, count = _slabs(memory - begin, before, page_bytes)
    places = tuple(
        Place(begin - ahead, each, pages, -(-(ahead + count * size) // each) + 1, _ranges(ahead, each, size, count))
        for ahead, each, pages in zip(before, page_bytes, own, strict=True)
    )
    return Layout(max(place.end for place in places), count, size, places)


def _slabs(rest: int, before: Sequence[int], page_bytes: Sequence[int]) -> tuple[int, int]:
    """(bytes of a slab, how many): of TRIED sizes the one of which all models together can use most."""
    largest = max(page_bytes)
    pages = rest // largest
    if len(page_bytes) == 1 or pages < 1:
        return largest, 0
    least = min(pages, max(LEAST_PAGES, -(-pages // MOST_SLABS)))
    sizes = [tried * largest for tried in range(least, min(pages, 2 * least) + 1, max(1, least // TRIED))]

    def used(size: int) -> int:
        return sum(
            sum(map(len, _ranges(ahead, each, size, rest // size))) * each
            for ahead, each in zip(before, page_bytes, strict=True)
        )

    size = max(sizes, key=used)
    return size, rest // size


def _ranges(before: int, page_bytes: int, size: int, count: int) -> tuple[range, ...]:
    """The pages that lie whole in each of `count` slabs of `size` bytes; the first is `before` bytes behind page 0."""
    edges = [before + number * size for number in range(count + 1)]
    return tuple(range(-(-first // page_bytes), last // page_bytes) for first, last in pairwise(edges))
