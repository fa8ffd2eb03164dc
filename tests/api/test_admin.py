"""Who may change models: the admin routes behind the gate."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from tandem.server.api.admin import ROUTES
from tandem.server.api.security import Gate

METHOD, PATH = sorted(ROUTES)[0]


async def status(path: str, key: str | None, api: tuple[str, ...], admin: tuple[str, ...], host: str) -> int:
    app = FastAPI()
    app.add_api_route(path, lambda: "in", methods=[METHOD])
    app.add_middleware(Gate, api_keys=api, admin_keys=admin)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app, client=(host, 5))
    async with httpx.AsyncClient(transport=transport, base_url="http://tandem", headers=headers) as http:
        return (await http.request(METHOD, path)).status_code


HOME, AWAY = "127.0.0.1", "10.1.2.3"


@pytest.mark.parametrize(
    ("key", "api", "admin", "host", "admin_route", "other_route"),
    [
        (None, (), (), HOME, 200, 200),
        (None, (), (), "::1", 200, 200),
        (None, (), (), "::ffff:127.0.0.1", 200, 200),
        (None, (), (), AWAY, 403, 200),
        ("any", (), (), "testclient", 403, 200),
        (None, ("a",), (), HOME, 401, 401),
        ("a", ("a",), (), HOME, 403, 200),
        ("a", ("a",), ("root",), HOME, 403, 200),
        ("root", ("a",), ("root",), AWAY, 200, 200),
        ("root", (), ("root",), AWAY, 200, 200),
        (None, (), ("root",), HOME, 401, 200),
        ("wrong", (), ("root",), HOME, 401, 200),
    ],
)
async def test_who_gets_in(
    key: str | None, api: tuple[str, ...], admin: tuple[str, ...], host: str, admin_route: int, other_route: int
) -> None:
    assert await status(PATH, key, api, admin, host) == admin_route
    assert await status("/v1/chat/completions", key, api, admin, host) == other_route


async def test_every_admin_route_is_there(http: httpx.Client) -> None:
    for method, path in ROUTES:
        answer = http.request(method, path, json={"no": "such field"})
        assert answer.status_code == 400, (method, path, answer.text)
