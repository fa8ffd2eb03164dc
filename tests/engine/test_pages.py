"""The page pool's rules one by one, and all of them at once against a naive pool."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from page_machine import page_machine

from tandem.server.engine import pages as pages_module
from tandem.server.engine.pages import Chain, Pages, Root

ROOT = Root("policy", 1)
PROMPT = list(range(10))


def filled(pages: Pages, tokens: list[int], root: Root = ROOT) -> tuple[list[int], Chain]:
    """A table for the tokens, computed and published as far as that goes."""
    table = pages.match(root, tokens, len(tokens) - 1)
    chain = pages.chain(root, table)
    table += pages.allocate(-(-len(tokens) // pages.page_size) - len(table)) or []
    pages.publish(chain, table, tokens, len(tokens))
    return table, chain


def test_a_published_prefix_is_found_in_whole_pages():
    pages = Pages(8, 4)
    table, _ = filled(pages, PROMPT)
    assert pages.match(ROOT, PROMPT, 9) == table[:2]
    assert pages.match(ROOT, [*PROMPT[:4], 99, *PROMPT[5:]], 9) == table[:1]
    assert pages.match(ROOT, [99, *PROMPT[1:]], 9) == []
    pages.check([table, table[:2], table[:1]])


@pytest.mark.parametrize(("limit", "found"), [(8, 2), (7, 1), (4, 1), (3, 0), (0, 0)])
def test_no_page_reaches_the_first_needed_position(limit: int, found: int):
    pages = Pages(8, 4)
    filled(pages, PROMPT)
    assert len(pages.match(ROOT, PROMPT, limit)) == found


@pytest.mark.parametrize(
    "other", [Root("reward", 1), Root("policy", 2), Root("policy", 1, adapter="a"), Root("policy", 1, salt="s")]
)
def test_roots_do_not_share(other: Root):
    pages = Pages(8, 4)
    filled(pages, PROMPT)
    assert pages.match(other, PROMPT, 9) == []


def test_roots_are_told_apart_by_field_not_by_their_concatenation():
    assert Root("a", 1, "b", "").digest != Root("a", 1, "", "b").digest


def test_a_partial_page_is_not_published_until_it_is_full():
    pages = Pages(8, 4)
    table, chain = filled(pages, PROMPT)
    assert pages.match(ROOT, [*PROMPT, 10, 11, 12], 12) == table[:2]
    pages.publish(chain, table, [*PROMPT, 10, 11], 12)
    assert pages.match(ROOT, [*PROMPT, 10, 11, 12], 12) == table


def test_the_first_of_two_equal_prefixes_stays():
    pages = Pages(8, 4)
    first, _ = filled(pages, PROMPT)
    chain, second = pages.chain(ROOT, []), pages.allocate(3)
    assert second is not None
    pages.publish(chain, second, PROMPT, 10)
    assert pages.match(ROOT, PROMPT, 9) == first[:2]
    pages.release(second)
    assert (pages.cached, pages.free) == (0, 5)


def test_pages_nobody_uses_are_kept_until_they_are_needed_oldest_first():
    pages = Pages(4, 2)
    old, _ = filled(pages, [1, 2])
    new, _ = filled(pages, [3, 4])
    pages.release(old)
    pages.release(new)
    assert (pages.free, pages.cached, pages.used, pages.available) == (2, 2, 0, 4)
    assert set(pages.allocate(3) or []) == {0, 1, 2, 3} - set(new)
    assert pages.match(ROOT, [1, 2, 3], 2) == []
    assert pages.match(ROOT, [3, 4, 5], 2) == new


def test_the_end_of_a_prompt_is_thrown_out_before_its_beginning():
    pages = Pages(3, 2)
    table, _ = filled(pages, [1, 2, 3, 4, 5, 6])
    pages.release(table)
    pages.allocate(1)
    assert pages.match(ROOT, [1, 2, 3, 4, 5, 6, 7], 6) == table[:2]


def test_using_a_cached_page_makes_it_recent():
    pages = Pages(2, 2)
    for tokens in ([1, 2], [3, 4], [1, 2]):
        table = pages.match(ROOT, [*tokens, 9], 2) or filled(pages, tokens)[0]
        pages.release(table)
    pages.allocate(1)
    assert pages.match(ROOT, [1, 2, 9], 2)
    assert not pages.match(ROOT, [3, 4, 9], 2)


def test_allocating_takes_all_or_nothing():
    pages = Pages(4, 2)
    assert pages.allocate(5) is None
    assert pages.free == 4
    assert len(pages.allocate(4) or []) == 4
    assert pages.allocate(1) is None
    assert pages.allocate(0) == []


def test_a_shared_page_is_copied_by_all_but_the_last_writer():
    pages = Pages(6, 4)
    table = pages.allocate(2)
    assert table is not None
    forks = [pages.fork(table), pages.fork(table)]
    source = table[1]
    copies = [pages.writable(fork, 1) for fork in [table, *forks]]
    assert [copy and copy[0] for copy in copies] == [source, source, None]
    assert len({table[1], forks[0][1], forks[1][1]}) == 3 and forks[1][1] == source
    assert table[0] == forks[0][0] == forks[1][0]
    pages.check([table, *forks])


def test_dropping_the_cache_frees_what_is_cached_and_hides_what_is_used():
    pages = Pages(8, 4)
    kept, chain = filled(pages, PROMPT)
    pages.release(filled(pages, [7] * 8)[0])
    pages.drop()
    assert (pages.free, pages.cached, pages.used) == (5, 0, 3)
    assert pages.match(ROOT, PROMPT, 9) == []
    pages.publish(chain, kept, [*PROMPT, 1, 2], 12)
    pages.check([kept])
    pages.release(kept)
    assert pages.used == 0


def test_releasing_a_page_too_often_is_noticed():
    pages = Pages(2, 2)
    table = pages.allocate(1)
    assert table is not None
    pages.release(table)
    with pytest.raises(AssertionError, match="once too often"):
        pages.release(table)


def test_digests_take_any_token_id():
    pages = Pages(2, 1)
    filled(pages, [2**40])
    assert pages.match(ROOT, [2**40, 0], 1)


def test_random_use_agrees_with_a_naive_pool():
    run_state_machine_as_test(
        page_machine(pages_module),
        settings=settings(max_examples=2000, stateful_step_count=25, deadline=None, derandomize=True, database=None),
    )
