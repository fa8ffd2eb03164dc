"""Thinking and the answer behind it, told apart by their tags: `--reasoning-parser`.

| name          | models                                  | an answer without an opening tag is                      |
|---------------|-----------------------------------------|----------------------------------------------------------|
| `qwen3`       | Qwen3, and who writes <think> likewise  | an answer, unless the prompt has opened the tag          |
| `deepseek_r1` | DeepSeek-R1 and what is distilled of it | thinking: these models always think, the tag or not      |

Either way a prompt that ends with a closing tag (Qwen3's template with `enable_thinking: false`) leaves no thinking.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from .markers import UpTo

OPEN, CLOSE = "<think>", "</think>"
TAIL = 16  # tokens of a prompt's end in which its tag is looked for

# Whether an answer thinks before it has said so.
PARSERS: Mapping[str, bool] = MappingProxyType({"qwen3": False, "deepseek_r1": True})


Stage = Literal["thinks", "may think", "answers"]  # where an answer begins


def stage_of(prompt: str, thinks: bool) -> Stage:
    """Where the answer to a prompt begins. `thinks`: inside thinking, where the prompt does not say."""
    end = prompt.rstrip()
    if end.endswith(CLOSE):
        return "answers"
    return "thinks" if thinks or end.endswith(OPEN) else "may think"


class Thinking:
    """Text in pieces -> what of it is thinking and what is not, without the tags and the space around them."""

    def __init__(self, stage: Stage) -> None:
        """Whatever the stage, an answer may open the tag first."""
        self._thinks = stage == "thinks"
        self._at: Literal["start", "inside", "behind", "over"] = "start"
        self._held = ""
        self._inside = UpTo(CLOSE)

    def push(self, text: str) -> tuple[str, str]:
        """(thinking, answer)"""
        if self._at == "start":
            text = self._start(self._held + text)
        thought = ""
        if self._at == "inside":
            thought, rest = self._inside.push(text)
            if rest is None:
                return thought, ""
            self._at, text = "behind", rest
        if self._at == "behind":
            text = text.lstrip()
            if text:
                self._at = "over"
        return (thought, text) if self._at == "over" else (thought, "")

    def _start(self, text: str) -> str:
        bare = text.lstrip()
        if OPEN.startswith(bare) and bare != OPEN:  # as nothing does
            self._held = text
            return ""
        self._held = ""
        opened = bare.startswith(OPEN)
        if opened:
            bare = bare.removeprefix(OPEN).lstrip()
            if not bare:  # more space may follow
                self._held = OPEN
                return ""
        self._at = "inside" if opened or self._thinks else "over"
        return bare if self._at == "inside" else text

    def rest(self) -> tuple[str, str]:
        """What was held back, once nothing follows."""
        if self._at == "start":
            bare = self._held.removeprefix(OPEN)
            return (bare.lstrip(), "") if self._thinks or bare != self._held else ("", self._held)
        return self._inside.rest().rstrip(), ""
