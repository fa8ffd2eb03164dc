"""Commands to the engine, as the dialects' control routes give them."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request

from ..api.errors import ApiError
from ..api.service import Service
from ..engine.commands import AbortAll, Command, Pause
from ..engine.request import ModelCard

Reply = TypeVar("Reply")


async def carried_out(request: Request, command: Command[Reply], path: str = "path") -> Reply:
    """The engine's answer, which may take long; other requests are served meanwhile. Raises ApiError. `path`: what
    the dialect calls the command's path."""
    try:
        return await Service.of(request).command(command, request.state.request_id)
    except ApiError as error:
        if error.param == "path":
            error.param = path
        raise


def trained(request: Request) -> ModelCard:
    """The model that a trainer means: `?model=NAME`, or the first that writes text. Raises ApiError."""
    return Service.of(request).card(request.query_params.get("model"), gives="text")


async def stopped(request: Request) -> int:
    """What SGLang and AReaL call pausing: what runs ends with what it has, what comes waits. -> how many ended."""
    model = request.query_params.get("model")
    await carried_out(request, Pause(model, "keep"))
    return (await carried_out(request, AbortAll(model))).requests
