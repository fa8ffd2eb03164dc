"""What issue 4 asks to be shown: Tandem beside other engines on this machine, in one run.

    python -m tandem.benchmarks.peers.compare [--only serve,tiny] [--threads 2] [--runs 3] [--save DIR]

Every figure is a ratio of two engines that take turns under the same load. The engines must be set up
(`python -m tandem.benchmarks.peers.setup vllm`, `… llama.cpp`). Prints a table with the goal beside each figure and, as
the last line, one JSON document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...model.load import cpu_has_bfloat16
from ...server.engine.options import EngineOptions
from ..bench import offline, result, serve
from ..bench.offline import Dataset as OfflineLoad
from ..bench.prompts import Dataset, ServeOptions, Side
from ..bench.servers import Server, start
from ..bench.sides import Setup
from ..bench.stats import percentile
from .checkpoint import checkpoint

# What the bfloat16 checkpoint is computed in. Without the processor's own bfloat16 PyTorch's engines take several
# times as long in it, which would make a ratio easy.
DTYPE = "bfloat16" if cpu_has_bfloat16() else "float32"
LARGE, TINY = "random:125m", "random:tiny"
OWN_TOOL_ROUNDS = 5
SEEDS_APART = 1_000_000  # more than the rounds of a load lie apart
CLOSE = 0.05  # how far two tools' medians may lie apart


@dataclass
class Row:
    """`figure` is a ratio unless `unit` says otherwise; `least` and `most` are the goal."""

    name: str
    figure: float
    spread: str = ""
    least: float | None = None
    most: float | None = None
    unit: str = "×"
    beside: str = ""

    @property
    def met(self) -> bool | None:
        if self.least is None and self.most is None:
            return None
        return (self.least is None or self.figure >= self.least) and (self.most is None or self.figure <= self.most)


@dataclass
class Run:
    threads: int
    runs: int
    save: Path | None
    rows: list[Row] = field(default_factory=list[Row])
    loads: int = 0  # so far

    def next_seed(self) -> int:
        """Each load has prompts of its own: a server that stays up has those of earlier ones in its prefix cache."""
        self.loads += 1
        return self.loads * SEEDS_APART

    def add(self, name: str, value: dict[str, Any] | float, beside: str = "", **goal: Any) -> None:
        """A row: of a Spread as a dict, or of one figure."""
        if isinstance(value, dict):
            figure, around = value["median"], f"{value['low']:.3g}…{value['high']:.3g}"
        else:
            figure, around = value, ""
        self.rows.append(Row(name, figure, around, beside=beside, **goal))
        print(f"  {name}: {figure:.3g} {around} {beside}", flush=True)

    def keep(self, name: str, found: dict[str, Any]) -> None:
        if self.save is not None:
            result.save(self.save / f"{name}.json", found)


def between(run: Run, servers: Sequence[Server], **given: Any) -> dict[str, Any]:
    """Token ids to /v1/completions of every server in turns."""
    dataset = Dataset("random", count=given.pop("count"), input_len=given.pop("given"), output_len=given.pop("wanted"))
    sides = tuple(Side(server.name, server.base_url, server.pid) for server in servers)
    options = ServeOptions(
        sides,
        tokenizer=str(given.pop("model")),
        dataset=dataset,
        runs=run.runs,
        num_warmups=8,
        seed=run.next_seed(),
        **given,
    )
    return serve.run(options)


def ratio_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    ((_, about),) = found["ratios"].items()
    return about[name]


def figures(found: dict[str, Any], name: str, unit: str) -> str:
    """Both sides' medians, for reading."""
    shown = [f"{side} {about.get(name, float('nan')):.4g}" for side, about in found["sides"].items()]
    return f"{', '.join(shown)} {unit}"


def both(stack: ExitStack, model: Path, threads: int) -> list[Server]:
    """Tandem and vLLM with this model in `DTYPE`, until the stack ends."""
    return [
        stack.enter_context(start(name, model, threads=threads, arguments=("--dtype", DTYPE)))
        for name in ("tandem", "vllm")
    ]


def serve_section(run: Run) -> None:
    """16 and 32 clients, 64 streams, and how soon each server is ready; 125M, both in `DTYPE`."""
    model = checkpoint(LARGE)
    with ExitStack() as stack:
        servers = both(stack, model, run.threads)
        ready = {server.name: server.ready_seconds for server in servers}
        told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in ready.items())
        run.add("ready after the start, vllm / tandem", ready["vllm"] / ready["tandem"], told, least=8)
        for clients in (16, 32):
            clients_row(run, servers, model, clients, least=1.7)
        streams_row(run, servers, model, most=0.5)


def w8a8_section(run: Run) -> None:
    """The same model with int8 matrices and activations, as both servers read it from one checkpoint."""
    with ExitStack() as stack:
        model = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "w8a8"
        words = ["quantize", str(checkpoint(LARGE)), str(model), "--scheme", "w8a8"]
        subprocess.run([sys.executable, "-m", "tandem.server", *words], check=True, stdout=subprocess.DEVNULL)
        servers = both(stack, model, run.threads)
        clients_row(run, servers, model, 32, prefix="w8a8, ")
        streams_row(run, servers, model, prefix="w8a8, ")


def clients_row(
    run: Run, servers: Sequence[Server], model: Path, clients: int, prefix: str = "", least: float | None = None
) -> None:
    load = {"count": 2 * clients, "given": 128, "wanted": 64, "max_concurrency": clients}
    found = between(run, servers, **load, model=model)
    run.keep(f"{prefix.replace(', ', '_')}serve_{clients}", found)
    beside = figures(found, "output_throughput", "tok/s")
    name = f"{prefix}{clients} clients, output tokens/s, tandem / vllm"
    run.add(name, ratio_of(found, "output_throughput"), beside, least=least)


def streams_row(run: Run, servers: Sequence[Server], model: Path, prefix: str = "", most: float | None = None) -> None:
    found = between(run, servers, count=128, given=64, wanted=32, max_concurrency=64, model=model)
    run.keep(f"{prefix.replace(', ', '_')}serve_64", found)
    beside = figures(found, "p99_ttft_ms", "ms")
    run.add(f"{prefix}64 streams, TTFT p99, tandem / vllm", ratio_of(found, "p99_ttft_ms"), beside, most=most)


def tiny_section(run: Run) -> None:
    """What it costs to serve a token when the model costs little: CPU of all processes of a server per token."""
    model = checkpoint(TINY)
    with ExitStack() as stack:
        servers = [stack.enter_context(start(name, model, threads=1)) for name in ("tandem", "vllm")]
        for streams in (64, 256):
            found = between(run, servers, count=streams, given=16, wanted=64, max_concurrency=streams, model=model)
            run.keep(f"tiny_{streams}", found)
            cpu = [
                f"{name} {side['tandem']['server']['cpu_us_per_output_token']:.1f}"
                for name, side in found["sides"].items()
            ]
            goal = {"most": 0.25} if streams == 256 else {}
            beside = f"{', '.join(cpu)} µs"
            run.add(
                f"tiny model, {streams} streams, CPU per token, tandem / vllm",
                ratio_of(found, serve.CPU),
                beside,
                **goal,
            )
            beside = figures(found, "p99_ttft_ms", "ms")
            run.add(f"tiny model, {streams} streams, TTFT p99, tandem / vllm", ratio_of(found, "p99_ttft_ms"), beside)


def offline_section(run: Run) -> None:
    """Batch 1, and prompts alone."""

    def compare(name: str, others: tuple[str, ...], load: OfflineLoad, dtype: str, **options: Any) -> dict[str, Any]:
        engine = EngineOptions(threads=run.threads, max_model_len=1024, **options)
        setup = Setup(LARGE, engine, dtype, ("tandem", *others), runs=run.runs, warmups=1)
        found = offline.throughput(setup, load)
        run.keep(name, found)
        return found

    def told(found: dict[str, Any]) -> str:
        medians = [
            f"{name} {about['output_tokens_per_second']['median']:.4g}" for name, about in found["engines"].items()
        ]
        return f"{', '.join(medians)} tok/s"

    load = OfflineLoad(count=1, input_len=16, output_len=64)
    found = compare("batch_1", ("vllm",), load, DTYPE)
    run.add("batch 1, tandem / vllm", found["ratios"]["tandem / vllm"], told(found), least=2.5)
    found = compare("batch_1_llama_cpp", ("llama.cpp",), load, "bfloat16")
    run.add("batch 1, tandem / llama.cpp bf16", found["ratios"]["tandem / llama.cpp"], told(found), least=0.8)
    found = compare(
        "prefill",
        ("transformers",),
        OfflineLoad(count=4, input_len=512, output_len=1),
        DTYPE,
        enable_prefix_caching=False,
    )
    seconds = {name: about["elapsed_times"] for name, about in found["engines"].items()}
    rates = [f"{name} {4 * 512 / percentile(taken, 50):.0f}" for name, taken in seconds.items()]
    beside = f"{', '.join(rates)} prompt tok/s"
    run.add("4 prompts of 512, tandem / transformers", found["ratios"]["tandem / transformers"], beside, least=1.2)


def agreement(run: Run, name: str, beside: str, arguments: Sequence[str], *load: str) -> None:
    """`tandem bench serve` and another tool against the same server, in turns: do they say the same?

    The model is busy on one core, so that the tools have the other: beside the tiny one, whose server needs both, the
    heavier tool slows down what it measures.
    """
    model = checkpoint(LARGE)
    with start(name, model, threads=1, arguments=arguments) as server, tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "agreement.json"
        words = ["--url", server.base_url, "--model", server.model, "--tokenizer", str(model), "--out", str(out)]
        words += ["--beside", beside, "--rounds", str(OWN_TOOL_ROUNDS), *load]
        command = [sys.executable, "-m", "tandem.benchmarks.bench.agreement", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    run.keep(f"agreement_{name}", found)
    for figure, about in found["figures"].items():
        medians = ", ".join(f"{tool} {percentile(about[tool], 50):.4g}" for tool in ("tandem", beside))
        row = f"{name}'s server, {figure}, tandem bench / {beside}"
        run.add(row, about["ratio"], medians, least=1 - CLOSE, most=1 + CLOSE)


def own_tool_section(run: Run) -> None:
    """Beside vLLM's own tool at its server, and beside the `openai` SDK at transformers', which has no tool."""
    agreement(run, "vllm", "vllm", ("--dtype", DTYPE), "--num-prompts", "72", "--max-concurrency", "4")
    one_by_one = ("--num-prompts", "24", "--max-concurrency", "1", "--output-len", "16")
    agreement(run, "transformers", "sdk", ("--dtype", DTYPE), *one_by_one)


SECTIONS: dict[str, Callable[[Run], None]] = {
    "offline": offline_section,
    "serve": serve_section,
    "w8a8": w8a8_section,
    "tiny": tiny_section,
    "own_tool": own_tool_section,
}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--save", type=Path, help="directory for the whole results")
    options = parser.parse_args(words)
    names = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    run = Run(options.threads, options.runs, options.save)
    for name in names:
        print(f"{name}:", flush=True)
        began = time.monotonic()
        SECTIONS[name](run)
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    print()
    width = max(len(row.name) for row in run.rows)
    for row in run.rows:
        goal = " and ".join(
            f"{sign} {bound:g}" for sign, bound in (("≥", row.least), ("≤", row.most)) if bound is not None
        )
        verdict = "" if row.met is None else "met" if row.met else "MISSED"
        print(f"{row.name:{width}}  {row.figure:8.3f}  {row.spread:14} {goal:16} {verdict:7} {row.beside}")
    found = {
        "benchmark": "peers",
        "runs": options.runs,
        "threads": options.threads,
        "dtype": DTYPE,
        "rows": [asdict(row) | {"met": row.met} for row in run.rows],
    }
    print(json.dumps(found | result.describe(), ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
