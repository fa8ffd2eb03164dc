"""What an answer must look like -> a grammar, the string that llguidance reads and `Sampling.grammar` holds.

The functions make grammars and refuse what is none by its type or size. Whether llguidance can follow one, and within
bounds, `GrammarChecker` says; both raise GrammarError.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any, cast

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper, grammar_from

from .errors import TextError

MAX_CHARACTERS = 1 << 16  # of a grammar
MAX_CHOICES = 4096
CHECKED = 256  # grammars that are known to be good
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"  # between the tokens of JSON: without an end a weak model writes nothing else
SHOWN = 300  # characters of llguidance's message
UNIMPLEMENTED = re.compile(r"Unimplemented keys: (\[[^\]]*\])")


class GrammarError(TextError):
    """A grammar that cannot be followed. The message says why, and names the keyword where one is not supported."""


def limits() -> LLParserLimits:
    """What building a grammar and a step through it may cost: about 0.3 s for the largest that is let in.

    Deterministic, so that what one process accepts no other refuses. A schema of 1,000 properties with a pattern each
    stays inside.
    """
    return LLParserLimits(initial_lexer_fuel=100_000, max_grammar_size=100_000, verbose_errors=False)


def json_object() -> str:
    """Any JSON object."""
    return of_schema({"type": "object"})


def of_schema(schema: object) -> str:
    """JSON that a JSON schema (an object, or its text) allows, with properties in the schema's order."""
    if isinstance(schema, str):
        _bound(schema, "JSON schema")
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise GrammarError("the JSON schema is no JSON") from None
    if not isinstance(schema, dict):
        raise GrammarError(f"a JSON schema must be an object, not {type(schema).__name__}")
    text = json.dumps(cast("dict[str, Any]", schema), ensure_ascii=False)
    _bound(text, "JSON schema")
    if "x-guidance" in schema:  # llguidance's own options, white space among them
        return LLMatcher.grammar_from_json_schema(text)
    return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITESPACE})


def of_regex(regex: str) -> str:
    """Text that a regular expression (Rust's syntax) matches from end to end; no look-around, no references back."""
    _bound(regex, "regular expression")
    if not regex:
        raise GrammarError("the regular expression is empty")
    return LLMatcher.grammar_from_regex(regex)


def of_choice(choices: Sequence[str]) -> str:
    """One of some texts."""
    if not 0 < len(choices) <= MAX_CHOICES or not all(choices):
        raise GrammarError(f"choice holds {len(choices)} texts; it must be 1 to {MAX_CHOICES}, none of them empty")
    return _bound(grammar_from("choice", json.dumps(list(choices))), "list of choices")


def of_lark(grammar: str) -> str:
    """Text of a context-free grammar: Lark's notation as llguidance extends it, or GBNF (`root ::= …`)."""
    _bound(grammar, "grammar")
    try:
        return grammar_from("grammar", grammar)
    except ValueError as error:
        raise GrammarError(f"the grammar cannot be read: {_short(str(error))}") from None


class GrammarChecker:
    """Tells whether grammars can be followed; remembers those that can. Safe to share between threads."""

    def __init__(self) -> None:
        self._good: OrderedDict[str, None] = OrderedDict()
        self._lock = Lock()
        self._bytes = LLTokenizer(cast("TokenizerWrapper", _Bytes()))

    def known(self, grammar: str) -> bool:
        """Whether it was checked before, so that `check` takes no time."""
        with self._lock:
            return grammar in self._good

    def check(self, grammar: str) -> None:
        """Builds it over single bytes and takes a first step. Raises GrammarError."""
        if not self.known(grammar):
            matcher = LLMatcher(self._bytes, grammar, log_level=0, limits=limits())
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            if not matcher.is_error() and mask:  # some bounds are noticed only behind a byte
                matcher.consume_token((mask & -mask).bit_length() - 1)
            if matcher.is_error():
                raise GrammarError(explain(matcher.get_error()))
            if not mask:
                raise GrammarError("the grammar allows no text at all")
        with self._lock:
            self._good[grammar] = None
            self._good.move_to_end(grammar)
            if len(self._good) > CHECKED:
                self._good.popitem(last=False)


def explain(error: str) -> str:
    """llguidance's message for whoever sent the grammar."""
    if found := UNIMPLEMENTED.search(error):
        keys = ", ".join(json.loads(found[1]))
        return f"the JSON schema uses what is not supported: {keys}"
    return f"the grammar cannot be used: {_short(error)}"


def _bound(text: str, what: str) -> str:
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(f"the {what} has {len(text)} characters; it may have at most {MAX_CHARACTERS}")
    return text


def _short(error: str) -> str:
    """In one line, without what llguidance adds about its own state."""
    text = " ".join(error.partition("<state>")[0].removesuffix("<non-verbose/>").split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


class _Bytes:
    """A vocabulary of the 256 bytes and an end, as LLTokenizer takes it."""

    is_tokenizer_wrapper = True
    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)
