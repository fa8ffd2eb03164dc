"""`tandem chat` against a small server that streams as the real one does."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from tandem.server.chat import ChatOptions, chat, events

USAGE = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}


@dataclass
class Backend:
    """What the server was asked and what it shall answer: pieces of text, exceptions of its own, raw bytes."""

    answers: list[list[Any]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    status: int = 200
    url: str = ""
    hung_up: threading.Event = field(default_factory=threading.Event)


def chunk(text: str | None, finish: str | None = None) -> bytes:
    body = {"choices": [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}]}
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n".encode()


@pytest.fixture
def backend() -> Iterator[Backend]:
    state = Backend()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send(200, {"data": [{"id": "reward"}, {"id": "policy", "sampling_defaults": {}}]})

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            state.keys.append(self.headers.get("Authorization"))
            state.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if state.status != 200:
                self.send(state.status, {"error": {"message": "that\nis wrong", "type": "x"}})
                return
            self.send_response(200)
            self.end_headers()
            try:
                for part in state.answers.pop(0):
                    self.wfile.write(chunk(part) if isinstance(part, str) else part() if callable(part) else part)
                    self.wfile.flush()
                self.wfile.write(b": still here\n\n" + chunk(None, "stop"))
                self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\ndata: [DONE]\n\n".encode())
            except (BrokenPipeError, ConnectionResetError):
                state.hung_up.set()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def run(backend: Backend, lines: list[str | type[BaseException]], **options: Any) -> tuple[int, str]:
    waiting = iter([*lines, EOFError])

    def read() -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    file = io.StringIO()
    status = chat(ChatOptions(**{"url": backend.url} | options), Console(file=file, soft_wrap=True), read)
    return status, file.getvalue()


def roles(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_a_conversation(backend: Backend) -> None:
    backend.answers = [["Hi ", "[b]there[/b]\n", "\ttab 你好 :smile:"], ["Fine."], ["Again."]]
    lines = ["hello", "how are you", "/reset", "/system Be brief.", "third", "/what", "", "/exit", "never"]
    status, shown = run(backend, lines, system="Be kind.", temperature=0.5, max_tokens=9, stats=True, api_key="k")
    assert status == 0
    assert "Hi [b]there[/b]\n\ttab 你好 :smile:" in shown and "5 → 3 tokens · first after" in shown
    first = [("system", "Be kind."), ("user", "hello")]
    assert roles(backend.bodies[0]) == first
    said = ("assistant", "Hi [b]there[/b]\n\ttab 你好 :smile:")
    assert roles(backend.bodies[1]) == [*first, said, ("user", "how are you")]
    assert roles(backend.bodies[2]) == [("system", "Be brief."), ("user", "third")]
    assert len(backend.bodies) == 3
    assert backend.keys[0] == "Bearer k"
    wanted = {"model": "policy", "temperature": 0.5, "max_tokens": 9, "stream": True}
    assert wanted.items() <= backend.bodies[0].items()


def test_one_question(backend: Backend) -> None:
    backend.answers = [["42"]]
    status, shown = run(backend, [], prompt="6 * 7?", model="mine", url=backend.url.removesuffix("/v1") + "/")
    assert (status, shown.strip()) == (0, "42")
    assert backend.bodies[0]["model"] == "mine" and "temperature" not in backend.bodies[0]


def test_control_characters_do_not_reach_the_terminal(backend: Backend) -> None:
    backend.answers = [["a\x1b[2Jb\x07\x9b\rc", b'data: {"choices": [{"delta": {"content": "\\ud83d"}}]}\n\n']]
    _, shown = run(backend, [], prompt="x")
    assert shown.strip() == "a\ufffd[2Jb\ufffd\ufffd\ufffdc\ufffd"


def test_ctrl_c_ends_the_answer_and_keeps_the_conversation(backend: Backend) -> None:
    def interrupt() -> bytes:
        time.sleep(0.2)  # until the piece before is shown
        os.kill(os.getpid(), signal.SIGINT)
        return b""

    def until_hung_up() -> bytes:
        time.sleep(0.05)
        return b": waiting\n\n"

    backend.answers = [["Once upon", interrupt, *[until_hung_up] * 100], ["Yes."]]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, shown = run(backend, ["a story", KeyboardInterrupt, "sure?"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert status == 0
    assert "Once upon [stopped]" in shown and "Ctrl-D ends" in shown and "Yes." in shown
    said = [("user", "a story"), ("assistant", "Once upon"), ("user", "sure?")]
    assert roles(backend.bodies[1]) == said
    assert backend.hung_up.wait(5)


def test_an_error_is_one_line_and_the_turn_is_forgotten(backend: Backend) -> None:
    backend.status = 400
    status, shown = run(backend, ["x"])
    assert status == 0 and "400: that is wrong\n" in shown
    backend.status = 401
    status, shown = run(backend, [], prompt="x")
    assert (status, shown) == (1, "401: that is wrong (--api-key)\n")
    backend.status, backend.answers = 200, [[b'data: {"error": {"message": "gone"}}\n\n'], ["ok"]]
    status, shown = run(backend, ["x", "y"])
    assert "gone\n" in shown and roles(backend.bodies[-1]) == [("user", "y")]


def test_no_server_is_said_with_the_command_that_starts_one() -> None:
    file = io.StringIO()
    status = chat(ChatOptions(url="http://127.0.0.1:1", prompt="x"), Console(file=file, soft_wrap=True))
    assert status == 1
    assert file.getvalue().count("\n") == 1 and "`tandem serve`" in file.getvalue()


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://", "ftp://x", "http://[::"])
def test_a_url_that_is_none_is_an_error(url: str) -> None:
    file = io.StringIO()
    assert chat(ChatOptions(url=url, prompt="x"), Console(file=file, soft_wrap=True)) == 1
    assert file.getvalue().count("\n") == 1


def test_something_else_behind_the_url(backend: Backend) -> None:
    backend.answers = [[b"data: <html>\n\n"]]
    status, shown = run(backend, [], prompt="x")
    assert status == 1 and "OpenAI API" in shown


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_whatever_the_chunks(size: int) -> None:
    text = 'data: {"a": "ü\u2028\x85b"}\r\n\r\n: comment\n\nevent: x\ndata:one\ndata: two\n\nid: 3\n\ndata: [DONE]\n\n'
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(events(chunks)) == ['{"a": "ü\u2028\x85b"}', "one\ntwo", "[DONE]"]
