"""`tandem bench`: words to options, results to lines and files. Flags are vLLM's where it has them.

torch and the engines are imported by the commands that need them, so that wrong words are answered at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ...server.engine.control import as_flags
from ...server.engine.options import Dtype as PlainDtype
from ...server.engine.options import EngineOptions, OptionsError, Scheme
from ...server.engine.options import KVDtype as KVCacheDtype
from ...server.options import has_gpu, parse_quantity
from . import datasets
from .datasets import DatasetError
from .models import UsageError
from .result import append, save

if TYPE_CHECKING:
    from .sides import Setup

app = typer.Typer(
    help="Measure Tandem, and other engines beside it, in one run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
ENGINE = EngineOptions()
DTYPES = (*get_args(PlainDtype), *(scheme for scheme in get_args(Scheme) if scheme not in ("auto", "none")))
GPU_TOKENS = 8192  # of a step, as `tandem serve` takes where a GPU is used and nothing else is said

Model = Annotated[
    str,
    typer.Option(help="A checkpoint's directory, demo (bundled), null (a free step) or random:125m."),
]
Engines = Annotated[
    str,
    typer.Option("--engine", help="Of tandem, transformers, vllm, llama.cpp, ctranslate2, by commas."),
]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16, float16; int8 or w8a8: matrices that are quantized so.")
]
KVDtype = Annotated[str, typer.Option(help="Tandem's flag of that name.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of each engine.", show_default=False)]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Tandem's mode of that name.")]
MaxSeqs = Annotated[
    int | None,
    typer.Option(min=1, help=f"Sequences computed at once. None: {ENGINE.max_num_seqs}."),
]
MaxTokens = Annotated[
    str | None,
    typer.Option(help=f"Tokens of one step. None: {ENGINE.max_num_batched_tokens}, on a GPU {GPU_TOKENS}."),
]
MaxLen = Annotated[str | None, typer.Option(help="Tokens of prompt and answer. None: the model's context.")]
KVMemory = Annotated[str | None, typer.Option(help="KV cache, such as 4G. None: by the memory that is free.")]
Runs = Annotated[int, typer.Option(min=1, help="Measured runs of each engine; they take turns.")]
Warmups = Annotated[int, typer.Option("--warmups", "--num-warmups", min=0, help="Runs before them.")]
Output = Annotated[Path | None, typer.Option(help="File for the result as JSON.", show_default=False)]
History = Annotated[
    Path | None,
    typer.Option("--append-result", help="File to add the result to as a line of JSON.", show_default=False),
]
Report = Annotated[
    Path | None, typer.Option(metavar="FILE.html", help="Figures as a page, the result beside it.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Of the prompts.")]
N = Annotated[int, typer.Option("--n", min=1, help="Answers to each prompt.")]


@app.command()
def throughput(
    file: Annotated[Path | None, typer.Argument(help="As in `--dataset sharegpt FILE`.", show_default=False)] = None,
    model: Model = "demo",
    engine: Engines = "tandem",
    reward: Annotated[
        str | None,
        typer.Option(help="A reward model beside it that scores every answer.", show_default=False),
    ] = None,
    dataset_name: Annotated[
        str, typer.Option("--dataset-name", "--dataset", help=", ".join(datasets.NAMES))
    ] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="File of sharegpt or jsonl.", show_default=False)] = None,
    input_len: Annotated[
        int | None,
        typer.Option("--input-len", "--random-input-len", min=1, help="None: 1024 or half the context."),
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option("--output-len", "--random-output-len", min=1, help="None: the file's, or 128."),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="None: 1000 on a GPU, 32 on a CPU.")] = None,
    range_ratio: Annotated[
        float, typer.Option("--range-ratio", "--random-range-ratio", help="Lengths vary by it.")
    ] = 0.0,
    prefix_len: Annotated[
        int,
        typer.Option("--prefix-len", "--random-prefix-len", min=0, help="Tokens in front of all prompts."),
    ] = 0,
    n: N = 1,
    seed: Seed = 0,
    runs: Runs = 3,
    warmups: Warmups = 1,
    dtype: Dtype = "auto",
    kv_cache_dtype: KVDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    deterministic: Deterministic = False,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxLen = None,
    kv_cache_memory_bytes: KVMemory = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching", help="Off, as in vLLM's bench.")
    ] = False,
    output_json: Output = None,
    append_result: History = None,
    report: Report = None,
) -> None:
    """Requests handed over all at once: how many tokens per second until the last one."""
    with one_sentence("throughput"):
        options = engine_options(
            device,
            threads,
            deterministic,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            kv_cache_memory_bytes,
            enable_prefix_caching,
        )
        from . import offline

        setup = setup_of(model, options, dtype, engine, runs, warmups, reward, kv_cache_dtype)
        dataset = offline.Dataset(
            dataset_name, dataset_path or file, num_prompts, input_len, output_len, range_ratio, prefix_len, seed, n
        )
        finish(offline.throughput(setup, dataset), offline.lines, output_json, append_result, report)


@app.command()
def latency(
    model: Model = "demo",
    engine: Engines = "tandem",
    input_len: Annotated[int, typer.Option(min=1)] = 32,
    output_len: Annotated[int, typer.Option(min=1)] = 128,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    n: N = 1,
    num_iters: Annotated[int, typer.Option("--num-iters", "--runs", min=1, help="Measured batches.")] = 30,
    num_iters_warmup: Annotated[int, typer.Option("--num-iters-warmup", "--warmups", min=0, help="Before them.")] = 10,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    kv_cache_dtype: KVDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    deterministic: Deterministic = False,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxLen = None,
    kv_cache_memory_bytes: KVMemory = None,
    output_json: Output = None,
    append_result: History = None,
    report: Report = None,
) -> None:
    """One batch of fixed lengths: how long until its last token."""
    with one_sentence("latency"):
        options = engine_options(
            device,
            threads,
            deterministic,
            max_num_seqs or max(ENGINE.max_num_seqs, batch_size * n),
            max_num_batched_tokens,
            max_model_len,
            kv_cache_memory_bytes,
        )
        from . import latency as measure

        setup = setup_of(model, options, dtype, engine, num_iters, num_iters_warmup, None, kv_cache_dtype)
        load = measure.batch(setup, batch_size, input_len, output_len, n, seed)
        finish(measure.latency(setup, load), measure.lines, output_json, append_result, report)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def report(context: typer.Context) -> None:
    """Results as one HTML page with figures."""
    from .report import main

    main(context.args)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(context: typer.Context) -> None:
    """Servers under load, over HTTP: any that speaks the OpenAI API."""
    from .serve_cli import main

    main(context.args, prog_name="tandem bench serve")


@app.command()
def score(
    model: Model = "demo",
    engine: Engines = "tandem",
    groups: Annotated[int, typer.Option(min=1, help="Prompts.")] = 8,
    answers: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 8,
    prompt_len: Annotated[int, typer.Option(min=1)] = 512,
    answer_len: Annotated[int, typer.Option(min=1)] = 128,
    seed: Seed = 0,
    runs: Runs = 5,
    warmups: Warmups = 1,
    dtype: Dtype = "auto",
    kv_cache_dtype: KVDtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    deterministic: Deterministic = False,
    max_num_seqs: MaxSeqs = None,
    max_num_batched_tokens: MaxTokens = None,
    max_model_len: MaxLen = None,
    kv_cache_memory_bytes: KVMemory = None,
    output_json: Output = None,
    append_result: History = None,
    report: Report = None,
) -> None:
    """Reward models: groups of answers, with the prompt shared and not."""
    with one_sentence("score"):
        options = engine_options(
            device,
            threads,
            deterministic,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            kv_cache_memory_bytes,
            True,
        )
        from . import score as measure

        setup = setup_of(model, options, dtype, engine, runs, warmups, None, kv_cache_dtype)
        wanted = measure.Groups(groups, answers, prompt_len, answer_len, seed)
        finish(measure.run_scores(setup, wanted), measure.lines, output_json, append_result, report)


@app.command()
def kernels(
    model: Model = "demo",
    rows: Annotated[str, typer.Option(help="Sequences of decode steps, by commas.")] = "1,16,64",
    tokens: Annotated[str, typer.Option(help="Lengths of prompts, by commas.")] = "512",
    context: Annotated[int, typer.Option(min=1, help="Tokens that a decoding sequence has.")] = 512,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    output_json: Output = None,
    append_result: History = None,
    report: Report = None,
) -> None:
    """The operations at a model's shapes, each beside what it takes at least."""
    with one_sentence("kernels"):
        options = engine_options(device, threads)
        shapes = integers("--rows", rows), integers("--tokens", tokens)
        from . import kernels as measure

        setup = setup_of(model, options, dtype, "tandem", 1, 0)
        found = measure.run(setup, measure.Shapes(*shapes, context))
        finish(found, measure.lines, output_json, append_result, report)


@app.command()
def startup(
    serve: Annotated[list[str] | None, typer.Argument(help="Further arguments for `tandem serve`, behind --.")] = None,
    model: Annotated[str | None, typer.Option(help="What every engine serves. None: the bundled models.")] = None,
    engine: Engines = "tandem",
    runs: Annotated[int, typer.Option("--runs", "--num-iters-warm", min=1, help="Warm starts of each engine.")] = 3,
    cold: Annotated[
        int,
        typer.Option("--num-iters-cold", "--cold", min=0, help="Starts before them, with cold caches."),
    ] = 0,
    warmups: Annotated[int, typer.Option("--num-iters-warmup", "--warmups", min=0)] = 0,
    threads: Threads = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that a start may take.")] = 600.0,
    output_json: Output = None,
    append_result: History = None,
    report: Report = None,
) -> None:
    """From starting a server's process to its first token."""
    with one_sentence("startup"):
        from . import result
        from . import startup as measure
        from .engines import parse
        from .models import is_null, path_of

        names = parse(engine)
        if "tandem" not in names:
            raise UsageError(f"--engine {engine}: tandem must be one of them, the others are measured beside it")
        if model is None and len(names) > 1:
            raise UsageError("--engine with several names needs --model: the checkpoint that all of them serve")
        path = None if model is None else path_of(model)
        if path is not None and is_null(path):
            raise UsageError(f"--model {model} reads no checkpoint; give a directory, demo or random:125m")
        words = ([] if path is None else [path]) + ([] if threads is None else ["--threads", str(threads)])
        found = measure.run(
            [*words, *(serve or [])],
            runs=runs,
            cold_runs=cold,
            warmups=warmups,
            peers=[name for name in names if name != "tandem"],
            model=None if path is None else Path(path),
            threads=threads,
            timeout=timeout,
        )
        finish(
            {"model_id": model or "demo"} | found | result.describe(), measure.lines, output_json, append_result, report
        )


@contextmanager
def one_sentence(command: str) -> Iterator[None]:
    """What is wrong with the words, or with what they name, ends the command with status 2 and says so."""
    from ...model.errors import CheckpointError
    from .engines import EngineError
    from .protocol import ChildError
    from .servers import ServerError

    try:
        yield
    except (UsageError, DatasetError, OptionsError, CheckpointError, EngineError) as error:
        typer.echo(f"tandem bench {command}: {as_flags(str(error))}", err=True)
        raise typer.Exit(2) from None
    except (ChildError, ServerError, TimeoutError) as error:  # asked for in the right way, but it failed
        typer.echo(f"tandem bench {command}: {error}", err=True)
        raise typer.Exit(1) from None


def engine_options(
    device: str,
    threads: int | None = None,
    deterministic: bool = False,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: str | None = None,
    max_model_len: str | None = None,
    kv_cache_memory_bytes: str | None = None,
    enable_prefix_caching: bool = False,
) -> EngineOptions:
    """Raises OptionsError. As many requests may wait as are handed over."""
    tokens = GPU_TOKENS if on_gpu(device) else ENGINE.max_num_batched_tokens
    if max_num_batched_tokens is not None:
        tokens = parse_quantity(max_num_batched_tokens, "--max-num-batched-tokens")
    count = max_num_seqs or min(ENGINE.max_num_seqs, tokens)
    memory = None if kv_cache_memory_bytes is None else parse_quantity(kv_cache_memory_bytes, "--kv-cache-memory-bytes")
    return EngineOptions(
        device=device,
        threads=threads,
        max_model_len=None if max_model_len is None else parse_quantity(max_model_len, "--max-model-len"),
        max_num_seqs=count,
        max_num_batched_tokens=max(tokens, count) if max_num_batched_tokens is None else tokens,
        page_size=64 if on_gpu(device) else ENGINE.page_size,
        kv_cache_memory_bytes=memory,
        deterministic=deterministic,
        enable_prefix_caching=enable_prefix_caching,
        max_waiting_requests=1 << 30,
        max_waiting_tokens=1 << 40,
    )


def on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and has_gpu())


def setup_of(
    model: str,
    options: EngineOptions,
    dtype: str,
    engine: str,
    runs: int,
    warmups: int,
    reward: str | None = None,
    kv_cache_dtype: str = "auto",
) -> Setup:
    """Raises UsageError and EngineError."""
    from .engines import parse
    from .sides import Setup

    for flag, value, known in (
        ("--dtype", dtype, DTYPES),
        ("--kv-cache-dtype", kv_cache_dtype, get_args(KVCacheDtype)),
    ):
        if value not in known:
            raise UsageError(f"{flag} {value}: one of {', '.join(known)}")
    return Setup(model, options, dtype, tuple(parse(engine)), reward, runs, warmups, kv_cache_dtype)


def integers(flag: str, words: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in words.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"{flag} {words}: whole numbers, at least 1, by commas, such as 1,16,64")
    return found


def finish(
    found: dict[str, Any],
    lines: Callable[[dict[str, Any]], list[str]],
    output: Path | None,
    history: Path | None,
    report: Path | None,
) -> None:
    """Says and writes what was found."""
    print("\n".join(lines(found)))
    try:
        if output is not None:
            save(output, found)
        if history is not None:
            append(history, found)
        if report is not None:
            save(report.with_suffix(".json"), found)
    except OSError as error:
        raise UsageError(f"the result cannot be written: {error}") from None
    if report is not None:
        try:
            from .report import report as draw
        except ImportError as error:
            raise UsageError(f"--report needs {error.name}: pip install 'tandem[bench]'") from None
        print(f"Report: {draw([report.with_suffix('.json')], report)}")


if __name__ == "__main__":
    app(prog_name="tandem bench")
