"""The process that loads a server, and the clock beside it: `python -m tandem.benchmarks.bench.client`.

It does as little as it can, for what it does late is measured as the server's delay: requests come as finished bytes,
the collector of garbage is off during the run, an event costs a split and a typed JSON decoding. What it costs itself
(CPU time, the busiest second, how late its timers fire) is part of the result.

One line of JSON comes on stdin (`Load`); on stdout go lines {"event": …}: "ready" (warmed up, waiting for a line on
stdin), "progress", "ended" (the last answer is in) and, as the last line, the `Outcome`.

Times are `time.perf_counter()`: monotonic, and on Linux the same clock in every process.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import sys
import time
from collections.abc import Callable

import aiohttp
import msgspec
import uvloop

from .stream import Answer, Events, StreamError, reason_of, shortened

KEPT = 4.0  # seconds that an unused connection is kept: less than servers do, or a request may meet one that is closing
TICK = 0.05  # seconds between two looks at this process's own CPU time


class Load(msgspec.Struct, frozen=True):
    """What to send, and when."""

    url: str
    bodies: list[str]  # JSON
    moments: list[float]  # seconds after the start, ascending, one per body
    headers: dict[str, str] = {}
    max_concurrency: int | None = None
    warmups: list[str] = []  # bodies that are sent and not measured
    timeout: float = 600.0  # seconds for one answer
    insecure: bool = False  # take any TLS certificate


class Record(msgspec.Struct):
    """One request. Moments are seconds after `start`."""

    due: float  # perf_counter of when it was to be sent
    start: float = 0.0  # perf_counter of when it was sent
    times: list[float] = []  # arrival of every chunk with content; the first is the time to first token
    end: float = 0.0  # arrival of the last chunk of the answer, or of the failure
    prompt_tokens: int | None = None  # None: the server did not say
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    text: str = ""
    error: str = ""  # "": complete


class Outcome(msgspec.Struct):
    records: list[Record]
    began: float  # perf_counter
    ended: float
    cpu_seconds: float  # of this process, all threads, from began to ended
    busiest: float  # CPU seconds per second in the busiest second
    lags: list[float]  # seconds that timers fired late: what an arrival may have lain here unseen
    reads: int  # of sockets
    events: int  # server-sent events


class Client:
    """Sends one load."""

    def __init__(self, load: Load, session: aiohttp.ClientSession) -> None:
        self._load = load
        self._session = session
        self._places = asyncio.Semaphore(load.max_concurrency) if load.max_concurrency else None
        self.reads = self.events = 0
        self.done = self.failed = 0

    async def send_all(self, bodies: list[str], moments: list[float]) -> list[Record]:
        """Every body at its moment; what has been sent before plays no part in that."""
        began = time.perf_counter()
        tasks: list[asyncio.Task[Record]] = []
        for body, moment in zip(bodies, moments, strict=True):
            due = began + moment
            while (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(self._send(body.encode(), due)))
        return [await task for task in tasks]

    async def _send(self, body: bytes, due: float) -> Record:
        record = Record(due)
        if self._places is None:
            await self._ask(body, record)
        else:
            async with self._places:
                await self._ask(body, record)
        self.done += 1
        self.failed += bool(record.error)
        return record

    async def _ask(self, body: bytes, record: Record) -> None:
        record.start = time.perf_counter()
        answer = Answer(record.start)
        try:
            async with self._session.post(self._load.url, data=body) as response:
                if response.status != 200:
                    record.error = f"HTTP {response.status}: {reason_of(await response.read())}"
                elif response.content_type == "application/json":
                    record.error = f"a whole JSON document instead of a stream: {reason_of(await response.read())}"
                else:
                    await self._read(response.content, answer)
                    record.error = answer.missing()
        except StreamError as error:
            record.error = str(error)
        except TimeoutError:
            record.error = f"no complete answer within {self._load.timeout:g} s"
        except aiohttp.ClientPayloadError:
            record.error = "the connection broke in the middle of the answer"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            record.error = shortened(f"{type(error).__name__}: {error}".removesuffix(": "))
        record.times, record.text, record.finish_reason = answer.times, answer.text, answer.finish_reason
        record.prompt_tokens = answer.told("prompt_tokens")
        record.completion_tokens = answer.told("completion_tokens")
        record.cached_tokens = answer.told("prompt_tokens_details", "cached_tokens")
        record.end = time.perf_counter() - record.start if record.error else answer.end

    async def _read(self, content: aiohttp.StreamReader, answer: Answer) -> None:
        stream = Events()
        while data := await content.readany():
            now = time.perf_counter()
            self.reads += 1
            for event in stream.feed(data):
                self.events += 1
                answer.take(event, now)
        for event in stream.close():
            self.events += 1
            answer.take(event, time.perf_counter())


class Watch:
    """What this process costs itself, every TICK seconds; `tell(done, failed)` every fifth time."""

    def __init__(self, client: Client, tell: Callable[[int, int], None]) -> None:
        self._client, self._tell = client, tell
        self.lags: list[float] = []
        self._seen = [(time.perf_counter(), time.process_time())]

    async def run(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self.look()
            self.lags.append(max(0.0, self._seen[-1][0] - due))
            if len(self.lags) % 5 == 0:
                self._tell(self._client.done, self._client.failed)

    def look(self) -> None:
        self._seen.append((time.perf_counter(), time.process_time()))

    def cpu_seconds(self) -> float:
        return self._seen[-1][1] - self._seen[0][1]

    def busiest(self) -> float:
        """CPU seconds per second over at least one second, or over the whole run where that is shorter."""
        return busiest_second(self._seen)


def busiest_second(seen: list[tuple[float, float]]) -> float:
    """The largest share over one second of (moment, CPU time until then); over the whole where it is shorter."""
    (first, used_first), (last, used_last) = seen[0], seen[-1]
    most = (used_last - used_first) / max(last - first, 1e-9) if last - first < 1 else 0.0
    begin = 0
    for moment, used in seen:
        while begin + 1 < len(seen) and moment - seen[begin + 1][0] >= 1:
            begin += 1
        if moment - seen[begin][0] >= 1:
            most = max(most, (used - seen[begin][1]) / (moment - seen[begin][0]))
    return most


async def run(
    load: Load, wait: Callable[[], None] = lambda: None, tell: Callable[[int, int], None] = lambda done, failed: None
) -> Outcome:
    """Warm up, `wait`, then send. Failures are in the records, not raised."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT, ssl=not load.insecure)
    timeout = aiohttp.ClientTimeout(total=load.timeout)
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", **load.headers}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        await Client(load, session).send_all(load.warmups, [0.0] * len(load.warmups))
        wait()
        client = Client(load, session)
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            began = time.perf_counter()
            watch = Watch(client, tell)
            watching = asyncio.create_task(watch.run())
            records = await client.send_all(load.bodies, load.moments)
            ended = time.perf_counter()
            watch.look()
            watching.cancel()
        finally:
            gc.enable()
            gc.unfreeze()
    return Outcome(records, began, ended, watch.cpu_seconds(), watch.busiest(), watch.lags, client.reads, client.events)


def main() -> None:
    def say(event: str, **more: int) -> None:
        sys.stdout.buffer.write(msgspec.json.encode({"event": event, **more}) + b"\n")
        sys.stdout.buffer.flush()

    def wait() -> None:
        say("ready")
        sys.stdin.buffer.readline()

    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every open request is a file
    load = msgspec.json.decode(sys.stdin.buffer.readline(), type=Load)
    outcome = uvloop.run(run(load, wait, lambda done, failed: say("progress", done=done, failed=failed)))
    say("ended")
    sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
