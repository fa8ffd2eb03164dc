"""The ASGI application of an API worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fastapi import FastAPI

from .. import compat
from ..engine.link import EngineClient
from ..engine.request import ModelCard
from ..text.text import Text
from . import chat, completions, embeddings, errors, metrics, models, rewards, state, tokens
from .options import ApiOptions
from .rlhf import evaluate, normalize, preferences, rollout, score_group, weights
from .security import Gate, routes_of
from .service import Service
from .traffic import Traffic


def create_app(
    client: EngineClient,
    texts: Callable[[ModelCard], Text],
    options: ApiOptions,
    *,
    settings: Mapping[str, object] | None = None,
    metrics_directory: str | None = None,
) -> FastAPI:
    """`texts` gives the text side of a hosted model; it is called for each request and should remember. `settings` is
    what /server_info shows of the server's options. `metrics_directory`: see `traffic`.

    Draining is the client's: once it refuses requests, so does every route, and `/ready`.
    """
    traffic = Traffic(metrics_directory)
    app = FastAPI(title="Tandem", openapi_url=None, redirect_slashes=False)
    app.state.service = Service(client, texts, options, traffic, settings or {})
    errors.install(app)
    openai, rlhf = (chat, completions, embeddings), (rewards, score_group, evaluate, rollout, normalize, weights)
    own = [part.router for part in (*openai, *rlhf, preferences, tokens, models, state, metrics)]
    admins = (normalize.admin, weights.admin, *compat.ADMINS)
    for router in (*own, *compat.ROUTERS, *admins):
        app.include_router(router)
    app.add_middleware(
        Gate,
        api_keys=options.api_keys,
        admin_keys=options.admin_keys,
        admin_routes=routes_of(*admins),
        observe=traffic.answered,
    )
    return app
