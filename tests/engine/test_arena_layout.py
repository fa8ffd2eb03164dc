"""Which bytes are whose: nobody's twice, and little is wasted."""

from itertools import pairwise

import pytest

from tandem.server.engine.arena_layout import ALIGNED, Layout, lay_out

MIB = 1 << 20


def claims(layout: Layout) -> list[tuple[int, int, object]]:
    """(begin, end, whose) of every model's own pages and of the pages of each slab."""
    found: list[tuple[int, int, object]] = []
    for number, place in enumerate(layout.places):
        found += [(place.begin, place.begin + place.own * place.page_bytes, number)]
        found += [
            (place.begin + pages.start * place.page_bytes, place.begin + pages.stop * place.page_bytes, ("slab", slab))
            for slab, pages in enumerate(place.slabs)
        ]
    return found


@pytest.mark.parametrize(
    ("memory", "page_bytes", "own"),
    [
        (4 * MIB, [8192, 8192], [100, 60]),
        (64 * MIB, [65536, 40960, 7000], [10, 20, 30]),
        (2048 * MIB, [1179648, 589824], [64, 64]),
        (100 << 30, [8 * MIB, 7 * MIB, 3 * MIB, 3 * MIB // 2], [128, 64, 64, 64]),
        (MIB, [100_000, 300], [4, 5]),
        (MIB, [300_000, 200_000], [1, 2]),
    ],
)
def test_no_byte_is_two_models_at_once(memory: int, page_bytes: list[int], own: list[int]) -> None:
    layout = lay_out(memory, page_bytes, own)
    edges = sorted(claims(layout), key=lambda claim: claim[:2])
    for (_, end, one), (begin, _, other) in pairwise(edges):
        assert end <= begin or one == other, f"{one} and {other}"
    for place, size, count in zip(layout.places, page_bytes, own, strict=True):
        assert place.begin >= 0 and (place.page_bytes, place.own) == (size, count)
        last = place.pages - 1  # nobody's
        assert place.begin + last * size >= max(end for _, end, _ in claims(layout))
        assert place.end == place.begin + place.pages * size <= layout.bytes < memory + 2 * max(page_bytes)
        assert not place.slabs or (place.begin + place.slabs[0].start * size) % ALIGNED == 0


@pytest.mark.parametrize("pages", [[8.0, 8.0, 1.5], [8.0, 7.0, 3.0], [1.125, 0.5625], [4.0, 3.9]])
def test_little_of_a_slab_is_wasted(pages: list[float]) -> None:
    layout = lay_out(20 << 30, [int(size * MIB) for size in pages], [32] * len(pages))
    assert 64 <= layout.slabs <= 256
    used = [layout.usable(number) for number in range(len(pages))]
    assert min(used) > 0.97 and max(used) == 1.0
    assert layout.shared > 0.98 * ((20 << 30) - 32 * sum(pages) * MIB)


def test_one_model_has_all_of_it() -> None:
    layout = lay_out(4 * MIB, [65536], [64])
    (place,) = layout.places
    assert (layout.slabs, place.begin, place.own, place.slabs, place.pages) == (0, 0, 64, (), 65)
    assert layout.bytes == 65 * 65536
