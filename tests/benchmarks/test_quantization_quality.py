"""What `tandem quantize --evaluate` measures: the arithmetic, and what of a text is measured."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tandem.benchmarks.bench.models import UsageError
from tandem.benchmarks.quantization.quality import (
    LanguageQuality,
    RewardQuality,
    correlation,
    least_divergence,
    ranks,
)
from tandem.benchmarks.quantization.texts import BUNDLED, Message, passages, rankings, read_examples

DRAW = torch.Generator().manual_seed(3)


def logits(rows: int, vocab: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=DRAW)


def test_distributions_are_compared_token_by_token() -> None:
    p, q, targets = logits(40, 11), logits(40, 11), torch.randint(0, 11, (40,), generator=DRAW)
    found = LanguageQuality()
    for rows in (slice(0, 25), slice(25, 40)):
        found.add(p[rows], q[rows], targets[rows])
    figures = found.figures()
    divergences = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert figures["kl_mean"] == pytest.approx(float(divergences.mean()), rel=1e-5)
    assert figures["kl_p99"] == pytest.approx(float(divergences.quantile(0.99)), rel=1e-5)
    for name, side in (("reference", p), ("candidate", q)):
        assert figures[f"perplexity_{name}"] == pytest.approx(math.exp(F.cross_entropy(side, targets)), rel=1e-5)
    assert figures["perplexity_change"] == pytest.approx(
        figures["perplexity_candidate"] / figures["perplexity_reference"] - 1
    )
    assert figures["top1_agreement"] == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert figures["tokens"] == 40


def test_a_model_is_like_itself() -> None:
    p, targets = logits(10, 7), torch.zeros(10, dtype=torch.int64)
    found = LanguageQuality()
    found.add(p, p, targets)
    figures = found.figures()
    assert (figures["kl_mean"], figures["kl_p99"], figures["perplexity_change"]) == (0, 0, 0)
    assert figures["top1_agreement"] == 1


def test_logits_in_16_bits_are_compared_in_32() -> None:
    """Log-probabilities rounded to 8 bits would look like a divergence of their own."""
    p, q = logits(40, 11).bfloat16(), logits(40, 11).bfloat16()
    targets, found = torch.zeros(40, dtype=torch.int64), [LanguageQuality(), LanguageQuality()]
    found[0].add(p, q, targets)
    found[1].add(p.float(), q.float(), targets)
    assert found[0].figures() == found[1].figures()


@pytest.mark.parametrize("top", [1, 3, 12])
def test_the_most_likely_tokens_bound_the_divergence(top: int) -> None:
    p, q = logits(30, 12).log_softmax(-1).double(), logits(30, 12).log_softmax(-1).double()
    exact = (p.exp() * (p - q)).sum(-1).tolist()
    for row, whole in enumerate(exact):
        sides = [{int(i): float(side[row, i]) for i in side[row].topk(top).indices} for side in (p, q)]
        least = least_divergence(sides[0], sides[1])
        assert 0 <= least <= whole + 1e-6
        if top == 12:
            assert least == pytest.approx(whole, abs=1e-6)


def test_what_a_server_tells_adds_up() -> None:
    found = LanguageQuality(exact=False)
    found.add_top({5: math.log(0.5), 7: math.log(0.3)}, {5: math.log(0.2), 7: math.log(0.6)}, 7)
    found.add_top({5: math.log(0.9)}, {5: math.log(0.8)}, 5)
    figures = found.figures()
    assert figures["perplexity_reference"] == pytest.approx((1 / (0.3 * 0.9)) ** 0.5)
    assert figures["perplexity_candidate"] == pytest.approx((1 / (0.6 * 0.8)) ** 0.5)
    assert figures["top1_agreement"] == 0.5


def test_scores_are_compared_within_their_group() -> None:
    found = RewardQuality()
    found.add([3.0, 1.0, 2.0], [30.0, 10.0, 5.0])  # one of three pairs is the other way round
    found.add([0.0, 0.0, 5.0], [1.0, 2.0, 3.0])  # the first two are equal: no pair
    figures = found.figures()
    assert (figures["pairs"], figures["ranking_agreement"]) == (5, 0.8)
    assert (figures["texts"], figures["largest_difference"]) == (6, 27)


def test_a_tie_of_the_candidate_is_no_agreement() -> None:
    found = RewardQuality()
    found.add([1.0, 2.0], [4.0, 4.0])
    assert found.figures()["ranking_agreement"] == 0


def test_correlations() -> None:
    assert ranks([10.0, 5.0, 10.0, -1.0]) == [2.5, 1.0, 2.5, 0.0]
    assert correlation([1, 2, 3, 4], [-2, -4, -6, -8]) == pytest.approx(-1)
    x = torch.randn(50, generator=DRAW).double()
    y = x + torch.randn(50, generator=DRAW)
    centred = x - x.mean(), y - y.mean()
    expected = (centred[0] @ centred[1]) / (centred[0].norm() * centred[1].norm())
    assert correlation(x.tolist(), y.tolist()) == pytest.approx(float(expected))
    assert math.isnan(correlation([1, 1], [2, 3]))


class Bytes:
    """A tokenizer whose tokens are bytes, with a template that marks turns."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def render(self, messages: Sequence[Message], tools: Sequence[Message], opens: bool) -> list[int]:
        return self.encode("".join(f"<{one['role'][0]}>{one['content']}" for one in messages) + "<a>" * opens)


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_the_best_answer_is_measured_behind_its_prompt(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "two?"}], "answers": ["2", "3", "4"]}
    examples = read_examples(write(tmp_path / "texts.jsonl", line))
    (passage,) = passages(examples, Bytes(), 100)
    assert bytes(passage.token_ids) == b"<u>two?<a>2"
    assert bytes(passage.token_ids[passage.first :]) == b"2"
    assert [bytes(ids) for ids in rankings(examples, Bytes(), 100)[0]] == [
        b"<u>two?<a>" + end for end in (b"2", b"3", b"4")
    ]
    with pytest.raises(UsageError, match="no two tokens in a row to measure within a context of 10"):
        passages(examples, Bytes(), 10)  # the answer lies behind that


def test_every_token_of_plain_text_but_the_first_is_measured_once(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("abcdefghijklmno")
    found = passages(read_examples(tmp_path / "book.txt"), Bytes(), 6)
    assert b"".join(bytes(one.token_ids[one.first :]) for one in found) == b"bcdefghijklmno"
    assert max(len(one.token_ids) for one in found) == 6


def test_texts_are_compared_with_each_other(tmp_path: Path) -> None:
    examples = read_examples(write(tmp_path / "texts.jsonl", {"text": "one"}, {"text": "two"}))
    assert rankings(examples, Bytes(), 100) == [[list(b"one"), list(b"two")]]
    with pytest.raises(UsageError, match="texts that it can compare"):
        rankings(examples[:1], Bytes(), 100)


@pytest.mark.parametrize("line", ['{"answers": ["a"]}', '{"messages": [], "answers": ["a"]}', "[]", "{"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "texts.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(UsageError, match=r"texts\.jsonl, line 2: .*is needed"):
        read_examples(tmp_path / "texts.jsonl")


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "missing"])
def test_a_file_without_text_is_refused(tmp_path: Path, name: str) -> None:
    if name != "missing":
        (tmp_path / name).write_text("\n")
    with pytest.raises(UsageError, match=r"empty|no lines|cannot be read"):
        read_examples(tmp_path / name)


def test_the_bundled_set_is_whole() -> None:
    examples = read_examples(None)
    assert len(examples) == 300 == len(BUNDLED.read_text("utf-8").splitlines())
    assert sum(len(one.answers) > 1 for one in examples) == 180
