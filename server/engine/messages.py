"""The messages of the link: msgpack arrays with a number for their kind first. Each carries the engine's epoch."""

from __future__ import annotations

from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import msgspec

from . import request as vocabulary
from .commands import AnyCommand
from .counts import ModelStats
from .request import Catalog, EngineError, Finish, Group, Output, Request

_NAMES = [field.name for field in fields(Output)]
row_of = attrgetter(*_NAMES)  # Output -> its fields in order
columns_of = attrgetter("request_ids", "choices", "token_ids", "weight_version")
Columns = tuple[list[int], list[int], list[int], int]  # the fields of `Tokens`
_encode = msgspec.msgpack.Encoder().encode
_COMMANDS = {kind.__name__: msgspec.msgpack.Decoder(kind).decode for kind in get_args(AnyCommand)}
if TYPE_CHECKING:
    Row = tuple[Any, ...]
else:
    Row = tuple[tuple(get_type_hints(Output, vars(vocabulary))[name] for name in _NAMES)]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """A worker is there; answered with the catalog once there is one."""

    epoch: int


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=1):
    epoch: int
    request: Request


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Nobody wants that choice (None: any choice) any more."""

    epoch: int
    request_id: int
    choice: int | None
    finish: Finish = "abort"  # "stop": a stop string, which the engine does not know, ended it


class Step(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """`tokens` by column: what most outputs are, a token and no more."""

    epoch: int
    rows: list[Row]
    tokens: list[Columns]


class News(msgspec.Struct, frozen=True, array_like=True, tag=4):
    epoch: int
    catalog: Catalog


class Beat(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The engine's loop came around."""

    epoch: int


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """How do the models do? Answered with a `Told`."""

    epoch: int
    worker: int


class Told(msgspec.Struct, frozen=True, array_like=True, tag=7):
    epoch: int
    models: list[ModelStats]


class Open(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """A group begins. Why one cannot be is told to its members."""

    epoch: int
    group: Group


class Close(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """A group gets no more members; those that are not finished are aborted."""

    epoch: int
    group_id: int


class Order(msgspec.Struct, frozen=True, array_like=True, tag=10):
    """A command; answered with an `Answer` of the same number."""

    epoch: int
    worker: int
    number: int  # unique among the worker's
    kind: str
    body: msgspec.Raw

    @classmethod
    def of(cls, epoch: int, worker: int, number: int, command: object) -> Order:
        return cls(epoch, worker, number, type(command).__name__, msgspec.Raw(_encode(command)))

    @property
    def command(self) -> AnyCommand:
        return _COMMANDS[self.kind](self.body)


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=11):
    """`body`: the reply, of the type that the command names; of no meaning beside an error."""

    epoch: int
    number: int
    error: EngineError | None
    body: msgspec.Raw

    @classmethod
    def of(cls, epoch: int, number: int, outcome: object) -> Answer:
        error = outcome if isinstance(outcome, EngineError) else None
        return cls(epoch, number, error, msgspec.Raw(_encode(None if error else outcome)))


class Seen(msgspec.Struct, frozen=True, array_like=True, tag=12):
    """The worker has the catalog of that version."""

    epoch: int
    worker: int
    version: int
