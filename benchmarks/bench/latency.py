"""`tandem bench latency`: how long one batch of fixed lengths takes, from handing it over to its last token.

The lines and JSON keys of vLLM's `bench latency` come first; below the line that begins with `Tandem:` stand the time
to the first token (TTFT: median over the batch, then over the iterations) and per output token after it (TPOT).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from . import offline, result
from .datasets import FIRST_ID
from .limits import Held, Limits
from .models import UsageError, is_null, path_of
from .offline import Load
from .progress import progress
from .sides import LimitsOf, Sample, Setup, Side, Watch, held_of, opened
from .stats import interleaved, percentile, spread

PERCENTILES = (10, 25, 50, 75, 90, 99)


def batch(setup: Setup, size: int, input_len: int, output_len: int, n: int, seed: int) -> Load:
    """Raises UsageError where the lengths exceed the model's context."""
    path = path_of(setup.model)
    context, vocab_size = offline.sizes_of(path_of("demo") if is_null(path) else path)
    if input_len + output_len > context and not is_null(path):
        raise UsageError(
            f"--input-len {input_len} and --output-len {output_len} exceed the model's context of {context}: lower one"
        )
    draw = random.Random(seed)
    ids = [draw.choices(range(FIRST_ID, vocab_size), k=input_len) for _ in range(size)]
    return Load(ids, [output_len] * size, n)


def latency(setup: Setup, load: Load) -> dict[str, Any]:
    """The result as JSON. Raises UsageError and what the engines raise where they cannot be measured."""
    held = held_of(setup)
    limits = LimitsOf(setup, held)
    with opened(setup) as sides:
        samples = run(setup, sides, load)
        told = {name: side.told for name, side in sides.items()}
    return summary(setup, load, samples, told, held, limits.after()) | result.describe(setup.device)


def run(setup: Setup, sides: Mapping[str, Side], load: Load) -> dict[str, list[Sample]]:
    with progress("latency", (setup.runs + setup.warmups) * len(sides)) as show:
        done = 0

        def once(name: str, side: Side) -> Callable[[int], Sample]:
            def call(number: int) -> Sample:
                nonlocal done
                watch = Watch()
                sample = side.generate(load.token_ids, load.output_lens, n=load.n)
                sample = replace(sample, others=watch.others(sample.cpu_seconds))
                done += 1
                show(done, name)
                return sample

            return call

        return interleaved({name: once(name, side) for name, side in sides.items()}, setup.runs, setup.warmups)


def summary(
    setup: Setup,
    load: Load,
    samples: Mapping[str, Sequence[Sample]],
    told: Mapping[str, dict[str, Any]],
    held: Held | None,
    limits: Limits | None,
) -> dict[str, Any]:
    """vLLM's keys are those of the first engine; ours follow."""
    seconds = {name: [sample.seconds for sample in found] for name, found in samples.items()}
    taken = seconds[setup.engines[0]]
    found: dict[str, Any] = {
        "model_id": setup.model,
        "avg_latency": sum(taken) / len(taken),
        "latencies": taken,
        "percentiles": {str(p): percentile(taken, p) for p in PERCENTILES},
        "benchmark": "latency",
        "batch_size": len(load.token_ids),
        "input_len": len(load.token_ids[0]),
        "output_len": load.output_lens[0],
        "n": load.n,
        "runs": setup.runs,
        "warmups": setup.warmups,
        "engines": {name: told[name] | figures(load, samples[name], held, limits) for name in samples},
        "ratios": offline.ratios(seconds),
    }
    if limits is not None:
        found["limits"] = limits.as_json()
    return found


def figures(load: Load, samples: Sequence[Sample], held: Held | None, limits: Limits | None) -> dict[str, Any]:
    found = offline.figures(load, samples, held, limits)
    found["latency_seconds"] = asdict(spread([sample.seconds for sample in samples]))
    between = [percentile(sample.between, 50) for sample in samples if sample.between]
    if not between and load.output_lens[0] > 1:  # an engine that tells its first token alone
        between = [(s.seconds - s.firsts[0]) / (load.output_lens[0] - 1) for s in samples if s.firsts]
    if between:
        found["time_per_output_token_seconds"] = asdict(spread(between))
    return found


def lines(found: dict[str, Any]) -> list[str]:
    first, *others = found["engines"]
    shown = [f"Avg latency: {found['avg_latency']} seconds"]
    shown += [f"{p}% percentile latency: {value} seconds" for p, value in found["percentiles"].items()]
    shown.append(offline.headline(found, found["engines"][first]))
    for name in (first, *others):
        own, before = found["engines"][name], f"{name}: " if others else ""
        shown.append(offline.row(f"{before}latency", offline.text_of_spread(own["latency_seconds"], " ms", 1e3)))
        if "time_per_output_token_seconds" in own:
            text = offline.text_of_spread(own["time_per_output_token_seconds"], " ms", 1e3)
            shown.append(offline.row(f"{before}time per output token after the first", text))
        shown += offline.of_engine(name if others else "", own)
    return shown + offline.closing(found)
