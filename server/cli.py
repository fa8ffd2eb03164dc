"""The `tandem` command: words to options. What only one command needs is imported there, so that starts are quick."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from .api.options import ApiOptions
from .engine.control import Ready, as_flags, log_to_stderr
from .engine.options import AttentionBackend, Dtype, EngineOptions, KVDtype, ModelSpec, OptionsError, Scheme
from .engine.request import LogprobsMode, PoolingMode
from .options import (
    REASONING_PARSERS,
    TOOL_CALL_PARSERS,
    LogLevel,
    ServeOptions,
    bundled_models,
    has_gpu,
    parse_adapter,
    parse_model,
    parse_quantity,
    read_config_file,
)

if TYPE_CHECKING:
    from .supervisor import Supervisor

app = typer.Typer(
    help="Serve a language model and the reward model that judges it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ENGINE, API = EngineOptions(), ApiOptions()
GPU_TOKENS = 8192  # of a step, where a GPU is used and nothing else is said
LORAS = 8  # of `--enable-lora`: trainers keep the last few versions (6 by default in TRL's AsyncGRPO)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"tandem {version('tandem')}")
        except PackageNotFoundError:
            typer.echo("tandem (not installed)")
        raise typer.Exit


def _take_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults, so that the command line wins."""
    if path is not None:
        known: dict[str, str] = {}
        for parameter in context.command.params:
            if parameter.name not in ("config", "help"):
                known |= {word.lstrip("-"): parameter.name for word in parameter.opts}
        try:
            values = read_config_file(path, known)
        except OptionsError as error:
            raise typer.BadParameter(str(error)) from None
        context.default_map = {**(context.default_map or {}), **values}
    return path


@app.callback()
def tandem(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[[NAME=]PATH|ORG/NAME[,role=…,dtype=…,quantization=…,lm_head=…,kv_dtype=…,kv=…%,alias=a|b,chat_template=…,max_model_len=…,weight=…,"
            "pooling=…,trunk=OTHER,revision=…,tool_call_parser=…,reasoning_parser=…]|NAME=base-of:OTHER]…",
            help="Directories of Hugging Face checkpoints, or hub ids; models that share the weights of another one: a "
            "reference as base-of:OTHER, a value head with trunk=OTHER. None: the bundled policy and reward model. kv: "
            "the part of the KV caches' memory that a model has for good; what is left is lent as needed.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(callback=_take_config, is_eager=True, help="YAML file; its keys are these flags' names."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 or :: for every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="The one model's name; repeated: further names.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16, where a model names none.")] = "auto",
    quantization: Annotated[
        str,
        typer.Option(help="auto (as the checkpoint is), none, int8 (weights) or w8a8, where a model names none."),
    ] = "auto",
    kv_cache_dtype: Annotated[
        str,
        typer.Option(help="auto (the model's dtype), int8, float32, bfloat16 or float16, where a model names none."),
    ] = "auto",
    max_model_len: Annotated[
        str | None, typer.Option(help="Tokens of prompt and answer; 4096, 4k (4,000) or 4K (4,096).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N. auto: a GPU where torch finds one.")] = "auto",
    max_num_seqs: Annotated[
        int | None,
        typer.Option(help=f"Sequences of a model that run at once. None: {ENGINE.max_num_seqs}, or a step's tokens."),
    ] = None,
    max_num_batched_tokens: Annotated[
        str | None,
        typer.Option(help=f"Tokens of one step. None: {ENGINE.max_num_batched_tokens}, on a GPU {GPU_TOKENS}."),
    ] = None,
    gpu_memory_utilization: Annotated[
        float, typer.Option(help="Of the GPU's whole memory, for weights, steps and KV caches together.")
    ] = ENGINE.gpu_memory_utilization,
    page_size: Annotated[int, typer.Option("--page-size", "--block-size", help="Tokens of a page of the KV cache.")] = (
        ENGINE.page_size
    ),
    attention_backend: Annotated[
        str, typer.Option(help="On GPUs: triton, flash (needs flash-attn and --page-size 256) or torch.")
    ] = ENGINE.attention_backend,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="A token's bits do not depend on what else is computed with it.")
    ] = False,
    run_ahead: Annotated[
        bool | None,
        typer.Option(
            "--run-ahead/--no-run-ahead",
            help="Launch the next step before the last one's tokens are read. None: on GPUs.",
            show_default=False,
        ),
    ] = None,
    role_streams: Annotated[
        bool, typer.Option("--role-streams", help="Models of one GPU compute side by side instead of in turns.")
    ] = False,
    max_waiting_requests: Annotated[int, typer.Option(help="Of one model; more are refused.")] = (
        ENGINE.max_waiting_requests
    ),
    max_waiting_tokens: Annotated[str, typer.Option(help="Of one model; more are refused.")] = str(
        ENGINE.max_waiting_tokens
    ),
    max_request_seconds: Annotated[float, typer.Option(min=0.001, help="A request is answered by then.")] = (
        API.max_request_seconds
    ),
    kv_cache_memory_bytes: Annotated[
        str | None, typer.Option(help="All models together, such as 4G. None: by the memory that is free.")
    ] = None,
    enable_prefix_caching: Annotated[
        bool, typer.Option("--enable-prefix-caching/--no-enable-prefix-caching")
    ] = ENGINE.enable_prefix_caching,
    pooling: Annotated[
        str | None, typer.Option(help="Of embedding models: last, mean or cls. None: as the checkpoint says, or last.")
    ] = None,
    enable_lora: Annotated[
        bool, typer.Option("--enable-lora", help=f"Room for {LORAS} LoRA adapters, or for as many as is said.")
    ] = False,
    max_loras: Annotated[
        int | None, typer.Option(min=1, help="LoRA adapters that are loaded at once.", show_default=False)
    ] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help=f"None: {ENGINE.max_lora_rank}.")] = None,
    lora_modules: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="An adapter of the policy. Repeatable.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine.")] = None,
    step_target_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Longest step of one model while another one writes.")
    ] = None,
    api_key: Annotated[list[str] | None, typer.Option(help="Repeatable; any of them opens every route.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="One key per line.")] = None,
    admin_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable; opens every route, and alone those that change models. None: with API keys these stay "
            "shut, without any they open to this machine."
        ),
    ] = None,
    admin_key_file: Annotated[Path | None, typer.Option(help="One key per line.")] = None,
    weights_root: Annotated[
        Path | None, typer.Option(help="Directory that requests may have new weights read from. None: no path is read.")
    ] = None,
    preferences: Annotated[
        Path | None, typer.Option(help="JSONL file that /v1/rlhf/preferences appends to. None: none are taken.")
    ] = None,
    api_workers: Annotated[int, typer.Option(min=1, max=64, help="HTTP processes.")] = 1,
    drain_seconds: Annotated[float, typer.Option(min=0.0, help="For running requests, at the end.")] = 30.0,
    stream_timeout: Annotated[float, typer.Option(min=0.001, help="A reader that takes nothing is aborted.")] = (
        API.stream_timeout
    ),
    max_body: Annotated[str, typer.Option(help="Bytes of a request, such as 8M.")] = str(API.max_body),
    max_logprobs: Annotated[int, typer.Option(min=0, help="Most alternatives per token.")] = API.max_logprobs,
    logprobs_mode: Annotated[str, typer.Option(help="raw or processed.")] = API.logprobs_mode,
    ignore_unknown_fields: Annotated[
        bool, typer.Option("--ignore-unknown-fields", help="Warn in a header instead of refusing.")
    ] = False,
    chat_template: Annotated[
        str | None, typer.Option(help="File, or alpaca, vicuna, chatml, plain, for models that name none.")
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(TOOL_CALL_PARSERS)}, for models that name none. None: by the chat template."),
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help=f"{' or '.join(REASONING_PARSERS)}: thinking becomes reasoning_content.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    access_log: Annotated[bool, typer.Option("--access-log", help="A line per request.")] = False,
) -> None:
    """Serve models over HTTP, with the OpenAI API, /v1/rewards and /v1/rlhf."""
    from .supervisor import CannotServe, Supervisor, bind

    try:
        gpu = device.startswith("cuda") or (device == "auto" and has_gpu())
        defaults = {
            "dtype": _one_of("--dtype", dtype, get_args(Dtype)),
            "quantization": _one_of("--quantization", quantization, get_args(Scheme)),
            "kv_dtype": _one_of("--kv-cache-dtype", kv_cache_dtype, get_args(KVDtype)),
            "chat_template": chat_template,
            "tool_call_parser": _one_of("--tool-call-parser", tool_call_parser, TOOL_CALL_PARSERS),
            "reasoning_parser": _one_of("--reasoning-parser", reasoning_parser, tuple(REASONING_PARSERS)),
        }
        tokens = GPU_TOKENS if gpu else ENGINE.max_num_batched_tokens
        if max_num_batched_tokens is not None:
            tokens = parse_quantity(max_num_batched_tokens, "--max-num-batched-tokens")
        options = ServeOptions(
            models=_models(models or [], served_model_name or [], defaults),
            engine=EngineOptions(
                threads=threads,
                max_model_len=None if max_model_len is None else parse_quantity(max_model_len, "--max-model-len"),
                device=device,
                max_num_seqs=max_num_seqs or min(ENGINE.max_num_seqs, tokens),
                max_num_batched_tokens=tokens,
                gpu_memory_utilization=gpu_memory_utilization,
                page_size=page_size,
                attention_backend=_one_of("--attention-backend", attention_backend, get_args(AttentionBackend)),
                deterministic=deterministic,
                run_ahead=run_ahead,
                role_streams=role_streams,
                kv_cache_memory_bytes=(
                    None
                    if kv_cache_memory_bytes is None
                    else parse_quantity(kv_cache_memory_bytes, "--kv-cache-memory-bytes")
                ),
                enable_prefix_caching=enable_prefix_caching,
                max_waiting_requests=max_waiting_requests,
                max_waiting_tokens=parse_quantity(max_waiting_tokens, "--max-waiting-tokens"),
                pooling=_one_of("--pooling", pooling, get_args(PoolingMode)),
                step_target_ms=step_target_ms,
                **_loras(enable_lora, max_loras, max_lora_rank, lora_modules or []),
            ),
            api=ApiOptions(
                api_keys=_keys("--api-key", api_key or [], api_key_file),
                admin_keys=_keys("--admin-key", admin_key or [], admin_key_file),
                max_body=parse_quantity(max_body, "--max-body"),
                max_request_seconds=max_request_seconds,
                stream_timeout=stream_timeout,
                ignore_unknown_fields=ignore_unknown_fields,
                max_logprobs=max_logprobs,
                logprobs_mode=_one_of("--logprobs-mode", logprobs_mode, get_args(LogprobsMode)),
                weights_root=_directory("--weights-root", weights_root),
                preferences=_appendable("--preferences", preferences),
            ),
            host=host,
            port=port,
            api_workers=api_workers,
            drain_seconds=drain_seconds,
            log_level=_one_of("--log-level", log_level, get_args(LogLevel)),
            access_log=access_log,
        )
        log_to_stderr("tandem", options.log_level)
        sockets = bind(host, port)
        bound = sockets[0].getsockname()[1]
        supervisor: Supervisor = Supervisor(options, sockets, lambda ready: _announce(ready, host, bound))
    except (OptionsError, CannotServe) as error:
        typer.echo(f"tandem serve: {as_flags(str(error))}", err=True)
        raise typer.Exit(2) from None
    raise typer.Exit(supervisor.run())


def _models(words: list[str], names: list[str], defaults: dict[str, Any]) -> tuple[ModelSpec, ...]:
    specs = tuple(parse_model(word) for word in words) or bundled_models()
    if names:
        if len(words) != 1:
            raise OptionsError("--served-model-name names exactly one model; use NAME=PATH,alias=a|b for several")
        specs = (replace(specs[0], name=names[0], aliases=(*names[1:], *specs[0].aliases)),)
    return tuple(
        replace(
            spec,
            dtype=defaults["dtype"] if spec.dtype == "auto" else spec.dtype,
            quantization=defaults["quantization"] if _own_weights(spec) else spec.quantization,
            kv_dtype=defaults["kv_dtype"] if spec.kv_dtype == "auto" else spec.kv_dtype,
            chat_template=spec.chat_template or defaults["chat_template"],
            tool_call_parser=spec.tool_call_parser or defaults["tool_call_parser"],
            reasoning_parser=spec.reasoning_parser or defaults["reasoning_parser"],
        )
        for spec in specs
    )


def _own_weights(spec: ModelSpec) -> bool:
    """Whether `--quantization` is for it: it has weights, its own, and says nothing itself."""
    return spec.quantization == "auto" and not spec.shares and not spec.is_null


def _loras(enabled: bool, most: int | None, rank: int | None, modules: list[str]) -> dict[str, Any]:
    """The engine's options for adapters. Any of the flags but the rank's makes room for some."""
    if not (enabled or most or modules):
        if rank is not None:
            raise OptionsError(f"--max-lora-rank {rank} is for --enable-lora; give that, too")
        return {}
    adapters = tuple(map(parse_adapter, modules))
    return {
        "max_loras": most or max(LORAS, len(adapters)),
        "max_lora_rank": ENGINE.max_lora_rank if rank is None else rank,
        "lora_modules": adapters,
    }


def _one_of(flag: str, value: str | None, allowed: tuple[str, ...]) -> Any:
    if value is not None and value not in allowed:
        raise OptionsError(f"{flag} {value}: one of {', '.join(allowed)}")
    return value


def _keys(flag: str, keys: list[str], file: Path | None) -> tuple[str, ...]:
    if file is not None:
        try:
            keys = [*keys, *(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())]
        except (OSError, ValueError) as error:
            raise OptionsError(f"{flag}-file {file}: {error}") from None
        if not keys:
            raise OptionsError(f"{flag}-file {file}: it holds no key")
    if not all(key.isascii() and key.isprintable() and key for key in keys):
        raise OptionsError(f"{flag}: a key is one or more printable ASCII characters")
    return tuple(keys)


def _directory(flag: str, path: Path | None) -> str | None:
    if path is not None and not path.is_dir():
        raise OptionsError(f"{flag} {path}: there is no such directory")
    return None if path is None else str(path.resolve())


def _appendable(flag: str, file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        return str(file.resolve())
    except OSError as error:
        raise OptionsError(f"{flag} {file}: {error.strerror}") from None


def _announce(ready: Ready, host: str, port: int) -> None:
    """The one table of a start, and where to find the server."""
    from rich.console import Console
    from rich.table import Table

    from .supervisor import process_age

    age = process_age()
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table(caption=ready.division, caption_justify="left", title_justify="left")
    for column in ("model", "role", "architecture", "head", "dtype"):
        table.add_column(column)
    for column in ("context", "weights MiB", "KV pages", "KV tokens", "KV tokens at most", "KV MiB"):
        table.add_column(column, justify="right")
    for model in ready.models:
        tokens = (model.kv_pages, model.kv_tokens, model.kv_most_tokens)
        numbers = (model.context, model.weight_bytes / 2**20, *tokens, model.kv_bytes / 2**20)
        shown = [f"{number:,.1f}" if isinstance(number, float) else f"{number:,}" for number in numbers]
        if model.shares:  # what it has of its own stands there
            shown[1] += f" + {model.shares}'s"
        table.add_row(model.name, model.role, model.architecture, model.head, model.dtype, *shown)
    console.print(table)
    parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ready.seconds.items())
    address = f"[{host}]" if ":" in host else host
    print(f"Serving on http://{address}:{port} after {age:.1f} s ({parts})", flush=True)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="None: the first one that can chat.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's key, where it wants one.")] = None,
    temperature: Annotated[float | None, typer.Option(help="None: the server's default.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Of an answer; none: as the context allows.")] = None,
    prompt: Annotated[str | None, typer.Option("-q", "--prompt", help="Ask this one thing and end.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tokens and speed after each answer.")] = False,
) -> None:
    """Talk to a served model in the terminal."""
    from .chat import ChatOptions
    from .chat import chat as talk

    raise typer.Exit(talk(ChatOptions(url, model, api_key, system, temperature, max_tokens, prompt, stats)))


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure: throughput, latency, serve, score, kernels, startup."""
    from ..benchmarks.bench.cli import app as measure

    measure(context.args, prog_name="tandem bench")


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def quantize(context: typer.Context) -> None:
    """Write a checkpoint with int8 matrices, or compare two models' quality."""
    from ..benchmarks.quantization.cli import app as work

    work(context.args, prog_name="tandem quantize")


def main() -> None:
    app(prog_name="tandem")
