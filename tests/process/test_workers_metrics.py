"""What several API workers counted is one number, whichever of them is asked, and those that died count on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from servers import Server, eventually


def counted(server: Server, name: str, **labels: str) -> float:
    answer = httpx.get(f"{server.base_url}/metrics", timeout=30)
    return sum(
        sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name == f"tandem:{name}" and labels.items() <= sample.labels.items()
    )


def test_numbers_of_all_workers_are_added_up(tmp_path: Path) -> None:
    version = {"handler": "/version", "status": "200"}
    with Server(tmp_path, "null", "--api-workers", 2) as server:
        for _ in range(12):  # each on a connection of its own, so that both workers get some
            assert httpx.get(f"{server.base_url}/version", timeout=30).status_code == 200
        for _ in range(4):
            assert counted(server, "http_requests_total", **version) == 12
        workers = server.children("tandem-api")
        os.kill(workers[0], signal.SIGKILL)
        eventually(lambda: len(server.children("tandem-api")) == 2 and workers[0] not in server.children(), 30)
        assert counted(server, "http_requests_total", **version) == 12
        body = {"prompt": "a", "max_tokens": 5}
        assert httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=30).status_code == 200
        for _ in range(4):  # of the engine there is one
            assert counted(server, "generation_tokens_total") == 5
