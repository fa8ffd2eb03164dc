"""Recorded operations: a replay does what was recorded, on whatever the tensors hold by then, and only what can be
replayed is recorded."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.cpu.native import native
from tandem.kernels.cpu.recording import Memory, record

pytestmark = pytest.mark.skipif(native() is None, reason="the C++ kernels were not built, or this CPU lacks AVX2")

MEMORY = 1 << 16
ROWS, SIZE = 3, 64


def weights(dtype: torch.dtype, layers: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SIZE, SIZE, generator=generator).to(dtype) / 8 for _ in range(layers)]


def layers_of(x: Tensor, dtype: torch.dtype, layers: int = 4) -> Callable[[], Tensor]:
    """Kernels, views between them, and operations of PyTorch's that make tensors and that change them."""
    matrices = weights(dtype, layers)
    packed = [ops.pack(matrix) for matrix in matrices]
    norm = torch.ones(SIZE, dtype=dtype)

    def work() -> Tensor:
        residual = x.new_zeros(x.shape)
        hidden = torch.nn.functional.embedding(torch.tensor([2, 0, 1]), x)  # rows in another order
        for matrix in packed:
            assert matrix is not None
            hidden = ops.packed_linear(ops.rms_norm(hidden, norm, 1e-5, residual), matrix).mul_(2)
            hidden = hidden.unflatten(1, (2, -1)).flatten(1)
        return ops.rms_norm(hidden, norm, 1e-5, residual)

    return work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_equals_the_work(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, SIZE, generator=generator).to(dtype)
    work, memory = layers_of(x, dtype), Memory(MEMORY)
    with torch.inference_mode():
        expected = work()
        first, recording = record(work, memory)
        assert recording is not None and torch.equal(first, expected)
        assert recording.calls == {"tandem_norm": 5, "tandem_linear": 4}
        for _ in range(3):
            x.copy_(torch.randn(ROWS, SIZE, generator=generator))
            expected = work()
            memory.data[memory.data.size // 2 :] = 255  # nothing of an earlier run is needed
            found = recording.replay()
            assert torch.equal(found, expected) and found.data_ptr() == first.data_ptr()


def test_recordings_share_their_memory() -> None:
    memory = Memory(MEMORY)
    inputs = [torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    works = [layers_of(x, torch.float32) for x in inputs]
    with torch.inference_mode():
        recordings = [record(work, memory)[1] for work in works]
        for work, recording in [*zip(works, recordings, strict=True)] * 2:
            assert recording is not None and torch.equal(recording.replay(), work())


def test_places_are_used_again() -> None:
    """Sixty layers fit where four do: what nobody looks at any more makes room."""
    x = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    size = ROWS * SIZE * 4
    with torch.inference_mode():
        for layers in (4, 60):
            work = layers_of(x, torch.float32, layers)
            result, recording = record(work, Memory(5 * size))
            assert recording is not None and torch.equal(recording.replay(), work()) and torch.equal(result, work())
        assert record(layers_of(x, torch.float32), Memory(size))[1] is None


def test_results_of_pytorchs_operations_lie_in_the_memory_too() -> None:
    """However many recordings there are, they hold no more than it."""
    x, memory = torch.arange(1024.0), Memory(MEMORY)
    with torch.inference_mode():
        result, recording = record(lambda: (x + 1) * 2 - x, memory)
        assert recording is not None
        begin = result.data_ptr() - memory.data.ctypes.data
        assert 0 <= begin < 3 * x.nbytes
        x.neg_()
        assert torch.equal(recording.replay(), (x + 1) * 2 - x)
        assert record(lambda: x + 1, Memory(x.nbytes - 64))[1] is None


def refused(work: Callable[[], Tensor]) -> None:
    with torch.inference_mode():
        result, recording = record(work, Memory(MEMORY))
        assert recording is None and torch.equal(result, work())


def test_what_looks_at_values_is_not_recorded() -> None:
    x = torch.arange(8.0)
    refused(lambda: x * 2 if x[3].item() == 3 else x)
    refused(lambda: x[: int(x.max())] + 1)
    refused(lambda: torch.stack(torch.meshgrid(x, x.topk(2)[0], indexing="ij")))  # two results at once


def test_a_failed_work_leaves_nothing_behind() -> None:
    x = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        with pytest.raises(ZeroDivisionError):
            record(lambda: x / (1 // 0), Memory(MEMORY))
        _, recording = record(layers_of(x, torch.float32), Memory(MEMORY))
        assert recording is not None and recording.calls["tandem_linear"] == 4


def test_calls_of_other_threads_are_not_recorded() -> None:
    """Weights are packed in a thread while steps are taken."""
    x = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1))
    work = layers_of(x, torch.float32)

    def packed() -> None:
        assert ops.pack(x) is not None

    def beside() -> Tensor:
        thread = threading.Thread(target=packed)
        thread.start()
        thread.join()
        return work()

    with torch.inference_mode():
        _, recording = record(beside, Memory(MEMORY))
        assert recording is not None and recording.calls == {"tandem_norm": 5, "tandem_linear": 4}


def test_recording_does_not_import_the_compiler() -> None:
    """That would be a second's pause in the middle of the first answer."""
    program = """
import sys, torch
from tandem.kernels.cpu.recording import Memory, record
x = torch.ones(4)
result, recording = record(lambda: x + 1, Memory(1 << 10))
assert recording is not None and torch.equal(recording.replay(), x + 1)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
