"""A request's bytes become one of `protocol`'s bodies, or a refusal that names what is wrong."""

# JSON of any shape is taken apart here:
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from .errors import ApiError, invalid
from .fields import Field
from .options import ApiOptions

MAX_DEPTH = 32  # containers inside containers
SHOWN = 80  # characters of a refused value in a message
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
WARNING_HEADER = "x-tandem-warning"

Body = TypeVar("Body", bound=BaseModel)
Known = Mapping[str, Field]


@dataclass(frozen=True, slots=True)
class Received:
    """A body's object, and the literals in it that are no JSON numbers (NaN, Infinity)."""

    value: dict[str, Any]
    constants: list[str]


async def read(
    request: Request, model: type[Body], known: Known, options: ApiOptions, may_be_empty: bool = False
) -> tuple[Body, dict[str, str]]:
    """The body, and headers to answer with: a warning where unknown fields were let pass. `may_be_empty`: no body at
    all is an object without fields."""
    return checked(await receive(request, options, may_be_empty), model, known, options)


async def receive(request: Request, options: ApiOptions, may_be_empty: bool = False) -> Received:
    """For routes on which more than one kind of body arrives; `checked` is the second half."""
    sent = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
    if may_be_empty and not sent:
        return Received({}, [])
    value, constants = parse(await _bytes(request, options))
    if not isinstance(value, dict):
        raise invalid(f"the body must be a JSON object, not {_kind(value)}")
    return Received(value, constants)


def checked(received: Received, model: type[Body], known: Known, options: ApiOptions) -> tuple[Body, dict[str, str]]:
    """As `read`. Takes fields out of `received`."""
    headers = sort_out(received.value, known, options.ignore_unknown_fields)
    body = validated(model, received.value)
    if received.constants:
        raise invalid(f"the body is not valid JSON: {received.constants[0]} is no JSON number")
    return body, headers


@contextmanager
def within(field: str) -> Generator[None]:
    """Refusals in it are about what is inside that field."""
    try:
        yield
    except ApiError as error:
        inner = f"{field}.{error.param}" if error.param else field
        raise ApiError(error.status, f"{field}: {error.message}", param=inner, code=error.code) from None


def validated(model: type[Body], value: Mapping[str, Any]) -> Body:
    """Raises ApiError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise of_validation(error) from None


async def _bytes(request: Request, options: ApiOptions) -> bytes:
    media, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    if not re.fullmatch(r"application/([\w.-]+\+)?json", media.strip().lower()) or charset not in ("", "utf-8", "utf8"):
        raise ApiError(
            415, f"send the body as 'Content-Type: application/json', not {media + parameters or 'nothing'!r}"
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"bodies are taken as they are, not with content-encoding {encoding!r}")
    too_large = ApiError(413, f"the body has more than {options.max_body} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > options.max_body:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(options.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > options.max_body:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {options.body_seconds:g} s") from None
    return b"".join(chunks)


def parse(raw: bytes) -> tuple[Any, list[str]]:
    """The JSON value, and the literals in it that are none (NaN, Infinity): where they stand decides the message."""
    constants: list[str] = []

    def constant(name: str) -> float:
        constants.append(name)
        return float(name)

    try:
        value = json.loads(raw.decode(), parse_constant=constant)
        if SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not valid UTF-8: byte {raw[error.start]:#04x} at {error.start}") from None
    except UnicodeEncodeError:
        raise invalid("the body holds half of a surrogate pair, which is no character") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
    except ValueError:
        raise invalid("the body is not valid JSON: a number has too many digits") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if type(node) in (dict, list)
            for child in (node.values() if type(node) is dict else node)
            if type(child) in (dict, list)
        ]
        if not level:
            return value, constants
    raise _too_deep()


def _too_deep() -> ApiError:
    return invalid(f"the body nests deeper than {MAX_DEPTH} levels")


def sort_out(value: dict[str, Any], known: Known, ignore_unknown: bool) -> dict[str, str]:
    """Take out of `value` what is ignored, and what is null; refuse what is refused or unknown."""
    unknown: list[str] = []
    for name in list(value):
        field = known.get(name)
        if field is None:
            unknown.append(name)
        elif field.fate == "honoured" and value[name] is not None:
            continue
        elif field.fate == "refused" and not field.lets_pass(value[name]):
            raise invalid(f"{name} is {shown(value[name])}; not supported: {field.reason}", name, "unsupported")
        del value[name]
    if not unknown:
        return {}
    if ignore_unknown:
        return {WARNING_HEADER: "ignored unknown fields: " + ", ".join(ascii(name[:SHOWN]) for name in unknown[:16])}
    name = unknown[0][:SHOWN]
    nearest = get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise invalid(f"unknown field {name!r}{hint}", name, "unknown_field")


LIMITS = {  # pydantic's names of broken bounds: (its key for the limit, how to say it)
    "greater_than": ("gt", "it must be greater than {}"),
    "greater_than_equal": ("ge", "it must be at least {}"),
    "less_than": ("lt", "it must be less than {}"),
    "less_than_equal": ("le", "it must be at most {}"),
    "too_long": ("max_length", "it may have at most {} entries"),
    "too_short": ("min_length", "it must have at least {}"),
    "string_too_long": ("max_length", "it may have at most {} characters"),
    "string_too_short": ("min_length", "it must have at least {} character"),
    "literal_error": ("expected", "it must be {}"),
    "finite_number": ("", "it must be a finite number"),
    "int_type": ("", "it must be an integer"),
    "float_type": ("", "it must be a number"),
    "bool_type": ("", "it must be true or false"),
    "string_type": ("", "it must be a string"),
    "list_type": ("", "it must be a list"),
    "dict_type": ("", "it must be an object"),
    "model_type": ("", "it must be an object"),
    "extra_forbidden": ("", "there is no such field"),
}


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong: where, the value, the limit."""
    first = error.errors(include_url=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else part
    kind, value = first["type"], first["input"]
    if kind == "missing":
        return invalid(f"{param} is missing", param, "missing")
    wording = first["msg"]  # protocol's own, if it is none of pydantic's
    if kind in LIMITS:
        key, wording = LIMITS[kind]
        wording = wording.format(first.get("ctx", {}).get(key, ""))
    return invalid(f"{param} is {shown(value)}; {wording}", param)


def shown(value: Any) -> str:
    text = _kind(value) if isinstance(value, (dict, list)) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    names = {dict: "an object", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
