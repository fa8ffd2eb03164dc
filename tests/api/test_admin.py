"""Who may change models: the admin routes behind the gate."""

from __future__ import annotations

import httpx
import pytest
from fastapi import FastAPI

from tandem.server.api.rlhf import normalize, weights
from tandem.server.api.security import Gate, routes_of

ROUTES = routes_of(weights.admin, normalize.admin)
METHOD, PATH = "POST", "/v1/rlhf/weights"


async def status(path: str, key: str | None, api: tuple[str, ...], admin: tuple[str, ...], host: str) -> int:
    app = FastAPI()
    app.add_api_route(path, lambda: "in", methods=[METHOD])
    app.add_middleware(Gate, api_keys=api, admin_keys=admin, admin_routes=ROUTES)
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


def test_what_changes_the_server_is_guarded() -> None:
    assert {(METHOD, PATH), ("POST", "/v1/rlhf/normalize")} == ROUTES


def test_a_server_without_keys_opens_them_to_this_machine(http: httpx.Client) -> None:
    assert http.post(PATH, json={"no": "such field"}).status_code == 400  # and not 403


async def test_a_server_with_keys_of_users_alone_shuts_them(narrow_http: httpx.AsyncClient) -> None:
    answer = await narrow_http.post(PATH, json={})
    assert answer.status_code == 403 and "--admin-key" in answer.json()["error"]["message"]
