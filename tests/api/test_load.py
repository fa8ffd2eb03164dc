"""Many at once, readers that leave, readers that do not read."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import openai

LONG = {"prompt": "The", "max_tokens": 1000, "ignore_eos": True, "temperature": 0}
STREAMS = 200


async def test_parallel_streams_say_what_each_says_alone(aclient: openai.AsyncOpenAI) -> None:
    def ask(number: int, stream: bool):
        return aclient.chat.completions.create(
            model="policy",
            messages=[{"role": "user", "content": f"{number} " * (1 + number % 7)}],
            max_tokens=5 + number % 8,
            seed=number,
            temperature=0 if number % 5 == 0 else 1,
            top_p=0.9 if number % 2 else 1,
            stream=stream,
        )

    async def streamed(number: int) -> str:
        return "".join([c.choices[0].delta.content or "" async for c in await ask(number, True) if c.choices])

    alone = [(await ask(number, False)).choices[0].message.content for number in range(STREAMS)]
    together = await asyncio.gather(*map(streamed, range(STREAMS)))
    assert together == alone


async def test_a_huge_text_keeps_nobody_waiting(server: str) -> None:
    text = "".join(map(str, range(150_000)))  # 0.8 MB: encoded in the event loop, it would stop that for seconds
    bodies = [
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": ["x" * 5000] * 200}),
        ("/v1/completions", {"prompt": "x", "bad_words": [text]}),
        ("/v1/chat/completions", {"messages": [{"role": text, "content": "Hi"}]}),
    ]
    async with httpx.AsyncClient(base_url=server, timeout=60) as http:
        for path, body in bodies:
            asked = asyncio.create_task(http.post(path, json=body))
            longest = 0.0
            while not asked.done():
                began = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                longest = max(longest, time.monotonic() - began)
            assert (await asked).status_code == 400
            assert longest < 1, (path, list(body))


async def run_time(http: httpx.AsyncClient, body: dict) -> float:
    began = time.monotonic()
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    return time.monotonic() - began


async def test_whoever_leaves_frees_the_engine(narrow_http: httpx.AsyncClient) -> None:
    """The server runs one sequence at a time: an engine that went on for those who left would let the next one wait."""
    http = narrow_http
    whole = await run_time(http, LONG)
    began = time.monotonic()
    for body in (LONG, {**LONG, "prompt": ["The"] * 8}, {**LONG, "n": 4}):
        for stream in (False, True):
            asked = asyncio.create_task(http.post("/v1/completions", json={**body, "stream": stream}))
            await asyncio.sleep(whole / 20)
            asked.cancel()
            await asyncio.wait([asked])
    async with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        await anext(answer.aiter_lines())
    await run_time(http, {**LONG, "max_tokens": 1})
    assert time.monotonic() - began < 5 * whole  # 27 such answers were asked for


async def test_a_reader_that_does_not_read_is_aborted(narrow_http: httpx.AsyncClient) -> None:
    """Its answer is far larger than what its socket holds; others are served once `stream_timeout` is over."""
    body = json.dumps({**LONG, "stream": True, "logprobs": 300}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((narrow_http.base_url.host, narrow_http.base_url.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    try:
        more = f"Authorization: {narrow_http.headers['Authorization']}\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(f"{head}\r\n{more}".encode() + body)
        assert b"200" in await reader.readline()
        await run_time(narrow_http, {**LONG, "max_tokens": 1, "prompt": "b"})
        await asyncio.sleep(2)
        said = await reader.read()
        assert said.count(b"data: ") > 10 and b"[DONE]" not in said  # it was ended in the middle, not held for it
    finally:
        writer.close()


async def test_a_full_queue_is_said(narrow_http: httpx.AsyncClient) -> None:
    """One runs and eight may wait; the others are told to come back."""
    asked = [narrow_http.post("/v1/completions", json={**LONG, "max_tokens": 100}) for _ in range(16)]
    answers = await asyncio.gather(*asked)
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses[0] == 200 and statuses[-1] == 429
    full = next(answer for answer in answers if answer.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["type"] == "rate_limit_error"
    assert (await narrow_http.post("/v1/completions", json={**LONG, "max_tokens": 1})).status_code == 200
