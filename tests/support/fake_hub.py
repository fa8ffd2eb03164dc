"""A Hugging Face hub on this machine: what huggingface-hub asks for one model, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSALS = {  # owner -> (status, the hub's code for it)
    "gated": (403, "GatedRepo"),
    "nobody": (404, "RepoNotFound"),
    "broken": (500, ""),
}


class FakeHub:
    """`with FakeHub({"org/name": {"config.json": b"{}"}}) as hub:`; `fetched` are the files whose content was sent."""

    def __init__(self, models: Mapping[str, Mapping[str, bytes]], token: str | None = None) -> None:
        """With a `token`, models are shown to who sends it."""
        self.fetched: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

            def _answer(self, body: bool) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                api = parts[:2] == ["api", "models"]
                owner, name, *rest = parts[2:] if api else parts
                files = models.get(f"{owner}/{name}")
                if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                    return self._refuse(401, "RepoNotFound")
                if files is None:
                    return self._refuse(*REFUSALS.get(owner, REFUSALS["nobody"]))
                if api and rest[:1] in ([], ["revision"]):
                    if rest[1:] not in ([], ["main"], ["v1"], [COMMIT]):
                        return self._refuse(404, "RevisionNotFound")
                    shown = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": f} for f in files]}
                    return self._send(json.dumps(shown).encode(), "application/json")
                if api and rest[0] == "tree":
                    listed = [
                        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for path, data in files.items()
                    ]
                    return self._send(json.dumps(listed).encode(), "application/json")
                path = "/".join(rest[2:])  # resolve/COMMIT/…
                if rest[:1] != ["resolve"] or path not in files:
                    return self._refuse(404, "EntryNotFound")
                if body:
                    hub.fetched.append(path)
                tag = hashlib.sha1(files[path]).hexdigest()
                self._send(files[path] if body else b"", "application/octet-stream", len(files[path]), tag)

            def _send(self, data: bytes, kind: str, length: int | None = None, tag: str = "") -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data) if length is None else length))
                self.send_header("X-Repo-Commit", COMMIT)
                if tag:
                    self.send_header("ETag", f'"{tag}"')
                self.end_headers()
                self.wfile.write(data)

            def _refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
