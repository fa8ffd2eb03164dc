"""Neighbouring decode rows whose first tokens lie in the same pages: attention reads those once for the whole group.

Choices of one request are neighbours, and so are requests with one prompt that came one after another.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise


def groups_of(tables: Sequence[list[int]], page_size: int, least: int) -> list[tuple[int, int]] | None:
    """By row: (first row of its group, tokens of the pages that all rows of the group begin with). None: no groups.

    A group shares `least` tokens or more; a row alone 0. Where two rows have less than half of what one of them has in
    common with its other neighbour, a group ends: a common system prompt does not join the choices of one long prompt
    to those of another. A decode writes a page of its own, so it has more tokens than its group shares.
    """
    least = -(-least // page_size)
    common = [0, *(common_pages(one, other, least) for one, other in pairwise(tables)), 0]  # with the row before
    if not any(common):
        return None
    groups: list[tuple[int, int]] = []
    first = 0
    for row in range(1, len(tables) + 1):
        if row < len(tables) and common[row] and 2 * common[row] >= max(common[row - 1], common[row + 1]):
            continue
        shared = min(common[first + 1 : row], default=0)
        groups += [(first, shared * page_size)] * (row - first)
        first = row
    return groups


def common_pages(one: list[int], other: list[int], least: int) -> int:
    """Leading pages that hold the same tokens in both tables; 0 where they are fewer than `least`.

    A page that stands in both tables at one place was found by all tokens up to its end, or forked with the pages
    before it: then those hold the same as well, even where both sequences have computed them for themselves.
    """
    shortest = min(len(one), len(other))
    if shortest < least or one[least - 1] != other[least - 1]:
        return 0
    return bisect_left(range(shortest), True, lo=least, key=lambda index: one[index] != other[index])
