"""The same checks through the `openai` packages of Python and npm, unchanged, on the bundled models.

The first run installs npm's into `.venvs/npm-openai`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from servers import Server

from tandem.benchmarks.clients import environments, python_openai

NAMES = [check.__name__ for check in python_openai.CHECKS]
NO_NODE = pytest.mark.skipif(
    environments.find_node() is None, reason=f"node {environments.NODE_MAJOR} or later and npm are not installed"
)
PACKAGES = [
    pytest.param(python_openai.run, id="python"),
    pytest.param(environments.npm_openai, id="npm", marks=NO_NODE),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("log")) as server:
        yield server


@pytest.mark.parametrize("run", PACKAGES)
def test_every_check_passes(server: Server, run: Callable[[str], dict[str, Any]]) -> None:
    report = run(server.base_url)
    assert report["failed"] == {} and report["passed"] == NAMES


@pytest.mark.parametrize("run", PACKAGES)
def test_what_fails_is_told(server: Server, run: Callable[[str], dict[str, Any]]) -> None:
    """At an address where no API is nothing passes, and each check says why."""
    report = run(f"{server.base_url}/nowhere")
    assert report["passed"] == [] and list(report["failed"]) == NAMES
    assert "404" in report["failed"]["chat"]
