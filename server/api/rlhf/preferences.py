"""POST /v1/rlhf/preferences: how people rank answers, a line each in the file of --preferences; GET gives them back."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from .. import body as bodies
from ..errors import ApiError, invalid
from ..service import Service
from ..streaming import JsonAnswer
from . import fields
from .bodies import PreferenceBody

CHUNK = 1 << 16  # bytes

router = APIRouter()


@router.post("/v1/rlhf/preferences")
async def create(request: Request) -> Response:
    service = Service.of(request)
    body, headers = await bodies.read(request, PreferenceBody, fields.PREFERENCES, service.options)
    file = file_of(service)
    line = line_of(body)
    encoded = json.dumps({**line, "created": int(time.time())}, ensure_ascii=False, allow_nan=False).encode()
    try:
        await asyncio.to_thread(append, file, encoded + b"\n")
    except OSError as error:
        raise ApiError(503, f"the preference was not kept: {file}: {error.strerror}", code="unavailable") from None
    return JsonAnswer({"object": "preference", "completions": len(body.completions), "pairs": pairs(line)}, headers)


@router.get("/v1/rlhf/preferences")
async def every(request: Request) -> Response:
    file = file_of(Service.of(request))
    return StreamingResponse(lines(file), media_type="application/jsonl")


def file_of(service: Service) -> Path:
    if service.options.preferences is None:
        raise ApiError(409, "no preferences are kept: start the server with --preferences FILE", code="no_preferences")
    return Path(service.options.preferences)


def line_of(body: PreferenceBody) -> dict[str, Any]:
    """What is kept: `ranking` holds the completions' indices, best first, those of one rank in one list."""
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either prompt or messages", "prompt")
    count = len(body.completions)
    ranking = [[rank] if isinstance(rank, int) else rank for rank in body.ranking]
    if sorted(index for rank in ranking for index in rank) != list(range(count)) or not all(ranking):
        raise invalid(
            f"ranking must name each completion once, 0 to {count - 1}, best first; those that are equally good "
            "in a list",
            "ranking",
        )
    if body.scores is not None and len(body.scores) != count:
        raise invalid(f"scores has {len(body.scores)} entries; there are {count} completions", "scores")
    given: dict[str, Any] = {
        "prompt": body.prompt,
        "messages": body.messages,
        "completions": body.completions,
        "ranking": ranking,
        "scores": body.scores,
        "model": body.model,
        "metadata": body.metadata or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def pairs(line: dict[str, Any]) -> int:
    """Of a better and a worse completion."""
    sizes = [len(rank) for rank in line["ranking"]]
    return (sum(sizes) ** 2 - sum(size * size for size in sizes)) // 2


def append(file: Path, line: bytes) -> None:
    """On disk when it returns, whole or not at all, however many workers write. Raises OSError."""
    with locked(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as descriptor:
        size = os.fstat(descriptor).st_size
        try:
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise


def lines(file: Path) -> Iterator[bytes]:
    """What is in the file now, in pieces."""
    try:
        with locked(file, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
            size = os.fstat(descriptor).st_size
    except FileNotFoundError:
        return
    with file.open("rb") as content:
        while size > 0 and (piece := content.read(min(size, CHUNK))):
            size -= len(piece)
            yield piece


@contextmanager
def locked(file: Path, flags: int, lock: int) -> Generator[int]:
    descriptor = os.open(file, flags, 0o600)
    try:
        fcntl.flock(descriptor, lock)
        yield descriptor
    finally:
        os.close(descriptor)
