"""What a request says about tools: which there are, whether they may or must be called, and what is wrong with them."""

# JSON of any shape is taken apart here:
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..text.grammar import GrammarError, of_schema
from ..text.reasoning import Stage
from ..text.text import Text
from ..text.tools.forced import arguments_of
from ..text.tools.formats import FORMATS
from .body import shown
from .errors import ApiError, invalid
from .protocol import ChatBody
from .service import Service, in_thread_if

MAX_TOOLS = 128
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
MODES = ("none", "auto", "required")

Tool = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Calling:
    tools: Sequence[Tool] = ()  # for the chat template
    reads: bool = False  # whether calls are looked for in the answer
    forced: tuple[Tool, ...] = ()  # functions of which at least one must be called; none: as the model likes
    one_call: bool = False  # the answer ends with its first call


def calling_of(body: ChatBody, text: Text) -> Calling:
    """Raises ApiError where tools are asked for wrongly, or the model cannot do what is asked."""
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(_listed(body.tools))]
    mode, named = _choice(body.tool_choice, functions)
    if not functions:
        return Calling()
    if not text.takes_tools:
        if mode == "none":
            return Calling()
        raise invalid("the model's chat template takes no tools: start the server with a --chat-template that does, "
                      "or ask with tool_choice 'none'", "tools", "unsupported")  # fmt: skip
    forced = tuple(functions) if mode == "required" else () if named is None else (named,)
    if mode == "none" or (text.leaves_calls and not forced):
        return Calling(body.tools)
    if text.tool_format is None:
        why = (
            "calls are left in the text (--tool-call-parser none), so none can be forced"
            if text.leaves_calls
            else "how the model calls tools cannot be told from its chat template"
        )
        raise invalid(f"{why}: start the server with --tool-call-parser {'|'.join(FORMATS)}"
                      + ("" if forced else ", or none for calls as text"), "tools", "unsupported")  # fmt: skip
    return Calling(body.tools, True, forced, named is not None or body.parallel_tool_calls is False)


async def shape_of(service: Service, body: ChatBody, calling: Calling, text: Text, stage: Stage, answer: str) -> str:
    """The grammar of the whole answer, checked: the thinking it may begin with, then calls where they are forced, and
    what `answer` asks of it (or calls) where they are not. Empty: as the model likes.

    Raises ApiError, which names the schema that cannot be followed.
    """
    functions = calling.forced
    if calling.reads and answer and not functions:
        functions = tuple(tool["function"] for tool in calling.tools)
    if calling.forced:
        answer = ""
        if body.ignore_eos:
            raise invalid("ignore_eos is true; an answer that must call a tool ends with the call", "ignore_eos")
    if not functions and (not answer or stage == "answers"):
        return answer

    def work() -> str:
        try:
            service.grammars.check(text.grammar(stage, functions, calling.one_call, answer, tokens=False))
        except GrammarError as error:
            _blame(service, calling.tools, functions)
            raise GrammarError(str(error), "tools") from None
        return text.grammar(stage, functions, calling.one_call, answer)

    return await in_thread_if(True, work)


def _blame(service: Service, tools: Sequence[Tool], functions: Sequence[Tool]) -> None:
    """Raises GrammarError with the first schema at fault."""
    for i, tool in enumerate(tools):
        function = tool["function"]
        if any(function is other for other in functions):
            try:
                service.grammars.check(of_schema(arguments_of(function)))
            except GrammarError as error:
                raise GrammarError(str(error), f"tools[{i}].function.parameters") from None


def _listed(tools: Sequence[object]) -> Sequence[object]:
    if len(tools) > MAX_TOOLS:
        raise invalid(f"tools has {len(tools)} entries; there may be at most {MAX_TOOLS}", "tools")
    return tools


def _function(tool: object, at: str) -> Tool:
    """The function that a tool is."""
    tool = _object(tool, at)
    kind = tool.get("type")
    if kind != "function":
        raise _wrong(f"{at}.type", kind, "it must be 'function'")
    at += ".function"
    function = _object(tool.get("function"), at)
    name, description = function.get("name"), function.get("description")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _wrong(f"{at}.name", name, "it must be 1 to 64 of a-z, A-Z, 0-9, _ and -")
    if not isinstance(description, str | None):
        raise _wrong(f"{at}.description", description, "it must be a string")
    if not isinstance(function.get("strict"), bool | None):
        raise _wrong(f"{at}.strict", function["strict"], "it must be true or false")
    if function.get("parameters") is None:
        return function
    at += ".parameters"
    parameters = _object(function["parameters"], at)
    if parameters.get("type", "object") != "object":
        raise _wrong(f"{at}.type", parameters["type"], "it must be 'object': arguments are a JSON object")
    _object(parameters.get("properties", {}), f"{at}.properties")
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise _wrong(f"{at}.required", required, "it must be a list of strings")
    return function


def _choice(choice: object, functions: Sequence[Tool]) -> tuple[str, Tool | None]:
    """(mode, the one function that must be called)"""
    at = "tool_choice"
    if choice is None or isinstance(choice, str):
        mode = choice or ("auto" if functions else "none")
        if mode not in MODES:
            raise _wrong(at, choice, f"it must be one of {', '.join(MODES)}, or an object that names a function")
        if mode == "required" and not functions:
            raise invalid("tool_choice is 'required' and there are no tools", at)
        return mode, None
    choice = _object(choice, at)
    if choice.get("type") != "function":
        raise _wrong(f"{at}.type", choice.get("type"), "it must be 'function'")
    name = _object(choice.get("function"), f"{at}.function").get("name")
    found = next((function for function in functions if function["name"] == name), None)
    if found is None:
        known = ", ".join(function["name"] for function in functions) or "none"
        raise _wrong(f"{at}.function.name", name, f"no such tool; there are: {known}")
    return "named", found


def _object(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"{at} is missing", at, "missing") if value is None else _wrong(at, value, "it must be an object")
    return cast("dict[str, Any]", value)


def _wrong(at: str, value: object, wanted: str) -> ApiError:
    return invalid(f"{at} is {shown(value)}; {wanted}", at)
