"""What a row with a grammar costs the rows beside it: `python -m tandem.benchmarks.grammar_rows`.

63 plain rows and one under a JSON schema against 64 plain ones, in turns on one engine: milliseconds and processor
milliseconds (of all threads, those that find masks included) per decode step of the plain rows. The schema's list has
no end that the answer could reach, so that the row is there in every step that it may have. In `ahead` the device runs
ahead of the host and the row sits out every second step.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from ..server.engine.hub import Hub
from ..server.engine.options import DEMO, EngineOptions, ModelSpec
from ..server.engine.request import Request, Sampling
from ..server.text import grammar as grammars
from ..server.text.matching import load_grammars
from .bench.stats import interleaved, spread

ROWS, PROMPT = 64, 16
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 10_000}


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one decode step, in milliseconds."""

    wall: float
    cpu: float


def measure(hub: Hub, grammar: str, steps: int) -> Cost:
    """`steps` is even: with two steps ahead and beside, the row with the grammar is in one."""
    tokens = steps + 64
    plain = Sampling(max_tokens=tokens, seed=1, ignore_eos=True)
    first = Sampling(max_tokens=tokens, seed=1, grammar=grammar) if grammar else plain
    engine = hub.engines[0]
    for number in range(ROWS):
        prompt = [300 + (number * PROMPT + place) % 1000 for place in range(PROMPT)]
        refused = hub.submit(Request(number, "m", prompt, plain if number else first))
        assert not refused, refused
    while engine.decoding < ROWS:
        hub.step()
    for _ in range(8):
        hub.step()
    cpu, began = time.process_time(), time.perf_counter()
    for _ in range(steps):
        hub.step()
    cost = Cost(1e3 * (time.perf_counter() - began) / steps, 1e3 * (time.process_time() - cpu) / steps)
    assert engine.decoding == ROWS, "a row ended too early"
    for number in range(ROWS):
        hub.abort(number)
    while hub.has_work:
        hub.step()
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO / "policy"), help="directory of a checkpoint with a tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    steps = options.steps + options.steps % 2
    print("| runner | rows | ms per step | CPU ms per step | beside 64 plain, ms | beside 64 plain, CPU |")
    print("|---|---|---|---|---|---|")
    for ahead in (False, True) if options.device == "cpu" else (True,):
        given = EngineOptions(threads=options.threads, run_ahead=ahead, device=options.device, max_model_len=512)
        hub = Hub.load([ModelSpec("m", options.model)], given, grammars=load_grammars)
        grammar = grammars.of_schema(SCHEMA)
        sides = {
            "64 plain": lambda _, hub=hub: measure(hub, "", steps),
            "63 plain, 1 with a grammar": lambda _, hub=hub, grammar=grammar: measure(hub, grammar, steps),
        }
        found = interleaved(sides, options.rounds)
        medians = {
            name: Cost(spread([one.wall for one in costs]).median, spread([one.cpu for one in costs]).median)
            for name, costs in found.items()
        }
        base = medians["64 plain"]
        for name, cost in medians.items():
            figures = f"{cost.wall:.2f} | {cost.cpu:.2f} | {cost.wall / base.wall:.3f} × | {cost.cpu / base.cpu:.3f} ×"
            print(f"| {'ahead' if ahead else 'waiting'} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
