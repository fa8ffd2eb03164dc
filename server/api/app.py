"""The ASGI application of an API worker."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI

from ..engine.link import EngineClient
from ..engine.request import ModelCard
from ..text.text import Text
from . import chat, completions, errors, models, rewards, state
from .options import ApiOptions
from .security import Gate
from .service import Service


def create_app(client: EngineClient, texts: Callable[[ModelCard], Text], options: ApiOptions) -> FastAPI:
    """`texts` gives the text side of a hosted model; it is called for each request and should remember.

    Draining is the client's: once it refuses requests, so does every route, and `/ready`.
    """
    app = FastAPI(title="Tandem", openapi_url=None, redirect_slashes=False)
    app.state.service = Service(client, texts, options)
    errors.install(app)
    for part in (chat, completions, rewards, models, state):
        app.include_router(part.router)
    app.add_middleware(Gate, api_keys=options.api_keys)
    return app
