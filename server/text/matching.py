"""llguidance over a model's vocabulary, as the engine takes it (`engine/guides.py`): grammars, and matchers of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import cast

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from ..engine.request import ModelCard
from .grammar import GrammarError, explain, limits
from .text import Text
from .tokenizer import load_tokenizer

KEPT = 64  # grammars of a model; one takes from kilobytes to a few megabytes
REPLACEMENT = "\ufffd".encode()


def load_grammars(card: ModelCard) -> LoadedGrammars:
    return LoadedGrammars(card.path, card.vocab_size, card.end_ids)


class LoadedGrammars:
    """The vocabulary is read with the first grammar: a second for 150,000 tokens, most of it without the GIL."""

    def __init__(self, directory: str, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._directory, self._vocab_size = directory, vocab_size
        self._end_ids = [token for token in end_ids if token < vocab_size]
        self._tokenizer: LLTokenizer | None = None
        self._fresh: OrderedDict[str, LoadedMatcher] = OrderedDict()  # never advanced; the one used last comes last
        self._lock = Lock()
        self._loading = Lock()

    def known(self, grammar: str) -> bool:
        with self._lock:
            return grammar in self._fresh

    def matcher(self, grammar: str) -> LoadedMatcher:
        with self._lock:
            fresh = self._fresh.get(grammar)
            if fresh is not None:
                self._fresh.move_to_end(grammar)
                return fresh.copy()
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=limits())
        fresh = LoadedMatcher(matcher, 4 * -(-self._vocab_size // 32))
        fresh.mask()  # the first one builds much of the lexer; it is the same for every answer
        with self._lock:
            self._fresh[grammar] = fresh
            if len(self._fresh) > KEPT:
                self._fresh.popitem(last=False)
            return fresh.copy()

    def _vocabulary(self) -> LLTokenizer:
        if not self._end_ids:
            raise GrammarError("the model has no end-of-text token, so that an answer under a grammar had no end")
        with self._loading:
            if self._tokenizer is None:
                text = Text(load_tokenizer(Path(self._directory)), {})  # its templates matter to the workers alone
                vocabulary = _Vocabulary(text, self._vocab_size, self._end_ids)
                wrapped = cast("TokenizerWrapper", vocabulary)
                self._tokenizer = LLTokenizer(wrapped, eos_token=self._end_ids)
            return self._tokenizer


class LoadedMatcher:
    """Both methods raise GrammarError."""

    def __init__(self, matcher: LLMatcher, size: int, mask: bytes | None = None) -> None:
        self._matcher = matcher
        self._size = size  # bytes of a mask
        self._mask = mask

    def copy(self) -> LoadedMatcher:
        return LoadedMatcher(self._matcher.deep_copy(), self._size, self._mask)

    def advance(self, token: int) -> None:
        self._mask = None
        if not self._matcher.consume_token(token):
            raise GrammarError(explain(self._matcher.get_error()))

    def mask(self) -> bytes:
        if self._mask is None:
            self._mask = self._matcher.compute_bitmask()[: self._size]  # it may have a word more than there are ids
            if self._matcher.is_error():
                raise GrammarError(explain(self._matcher.get_error()))
        return self._mask


class _Vocabulary:
    """Every id's bytes as the detokenizer writes them, as LLTokenizer takes it.

    It has exactly the model's ids: what the tokenizer has beyond them is left out, and ids that it does not know, or
    whose bytes cannot be told, are empty, which no grammar allows. Special tokens are none of an answer's text.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, text: Text, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._text = text
        self.eos_token_id = end_ids[0]
        special = text.special_ids
        self.tokens = [text.token_bytes(token) for token in range(vocab_size)]
        self.tokens = [b"" if REPLACEMENT in data else data for data in self.tokens]
        for token in end_ids:
            self.tokens[token] = self.tokens[token] or b"<end %d>" % token
        self.special_token_ids = sorted({token for token in (*special, *end_ids) if token < vocab_size})

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._text.encode(text, add_special_tokens=False)
