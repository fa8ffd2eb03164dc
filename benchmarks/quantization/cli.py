"""`tandem quantize`: words to options. torch is imported once they are right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...server.engine.control import as_flags
from ...server.engine.options import EngineOptions, ModelSpec, OptionsError
from ...server.options import parse_model, parse_quantity
from ...server.text.errors import TextError
from ..bench.models import UsageError
from ..bench.progress import progress
from .texts import passages, rankings, read_examples

if TYPE_CHECKING:
    from ...model.quantize import Change, Source

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
CALIBRATION = 256  # texts that SmoothQuant's factors are found on
SCHEMES = ("int8", "w8a8")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="PATH|REFERENCE", help="A checkpoint; to evaluate, the reference.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT|CANDIDATE", help="A directory to write to; to evaluate, what is compared.")
    ],
    scheme: Annotated[
        str | None, typer.Option(help="int8 (weights) or w8a8 (activations, too).", show_default=False)
    ] = None,
    smooth_quant: Annotated[
        float | None,
        typer.Option(metavar="ALPHA", help="Of w8a8: SmoothQuant's strength, 0.5 to begin with.", show_default=False),
    ] = None,
    shard_size: Annotated[str, typer.Option(help="Most bytes of a file.")] = "5g",
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Compare two models, said as to `tandem serve`, instead of writing one.")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="Evaluate two models of this server, by name.", show_default=False)
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's key, where it wants one.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Most likely tokens that a server is asked for.")] = 20,
    text: Annotated[
        Path | None,
        typer.Option(help="Text, or .jsonl with messages and answers. None: the bundled set.", show_default=False),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the figures.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="A picture.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="Where models compute: auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default=False)] = None,
) -> None:
    """Write a checkpoint with int8 matrices that Tandem and vLLM read, or say what quantizing costs in quality."""
    with one_sentence():
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        writing = {"--scheme": scheme, "--smooth-quant": smooth_quant}
        evaluating = {"--url": url, "--api-key": api_key, "--json": json_file, "--plot": plot}
        if evaluate:
            _only(writing, "writing a checkpoint, which --evaluate does not")
            _evaluate(model, out, text, url, api_key, top, json_file, plot, _options(device))
        else:
            _only(evaluating, "--evaluate")
            if scheme not in SCHEMES:
                raise UsageError(f"--scheme {scheme or 'is missing'}: one of {', '.join(SCHEMES)}")
            most = parse_quantity(shard_size, "--shard-size")
            _write(model, Path(out), scheme, smooth_quant, text, most, _options(device))


def _only(others: dict[str, Any], what: str) -> None:
    if given := [flag for flag, value in others.items() if value is not None]:
        raise UsageError(f"{given[0]} is for {what}")


def _options(device: str) -> EngineOptions:
    from ...server.engine.hosting import device_of

    return EngineOptions(device=device_of(EngineOptions(device=device).device))


def _write(
    word: str, out: Path, scheme: Any, alpha: float | None, text: Path | None, most: int, options: EngineOptions
) -> None:
    from ...model.quantize import Source, check_target, quantize

    spec = parse_model(word)
    if spec != ModelSpec(spec.name, spec.path) or spec.is_null:
        raise UsageError(f"{word}: a directory or a hub id alone is needed")
    if alpha is None and text is not None:
        raise UsageError("--text is for --smooth-quant and --evaluate")
    if alpha is not None and (scheme != "w8a8" or not 0 <= alpha <= 1):
        raise UsageError(f"--smooth-quant {alpha}: a number from 0 to 1, with --scheme w8a8")
    check_target(out)
    source, began = Source(Path(spec.path)), time.monotonic()
    changes = {} if alpha is None else _smoothed(source, spec, alpha, text, options)
    with progress(f"{spec.name} in {scheme}, MiB", _mib(source.nbytes)) as show:
        written = quantize(
            source,
            out,
            scheme,
            changes=changes,
            most=most,
            on_progress=lambda done, total: show(_mib(done * source.nbytes // max(total, 1)), ""),
        )
    sizes = f"{written.bytes_before / 1e6:,.1f} MB became {written.bytes_after / 1e6:,.1f} MB"
    files = f"{len(written.files)} file{'s' * (len(written.files) > 1)}"
    print(f"{out}: {written.matrices} matrices in {scheme}, {sizes} in {files}, {time.monotonic() - began:.1f} s")


def _mib(count: int) -> int:
    return -(-count // 2**20)


def _smoothed(
    source: Source, spec: ModelSpec, alpha: float, text: Path | None, options: EngineOptions
) -> dict[str, Change]:
    """The model is in memory whole while texts are read through it, and gone when the checkpoint is written."""
    from ...model.smoothing import smooth
    from .local import LocalModel

    examples = read_examples(text)
    model = LocalModel(spec.path, options)
    if model.config.generates:
        texts = [passage.token_ids for passage in passages(examples, model.tokens, model.context)]
    else:  # what it will read: bad answers, too
        texts = [ids for group in rankings(examples, model.tokens, model.context) for ids in group]
    texts = texts[:CALIBRATION]
    with progress("SmoothQuant, texts", len(texts)) as show:
        return smooth(model.model, source, texts, alpha, lambda done, total: show(done, ""))


def _evaluate(
    reference: str,
    candidate: str,
    text: Path | None,
    url: str | None,
    key: str | None,
    top: int,
    json_file: Path | None,
    plot: Path | None,
    options: EngineOptions,
) -> None:
    from . import report
    from .quality import LanguageQuality

    examples = read_examples(text)
    with progress("texts", len(examples)) as show:
        if url is None:
            from . import local

            sides = local.LocalModel(reference, options), local.LocalModel(candidate, options)
            found = local.compare(*sides, examples, lambda done: show(done, ""))
        else:
            from . import served

            with served.Server(url, key) as server:
                models = served.ServedModel(server, reference, top), served.ServedModel(server, candidate, top)
                found = served.compare(*models, examples, lambda done: show(done, ""))
    exact = not isinstance(found, LanguageQuality) or found.exact
    result = {"reference": reference, "candidate": candidate, "exact": exact, "figures": found.figures()}
    result |= {} if exact else {"top": top}
    print("\n".join(report.lines(result)))
    if json_file is not None:
        from ..bench.result import describe, save

        save(json_file, {"benchmark": "quality", **describe(options.device), "text": str(text or "bundled"), **result})
    if plot is not None:
        try:
            report.draw(found, f"{candidate} beside {reference}", plot)
        except ImportError as error:
            raise UsageError(f"--plot needs {error.name}: pip install 'tandem[bench]'") from None


@contextmanager
def one_sentence() -> Iterator[None]:
    """What is wrong with the words, or with what they name, ends the command with status 2 and says so."""
    from ...model.errors import CheckpointError

    try:
        yield
    except (UsageError, OptionsError, CheckpointError, TextError) as error:
        typer.echo(f"tandem quantize: {as_flags(str(error))}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"tandem quantize: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app(prog_name="tandem quantize")
