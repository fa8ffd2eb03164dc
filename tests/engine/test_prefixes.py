"""Which neighbouring rows share their first pages."""

from __future__ import annotations

import pytest

from tandem.server.engine.prefixes import common_pages, groups_of


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ([], [], 0),
        ([1], [1], 0),
        ([1, 2], [1, 2], 2),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3, 4, 5], [1, 2, 3], 3),
        ([1, 9, 3], [1, 2, 3], 0),
        ([7, 2, 3, 5], [1, 2, 3, 6], 3),  # page 2 was found by what comes before it: 7 and 1 hold the same
    ],
)
def test_common_pages(one: list[int], other: list[int], common: int) -> None:
    assert common_pages(one, other, 2) == common_pages(other, one, 2) == common


def rows(*shared: list[int]) -> list[list[int]]:
    """Tables that end with two pages of their own."""
    return [[*pages, 1000 + 2 * row, 1001 + 2 * row] for row, pages in enumerate(shared)]


def test_groups_share_whole_pages() -> None:
    assert groups_of(rows([1, 2], [1, 2]), page_size=16, least=17) == [(0, 32), (0, 32)]
    assert groups_of(rows([1, 2], [1, 2]), page_size=16, least=33) is None


def test_groups() -> None:
    system, long = [1, 2], [1, 2, 3, 4, 5, 6]
    assert groups_of([], 1, 2) is None
    assert groups_of(rows([], [], system), 1, 2) is None
    assert groups_of(rows(system, [], system, system), 1, 2) == [(0, 0), (1, 0), (2, 2), (2, 2)]
    assert groups_of(rows(long, long[:4], system), 1, 2) == [(0, 2)] * 3
    assert groups_of(rows(system, system), 1, 3) is None


def test_a_group_ends_where_less_than_half_is_shared() -> None:
    system, one, other = [1, 2], [1, 2, 3, 4, 5, 6], [1, 2, 7, 8, 9, 10]
    assert groups_of(rows(one, one, other, other), 1, 2) == [(0, 6), (0, 6), (2, 6), (2, 6)]
    assert groups_of(rows(system, one, one), 1, 2) == [(0, 0), (1, 6), (1, 6)]
    assert groups_of(rows(one, one, system), 1, 2) == [(0, 6), (0, 6), (2, 0)]
