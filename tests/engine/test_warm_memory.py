"""Memory is provided ahead of its use: as much as agreed, without a change of what it holds."""

from __future__ import annotations

import mmap
import resource

import pytest
import torch
from torch import Tensor

from tandem.server.engine import warm_memory
from tandem.server.engine.warm_memory import HUGE_PAGE, WarmMemory


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def fresh(mebibytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(-1, mebibytes << 20), dtype=torch.uint8)


def provide_all(warm: WarmMemory, used: int) -> int:
    calls = 1
    while warm.provide(used):
        calls += 1
    return calls


def test_what_was_provided_costs_no_fault() -> None:
    memory = fresh(96)
    warm = WarmMemory(memory, ahead=48 << 20)
    memory[: 8 << 20] = 7
    calls = provide_all(warm, 8 << 20)
    assert 24 <= calls <= 26  # of HUGE_PAGE each, and one that finds nothing
    before = faults()
    memory[8 << 20 : 56 << 20] = 1
    provided = faults() - before
    memory[56 << 20 :] = 1
    rest = faults() - before - provided
    assert provided <= 2 and rest >= 20
    assert memory[: 8 << 20].eq(7).all()


def test_it_follows_what_is_in_use() -> None:
    warm = WarmMemory(fresh(64), ahead=4 * HUGE_PAGE)
    first = provide_all(warm, 0)
    assert not warm.provide(0)
    assert provide_all(warm, 2 * HUGE_PAGE) in (3, 4) and first in (5, 6)
    assert provide_all(warm, 64 << 20) == 1  # the end


def test_a_system_that_cannot_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    warm, able = WarmMemory(fresh(16)), warm_memory.POPULATE_WRITE
    monkeypatch.setattr(warm_memory, "POPULATE_WRITE", 9999)  # no advice that any system knows
    assert not warm.provide(0)
    monkeypatch.setattr(warm_memory, "POPULATE_WRITE", able)
    assert not warm.provide(0)
    assert WarmMemory(fresh(16)).provide(0)
