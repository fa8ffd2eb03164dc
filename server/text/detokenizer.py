"""Generated ids -> the text of one answer, piece by piece, cut at its stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .decoding import Stream
from .stops import Stops


@dataclass(slots=True)
class Piece:
    """What one push added to the answer."""

    text: str
    stop: str | None  # the stop string that ended the answer; set again in every later piece
    tokens: int  # of all tokens pushed so far, those that belong to the answer: up to the one that completed the stop
    offsets: Sequence[int] = ()  # if asked for: where in the answer each new token starts


class Detokenizer:
    """One answer. The pieces together are the decoded ids, cut before (or after) the first stop string.

    Characters are never broken: bytes that may become one wait for the next ids. A stop string counts from the
    `min_tokens`-th token on. `offsets` are in characters of the uncut text; a token that only continues a
    character starts where the character does.
    """

    def __init__(self, stream: Stream, stops: Stops | None, include_stop: bool, min_tokens: int, offsets: bool) -> None:
        self._stream = stream
        self._stops = stops
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._offsets = offsets
        self._tokens = 0
        self._length = 0  # characters decoded, held back ones included
        self._stop: str | None = None

    def push(self, ids: Sequence[int], finished: bool = False, stop_id: int | None = None) -> Piece:
        """`finished` releases what is held back. `stop_id`: the end or stop id that ended the answer, last of `ids`;
        it counts as a token, and its text belongs to the answer only with `include_stop`."""
        if self._stop is not None:
            return Piece("", self._stop, self._tokens)
        shown = ids
        if stop_id is not None and not self._include_stop and ids and ids[-1] == stop_id:
            shown = ids[:-1]
        if self._stops is None and not self._offsets:
            text = self._stream.feed(shown, finished)
            self._tokens += len(ids)
            return Piece(text, None, self._tokens)
        return self._push_each(ids, len(shown), finished)

    def _push_each(self, ids: Sequence[int], shown: int, finished: bool) -> Piece:
        parts: list[str] = []
        offsets: list[int] = []
        for index, token_id in enumerate(ids):
            if self._offsets:
                offsets.append(self._length)
            self._tokens += 1
            if index < shown:
                parts.append(self._take(self._stream.feed((token_id,))))
                if self._stop is not None:
                    break
        if finished and self._stop is None:
            parts.append(self._take(self._stream.feed((), True)))
            if self._stops is not None and self._stop is None:
                parts.append(self._stops.rest())
        return Piece("".join(parts), self._stop, self._tokens, offsets)

    def _take(self, text: str) -> str:
        self._length += len(text)
        if self._stops is None or not text:
            return text
        text, self._stop = self._stops.scan(text, self._tokens >= self._min_tokens)
        return text
