"""A smoke of `make evidence-rlhf`, and that its checks see what is wrong."""

from __future__ import annotations

import pytest

from tandem.benchmarks.rlhf import agreement, shared_prompt, updates


def test_updates_under_streams() -> None:
    found = updates.run(streams=3, count=4)
    assert found["ok"] and found["chats_of_several_versions"] >= 3


def test_a_shared_prompt_is_computed_once() -> None:
    found = shared_prompt.run(k=3, prompt=64, answer=16, rounds=1, threads=1, model="tiny-reward")
    assert found["computed_together"] == [112] and found["computed_apart"] == [240]
    assert found["largest_difference"] <= 1e-5


def test_numbers_agree() -> None:
    assert agreement.run(n=2, count=6, batches=3)["ok"]


@pytest.mark.parametrize(
    ("spans", "problem"),
    [
        ([{"version": 0, "start": 0, "end": 160}], None),
        ([{"version": 1, "start": 0, "end": 160}], "are not of version 1"),
        ([{"version": 0, "start": 0, "end": 90}], "end before token 160"),
        ([{"version": 0, "start": 0, "end": 90}, {"version": 2, "start": 91, "end": 160}], "follow one another"),
        ([{"version": 2, "start": 0, "end": 90}, {"version": 0, "start": 90, "end": 160}], "follow one another"),
    ],
)
def test_wrong_spans_are_seen(spans: list[dict[str, int]], problem: str | None) -> None:
    said = updates.check_spans([updates.MIDDLE - 1] * updates.ANSWER, spans)
    assert said is None if problem is None else problem in (said or "")
