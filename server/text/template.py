"""Messages -> the prompt's text, as the checkpoint's chat template writes it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jinja2
from jinja2 import meta

from .errors import TextError
from .sandbox import DEADLINE, MAX_CHARACTERS, ChatEnvironment, OverBudget, RaisedByTemplate

MAX_TEMPLATE = 1 << 20  # characters
RENDER_SECONDS = 2.0
RESERVED = frozenset(["messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"])
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which reasoning is handed in
OPEN_END = "TANDEM-LEAVES-THIS-OPEN "  # the space at its end shows whether the template strips contents

# Templates that take a content apart by themselves get it as a list, the others as one string.
TAKES_PARTS = re.compile(r"content\s+is\s+(not\s+)?(string|iterable|sequence)|\bin\s+[\w.\[\]'\"]*content\b")


class ChatTemplate:
    """One compiled template. `render` raises `TextError` with the request field at fault."""

    def __init__(self, source: str, origin: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise TextError(f"{origin}: a chat template of {len(source)} characters; the limit is {MAX_TEMPLATE}")
        try:
            environment = ChatEnvironment()
            self._template = environment.from_string(source)
            self.takes_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            raise TextError(f"{origin}: not a chat template: {error}" + (f" (line {line})" if line else "")) from None
        self.source = source
        self.origin = origin
        self._knows_developer = "developer" in source
        self._takes_parts = TAKES_PARTS.search(source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokens: Mapping[str, str],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
        seconds: float = RENDER_SECONDS,
    ) -> str:
        chat = self._prepared(messages)
        for name in kwargs or {}:
            if name in RESERVED:
                raise TextError(f"chat_template_kwargs: {name} has a field of its own", f"chat_template_kwargs.{name}")
        variables: dict[str, Any] = {
            **tokens,
            **(kwargs or {}),
            "messages": chat,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
            DEADLINE: time.monotonic() + seconds,
        }
        variables.setdefault("documents", documents)
        if not continue_final_message:
            return self._run(variables)
        if add_generation_prompt:
            raise TextError(
                "continue_final_message continues the last message and add_generation_prompt starts another: "
                "set add_generation_prompt to false",
                "continue_final_message",
            )
        opened = open_last_text(chat)
        return cut_open(self._run(variables), opened)

    def _run(self, variables: dict[str, Any]) -> str:
        chunks: list[str] = []
        length = 0
        deadline = variables[DEADLINE]
        try:
            for chunk in self._template.generate(variables):
                chunks.append(chunk)
                length += len(chunk)
                if length > MAX_CHARACTERS:
                    raise OverBudget(f"writes more than {MAX_CHARACTERS} characters")
                if time.monotonic() > deadline:
                    raise OverBudget("takes too long to render")
        except RaisedByTemplate as error:
            raise TextError(f"the chat template refuses these messages: {error}", "messages") from None
        except OverBudget as error:
            raise TextError(f"the chat template ({self.origin}) {error}", "messages") from None
        except RecursionError:
            raise TextError(f"the chat template ({self.origin}) or its data is nested too deeply", "messages") from None
        except Exception as error:  # whatever a template does with data it did not expect
            raise TextError(
                f"the chat template ({self.origin}) fails on these messages: {type(error).__name__}: {error}",
                "messages",
            ) from None
        return "".join(chunks)

    def _prepared(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(messages, str) or not isinstance(messages, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TextError("messages must be a list", "messages")
        if not messages:
            raise TextError("messages is empty: a chat needs at least one message", "messages")
        return [self._prepared_message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _prepared_message(self, message: Mapping[str, Any], at: str) -> dict[str, Any]:
        """A copy without nulls, which templates would write as "None"."""
        if not isinstance(message, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TextError(f"{at} must be an object with role and content", at)
        prepared = {key: value for key, value in message.items() if value is not None}
        role = prepared.get("role")
        if not isinstance(role, str) or not role:
            raise TextError(f"{at}.role must be a string, got {role!r}", f"{at}.role")
        if role == "developer" and not self._knows_developer:
            prepared["role"] = "system"
        if "content" in prepared:
            prepared["content"] = self._prepared_content(prepared["content"], f"{at}.content")
        if "tool_calls" in prepared:
            prepared["tool_calls"] = prepared_tool_calls(prepared["tool_calls"], f"{at}.tool_calls")
        reasoning = next((prepared[name] for name in REASONING if name in prepared), None)
        if reasoning is not None:
            prepared["reasoning_content"] = reasoning
            prepared.setdefault("thinking", reasoning)
        return prepared

    def _prepared_content(self, content: object, at: str) -> str | list[dict[str, Any]]:
        if isinstance(content, str):
            return content
        if not isinstance(content, Sequence):
            raise TextError(f"{at} must be a string or a list of text parts, got {type(content).__name__}", at)
        parts: list[dict[str, Any]] = []
        for j, part in enumerate(cast("Sequence[object]", content)):
            where = f"{at}[{j}]"
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            if not isinstance(part, Mapping):
                raise TextError(f"{where} must be an object with type and text", where)
            part = dict(cast("Mapping[str, Any]", part))
            if part.get("type", "text") != "text":
                raise TextError(f"{where}: parts of type {part['type']!r} are not supported, only text", where)
            if not isinstance(part.get("text"), str):
                raise TextError(f"{where}.text must be a string", f"{where}.text")
            parts.append(part)
        return parts if self._takes_parts else "\n".join(part["text"] for part in parts)


def prepared_tool_calls(calls: object, at: str) -> list[dict[str, Any]]:
    """OpenAI sends a call's arguments as JSON text; templates expect the object. Text that is no object stays."""
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise TextError(f"{at} must be a list", at)
    prepared: list[dict[str, Any]] = []
    for j, call in enumerate(cast("Sequence[object]", calls)):
        if not isinstance(call, Mapping):
            raise TextError(f"{at}[{j}] must be an object", f"{at}[{j}]")
        call = dict(cast("Mapping[str, Any]", call))
        holder = call
        if isinstance(call.get("function"), Mapping):
            holder = call["function"] = dict(call["function"])
        arguments = holder.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed: object = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                parsed = None
            if isinstance(parsed, dict):
                holder["arguments"] = parsed
        prepared.append(call)
    return prepared


def open_last_text(chat: list[dict[str, Any]]) -> str:
    """Marks the end of the last message's text, in place; returns the text without the mark."""
    at = f"messages[{len(chat) - 1}].content"
    content: object = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + OPEN_END
        return content
    parts = cast("list[dict[str, Any]]", content or [])
    if not parts:
        raise TextError("continue_final_message: the last message has no text to continue", at)
    text: str = parts[-1]["text"]
    parts[-1]["text"] = text + OPEN_END
    return text


def cut_open(rendered: str, text: str) -> str:
    """Everything before the mark; without trailing space if the template strips contents."""
    mark = OPEN_END.rstrip()
    at = rendered.rfind(mark)
    if at < 0 or text.strip() not in rendered:
        raise TextError(
            "continue_final_message: the chat template does not write the last message as it is",
            "continue_final_message",
        )
    return rendered[:at] if rendered.startswith(OPEN_END, at) else rendered[:at].rstrip()
