"""Answers that follow a grammar: which tokens may come next, found in other threads beside the model's step.

The engine knows no grammar library: who composes its process hands it a `LoadGrammars` (`server/engine_process.py`).
A guide belongs to one choice in one slot. It is made anew from the tokens that were drawn whenever the choice enters a
slot, so a preemption leaves nothing behind.

V vocabulary, W = ceil(V / 32) words of a bit per token, the lowest bit first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .request import ModelCard, Request, Sampling

Words = NDArray[np.int32]

MOST_THREADS = 4  # for masks; finding one takes microseconds, rarely milliseconds

log = logging.getLogger(__name__)


class Matcher(Protocol):
    """How far one answer is in its grammar. Both methods raise ValueError where the grammar cannot be followed on."""

    def advance(self, token: int) -> None:
        """The answer goes on with that token, no end-of-text token."""
        ...

    def mask(self) -> bytes:
        """W words: what may come next. End-of-text tokens are among it where the answer may be over."""
        ...


class Grammars(Protocol):
    """Grammars over one model's vocabulary. Called from several threads; what takes long lets others run."""

    def known(self, grammar: str) -> bool:
        """Whether `matcher` takes next to no time."""
        ...

    def matcher(self, grammar: str) -> Matcher:
        """One at the start of an answer. Raises ValueError, with words for whoever sent the grammar."""
        ...


LoadGrammars = Callable[[ModelCard], Grammars]


def words_of(token_ids: Iterable[int], vocab_size: int) -> Words:
    """A bit for each of the tokens: [W] int32."""
    flags = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    flags[list(token_ids)] = True
    return np.packbits(flags, bitorder="little").view(np.int32)


def flags_of(words: Words, vocab_size: int) -> NDArray[np.bool_]:
    """[W] -> [V]"""
    return np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


class Guide:
    """One choice's. Between two of its steps it is worked on in a thread; `words` waits for that."""

    __slots__ = ("_allowed", "_found", "_matcher", "failure", "pending")

    def __init__(self, allowed: Words | None) -> None:
        self._allowed = allowed
        self._matcher: Matcher | None = None
        self._found: Words | None = None  # None: no token may come
        self.failure: str | None = None
        self.pending: Future[None] | None = None

    def begin(self, make: Callable[[], Matcher], tokens: Sequence[int]) -> None:
        """In a thread: at the end of the answer so far."""
        try:
            self._matcher = make()
            for token in tokens:
                self._matcher.advance(token)
            self._find()
        except BaseException as error:  # a panic of a library in another language is no Exception
            self._fail(error)

    def advance(self, token: int) -> None:
        """In a thread."""
        if self._matcher is not None and self.failure is None:
            try:
                self._matcher.advance(token)
                self._find()
            except BaseException as error:
                self._fail(error)

    def words(self, size: int) -> Words:
        """[W]; all 0 where the grammar cannot be followed on: `failure` says why."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None
        return np.zeros(size, np.int32) if self._found is None else self._found

    def _find(self) -> None:
        assert self._matcher is not None
        found = np.frombuffer(self._matcher.mask(), np.int32)
        self._found = found if self._allowed is None else found & self._allowed

    def _fail(self, error: BaseException) -> None:
        self._found = None
        self.failure = str(error)
        if not isinstance(error, ValueError):
            log.error("a grammar cannot be followed", exc_info=error)
            self.failure = f"the grammar could not be followed ({type(error).__name__}); the log has the traceback"


class Guides:
    """The guides of one model's slots, and the threads they are worked on in. `end_ids`: the model's."""

    def __init__(self, grammars: Grammars, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._grammars = grammars
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._end_ids = frozenset(end_ids)
        self._by_slot: dict[int, Guide] = {}
        self._threads = max(1, min(MOST_THREADS, (os.cpu_count() or 2) // 2))
        self._finders = ThreadPoolExecutor(self._threads, "masks")
        self._builder = ThreadPoolExecutor(1, "grammars")  # so that a large grammar holds up no mask

    def build(self, grammar: str) -> Future[None] | None:
        """Builds a grammar in a thread, so that it is at hand when a guide begins; None: it is already."""
        return None if self._grammars.known(grammar) else self._builder.submit(self._build, grammar)

    def _build(self, grammar: str) -> None:
        self._grammars.matcher(grammar)

    def enter(self, slot: int, request: Request, generated: Sequence[int]) -> None:
        """A choice of the request, with so much of its answer, takes the slot; without a grammar there is no guide."""
        sampling = request.sampling
        if sampling is None or not sampling.grammar:
            self._by_slot.pop(slot, None)
            return
        guide = self._by_slot[slot] = Guide(self._allowed(sampling))
        grammar = sampling.grammar
        guide.pending = self._finders.submit(guide.begin, lambda: self._grammars.matcher(grammar), list(generated))

    def leave(self, slot: int) -> None:
        self._by_slot.pop(slot, None)

    def of(self, slots: Iterable[int]) -> dict[int, Guide]:
        """By place in `slots`, the guides among them."""
        known = self._by_slot
        return {place: known[slot] for place, slot in enumerate(slots) if slot in known} if known else {}

    def words(self, guides: dict[int, Guide]) -> dict[int, Words]:
        """By place, which tokens may come: [W] each. Waits for the threads."""
        return {place: guide.words(self._words) for place, guide in guides.items()}

    def advance(self, guides: dict[int, Guide], tokens: Sequence[int]) -> dict[int, str]:
        """These tokens were drawn, by place: the threads find what may follow. Gives the failures, by place."""
        drawn = [(guide, tokens[place]) for place, guide in guides.items() if guide.failure is None]
        drawn = [(guide, token) for guide, token in drawn if token >= 0 and token not in self._end_ids]
        for first in range(min(self._threads, len(drawn))):
            part = drawn[first :: self._threads]
            pending = self._finders.submit(_advance, part)
            for guide, _ in part:
                guide.pending = pending
        return {place: guide.failure for place, guide in guides.items() if guide.failure is not None}

    def _allowed(self, sampling: Sampling) -> Words | None:
        return words_of(sampling.allowed_ids, self._vocab_size) if sampling.allowed_ids else None


def _advance(drawn: list[tuple[Guide, int]]) -> None:
    for guide, token in drawn:
        guide.advance(token)
