"""`tandem bench serve`: words to options, results to lines and files; flags, lines and names are vLLM's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from .arrivals import Arrivals, ArrivalsError, Ramp
from .datasets import NAMES, DatasetError
from .models import UsageError
from .progress import progress
from .result import append, save
from .stats import Spread

NEEDED = ("aiohttp", "matplotlib")
LISTS = ("--goodput", "--metadata", "--header")  # vLLM lets several words follow these
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Result = dict[str, Any]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def main(words: Sequence[str], prog_name: str = "tandem bench serve") -> None:
    """Runs the command and exits."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        typer.echo(f"{prog_name} needs {' and '.join(missing)}: pip install 'tandem[bench]'", err=True)
        raise SystemExit(2)
    app(gathered(words), prog_name=prog_name)


def gathered(words: Sequence[str]) -> list[str]:
    """`--goodput a b` as `--goodput a --goodput b`, `--dataset NAME FILE` as two flags: no word stands alone here."""
    found: list[str] = []
    flag, values = "", 0
    for word in words:
        if word.startswith("--"):
            flag, values = word, 0
            found.append("--dataset-name" if word == "--dataset" else word)
            continue
        values += 1
        if values > 1 and flag == "--dataset":
            found += ["--dataset-path", word]
        elif values > 1 and flag in LISTS:
            found += [flag, word]
        else:
            found.append(word)
    return found


@app.command()
def serve(
    url: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]URL", help="A server; several are measured in turns.", show_default=False),
    ] = None,
    pid: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PID", help="Its process. None: whoever listens on the port, on this machine."),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="One server's address; as --url.")] = None,
    host: Annotated[str, typer.Option(help="Of one server.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    backend: Annotated[str, typer.Option(help="openai, vllm or openai-chat: which endpoint.")] = "openai",
    endpoint: Annotated[
        str | None, typer.Option(help=f"None: {COMPLETIONS}, or {CHAT} for --backend openai-chat and --dataset chat.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Its name, or its directory. None: the first that the server lists.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Its name, where --model is the directory.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Checkpoint directory, demo or random:125m. None: the model's, if it lies here.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(help="For random token ids without a tokenizer.")] = None,
    dataset_name: Annotated[
        str, typer.Option("--dataset-name", "--dataset", metavar="NAME [FILE]", help=f"{', '.join(NAMES)}.")
    ] = "random",
    dataset_path: Annotated[Path | None, typer.Option(help="The file of sharegpt or jsonl.")] = None,
    num_prompts: Annotated[int, typer.Option(min=1)] = 1000,
    input_len: Annotated[int, typer.Option("--input-len", "--random-input-len", min=1)] = 1024,
    output_len: Annotated[
        int | None, typer.Option("--output-len", "--random-output-len", min=1, help="None: the file's, or 128.")
    ] = None,
    range_ratio: Annotated[
        float, typer.Option("--range-ratio", "--random-range-ratio", help="Lengths are uniform within ± this share.")
    ] = 0.0,
    prefix_len: Annotated[
        int, typer.Option("--prefix-len", "--random-prefix-len", min=0, help="Tokens that all prompts begin with.")
    ] = 0,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf: all at once.")] = math.inf,
    burstiness: Annotated[float, typer.Option(help="1: Poisson; less: in clumps; inf: evenly.")] = 1.0,
    burst: Annotated[int | None, typer.Option(help="So many requests at once …")] = None,
    burst_every: Annotated[float | None, typer.Option(help="… every so many seconds.")] = None,
    ramp_up_strategy: Annotated[str | None, typer.Option(help="linear or exponential.")] = None,
    ramp_up_start_rps: Annotated[float | None, typer.Option()] = None,
    ramp_up_end_rps: Annotated[float | None, typer.Option()] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests that may be open at once.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Rounds; figures are then medians with spreads.")] = 1,
    num_warmups: Annotated[int, typer.Option(min=0, help="Unmeasured requests before each run.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
    as_text: Annotated[
        bool, typer.Option("--as-text", help="Send text where token ids are known, too, as vLLM's tool does.")
    ] = False,
    ignore_eos: Annotated[
        bool | None, typer.Option("--ignore-eos/--no-ignore-eos", help="None: with random prompts.", show_default=False)
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="None: the server's default.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    top_k: Annotated[int | None, typer.Option()] = None,
    min_p: Annotated[float | None, typer.Option()] = None,
    frequency_penalty: Annotated[float | None, typer.Option()] = None,
    presence_penalty: Annotated[float | None, typer.Option()] = None,
    repetition_penalty: Annotated[float | None, typer.Option()] = None,
    logprobs: Annotated[int | None, typer.Option(min=0)] = None,
    extra_body: Annotated[str | None, typer.Option(metavar="JSON", help="Further fields; null takes one out.")] = None,
    header: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Do not check TLS certificates.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for one answer.")] = 600.0,
    ready_check_timeout_sec: Annotated[float, typer.Option(min=0, help="Wait so long for an answer first.")] = 0.0,
    percentile_metrics: Annotated[
        str, typer.Option(help="Of ttft, tpot, itl, e2el: what is printed.")
    ] = "ttft,tpot,itl",
    metric_percentiles: Annotated[str, typer.Option()] = "99",
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="METRIC:MS", help="What a good answer keeps: ttft, tpot, e2el.")
    ] = None,
    save_result: Annotated[bool, typer.Option("--save-result")] = False,
    save_detailed: Annotated[bool, typer.Option("--save-detailed", help="With a list of every request.")] = False,
    append_result: Annotated[bool, typer.Option("--append-result", help="As one more line of the file.")] = False,
    result_dir: Annotated[Path | None, typer.Option()] = None,
    result_filename: Annotated[str | None, typer.Option()] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE")] = None,
    label: Annotated[str | None, typer.Option()] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Figures as a page; saves the result.")
    ] = None,
    disable_tqdm: Annotated[bool, typer.Option("--disable-tqdm", help="No progress bar.")] = False,
) -> None:
    """Measure one or several OpenAI-compatible servers under load."""
    from . import serve as bench
    from .metrics import Selection
    from .prompts import Dataset, ServeError, ServeOptions

    sampling = {
        **{"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "logprobs": logprobs},
        **{"frequency_penalty": frequency_penalty, "presence_penalty": presence_penalty},
        "repetition_penalty": repetition_penalty,
    }
    body = {name: value for name, value in sampling.items() if value is not None} | _object(extra_body)
    try:
        arrivals = Arrivals(
            request_rate,
            burstiness,
            burst,
            burst_every,
            cast(Ramp | None, ramp_up_strategy),  # checked there
            ramp_up_start_rps,
            ramp_up_end_rps,
        )
    except ArrivalsError as error:
        raise typer.BadParameter(str(error)) from None
    options = ServeOptions(
        sides=_sides(url or [], pid or [], base_url or f"http://{host}:{port}"),
        endpoint=_endpoint(endpoint, backend, dataset_name),
        model=served_model_name or model,
        tokenizer=tokenizer or _directory(model),
        dataset=Dataset(
            dataset_name, dataset_path, num_prompts, input_len, output_len, range_ratio, prefix_len, vocab_size
        ),
        arrivals=arrivals,
        max_concurrency=max_concurrency,
        runs=runs,
        num_warmups=num_warmups,
        seed=seed,
        as_text=as_text,
        ignore_eos=ignore_eos,
        body=body,
        headers=_pairs("--header", header),
        timeout=timeout,
        ready_timeout=ready_check_timeout_sec,
        insecure=insecure,
        selection=Selection(_metrics(percentile_metrics), _percentiles(metric_percentiles), _goodput(goodput)),
    )
    notes = _pairs("--metadata", metadata)
    try:
        with _progress(not disable_tqdm, len(options.sides) * runs * num_prompts) as tell:
            result = bench.run(options, tell)
    except (DatasetError, UsageError) as error:
        raise typer.BadParameter(str(error)) from None
    except ServeError as error:
        typer.echo(f"tandem bench serve: {error}", err=True)
        raise typer.Exit(1) from None
    result = {"backend": backend, "label": label, **notes, **result}
    for text in lines(result, options):
        typer.echo(text)
    if save_result or save_detailed or append_result or report is not None:
        path = _path(result_dir, result_filename, label or backend, result)
        stored = result if save_detailed else without_details(result)
        (append if append_result else save)(path, stored)
        typer.echo(f"saved {path}", err=True)
        if report is not None:
            from .report import report as draw

            typer.echo(f"saved {draw([path], report)}", err=True)
    if not any(side["completed"] for side in sides_of(result).values()):
        raise typer.Exit(1)


def sides_of(result: Result) -> dict[str, Result]:
    """By name; a result of one server is its own side."""
    return result.get("sides") or {"server": result}


def without_details(result: Result) -> Result:
    """Without the lists that hold something of every request, wherever they stand."""
    from .metrics import DETAILS

    found = {name: value for name, value in result.items() if name not in DETAILS}
    if "sides" in found:
        found["sides"] = {name: without_details(side) for name, side in found["sides"].items()}
    if "runs" in found:
        found["runs"] = [without_details(run) for run in found["runs"]]
        for run in found["runs"]:  # the curve of the run with the median throughput stands at the side itself
            run["tandem"] = {name: value for name, value in run["tandem"].items() if name != "quantiles"}
    return found


def lines(result: Result, options: Any) -> Iterator[str]:
    """What is printed."""
    from .metrics import block, our_lines

    sides = sides_of(result)
    for name, side in sides.items():
        if len(sides) > 1 or options.runs > 1:
            yield f"{name}: {side['url']}" + (f", median of {options.runs} runs" if options.runs > 1 else "")
        yield from block(side, options.selection, options.max_concurrency, options.arrivals.request_rate)
        yield from our_lines(side, paced=options.arrivals != Arrivals())
        for number, run in enumerate(side.get("runs", [side]), 1):
            for doubt in run["tandem"]["doubts"]:
                yield f"WARNING: {f'run {number}: ' if options.runs > 1 else ''}{doubt}"
    for pair, about in result.get("ratios", {}).items():
        yield ""
        yield from ratio_lines(pair, about, sides)
    yield f"Prompts were sent as {result['prompts_sent_as']}."
    for name in result["fields_left_out"]:
        yield f"WARNING: a server refused {name}: it was left out of all requests"
    if result["prompts_repeated"]:
        yield "WARNING: the file has too few prompts for all runs: later runs ask again what a prefix cache may hold"
    if len(sides) > 1 and result["num_prompts"] and len({side["total_output_tokens"] for side in sides.values()}) > 1:
        yield "WARNING: the servers made different numbers of output tokens (above): compare by token, not by request"


def ratio_lines(pair: str, about: dict[str, dict[str, float]], sides: dict[str, Result]) -> Iterator[str]:
    first, _, other = pair.partition(" / ")
    yield f"{pair:<32} {first:>12.12} {other:>12.12} {'ratio':>8}  (10th - 90th percentile)"
    for name, values in about.items():
        one = Spread(values["median"], values["low"], values["high"], int(values["samples"]))
        above, below = (side.get(name, side["tandem"]["server"].get(name)) for side in (sides[first], sides[other]))
        yield f"{name:<32} {above:>12.2f} {below:>12.2f} {one.median:>8.3f}  ({one.low:.3f} - {one.high:.3f})"


def _sides(urls: list[str], pids: list[str], otherwise: str) -> tuple[Any, ...]:
    from .prompts import Side

    known = dict(_named("--pid", word, "server") for word in pids)
    sides: list[Side] = []
    for word in urls or [otherwise]:
        name, address = _named("--url", word, "server" if len(urls) < 2 else f"server{len(sides) + 1}")
        if not address.startswith(("http://", "https://")):
            raise typer.BadParameter(f"--url {word}: [NAME=]http://HOST:PORT")
        number = known.pop(name, None)
        if number is not None and not number.isdigit():
            raise typer.BadParameter(f"--pid {name}={number}: a process id")
        sides.append(Side(name, address.rstrip("/").removesuffix("/v1"), int(number) if number else None))
    if known:
        raise typer.BadParameter(f"--pid {next(iter(known))}=…: there is no such --url NAME=URL")
    if len({side.name for side in sides}) < len(sides):
        raise typer.BadParameter("every --url needs a name of its own: --url NAME=URL")
    return tuple(sides)


def _named(flag: str, word: str, otherwise: str) -> tuple[str, str]:
    """NAME=VALUE; a URL may hold = itself."""
    name, equals, value = word.partition("=")
    if equals and "/" not in name and name:
        return name, value
    if not word:
        raise typer.BadParameter(f"{flag}: it is empty")
    return otherwise, word


def _directory(model: str | None) -> str | None:
    """The model as a place to find a tokenizer at, if it is one."""
    files = ("config.json", "tokenizer.json")
    return model if model is not None and all((Path(model) / name).is_file() for name in files) else None


def _endpoint(endpoint: str | None, backend: str, dataset: str) -> str:
    if backend not in ("openai", "vllm", "openai-chat"):
        raise typer.BadParameter(f"--backend {backend}: openai, vllm or openai-chat")
    if endpoint is None:
        return CHAT if backend == "openai-chat" or dataset == "chat" else COMPLETIONS
    if not endpoint.startswith("/"):
        raise typer.BadParameter(f"--endpoint {endpoint}: a path such as {CHAT}")
    return endpoint


def _object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"--extra-body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise typer.BadParameter("--extra-body: a JSON object is needed")
    return value


def _pairs(flag: str, words: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words or []:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"{flag} {word}: KEY=VALUE is needed")
        found[name.strip()] = value.strip()
    return found


def _metrics(text: str) -> tuple[str, ...]:
    from .metrics import METRICS

    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in METRICS:
            raise typer.BadParameter(f"--percentile-metrics {name}: of {', '.join(METRICS)}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not all(0 <= value <= 100 for value in values):
        raise typer.BadParameter(f"--metric-percentiles {text}: numbers from 0 to 100 with commas between")
    return values


def _goodput(words: list[str] | None) -> dict[str, float] | None:
    from .metrics import GOODPUT

    found: dict[str, float] = {}
    for word in " ".join(words or []).split():
        name, _, value = word.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = math.nan
        if name not in GOODPUT or not limit >= 0:
            raise typer.BadParameter(f"--goodput {word}: METRIC:MILLISECONDS, of {', '.join(GOODPUT)}")
        found[name] = limit
    return found or None


def _path(directory: Path | None, name: str | None, label: str, result: Result) -> Path:
    """vLLM's name of a result file, unless one is given."""
    if name is None:
        stamp = "".join(filter(str.isdigit, result["date"][:19]))
        ramp = result.get("ramp_up_strategy")
        rate = f"{result['request_rate']}qps"
        if ramp is not None:
            rate = f"ramp-up-{ramp}-{result['ramp_up_start_rps']:g}qps-{result['ramp_up_end_rps']:g}qps"
        limit = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] is not None else ""
        name = f"{label}-{rate}{limit}-{result['model_id'].split('/')[-1]}-{stamp[:8]}-{stamp[8:]}.json"
    return (directory or Path()) / name


@contextmanager
def _progress(wanted: bool, total: int) -> Iterator[Callable[[str, int, int], None]]:
    """One bar over all runs, on a terminal."""
    if not wanted:
        yield lambda what, done, of: None
        return
    ended: dict[str, int] = {}
    with progress("serve", total) as show:

        def tell(what: str, done: int, of: int) -> None:
            ended[what] = done
            show(sum(ended.values()), what)

        yield tell
