"""Whether `tandem bench serve` and another tool find the same at one server: in turns, ratios of their medians.

`python -m tandem.benchmarks.bench.agreement --url URL --model NAME --tokenizer DIR`

Each tool draws random prompts of its own, of the same length, and keeps as many requests open; prompts are new in every
round. With --request-rate each draws Poisson arrivals of its own instead, and a few dozen of them load a server that
has little headroom in different ways. The other tool is `vllm bench serve` of the peer's environment, or with
`--beside sdk` the `openai` SDK and a clock (stopwatch.py); the server should leave it a core. 1 is agreement.
Completions are compared, because the tools count the first token of a chat differently (metrics.py).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .engines import EngineError, environment, interpreter
from .result import describe, save
from .stats import interleaved, ratio, spread

FIGURES = ("median_ttft_ms", "median_tpot_ms", "median_itl_ms", "median_e2el_ms", "output_throughput")


def command(tool: list[str], given: argparse.Namespace, seed: int, out: Path) -> list[str]:
    """The flags that both tools know."""
    load = ["--num-prompts", given.num_prompts, "--request-rate", given.request_rate, "--seed", seed]
    load += ["--max-concurrency", given.max_concurrency] if given.max_concurrency else []
    lengths = ["--random-input-len", given.input_len, "--random-output-len", given.output_len]
    shown = ["--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm", "--temperature", 0]
    where = [
        "--base-url",
        given.url,
        "--model",
        given.model,
        "--tokenizer",
        given.tokenizer,
        "--dataset-name",
        "random",
    ]
    file = ["--save-result", "--result-dir", out.parent, "--result-filename", out.name]
    return [str(word) for word in (*tool, *where, *load, *lengths, *shown, *file)]


def figures(tool: list[str], given: argparse.Namespace, env: dict[str, str] | None) -> Callable[[int], dict[str, Any]]:
    def run(number: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as directory:
            out = Path(directory) / "result.json"
            done = subprocess.run(
                command(tool, given, 100 + number, out),
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode or not out.is_file():
                raise SystemExit(f"{tool[0]} failed with status {done.returncode}:\n{done.stdout[-2000:]}")
            return json.loads(out.read_text())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="its name at the server")
    parser.add_argument("--tokenizer", required=True, help="the checkpoint's directory")
    parser.add_argument("--num-prompts", type=int, default=60)
    parser.add_argument("--request-rate", type=float, default=math.inf)
    parser.add_argument("--max-concurrency", type=int, default=4, help="0: no limit")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", choices=("vllm", "sdk"), default="vllm", help="the other tool")
    parser.add_argument("--out", type=Path, help="a JSON file")
    given = parser.parse_args()

    tools = {"tandem": figures([sys.executable, "-m", "tandem.server", "bench", "serve", "--as-text"], given, None)}
    if given.beside == "sdk":
        tools["sdk"] = figures([sys.executable, "-m", "tandem.benchmarks.bench.stopwatch"], given, None)
    else:
        try:
            python = interpreter("vllm")
        except EngineError as error:
            parser.error(str(error))
        own = [str(python.with_name("vllm")), "bench", "serve"]
        tools["vllm"] = figures(own, given, {**os.environ, **environment("vllm")})
    found = interleaved(
        tools, given.rounds, on_done=lambda name, number: print(f"{name}, round {number}", file=sys.stderr)
    )
    print(f"{'':24} {'tandem':>10} {given.beside:>10} {'ratio':>8}  (10th - 90th percentile, {given.rounds} rounds)")
    result: dict[str, Any] = {
        "benchmark": "agreement",
        **describe(),
        "load": vars(given) | {"out": None, "request_rate": f"{given.request_rate:g}"},
        "figures": {},
    }
    for name in FIGURES:
        ours, theirs = ([one[name] for one in found[tool]] for tool in ("tandem", given.beside))
        quotient = ratio(ours, theirs)
        result["figures"][name] = {"tandem": ours, given.beside: theirs, "ratio": asdict(quotient)}
        medians = f"{spread(ours).median:>10.2f} {spread(theirs).median:>10.2f}"
        print(f"{name:24} {medians} {quotient.median:>8.3f}  ({quotient.low:.3f} - {quotient.high:.3f})")
    if given.out is not None:
        save(given.out, result)


if __name__ == "__main__":
    main()
