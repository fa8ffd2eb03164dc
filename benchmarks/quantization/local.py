"""Two models in this process, computed as the engine computes prompts: their distributions row by row, their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...kernels import ops
from ...model.load import Model
from ...model.reading import read_texts
from ...server.engine.loading import load_models
from ...server.engine.options import EngineOptions
from ...server.engine.tokenizer_files import fingerprint
from ...server.options import parse_model
from ...server.text.text import Text
from ..bench.models import UsageError
from .quality import LanguageQuality, RewardQuality
from .texts import Example, LocalTokens, Passage, passages, rankings

STEP = 2048  # tokens that are computed at once, or one text
Tick = Callable[[int], None]  # texts compared so far


class LocalModel:
    """A model as `tandem serve` is told of it. Raises OptionsError, CheckpointError and TextError."""

    def __init__(self, word: str, options: EngineOptions) -> None:
        self.word, spec = word, parse_model(word)
        if spec.is_null or spec.shares:
            raise UsageError(f"{word}: a directory of a checkpoint or a hub id, with weights of its own, is compared")
        (model,) = load_models([spec], options, None)
        assert isinstance(model, Model)
        if model.config.kind == "embed" or model.config.labels > 1:
            raise UsageError(f"{word}: language models are compared, and reward and value models with one output")
        self.model, self.config = model, model.config
        self.context = min(spec.max_model_len or self.config.context, self.config.context)
        self.kv_dtype: torch.dtype = model.dtype if spec.kv_dtype == "auto" else getattr(torch, spec.kv_dtype)
        self.tokens = LocalTokens(Text.load(spec.text_path, spec.chat_template))
        self.tokenizer = fingerprint(Path(spec.text_path))

    def hidden(self, texts: Sequence[list[int]]) -> list[Tensor]:
        """[length, D] of each text."""
        return read_texts(self.model, texts, self.kv_dtype)

    @torch.inference_mode()
    def score(self, ids: list[int], hidden: Tensor) -> float:
        """The score of a text, or a value model's value at its end."""
        if self.config.values:
            return float(self.model.values(hidden[-1:]))
        position = self.config.score.pooling.position(ids)
        row = hidden.double().mean(0).float() if position is None else hidden[position]
        return float(self.model.scores(row.unsqueeze(0)))


def compare(
    reference: LocalModel, candidate: LocalModel, examples: Sequence[Example], tick: Tick
) -> LanguageQuality | RewardQuality:
    """Raises UsageError where the two cannot be compared."""
    _check(reference, candidate)
    context = min(reference.context, candidate.context)
    if reference.config.generates:
        return _language(reference, candidate, passages(examples, reference.tokens, context), tick)
    found = RewardQuality()
    for number, group in enumerate(rankings(examples, reference.tokens, context), 1):
        scores = [
            [
                side.score(ids, rows)
                for batch in _batches(group)
                for ids, rows in zip(batch, side.hidden(batch), strict=True)
            ]
            for side in (reference, candidate)
        ]
        found.add(*scores)
        tick(number)
    return found


def _check(reference: LocalModel, candidate: LocalModel) -> None:
    kinds = [side.config.kind for side in (reference, candidate)]
    sizes = [side.config.vocab_size for side in (reference, candidate)]
    if kinds[0] != kinds[1] or sizes[0] != sizes[1]:
        of = {"lm": "a language model", "score": "a reward model", "value": "a value model"}
        said = " and ".join(f"{of[kind]} of {size} tokens" for kind, size in zip(kinds, sizes, strict=True))
        raise UsageError(f"{reference.word} and {candidate.word} cannot be compared: {said}")
    if reference.tokenizer != candidate.tokenizer:
        raise UsageError(
            f"{reference.word} and {candidate.word} make other tokens of a text: compare models of one tokenizer"
        )


def _language(reference: LocalModel, candidate: LocalModel, texts: Sequence[Passage], tick: Tick) -> LanguageQuality:
    found, done = LanguageQuality(), 0
    rows = max(1, ops.LOGIT_ELEMENTS // reference.config.vocab_size)
    firsts = {id(one.token_ids): one.first for one in texts}
    for batch in _batches([one.token_ids for one in texts]):
        targets = torch.tensor([token for ids in batch for token in ids[firsts[id(ids)] :]])
        sides = [
            torch.cat([part[firsts[id(ids)] - 1 : -1] for ids, part in zip(batch, side.hidden(batch), strict=True)])
            for side in (reference, candidate)
        ]
        for p, q, tokens in zip(*(side.split(rows) for side in sides), targets.split(rows), strict=True):
            found.add(reference.model.logits(p), candidate.model.logits(q), tokens.to(p.device))
        done += len(batch)
        tick(done)
    return found


def _batches(texts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """At most STEP tokens in each, or one text."""
    batch: list[list[int]] = []
    for ids in texts:
        if batch and sum(map(len, batch)) + len(ids) > STEP:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch
