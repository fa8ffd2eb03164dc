"""Jinja's sandbox with Hugging Face's chat-template dialect and bounds on what a template may cost.

Templates come with the checkpoint, never with a request, so the bounds are there for mistakes and bad checkpoints.
Guaranteed: every start of a loop and every call looks at the clock; strings made by `+`, `*`, `~`, `center` and
`indent`, and the output, stay under a limit; `range` gives at most 100,000 items. Not guaranteed: that one operation
inside Python's own string methods or filters ends early. So a render overruns its time by at most one loop over data
that is already there.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARACTERS = 1 << 25
MAX_NUMBER = 1 << 20  # of repetitions, columns, digits

WIDTHS = re.compile(r"(%|\{[^{}]*:)[^a-zA-Z{}%]*(\d{6}|\*)")

DEADLINE = "tandem deadline"  # context variable, no identifier: a template cannot name it


class OverBudget(jinja2.TemplateError):
    """The template takes too long or builds too much."""


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[GenerationTag, loopcontrols]
        )
        self.filters |= {
            "tojson": to_json,
            "tandem_loop": bounded_loop,
            "tandem_size": bounded,
            "center": bounded_arguments(FILTERS["center"]),
            "indent": bounded_arguments(FILTERS["indent"]),
            "format": bounded_arguments(FILTERS["format"]),
        }
        self.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = filtered(cast("nodes.Expr", loop.iter), "tandem_loop")
        return replace_concats(tree)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        check_time(context)
        check_numbers(args)
        check_numbers(kwargs.values())
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            check_widths(value.__self__)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, Sized) and isinstance(count, int) and len(value) * count > MAX_CHARACTERS:
                    raise OverBudget(f"builds more than {MAX_CHARACTERS} characters")
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 1024:
            raise OverBudget(f"raises to the power {right}")
        elif operator == "%":
            check_widths(left)
        return bounded(super().call_binop(context, operator, left, right))


def filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def replace_concats(tree: nodes.Template) -> nodes.Template:
    """Every `a ~ b` becomes `(a ~ b) | tandem_size`."""
    pending: list[nodes.Node] = [tree]
    while pending:
        node = pending.pop()
        for field, value in node.iter_fields():
            if isinstance(value, nodes.Concat):
                setattr(node, field, filtered(value, "tandem_size"))
            elif isinstance(value, list):
                items = cast("list[object]", value)
                setattr(node, field, [filtered(i, "tandem_size") if isinstance(i, nodes.Concat) else i for i in items])
        pending += [
            child.node if isinstance(child, nodes.Filter) and child.name == "tandem_size" and child.node else child
            for child in node.iter_child_nodes()
        ]
    return tree


def check_time(context: Context) -> None:
    deadline = context.parent.get(DEADLINE)
    if deadline is not None and time.monotonic() > deadline:
        raise OverBudget("takes too long to render")


@jinja2.pass_context
def bounded_loop(context: Context, items: Iterable[Any]) -> Iterable[Any]:
    check_time(context)
    return items if isinstance(items, Sized | jinja2.Undefined) else counted(context, items)


def counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        check_time(context)
        yield item


def bounded(value: Any) -> Any:
    if isinstance(value, Sized) and len(value) > MAX_CHARACTERS:
        raise OverBudget(f"builds more than {MAX_CHARACTERS} characters")
    return value


def check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and value > MAX_NUMBER:
            raise OverBudget(f"calls with the number {value}")


def check_widths(pattern: object) -> None:
    """A format string may not ask for more columns than it could ever need."""
    if isinstance(pattern, str) and WIDTHS.search(pattern):
        raise OverBudget("formats with a width of 100,000 or more")


def bounded_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        check_numbers(args)
        check_numbers(kwargs.values())
        check_widths(args[0])
        return bounded(function(*args, **kwargs))

    return call


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja's own: that one escapes for HTML."""
    check_numbers([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class RaisedByTemplate(jinja2.TemplateError):
    """The template itself refuses the messages."""


def raise_exception(message: object) -> None:
    raise RaisedByTemplate(str(message))


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
