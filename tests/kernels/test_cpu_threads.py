"""The threads that the C++ kernels share their loops with: whoever takes a turn, the result is the same."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.cpu.native import native

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ kernels were not built, or this CPU lacks AVX2")

ROUNDS = 200


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Product:
    """One that is worth sharing, and what a single thread makes of it."""

    def __init__(self, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(rows, 192, generator=generator)
        packed = ops.pack(torch.randn(640, 192, generator=generator))
        assert packed is not None
        self.packed = packed
        torch.set_num_threads(1)
        self.alone = self.again()

    def again(self) -> Tensor:
        return ops.packed_linear(self.x, self.packed)


@pytest.mark.parametrize("count", [2, 3, 16])
@pytest.mark.parametrize("rows", [3, 70])
def test_the_number_of_threads_does_not_show(rows: int, count: int) -> None:
    product = Product(rows, seed=1)
    for threads in (count, 2, count):
        torch.set_num_threads(threads)
        assert all(torch.equal(product.again(), product.alone) for _ in range(ROUNDS))


def test_several_callers_at_once() -> None:
    """As when new weights are packed while a model computes."""
    products = [Product(rows, seed=rows) for rows in (2, 17, 40)]
    wrong: list[int] = []

    def call(number: int) -> None:
        torch.set_num_threads(3)
        for _ in range(ROUNDS):
            if not torch.equal(products[number].again(), products[number].alone):
                wrong.append(number)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(len(products))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_forked_process_computes_alone() -> None:
    product = Product(40, seed=5)
    torch.set_num_threads(2)
    assert torch.equal(product.again(), product.alone)  # the other thread is there
    with warnings.catch_warnings(action="ignore"):  # that forking beside threads may deadlock
        child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(product.again(), product.alone) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
