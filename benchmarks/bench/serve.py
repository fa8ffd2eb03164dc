"""`tandem bench serve`: one or several OpenAI-compatible servers under load, one after the other and in turns.

A run is a process of its own that sends the load (client.py), while this one sleeps on a pipe and looks at the server's
processes before the first request and after the last answer (processes.py). Several servers are measured A B, B A,
A B, …; ratios are taken round by round. Prompts differ from round to round, so that no prefix cache answers round 2
from round 1.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from . import metrics, processes
from .client import Load, Outcome
from .metrics import Result
from .prompts import (
    ASK_SECONDS,
    Bodies,
    Prompts,
    ServeError,
    ServeOptions,
    Side,
    agree,
    first_answer,
    model_of,
    patiently,
    tokenizer_for,
)
from .result import describe
from .stats import Spread, interleaved, ratio, spread

CACHED_LIMIT = 0.05  # share of prompt tokens: short prompts may begin alike by chance
CPU = "cpu_us_per_output_token"
RATIOS = ("output_throughput", "request_throughput", "request_goodput", CPU)
RATIOS += tuple(f"{kind}_{name}_ms" for name in metrics.METRICS for kind in ("median", "p90", "p99"))


def run(options: ServeOptions, tell: Callable[[str, int, int], None] = lambda what, done, of: None) -> Result:
    """Measures all sides; raises ServeError. Requests that fail are in the result, with the servers' reasons.

    `tell(what, done, of)` hears of progress: which run, how many requests of it have ended, of how many.
    """
    checked = not options.insecure
    with httpx.Client(timeout=ASK_SECONDS, headers=dict(options.headers), verify=checked, trust_env=False) as http:
        patience = options.ready_timeout
        models = {side.name: patiently(partial(model_of, side, options, http), patience) for side in options.sides}
        prompts = Prompts(options, tokenizer_for(options, models[options.sides[0].name]))
        bodies = Bodies(options, {name: model["id"] for name, model in models.items()}, prompts)
        for side in options.sides if patience else ():
            patiently(partial(first_answer, side, options, bodies, http), patience)
        agree(options, bodies, http)

    def one(side: Side) -> Callable[[int], Result]:
        return lambda number: _measure(
            side, number, options, bodies, lambda *at: tell(f"{side.name} {number + 1}", *at)
        )

    runs = interleaved({side.name: one(side) for side in options.sides}, options.runs, warmups=0)
    return _result(options, models, prompts, bodies, runs)


def _measure(
    side: Side, number: int, options: ServeOptions, bodies: Bodies, tell: Callable[[int, int], None]
) -> Result:
    load, input_lens = bodies.load(side, number)
    pid = side.pid or processes.listener(side.url)
    looks: list[tuple[dict[int, processes.Process], float, float]] = []

    def look() -> None:
        looks.append((processes.tree(pid) if pid else {}, processes.machine_seconds(), time.process_time()))

    outcome = send(load, look, lambda done: tell(done, len(load.bodies)))
    tell(len(load.bodies), len(load.bodies))
    found = metrics.measure(outcome, input_lens, options.selection)
    (before, all_before, own_before), (after, all_after, own_after) = looks
    used = processes.used(before, after)
    server = sum(process.cpu_seconds for process in used)
    others = all_after - all_before - server - outcome.cpu_seconds - (own_after - own_before)
    found["tandem"]["server"] = _server(side, pid, after, used, found["total_output_tokens"])
    found["tandem"]["others_cpu_cores"] = max(0.0, others) / found["duration"]
    found["tandem"]["doubts"] = metrics.doubts(found, options.on_time)
    share = found["tandem"]["prefix_cache_share"] or 0.0
    if options.dataset.name == "random" and not options.dataset.prefix_len and share > CACHED_LIMIT:
        found["tandem"]["doubts"].append(
            f"{share:.0%} of the prompt tokens came from a prefix cache, though these prompts have no common prefix: "
            "the server was asked them before (another --seed draws others)"
        )
    return found


def _server(
    side: Side,
    pid: int | None,
    after: Mapping[int, processes.Process],
    used: Sequence[processes.Used],
    tokens: int,
) -> Result:
    if pid is None:
        host = urlsplit(side.url).hostname or ""
        where = "no process that this user may look at listens there" if processes.is_local(host) else "another machine"
        return {"not_measured": f"{where} (--pid {side.name}=PID)"}
    if pid not in after:
        return {"not_measured": f"process {pid} has ended"}
    seconds = sum(process.cpu_seconds for process in used)
    return {
        "pid": pid,
        "cpu_seconds": seconds,
        CPU: 1e6 * seconds / tokens if tokens else None,
        "peak_rss": sum(process.peak_rss for process in used),
        "processes": [
            asdict(process) | {CPU: 1e6 * process.cpu_seconds / tokens if tokens else None} for process in used
        ],
    }


def send(load: Load, look: Callable[[], None], tell: Callable[[int], None]) -> Outcome:
    """The load from a process of its own. `look` is called before the first request and after the last answer."""
    command = [sys.executable, "-m", f"{__package__}.client"]
    # Ctrl-C is for this process, which then ends the child.
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(msgspec.json.encode(load) + b"\n")
        child.stdin.flush()
        for line in child.stdout:
            said = msgspec.json.decode(line)
            match said["event"]:
                case "ready":
                    look()
                    child.stdin.write(b"go\n")
                    child.stdin.flush()
                case "ended":
                    look()
                    return msgspec.json.decode(child.stdout.read(), type=Outcome)
                case _:
                    tell(said["done"])
        raise ServeError(f"the client's process ended with status {child.wait()}; its last words are above")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        with suppress(BrokenPipeError):
            child.stdin.close()


def _result(
    options: ServeOptions,
    models: Mapping[str, Mapping[str, Any]],
    prompts: Prompts,
    bodies: Bodies,
    runs: Mapping[str, list[Result]],
) -> Result:
    """Settings, then every side with its runs; the figures of a single side stand at the top, as in vLLM's files."""
    arrivals = options.arrivals
    rate = arrivals.request_rate
    result: Result = {
        "benchmark": "serve",
        **describe(),
        "endpoint": options.endpoint,
        "model_id": models[options.sides[0].name]["id"],
        "tokenizer_id": options.tokenizer,
        "num_prompts": options.dataset.count,
        "request_rate": "inf" if rate == math.inf else rate,
        "burstiness": "inf" if arrivals.burstiness == math.inf else arrivals.burstiness,
        "max_concurrency": options.max_concurrency,
        "seed": options.seed,
        "dataset": {**asdict(options.dataset), "path": str(options.dataset.path) if options.dataset.path else None},
        "prompts_sent_as": "messages" if options.is_chat else "token ids" if bodies.with_ids else "text",
        "prompts_repeated": prompts.repeated,
        "fields_left_out": bodies.left_out,
        "cores": os.cpu_count(),
    }
    if arrivals.ramp_up_strategy is not None:
        for name in ("ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps"):
            result[name] = getattr(arrivals, name)
    if arrivals.burst is not None:
        result |= {"burst": arrivals.burst, "burst_every": arrivals.burst_every}
    sides: Result = {}
    for side in options.sides:
        found = runs[side.name]
        sides[side.name] = {
            "url": side.url,
            "model_id": models[side.name]["id"],
            **metrics.median_of(found),
            **({"spreads": spreads(found)} if options.runs > 1 else {}),
            "runs": found,
        }
    if len(sides) == 1:
        (only,) = sides.values()
        return result | {name: value for name, value in only.items() if name != "runs" or options.runs > 1}
    return result | {"sides": sides, "ratios": ratios(runs)}


def ratios(runs: Mapping[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """Of the first side's figures over those of every other, round by round: by "first / other", then by figure."""
    first, *others = runs
    found: dict[str, dict[str, Any]] = {}
    for other in others:
        about: dict[str, Any] = {}
        for name in RATIOS:
            above, below = _figures(runs[first], name), _figures(runs[other], name)
            if len(above) == len(below) == len(runs[first]) and all(above) and all(below):
                about[name] = asdict(ratio(above, below))
        found[f"{first} / {other}"] = about
    return found


def _figures(runs: Sequence[Result], name: str) -> list[float]:
    """Of the runs that have it."""
    found = [one["tandem"]["server"].get(name) if name == CPU else one.get(name) for one in runs if one["completed"]]
    return [value for value in found if metrics.is_figure(value)]


def spreads(runs: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Of the figures that ratios are taken of, over the runs that have them."""
    found: dict[str, Spread] = {name: spread(values) for name in RATIOS if (values := _figures(runs, name))}
    return {name: asdict(one) for name, one in found.items()}
