"""Token ids -> text as they arrive. The text of all pieces equals `Tokenizer.decode` of all ids.

Two kinds of vocabulary cover the models we host, and both decode token by token from a table: byte-level BPE (GPT-2,
LLaMA 3, Qwen, BLOOM) and SentencePiece-like ones that write a space as ▁ and rare bytes as <0xE4> (LLaMA 2, Mistral,
Gemma). Any other decoder goes through `WindowStream`, which decodes a short window twice.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from tokenizers import Tokenizer

SPACE = "▁"
REPLACEMENT = "\ufffd"
CONTEXT = 8  # prompt tokens that can matter to the first generated one


class Stream(Protocol):
    def feed(self, ids: Sequence[int], final: bool = False) -> str:
        """The text that is certain after these ids; `final` releases the rest, broken characters as U+FFFD."""
        ...


class Vocabulary:
    """Ids -> token strings, and which of them are special; `shown` are taken for ordinary ones."""

    def __init__(self, tokenizer: Tokenizer, shown: Set[str] = frozenset()) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = {token.content for token in added if token.special} - shown

    def is_special(self, token: str) -> bool:
        return token in self._special

    def token(self, token_id: int, skip_special: bool) -> str | None:
        """None for an id that decoding passes over: unknown, or special where these are skipped."""
        if not 0 <= token_id < 1 << 32:
            return None
        token = self._tokenizer.id_to_token(token_id)
        return None if skip_special and token in self._special else token


def unicode_of_bytes() -> dict[str, int]:
    """Byte-level BPE's alphabet: bytes that print stand for themselves, the others for U+0100 and up."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printing)]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(others)}


class ByteTable(dict[int, bytes]):
    """Id -> bytes of byte-level BPE, filled as ids are met: a vocabulary of 150k costs nothing at start."""

    def __init__(self, vocabulary: Vocabulary, skip_special: bool) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._bytes = unicode_of_bytes()

    def __missing__(self, token_id: int) -> bytes:
        token = self._vocabulary.token(token_id, self._skip_special) or ""
        try:
            data = bytes([self._bytes[character] for character in token])
        except KeyError:  # an added token outside the alphabet is taken as it is
            data = token.encode()
        self[token_id] = data
        return data


def open_bytes(data: bytes) -> bytes:
    """The beginning of a character at the end."""
    return data[codecs.utf_8_decode(data, "replace", False)[1] :]


class ByteStream:
    def __init__(self, table: ByteTable, prompt_ids: Sequence[int]) -> None:
        self._table = table
        # Bytes of a character that is not complete; one that the prompt leaves open is completed here.
        self._open = open_bytes(b"".join([table[i] for i in prompt_ids[-CONTEXT:]]))

    def feed(self, ids: Sequence[int], final: bool = False) -> str:
        table = self._table
        data = self._open + (table[ids[0]] if len(ids) == 1 else b"".join([table[i] for i in ids]))
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._open = data[used:]
        return text


class PieceTable(dict[int, "str | bytes | None"]):
    """Id -> text, or one byte for a byte token (<0x0A>), or None for an id that decoding passes over."""

    def __init__(self, vocabulary: Vocabulary, skip_special: bool, byte_fallback: bool) -> None:
        super().__init__()
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._byte_fallback = byte_fallback

    def __missing__(self, token_id: int) -> str | bytes | None:
        token = self._vocabulary.token(token_id, self._skip_special)
        piece: str | bytes | None = token
        if token is not None:
            byte = byte_of(token) if self._byte_fallback else None
            piece = token.replace(SPACE, " ") if byte is None else byte
        self[token_id] = piece
        return piece


def byte_of(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None


def text_of_run(run: bytes | bytearray) -> str:
    """A run of byte tokens is decoded as a whole: if it is not UTF-8, each of its bytes becomes U+FFFD."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        return REPLACEMENT * len(run)


class PieceStream:
    """Because a later byte can still spoil a run of byte tokens, the run is held until another token ends it."""

    def __init__(self, table: PieceTable, prompt_ids: Sequence[int], strip: int, first_token_bare: bool) -> None:
        self._table = table
        self._run = bytearray()
        self._strip = strip  # spaces still to be taken from the start of the text
        self._bare = first_token_bare  # the first token loses its spaces instead (the Metaspace decoder)
        if any(table[i] is not None for i in prompt_ids):
            self._strip, self._bare = 0, False
            self._run += self._open_bytes(prompt_ids[-CONTEXT:])

    def _open_bytes(self, prompt_ids: Sequence[int]) -> bytes:
        run = b""
        for i in prompt_ids:
            piece = self._table[i]
            if piece is not None:
                run = run + piece if isinstance(piece, bytes) else b""
        return open_bytes(run)

    def feed(self, ids: Sequence[int], final: bool = False) -> str:
        table, run = self._table, self._run
        parts: list[str] = []
        for i in ids:
            piece = table[i]
            if isinstance(piece, str):
                if run:
                    parts.append(text_of_run(run))
                    run.clear()
                if self._bare:
                    piece = piece.replace(" ", "")
                parts.append(piece)
                self._bare = False
            elif piece is not None:
                run += piece
                self._bare = False
        if final and run:
            parts.append(text_of_run(run))
            run.clear()
        text = "".join(parts)
        while self._strip and text:
            self._strip = self._strip - 1 if text[0] == " " else 0
            text = text.removeprefix(" ")
        return text


class WindowStream:
    """For any decoder: new text is what a window of the last ids gains.

    Exact where a token's text depends on its few neighbours only.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window = list(prompt_ids[-CONTEXT:])
        self._known = len(self._window)  # ids of the window whose text is out

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)

    def feed(self, ids: Sequence[int], final: bool = False) -> str:
        self._window += [i for i in ids if i >= 0]
        before = self._decode(self._window[: self._known])
        after = self._decode(self._window)
        if not final and (len(after) <= len(before) or after.endswith(REPLACEMENT)):
            return ""
        drop = max(0, len(self._window) - CONTEXT)
        self._window = self._window[drop:]
        self._known = len(self._window)
        return after[len(before) :]


@dataclass(frozen=True)
class Decoding:
    """How a tokenizer's ids become text."""

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    byte_tables: tuple[ByteTable, ByteTable] | None = None  # by skip_special
    piece_tables: tuple[PieceTable, PieceTable] | None = None
    strip: int = 0
    first_token_bare: bool = False
    shows_all: bool = False  # where special tokens cannot be told apart: they are never skipped

    @classmethod
    def of(cls, tokenizer: Tokenizer, shown: Set[str] = frozenset()) -> Decoding:
        """`shown`: special tokens that are text all the same, also where special tokens are skipped."""
        vocabulary = Vocabulary(tokenizer, shown)
        steps = decoder_steps(tokenizer)
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(tokenizer, vocabulary, (ByteTable(vocabulary, False), ByteTable(vocabulary, True)))
        if kinds == ["Metaspace"] and steps[0]["replacement"] == SPACE:
            tables = PieceTable(vocabulary, False, False), PieceTable(vocabulary, True, False)
            bare = steps[0].get("prepend_scheme", "always") != "never"
            return cls(tokenizer, vocabulary, piece_tables=tables, first_token_bare=bare)
        if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and kinds[3:] in ([], ["Strip"]):
            stripped = kinds[3:] == ["Strip"]
            plain = steps[0]["pattern"] == {"String": SPACE} and steps[0]["content"] == " "
            if plain and not (stripped and (steps[3]["content"] != " " or steps[3]["stop"] != 0)):
                tables = PieceTable(vocabulary, False, True), PieceTable(vocabulary, True, True)
                return cls(tokenizer, vocabulary, piece_tables=tables, strip=steps[3]["start"] if stripped else 0)
        return cls(tokenizer, vocabulary, shows_all=bool(shown))

    def stream(self, prompt_ids: Sequence[int], skip_special: bool) -> Stream:
        if self.byte_tables:
            return ByteStream(self.byte_tables[skip_special], prompt_ids)
        if self.piece_tables:
            return PieceStream(self.piece_tables[skip_special], prompt_ids, self.strip, self.first_token_bare)
        return WindowStream(self.tokenizer, prompt_ids, skip_special and not self.shows_all)

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes, with its leading space; empty for an id that is no token."""
        if self.byte_tables:
            return self.byte_tables[False][token_id]
        if self.piece_tables:
            piece = self.piece_tables[False][token_id]
            return piece.encode() if isinstance(piece, str) else piece or b""
        token = self.vocabulary.token(token_id, False)
        return b"" if token is None else self.tokenizer.decode([token_id], skip_special_tokens=False).encode()


def decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The decoder as tokenizer.json writes it, a sequence as its members; without one, no steps."""
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
