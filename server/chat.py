"""`tandem chat`: a conversation with a served model in the terminal, streamed, over the OpenAI API."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import httpx
from rich.console import Console

HELP = "/reset forgets the conversation · /system TEXT sets the system message · /exit ends · Ctrl-C stops an answer"
TIMEOUT = httpx.Timeout(120.0, connect=5.0)  # the server sends a sign of life every 15 s

# What a model writes must not steer the terminal: control characters but tab and newline show as U+FFFD, and so do
# halves of surrogate pairs, which no terminal can show.
CONTROLS = {i: "\ufffd" for i in (*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)) if chr(i) not in "\n\t"}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    url: str  # with or without /v1
    model: str | None = None  # None: the server's first model that can chat
    api_key: str | None = None
    system: str | None = None
    temperature: float | None = None  # None: the server's default
    max_tokens: int | None = None
    prompt: str | None = None  # ask this one thing and end
    stats: bool = False  # after each answer: tokens, time to the first, tokens per second


class ChatError(Exception):
    """Said to the user in one line."""


@dataclass(slots=True)
class Answer:
    """What one request brought, as far as it came."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict[str, Any])
    began: float = field(default_factory=time.monotonic)
    first: float | None = None  # when the first text came
    ended: float | None = None

    def stats(self) -> str:
        ended = self.ended or time.monotonic()
        tokens = self.usage.get("completion_tokens")
        parts = [f"{self.usage['prompt_tokens']} → {tokens} tokens" if tokens is not None else "stopped"]
        if self.first is not None:
            parts.append(f"first after {self.first - self.began:.2f} s")
            if tokens and tokens > 1 and ended > self.first:
                parts.append(f"{(tokens - 1) / (ended - self.first):.1f} tokens/s")
        return " · ".join(parts)


@dataclass(slots=True)
class Conversation:
    options: ChatOptions
    client: httpx.Client
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def model(self) -> str:
        """The one asked for, or the first that writes text."""
        if self.options.model:
            return self.options.model
        with explained(self.options.url):
            response = self.client.get("models")
        check(response)
        models = cast("list[dict[str, Any]]", fields_of(response.text).get("data") or [])
        writers = [model for model in models if "sampling_defaults" in model] or models
        if not writers:
            raise ChatError(f"{self.options.url} serves no model")
        return str(writers[0]["id"])

    def ask(self, text: str, model: str, answer: Answer) -> Generator[str]:
        """Yields the answer as it comes. The turn is remembered as far as it came, and not at all if nothing did."""
        question = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        given = {"temperature": self.options.temperature, "max_tokens": self.options.max_tokens}
        body = {
            "model": model,
            "messages": [*system, *self.turns, question],
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in given.items() if value is not None},
        }
        try:
            with explained(self.options.url), self.client.stream("POST", "chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                check(response)
                for event in events(response.iter_bytes()):
                    if event == "[DONE]":
                        break
                    yield from self._text_of(fields_of(event), answer)
        finally:
            answer.ended = time.monotonic()
            if answer.text or answer.finish_reason:
                said = answer.text.encode("utf-8", "replace").decode()
                self.turns += [question, {"role": "assistant", "content": said}]

    def _text_of(self, chunk: dict[str, Any], answer: Answer) -> Iterator[str]:
        if "error" in chunk:
            raise ChatError(error_message(chunk))
        answer.usage = chunk.get("usage") or answer.usage
        for choice in cast("list[dict[str, Any]]", chunk.get("choices") or []):
            answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
            text = cast("dict[str, str | None]", choice.get("delta") or {}).get("content")
            if text:
                answer.first = answer.first or time.monotonic()
                answer.text += text
                yield text


def events(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of server-sent events. Lines end at newlines only: JSON may hold other separators as they are."""
    buffer = b""
    data: list[bytes] = []
    for chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data).decode("utf-8", "replace")
                data.clear()


def fields_of(text: str) -> dict[str, Any]:
    try:
        value: object = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ChatError(f"the server's answer is not what an OpenAI API sends: {text[:80]!r}")
    return cast("dict[str, Any]", value)


def error_message(body: dict[str, Any]) -> str:
    error: object = body.get("error")
    message = cast("dict[str, Any]", error).get("message") if isinstance(error, dict) else error
    return " ".join(str(message).split())


def check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        message = error_message(fields_of(response.text))
    except ChatError:
        message = response.reason_phrase
    hint = " (--api-key)" if response.status_code == 401 else ""
    raise ChatError(f"{response.status_code}: {message}{hint}")


@contextlib.contextmanager
def explained(url: str) -> Generator[None]:
    try:
        yield
    except httpx.ConnectError:
        raise ChatError(f"no server at {url}: start one with `tandem serve`, or name another with --url") from None
    except httpx.TimeoutException:
        raise ChatError(f"{url} does not answer") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ChatError(f"{url}: {error or type(error).__name__}") from None


def chat(options: ChatOptions, console: Console | None = None, read: Callable[[], str] | None = None) -> int:
    """Talks until `read` raises EOFError or gives /exit; returns the exit status."""
    console = console or Console(highlight=False, soft_wrap=True)
    errors = Console(stderr=True, highlight=False, soft_wrap=True) if console.file is sys.stdout else console
    base = options.url.rstrip("/").removesuffix("/v1") + "/v1/"
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    try:
        with httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT, trust_env=False) as client:
            conversation = Conversation(options, client, options.system)
            model = conversation.model()
            if options.prompt is not None:
                return 0 if respond(conversation, model, clean(options.prompt), console, errors) else 1
            console.print(f"{model} at {options.url}. {HELP}", style="dim", markup=False)
            return talk(conversation, model, console, errors, read or prompt)
    except (ChatError, httpx.InvalidURL, UnicodeEncodeError) as error:
        errors.print(str(error), style="red", markup=False)
        return 1


def talk(conversation: Conversation, model: str, console: Console, errors: Console, read: Callable[[], str]) -> int:
    while True:
        try:
            line = clean(read()).strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            console.print("\n/exit or Ctrl-D ends", style="dim")
            continue
        command, _, rest = line.partition(" ")
        if command == "/exit":
            return 0
        if command == "/reset":
            conversation.turns.clear()
            console.print("The conversation starts again.", style="dim")
        elif command == "/system":
            conversation.system = rest.strip() or None
            console.print("System message set." if conversation.system else "No system message.", style="dim")
        elif line.startswith("/"):
            console.print(HELP, style="dim")
        elif line:
            respond(conversation, model, line, console, errors)


def respond(conversation: Conversation, model: str, text: str, console: Console, errors: Console) -> bool:
    """Asks and prints the answer. Ctrl-C ends the answer: closing the connection makes the server stop, too."""
    answer = Answer()
    pieces = conversation.ask(text, model, answer)
    try:
        for piece in pieces:
            console.file.write(piece.translate(CONTROLS))  # as it is: rich would expand tabs
            console.file.flush()
    except KeyboardInterrupt:
        pieces.close()
        console.print(" [stopped]", style="dim", markup=False)
        return False
    except ChatError as error:
        if answer.text:
            console.print()
        errors.print(str(error), style="red", markup=False)
        return False
    cut = " [cut at the token limit]" if answer.finish_reason == "length" else ""
    console.print(cut, style="dim", markup=False)
    if conversation.options.stats:
        errors.print(answer.stats(), style="dim", markup=False)
    return True


def prompt() -> str:
    """One line from the terminal, with editing and history; from a pipe without a prompt."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # pyright: ignore[reportUnusedImport] - input() uses it once it is there
    return input("> ")


def clean(text: str) -> str:
    """Bytes that were no UTF-8 on the command line or in the pipe become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
