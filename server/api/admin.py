"""The routes that change the server for all: `security.Gate` lets nobody else in than who has the admin key."""

from __future__ import annotations

ROUTES: frozenset[tuple[str, str]] = frozenset(  # method, path
    {
        ("POST", "/v1/rlhf/normalize"),
        ("POST", "/v1/rlhf/weights"),
    }
)
