"""What it saves on a CPU that the C library keeps its heap: `python -m tandem.benchmarks.cpu_heap`.

16 requests of 128 tokens in and 48 out on the 125M LLaMA with random weights, in processes that keep it and processes
that do not, in turns. Page faults, processor time and tokens per second of the second load of each process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time

from ..server.engine import hosting
from ..server.engine.hub import Hub
from ..server.engine.options import EngineOptions, ModelSpec
from ..server.engine.request import Request, Sampling
from .peers.checkpoint import checkpoint

REQUESTS, PROMPT, ANSWER = 16, 128, 48


def load(seed: int) -> list[Request]:
    draw = random.Random(seed)
    sampling = Sampling(max_tokens=ANSWER, temperature=0.0, seed=0, ignore_eos=True)
    ids = range(300, 30000)
    return [Request(REQUESTS * seed + n, "m", draw.choices(ids, k=PROMPT), sampling) for n in range(REQUESTS)]


def measure(kept: bool, threads: int) -> dict[str, float]:
    if not kept:
        hosting.keep_heap = lambda: False
    options = EngineOptions(threads=threads, max_model_len=1024, enable_prefix_caching=False)
    hub = Hub.load([ModelSpec("m", str(checkpoint("random:125m")))], options)
    hub.run(load(0))
    before, cpu, began = resource.getrusage(resource.RUSAGE_SELF), time.process_time(), time.perf_counter()
    hub.run(load(1))
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "page_faults": after.ru_minflt - before.ru_minflt,
        "cpu_seconds": time.process_time() - cpu,
        "output_tokens_per_second": REQUESTS * ANSWER / seconds,
        "peak_mib": after.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=("kept", "fresh"), help=argparse.SUPPRESS)  # a process of its own
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one == "kept", options.threads)))
        return
    command = [sys.executable, "-m", "tandem.benchmarks.cpu_heap", "--threads", str(options.threads), "--one"]
    print("| heap | page faults | CPU seconds | output tokens/s | peak MiB |\n|---|---|---|---|---|")
    for _ in range(options.rounds):
        for how in ("kept", "fresh"):
            done = subprocess.run([*command, how], stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
            print(
                "| "
                + " | ".join([how, *(f"{value:,.0f}" if value >= 100 else f"{value:.2f}" for value in found.values())])
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
