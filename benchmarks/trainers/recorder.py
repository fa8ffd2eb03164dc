"""A proxy that writes down what passes: how the fixtures of tests/compat were made."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "content-length", "content-encoding", "keep-alive", "date"})


@dataclass
class Recorder:
    """Exchanges in the order in which they ended."""

    target: str
    exchanges: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    url: str = ""

    def take(self) -> list[dict[str, Any]]:
        """What passed since the last time."""
        taken, self.exchanges = self.exchanges, []
        return taken


@contextlib.contextmanager
def recording(target: str) -> Iterator[Recorder]:
    """In front of the server at `target`, on a free port. Answers are passed on whole."""
    recorder = Recorder(target)
    client = httpx.Client(base_url=target, timeout=None, limits=httpx.Limits(max_connections=None))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", *HOP_BY_HOP)}
            answer = client.request(self.command, self.path, content=body, headers=headers)
            path, _, query = self.path.partition("?")
            request = {"method": self.command, "path": path, "query": query, "body": json_of(body)}
            recorder.exchanges.append(
                {"request": request, "response": {"status": answer.status_code, "body": json_of(answer.content)}}
            )
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        do_GET = do_POST = forward

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    recorder.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield recorder
    finally:
        server.shutdown()
        client.close()


def json_of(raw: bytes) -> Any:
    """The value; text where it is none, and None where there is nothing."""
    if not raw:
        return None
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")


def routes(exchanges: list[dict[str, Any]]) -> dict[str, int]:
    """How often each route was called."""
    counted: dict[str, int] = {}
    for exchange in exchanges:
        route = f"{exchange['request']['method']} {exchange['request']['path']}"
        counted[route] = counted.get(route, 0) + 1
    return dict(sorted(counted.items()))


def kept(exchanges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first exchange of each form: route, fields of the request, status."""
    found: dict[str, dict[str, Any]] = {}
    for exchange in exchanges:
        request, body = exchange["request"], exchange["request"]["body"]
        fields = sorted(body) if isinstance(body, dict) else []
        form = json.dumps(
            [request["method"], request["path"], request["query"], fields, exchange["response"]["status"]]
        )
        found.setdefault(form, exchange)
    return list(found.values())


def save(file: Path, client: str, version: str, exchanges: list[dict[str, Any]]) -> Path:
    """A fixture: who spoke, and what was said."""
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"client": client, "version": version, "exchanges": exchanges}
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return file
