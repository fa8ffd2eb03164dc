"""What a step costs the engine's process besides the model: by running sequences, and by waiting requests.

    python -m tandem.benchmarks.bench.scaling --save benchmarks/results/scaling

Runs what the engine's loop runs (`engine/process.serve`): expire, plan, launch, advance, resolve, pack, send, with the
null model, whose draws are a table look-up, and with a second process at the other end of the socket that only empties
it. Processor time is the whole process's, ZMQ's thread included.

steady     every sequence decodes and none ends
mixed      answers end after `--answer` tokens on average and each is followed by a new request at once
waiting    64 sequences run, mixed, while 1 … 4,096 requests wait: does a step know how many?
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import zmq

from ...server.engine.hub import Hub
from ...server.engine.link import WORKER_SHIFT
from ...server.engine.link_server import EngineServer
from ...server.engine.options import EngineOptions, ModelSpec
from ...server.engine.request import Request, Sampling
from . import markdown, result
from .stats import Spread, spread

PROMPT = 64  # tokens
TAIL = [random.Random(1).randrange(300, 2000) for _ in range(PROMPT - 2)]
WORKER = 1
RUNNING = (1, 4, 16, 64, 128, 256)
WAITING = (1, 4, 16, 64, 256, 1024, 4096)
PARTS = (("scheduler", "plan"), ("runner", "launch"), ("scheduler", "advance"), ("scheduler", "resolve"))


def drain(address: str) -> None:
    """An API worker that reads nothing of what it is sent."""
    from ...server.engine.link import Hello, msgspec

    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.ROUTING_ID, str(WORKER).encode())
    socket.connect(address)
    socket.send(msgspec.msgpack.encode(Hello(1)))
    while True:
        socket.recv()


class Loop:
    """The engine's loop without the requests' way in: these are submitted by the benchmark."""

    def __init__(self, sequences: int, waiting: int, answer: int | None, ahead: bool, server: EngineServer) -> None:
        """`answer`: tokens on average; None: answers that do not end while this runs."""
        options = EngineOptions(
            max_num_seqs=sequences,
            max_num_batched_tokens=max(8192, sequences),
            max_waiting_requests=8192,
            run_ahead=ahead,
            kv_cache_memory_bytes=1 << 30,
        )
        self.hub = Hub.load([ModelSpec("null", "null")], options)
        self.server = server
        self._answer = answer
        self._random = random.Random(0)
        self._number = 0
        self.tokens = 0
        for _ in range(sequences + waiting):
            self.submit()
        self.run(8 if answer is None else 2 * answer)  # all prompts are computed, and ends are spread out

    def submit(self) -> None:
        self._number += 1
        first = divmod(self._number, 1000)  # no two prompts begin alike: nothing is found in the prefix cache
        prompt = [300 + first[0], 300 + first[1], *TAIL]
        length = 8000 if self._answer is None else self._random.randint(1, 2 * self._answer - 1)
        sampling = Sampling(max_tokens=length, seed=self._number, ignore_eos=True)
        refused = self.hub.submit(Request((WORKER << WORKER_SHIFT) + self._number, "null", prompt, sampling))
        assert not refused, refused

    def run(self, steps: int) -> None:
        hub, server = self.hub, self.server
        for _ in range(steps):
            server.receive(0.0)
            early = hub.expire(time.monotonic())
            outputs = hub.step()
            outputs.others += early
            server.send(outputs)
            server.beat()
            if self._answer is not None:
                for output in outputs.others:
                    if output.finish is not None:
                        self.submit()


def per_step(loop: Loop, steps: int, rounds: int) -> Spread:
    """Processor seconds of a step."""
    found: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        loop.run(steps)
        found.append((time.process_time() - began) / steps)
    return spread(found)


def parts_of(loop: Loop, steps: int) -> dict[str, float]:
    """Microseconds of a step by what they were spent on: medians of the calls' wall time, the clock's own included."""
    engine = loop.hub.engines[0]
    spent: dict[str, list[int]] = {}

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter_ns()
            value = call(*arguments)
            spent.setdefault(name, []).append(time.perf_counter_ns() - began)
            return value

        return timed

    owners: list[tuple[Any, str]] = [(getattr(engine, owner), name) for owner, name in PARTS]
    owners.append((loop.server, "send"))
    for owner, name in owners:
        setattr(owner, name, watched(name, getattr(owner, name)))
    step = watched("whole", loop.run)
    for _ in range(steps):
        step(1)
    for owner, name in owners:
        delattr(owner, name)
    found = {name: median(values) / 1000 for name, values in spent.items()}
    whole = found.pop("whole")
    found["else"] = max(whole - sum(found.values()), 0.0)
    return {name: round(value, 2) for name, value in found.items()}


def micro(value: Spread) -> dict[str, float]:
    return {name: round(getattr(value, name) * 1e6, 1) for name in ("median", "low", "high")}


def measure(options: argparse.Namespace, server: EngineServer) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(options, name) for name in ("answer", "steps", "rounds")}

    def one(kind: str, sequences: int, waiting: int, answer: int | None, ahead: bool) -> None:
        gc.unfreeze()
        gc.collect()
        loop = Loop(sequences, waiting, answer, ahead, server)
        gc.collect()
        gc.freeze()  # as engine/process.py does once it has loaded
        cost = per_step(loop, options.steps, options.rounds)
        row: dict[str, Any] = {"running": sequences, "waiting": waiting, "cpu_us_per_step": micro(cost)}
        row["parts_us"] = parts_of(loop, options.steps)
        stats = loop.hub.engines[0].stats
        assert stats.running + stats.waiting == sequences + waiting, stats
        found.setdefault(kind, []).append(row)
        print(f"  {kind:14}{sequences:5} run {waiting:5} wait  {row['cpu_us_per_step']['median']:8.1f} µs", flush=True)

    for sequences in RUNNING:
        one("steady", sequences, 0, None, False)
        one("steady_ahead", sequences, 0, None, True)
        one("mixed", sequences, 0, options.answer, False)
    for waiting in WAITING:
        one("waiting", 64, waiting, options.answer, False)
    few, many = (found["waiting"][at]["cpu_us_per_step"]["median"] for at in (0, -1))
    found["waiting_4096_to_1"] = round(many / few, 3)
    return found


def table(found: dict[str, Any]) -> str:
    """Medians in Markdown, with the middle 80 % of the rounds."""
    parts = list(found["steady"][0]["parts_us"])
    lines = [
        "| kind | running | waiting | CPU µs per step | " + " | ".join(parts) + " |",
        "|---" * (4 + len(parts)) + "|",
    ]
    for kind in ("steady", "steady_ahead", "mixed", "waiting"):
        for row in found[kind]:
            cost = row["cpu_us_per_step"]
            shown = f"{cost['median']:.0f} ({cost['low']:.0f}–{cost['high']:.0f})"
            timed = " | ".join(f"{row['parts_us'][name]:.0f}" for name in parts)
            lines.append(f"| {kind} | {row['running']} | {row['waiting']} | {shown} | {timed} |")
    ratio = found["waiting_4096_to_1"]
    return "\n".join(
        [*lines, "", f"A step with {WAITING[-1]:,} waiting costs {ratio:.2f} times one with {WAITING[0]}."]
    )


def draw(found: dict[str, Any], path: Path) -> None:
    """Both curves as one picture. Raises ImportError where matplotlib is not installed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind in ("steady", "steady_ahead", "mixed"):
        left.plot(
            [row["running"] for row in found[kind]],
            [row["cpu_us_per_step"]["median"] for row in found[kind]],
            marker="o",
            label=kind.replace("_", ", a step "),
        )
    left.set(xlabel="running sequences", ylabel="CPU µs per step", title="A step, the model not counted")
    left.axhline(150, color="grey", linestyle=":", label="goal at 256")
    left.legend()
    rows = found["waiting"]
    middle = [row["cpu_us_per_step"]["median"] for row in rows]
    spans = [[row["cpu_us_per_step"][name] for row in rows] for name in ("low", "high")]
    right.plot([row["waiting"] for row in rows], middle, marker="o")
    right.fill_between([row["waiting"] for row in rows], *spans, alpha=0.2)
    right.set(xlabel="waiting requests", xscale="log", title="64 sequences run, requests end and start", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--answer", type=int, default=100, help="tokens, on average, where answers end")
    parser.add_argument("--label", default="", help="kept with the result")
    parser.add_argument("--save", type=Path, help="writes this path with .json, .md and .png behind it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-") as directory:
        server = EngineServer(directory, epoch=1)
        reader = multiprocessing.get_context("spawn").Process(
            target=drain, args=(f"ipc://{directory}/engine-1",), daemon=True
        )
        reader.start()
        while not server.receive(0.1) and not server._open:  # pyright: ignore[reportPrivateUsage]
            pass
        try:
            found = {"benchmark": "scaling", "label": options.label, **result.describe(), **measure(options, server)}
        finally:
            reader.kill()
            server.close()
    if options.save:
        result.save(options.save.with_suffix(".json"), found)
        markdown.write(options.save, found, "What a step costs besides the model", table(found))
        draw(found, options.save.with_suffix(".png"))
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
