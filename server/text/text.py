"""`Text`: everything between strings and token ids for one hosted model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from . import reasoning
from .decoding import Decoding
from .detokenizer import Detokenizer, Piece
from .errors import TextError
from .reader import Reader
from .reasoning import Stage
from .stops import Stops
from .template import ChatTemplate
from .templates import BUILT_IN
from .tokenizer import LoadedTokenizer, load_tokenizer, read_json
from .tools.forced import composed, literal
from .tools.formats import FORMATS, taught_by

__all__ = ["Detokenizer", "Piece", "Text", "TextError"]

LONG = 1024  # characters; only the batch call lets other threads run, but it costs more for a short text

Messages = Sequence[Mapping[str, Any]]


class Text:
    """Tokenizer and chat template of a checkpoint. Holds no state of a request; safe to share between threads."""

    def __init__(
        self,
        loaded: LoadedTokenizer,
        templates: Mapping[str, ChatTemplate],
        built_in: bool = False,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> None:
        self._tokenizer = loaded.tokenizer
        self._bos_id = loaded.bos_id
        self._adds_bos = loaded.adds_bos
        self._templates = templates
        self._decoding = Decoding.of(loaded.tokenizer)
        self.tokens = dict(loaded.tokens)
        self._variables = dict(loaded.tokens)
        if built_in:  # these write BOS for every model that wants one
            bos = self.tokens.get("bos_token", "") if loaded.adds_bos else ""
            self._variables |= {"bos_token": bos, "eos_token": self.tokens.get("eos_token", "")}
        eos_id = None if "eos_token" not in self.tokens else self.token_id(self.tokens["eos_token"])
        self.end_ids: tuple[int, ...] = () if eos_id is None else (eos_id,)
        with_tools = templates.get("tool_use", templates.get("default"))
        self.takes_tools = with_tools is not None and with_tools.takes_tools
        self.leaves_calls = tool_call_parser == "none"  # in the text, for the client to read
        self.tool_format = FORMATS.get(tool_call_parser or "") or (
            None if with_tools is None or self.leaves_calls else taught_by(with_tools.source)
        )
        self._frame = self.tool_format and self.tool_format.frame(with_tools.source if with_tools else "")
        self._thinks = None if reasoning_parser is None else reasoning.PARSERS[reasoning_parser]
        shown = {*(self.tool_format.markers if self.tool_format else ())}
        shown |= {reasoning.OPEN, reasoning.CLOSE} if self._thinks is not None else set()
        self._marked = Decoding.of(loaded.tokenizer, shown) if shown else self._decoding
        sources = "".join(f"{name}:{template.source}" for name, template in sorted(templates.items()))
        self.fingerprint = hashlib.sha256((loaded.digest + sources).encode("utf-8", "replace")).hexdigest()[:16]

    @classmethod
    def load(
        cls,
        path: str | Path,
        chat_template: str | None = None,
        tool_call_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> Text:
        """`chat_template`: a file, a built-in name, or the name of one of the checkpoint's own templates.
        `tool_call_parser`: a name of `tools.formats.FORMATS`, or `none`; None: the one that the template teaches.
        `reasoning_parser`: a name of `reasoning.PARSERS`; None: thinking is text as any other.

        Raises `TextError` when the tokenizer or the template cannot be used.
        """
        directory = Path(path)
        loaded = load_tokenizer(directory)
        own = read_templates(directory, loaded.config)
        parsers = tool_call_parser, reasoning_parser
        if chat_template is None:
            templates = {name: ChatTemplate(source, f"{path}: {name}") for name, source in own.items()}
            return cls(loaded, templates, False, *parsers)
        built_in = chat_template in BUILT_IN and not Path(chat_template).is_file()
        source = BUILT_IN[chat_template] if built_in else own.get(chat_template)
        if source is None:
            try:
                source = Path(chat_template).read_text("utf-8")
            except (OSError, ValueError) as error:
                known = ", ".join([*BUILT_IN, *own])
                raise TextError(
                    f"--chat-template {chat_template}: no such name ({known}) and no file: {error}"
                ) from None
        return cls(loaded, {"default": ChatTemplate(source, chat_template)}, built_in, *parsers)

    @property
    def has_template(self) -> bool:
        return bool(self._templates)

    @property
    def special_ids(self) -> list[int]:
        """Tokens that stand for no text, such as the end of a turn."""
        return [number for number, token in self._tokenizer.get_added_tokens_decoder().items() if token.special]

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str:
        """The token as the vocabulary writes it; empty for an id that is no token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def encode(self, text: str, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
        """Ids of a text, with the special tokens its tokenizer adds; BOS not again where the text starts with it."""
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TextError(f"expected a string, got {type(text).__name__}", param)
        try:
            if len(text) < LONG:
                ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
            else:
                ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except Exception as error:  # the library raises plain Exception
            if lone := next((c for c in text if "\ud800" <= c <= "\udfff"), None):
                message = f"the text holds U+{ord(lone):04X}, half of a surrogate pair, which is no character"
                raise TextError(message, param) from None
            raise TextError(f"the text cannot be encoded: {error}", param) from None
        if add_special_tokens and self._adds_bos and ids[1:2] == [self._bos_id]:
            del ids[0]
        return ids

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Ids of two texts as the tokenizer joins them for a model that compares them, special tokens included."""
        return self._tokenizer.encode(first, second).ids

    def render_text(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a chat. Raises `TextError` with the field at fault."""
        return self._template(tools).render(
            messages,
            self._variables,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=kwargs,
        )

    def render(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Ids of `render_text`. The template writes BOS itself; with `add_special_tokens` it is there exactly once."""
        text = self.render_text(messages, tools, add_generation_prompt, continue_final_message, kwargs, documents)
        return self.encode(text, add_special_tokens, "messages")

    def _template(self, tools: object) -> ChatTemplate:
        if not self._templates:
            raise TextError(
                "this model has no chat template: start the server with --chat-template FILE|NAME "
                f"(built in: {', '.join(BUILT_IN)})",
                "messages",
            )
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TextError(
                "this model has several chat templates and no default: start the server with --chat-template "
                + "|".join(sorted(self._templates)),
                "messages",
            )
        return self._templates[name]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids the tokenizer does not know are passed over."""
        return self._decoding.stream((), skip_special_tokens).feed(ids, True)

    def token_text(self, token_id: int) -> str:
        """One token with its leading space; bytes that are no whole character show as U+FFFD."""
        return self._decoding.token_bytes(token_id).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The token's own bytes; empty for an id that is no token."""
        return self._decoding.token_bytes(token_id)

    def detokenizer(
        self,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        offsets: bool = False,
        shows_markers: bool = False,
    ) -> Detokenizer:
        """For one answer to the prompt: what follows a prompt keeps its leading space. With `shows_markers` the
        special tokens that a `reader` looks for are not skipped."""
        decoding = self._marked if shows_markers else self._decoding
        stream = decoding.stream(prompt_ids, skip_special_tokens)
        return Detokenizer(stream, Stops(stop, include_stop) if any(stop) else None, include_stop, min_tokens, offsets)

    def stage(self, prompt_ids: Sequence[int], continued: str | None = None) -> Stage:
        """Where the answer to a prompt begins. `continued`: the text it goes on with, if any."""
        if self._thinks is None:
            return "answers"
        if continued is not None:
            opened, closed = (continued.rfind(tag) for tag in (reasoning.OPEN, reasoning.CLOSE))
            return "thinks" if opened > closed else "answers"
        tail = self.decode(prompt_ids[-reasoning.TAIL :], skip_special_tokens=False)
        return reasoning.stage_of(tail, self._thinks)

    def grammar(
        self,
        stage: Stage,
        functions: Sequence[Mapping[str, Any]],
        one_call: bool = False,
        answer: str = "",
        tokens: bool = True,
    ) -> str:
        """What an answer must be: `tools.forced.composed`. Markers that are special tokens stand in it as such, or
        without `tokens` as text, for a check that knows no vocabulary. Raises GrammarError."""

        def spell(marker: str) -> str:
            token_id = self.token_id(marker) if tokens and self._decoding.vocabulary.is_special(marker) else None
            return literal(marker) if token_id is None else f"<[{token_id}]>"

        return composed(stage, functions, self._frame, one_call, answer, spell)

    def reader(self, calls: bool, stage: Stage, one_call: bool = False) -> Reader | None:
        """Of one answer: whether to look for `calls`, and where it begins. None: it is all text."""
        thinking = None if self._thinks is None else reasoning.Thinking(stage)
        if calls and self.tool_format is not None:
            return Reader(thinking, self.tool_format.parser(), one_call, self.tool_format.new_id)
        return None if thinking is None else Reader(thinking, None)


def read_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The checkpoint's chat templates by name; files win over tokenizer_config.json."""
    listed = config.get("chat_template")
    if listed is None:
        listed = read_json(path / "chat_template.json").get("chat_template")
    found: dict[str, str] = {}
    if isinstance(listed, str):
        found["default"] = listed
    elif isinstance(listed, list):
        found = {entry["name"]: entry["template"] for entry in cast("list[dict[str, str]]", listed)}
    files = sorted((path / "additional_chat_templates").glob("*.jinja"))
    for name, file in [("default", path / "chat_template.jinja"), *((file.stem, file) for file in files)]:
        if file.is_file():
            found[name] = file.read_text("utf-8")
    return found
