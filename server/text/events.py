"""What the text of an answer says, piece by piece: prose, thinking, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of `name`. Everything about calls that follows is about this one, until the next begins."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the call's arguments, as the model wrote it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnds:
    """Its arguments are a whole JSON object."""


@dataclass(frozen=True, slots=True)
class NoCall:
    """What has begun as a call is none; `text` is all of it, from its marker on."""

    text: str


Event = Content | Reasoning | CallBegins | Arguments | CallEnds | NoCall
End = Literal["ended", "cut"]  # the model ended its answer; or it was cut where it had more to say


class CallParser(Protocol):
    """Reads the calls in one answer. The events depend on the text alone, not on where it is cut into pieces, but for
    how neighbouring texts are divided: those of `Arguments`, and those of `NoCall` and `Content`."""

    def push(self, text: str) -> list[Event]: ...

    def finish(self, end: End) -> list[Event]:
        """What is still held back. A call that was cut stays incomplete; one that ended too early is none."""
        ...
