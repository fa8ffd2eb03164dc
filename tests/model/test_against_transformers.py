"""Every variant computes what transformers computes, however its rows are cut into batches."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest
import torch
from checkpoints import LANGUAGE_MODELS, REWARD_MODELS, VARIANTS, VOCAB, make_model
from paging import PagedRun
from torch import Tensor
from transformers import PreTrainedModel

from tandem.model.load import load_model
from tandem.model.model import Model

LENGTHS = [1, 7, 8, 9, 61, 90]  # around a page of 8, and beyond the sliding windows
TOLERANCE = 1e-4
HALF = [
    *("gpt2", "llama-gqa", "llama-yarn", "mistral", "qwen2", "qwen3", "bloom-6", "neox", "opt", "gptj"),
    *("gemma3-linear", "phi3-long", "falcon-new", "falcon-rw", "olmo2"),
]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Model]:
    path: Path = tmp_path_factory.mktemp("checkpoint")
    reference = make_model(request.param)
    reference.save_pretrained(path)
    return reference, load_model(path)


def head_of(model: Model, hidden: Tensor) -> Tensor:
    return model.scores(hidden) if model.config.labels else model.logits(hidden)


def expected(reference: PreTrainedModel, ids: list[int]) -> Tensor:
    """The reference's logits of every position, or its score of the whole sequence."""
    with torch.no_grad():
        return reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def difference(model: Model, hidden: Tensor, reference: Tensor) -> float:
    """The largest one, of all rows for a language model, of the last row for a reward model."""
    rows = hidden[-1:] if model.config.labels else hidden
    return float((head_of(model, rows).view_as(reference) - reference).abs().max())


def test_whole_prompts_in_one_batch(pair: tuple[PreTrainedModel, Model]) -> None:
    reference, model = pair
    run = PagedRun(model, len(LENGTHS), max(LENGTHS))
    hidden = run.step(dict(enumerate(prompts())))
    worst = max(difference(model, hidden[i], expected(reference, ids)) for i, ids in enumerate(prompts()))
    print(f"largest difference {worst:.1e}")
    assert worst < TOLERANCE


def test_chunks_mixed_with_decodes(pair: tuple[PreTrainedModel, Model]) -> None:
    """Chunks of uneven sizes, so that batches mix single rows, first chunks and later ones; pages of 5."""
    reference, model = pair
    run = PagedRun(model, len(LENGTHS), max(LENGTHS), page_size=5, seed=3)
    cuts = [[1], [1, 6], [3, 5], [5, 4], [13, 1, 1, 40, 6], [31, 59]]
    parts: list[list[Tensor]] = [[] for _ in LENGTHS]
    while any(cuts):
        chunks = {}
        for i, ids in enumerate(prompts()):
            if cuts[i]:
                at = run.lengths[i]
                chunks[i] = ids[at : at + cuts[i].pop(0)]
        for i, hidden in run.step(chunks).items():
            parts[i].append(hidden)
    for i, ids in enumerate(prompts()):
        assert difference(model, torch.cat(parts[i]), expected(reference, ids)) < TOLERANCE


@pytest.mark.parametrize("variant", LANGUAGE_MODELS)
def test_greedy_text_is_equal(variant: str, tmp_path: Path) -> None:
    """64 tokens from prompts of 5 and 50 tokens, decoded together; for dynamic rope past its original context."""
    reference = make_model(variant, seed=7)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    texts = [prompts()[4][:5], prompts()[4][:50]]
    run = PagedRun(model, 2, 128)
    chunks = dict(enumerate(texts))
    generated: list[list[int]] = [[], []]
    for _ in range(64):
        hidden = run.step(chunks)
        chunks = {i: [int(model.logits(rows[-1:]).argmax())] for i, rows in hidden.items()}
        for i, ids in chunks.items():
            generated[i] += ids
    for prompt, tokens in zip(texts, generated, strict=True):
        assert tokens == greedy(reference, prompt, 64)
        assert len(set(tokens)) > 8, "a degenerate text proves little"


def greedy(reference: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """What transformers writes token by token with its own cache; its end ids do not stop it."""
    name = "cache" if "cache" in signature(reference.forward).parameters else "past_key_values"  # the older name
    ids, past, tokens = torch.tensor([prompt]), None, []
    for _ in range(count):
        with torch.no_grad():
            out = reference(input_ids=ids, use_cache=True, **{name: past})
        ids, past = out.logits[:, -1:].argmax(-1), out[name]
        tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", HALF)
def test_half_precision_within_rounding(variant: str, dtype: str, tmp_path: Path) -> None:
    """Our logits in half precision are as near to the float32 ones as those of transformers in the same precision."""
    reference = make_model(variant)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=dtype)  # type: ignore[arg-type]
    run = PagedRun(model, 1, 61)
    ids = prompts()[4]
    ours = model.logits(run.step({0: ids})[0])
    exact = expected(reference, ids)
    theirs = expected(reference.to(model.dtype), ids).float()
    error, their_error = (ours - exact).abs(), (theirs - exact).abs()
    assert error.max() < 1.5 * their_error.max()
    assert error.mean() < 1.2 * their_error.mean()


@pytest.mark.parametrize("variant", REWARD_MODELS)
def test_scores_are_float32_in_half_precision(variant: str, tmp_path: Path) -> None:
    make_model(variant).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype="bfloat16")
    hidden = PagedRun(model, 1, 61).step({0: prompts()[4]})[0]
    scores = model.scores(hidden[-1:])
    assert scores.dtype == torch.float32
    assert scores.shape == (1, model.config.labels)
    assert torch.equal(scores, hidden[-1:].float() @ model.head.layers[0].weight.T)
