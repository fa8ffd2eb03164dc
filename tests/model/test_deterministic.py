"""In deterministic mode a row has the same bits whatever rows are computed with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from checkpoints import VOCAB, make_model
from paging import PagedRun
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.cpu import activations, attention, low_rank, product, rows
from tandem.model.linear import Linear
from tandem.model.load import load_model
from tandem.model.model import Model
from tandem.model.slots import Place

DTYPES = ["float32", "bfloat16", "float16"]
LENGTH = 41


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Products and sums are divided among threads; three share nothing evenly."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def linear_of(outs: int, ins: int, dtype: str, bias: bool, activation: ops.Activation | None = None) -> Linear:
    place = Place(getattr(torch, dtype), torch.device("cpu"), deterministic=True)
    linear = Linear(("w",), ins, (outs,), place, split="none", bias=bias, activation=activation)
    linear.weight.copy_(torch.randn(outs, ins) / ins**0.5)
    if linear.bias is not None:
        linear.bias.copy_(torch.randn(outs))
    linear.finish()
    return linear


def assert_rows_alone(compute: object, x: Tensor) -> None:
    assert callable(compute)
    whole = compute(x)
    for count in (1, 2, 16, 31, 32, 33, 64):
        for first in (0, 1, len(x) - count):
            assert torch.equal(compute(x[first : first + count]), whole[first : first + count]), (count, first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins"), [(64, 64), (96, 72), (768, 768), (768, 2048), (7, 33), (1, 768)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_matrices(outs: int, ins: int, bias: bool, dtype: str, threads: int) -> None:
    """Shapes in which oneDNN and MKL choose among orders by the number of rows."""
    linear = linear_of(outs, ins, dtype, bias)
    x = torch.randn(67, ins, dtype=getattr(torch, dtype))
    assert_rows_alone(linear, x)
    exact = F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double())
    torch.testing.assert_close(linear(x).double(), exact, rtol=2e-2, atol=1e-2 if dtype == "bfloat16" else 2e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu_and_mul", "gelu_tanh", "gelu"])
def test_activations(activation: ops.Activation, dtype: str, threads: int) -> None:
    """202 columns: torch rounds what lies behind the last whole vector of a thread's share otherwise."""
    linear = linear_of(202, 16, dtype, True, activation)
    assert_rows_alone(linear, torch.randn(401, 16, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [72, 101, 768])
def test_norms(width: int, dtype: str, threads: int) -> None:
    kind = getattr(torch, dtype)
    x, weight, bias = (
        torch.randn(701, width, dtype=kind),
        torch.randn(width, dtype=kind),
        torch.randn(width, dtype=kind),
    )
    assert_rows_alone(lambda rows: ops.rms_norm(rows, weight, 1e-5), x)
    assert_rows_alone(lambda rows: ops.layer_norm(rows, weight, bias, 1e-5), x)


@pytest.mark.parametrize("vocab_size", [320, 50257, 128256])
def test_logprobs_of_given_logits(vocab_size: int, threads: int) -> None:
    """A single row's sum would be divided among threads."""
    logits, ids = torch.randn(19, vocab_size) * 3, torch.randint(0, vocab_size, (19,))
    whole = ops.token_logprobs(logits, ids, 3)
    for row in range(19):
        alone = ops.token_logprobs(logits[row : row + 1], ids[row : row + 1], 3)
        for found, wanted in zip(alone, whole, strict=True):
            assert torch.equal(found[0], wanted[row])


# Whole models ---------------------------------------------------------------------------------------------------------


def texts(count: int) -> list[list[int]]:
    return torch.randint(0, VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(2)).tolist()


class Written(PagedRun):
    def advance(self, cuts: list[int], ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Of the first text: hidden states [LENGTH, D], and the log-probability of each chunk's next token."""
        hidden, values, at = list[Tensor](), list[Tensor](), 0
        for cut in cuts:
            rows = self.step({index: text[at : at + cut] for index, text in enumerate(ids)})[0]
            at += cut
            hidden.append(rows)
            logits = self.model.logits(rows[-1:])
            if at < LENGTH:
                values.append(ops.token_logprobs(logits, torch.tensor([ids[0][at]]), 0).values)
        return torch.cat(hidden), torch.cat(values or [torch.empty(0)])


def run(model: Model, cuts: list[int], sequences: int) -> tuple[Tensor, Tensor]:
    return Written(model, sequences, LENGTH).advance(cuts, texts(sequences))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "variant", ["llama-gqa", "qwen3", "mistral", "gpt2", "gpt2-scaled", "bloom-6", "gptj", "opt", "gemma2"]
)
def test_models(variant: str, dtype: str, tmp_path: Path) -> None:
    """Prefilled at once, in chunks, token by token; alone, with 2 and 63 others; written and scored."""
    make_model(variant).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype, deterministic=True)  # type: ignore[arg-type]
    ids = torch.tensor(texts(1)[0][1:])
    hidden, _ = run(model, [LENGTH], 1)
    scored = model.logprobs_of(hidden[:-1], ids, 2)
    for cuts, sequences in [([1] * LENGTH, 1), ([7, 16, 1, 1, 16], 1), ([20] + [1] * 21, 3), ([30] + [1] * 11, 64)]:
        found, drawn = run(model, cuts, sequences)
        assert torch.equal(found, hidden), (len(cuts), sequences)
        ends = torch.tensor(cuts).cumsum(0)[:-1] - 1
        assert torch.equal(drawn, scored.values[ends])
    top = model.logprobs_of(hidden[5:6], ids[5:6], 2)
    assert torch.equal(top.top_values[0], scored.top_values[5]) and torch.equal(top.top_ids[0], scored.top_ids[5])


def test_without_it_bits_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail. In C++ they never differ."""
    for module in (activations, attention, low_rank, product, rows):
        monkeypatch.setattr(module, "native", lambda: None)
    make_model("llama-gqa", intermediate_size=3072, hidden_size=768).save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not torch.equal(run(model, [LENGTH], 1)[0], run(model, [1] * LENGTH, 1)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores(dtype: str, tmp_path: Path) -> None:
    make_model("llama-reward").save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype, deterministic=True)  # type: ignore[arg-type]
    assert_rows_alone(model.scores, torch.randn(67, 64, dtype=model.dtype))


def test_what_is_scored_is_what_was_drawn(tmp_path: Path) -> None:
    """On CPUs in the usual mode, too: one product gives both, from one row count the same bits."""
    make_model("llama-gqa").save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        model = load_model(tmp_path, dtype=dtype)  # type: ignore[arg-type]
        hidden, ids = torch.randn(9, 64, dtype=model.dtype), torch.arange(9)
        drawn = ops.token_logprobs(model.logits(hidden), ids, 4)
        for found, wanted in zip(model.logprobs_of(hidden, ids, 4), drawn, strict=True):
            assert torch.equal(found, wanted)
