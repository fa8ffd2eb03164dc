"""The formats in which models call tools, and which of them a chat template teaches: `--tool-call-parser`.

| name          | the chat template contains                                  | models                         |
|---------------|-------------------------------------------------------------|--------------------------------|
| none          | `<function=`                                                | Qwen3-Coder: XML, not read     |
| `mistral`     | `[TOOL_CALLS]`                                              | Mistral, Ministral, Magistral  |
| `hermes`      | `<tool_call>`                                               | Hermes 2 and 3, Qwen2.5, Qwen3 |
| `llama3_json` | `<|python_tag|>` or `{"name": function name, "parameters":` | Llama 3.1 to 3.3               |

The first line that fits decides. The names are vLLM's.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..events import CallParser
from . import hermes, llama3, mistral

LETTERS = string.ascii_letters + string.digits


def openai_id() -> str:
    return "call_" + "".join(secrets.choice(LETTERS) for _ in range(24))


def mistral_id() -> str:
    """Mistral's templates refuse any other."""
    return "".join(secrets.choice(LETTERS) for _ in range(9))


@dataclass(frozen=True)
class Frame:
    """How calls are written: `begin`, calls with `between` between them, `end`. A call is `before`, its name, `middle`,
    its arguments, `after`."""

    before: str
    middle: str
    after: str
    between: str
    begin: str = ""
    end: str = ""
    markers: tuple[str, ...] = ()  # in these texts


@dataclass(frozen=True)
class ToolFormat:
    name: str
    parser: Callable[[], CallParser]
    signs: tuple[str, ...]  # of a chat template that teaches it
    markers: tuple[str, ...]  # which a tokenizer may have as special tokens, and which must be seen all the same
    frame: Callable[[str], Frame]  # as a chat template writes it
    new_id: Callable[[], str] = openai_id


def hermes_frame(template: str) -> Frame:
    before, after = f'{hermes.OPEN}\n{{"name": "', f"}}\n{hermes.CLOSE}"
    return Frame(before, '", "arguments": ', after, "\n", markers=(hermes.OPEN, hermes.CLOSE))


def llama3_frame(template: str) -> Frame:
    return Frame('{"name": "', '", "parameters": ', "}", "; ")


def mistral_frame(template: str) -> Frame:
    if mistral.ARGS in template:
        return Frame(mistral.MARKER, mistral.ARGS, "", "", markers=(mistral.MARKER, mistral.ARGS))
    begin = mistral.MARKER + (" [" if f"{mistral.MARKER} [" in template else "[")
    return Frame('{"name": "', '", "arguments": ', "}", ", ", begin, "]", (mistral.MARKER,))


HERMES = ToolFormat("hermes", hermes.Hermes, (hermes.OPEN,), (hermes.OPEN, hermes.CLOSE), hermes_frame)
LLAMA3 = ToolFormat(
    "llama3_json",
    llama3.Llama3,
    (llama3.TAG, '{"name": function name, "parameters":'),
    (llama3.TAG,),
    llama3_frame,
)
MISTRAL = ToolFormat(
    "mistral",
    mistral.Mistral,
    (mistral.MARKER,),
    (mistral.MARKER, mistral.ARGS, mistral.CALL_ID),
    mistral_frame,
    mistral_id,
)
OTHERS = ("<function=",)  # signs of formats that are not read

FORMATS: Mapping[str, ToolFormat] = MappingProxyType({form.name: form for form in (MISTRAL, HERMES, LLAMA3)})


def taught_by(template: str) -> ToolFormat | None:
    """The format that a chat template's source teaches."""
    if any(sign in template for sign in OTHERS):
        return None
    return next((form for form in FORMATS.values() if any(sign in template for sign in form.signs)), None)
