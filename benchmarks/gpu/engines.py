"""Engines on models with random weights, and the loads they are measured with."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...model.batch import Batch
from ...model.config import ModelConfig
from ...model.kv_cache import KVCache
from ...model.linear import linears
from ...model.load import random_model
from ...model.model import Model
from ...model.quantization import WantedScheme
from ...model.weights import slots_of
from ...server.engine.engine import Engine
from ...server.engine.hub import Hub
from ...server.engine.options import EngineOptions
from ...server.engine.request import ModelCard, Output, Request, Sampling
from .rows import Absent
from .setting import Setting

NAME = "model"
WARM = 8  # decode steps before the measured ones
SPREAD = 32  # tokens that the sequences whose prompts are computed first may be ahead of the last


def draw_model(
    setting: Setting,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    quantization: WantedScheme = "auto",
    deterministic: bool = False,
) -> Model:
    """Random weights on the device."""
    name: Any = str(setting.dtype(dtype)).removeprefix("torch.")
    return random_model(
        config, dtype=name, device=setting.device, deterministic=deterministic, quantization=quantization
    )


def make_engine(
    setting: Setting,
    model: Model,
    *,
    rows: int,
    context: int,
    tokens: int | None = None,
    batched: int = 8192,
    kv_dtype: str = "",
    **given: Any,
) -> Engine:
    """An engine for `rows` sequences of `context` tokens, or `tokens` in all, with steps of `batched` tokens.

    `kv_dtype`: of K and V, if not the model's. `given` are further options of the engine. Raises Absent where it does
    not have one.
    """
    known = {field.name for field in fields(EngineOptions)}
    if absent := [name for name in given if name not in known]:
        raise Absent(f"the engine has no option {', '.join(absent)}")
    page_size = 64 if setting.cuda else 16
    pages = max(-(-(tokens or rows * context) // page_size), 2) + rows
    given = {"enable_prefix_caching": False, **given}
    options = EngineOptions(
        device=str(setting.device),
        page_size=page_size,
        max_num_seqs=rows,
        max_num_batched_tokens=max(batched, rows),
        **given,
    )
    config = model.config
    card = ModelCard(
        name=NAME,
        role="reward" if config.labels else "policy",
        path="",
        architecture=config.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        context=min(context, config.context),
        vocab_size=config.vocab_size,
        end_ids=config.end_ids,
        labels=config.labels,
        weight_version=0,
        created=int(time.time()),
        kv_dtype=kv_dtype,
    )
    return Engine(card, model, pages=pages, options=options)


def skip_prompts(model: Model) -> None:
    """From now on prompts take no time: their K and V are what the pages hold, which are filled with noise once.

    A decode step reads as much whatever it reads; computing 256 prompts first would take longer than measuring it.
    """
    forward = model.forward
    filled: list[KVCache] = []

    def decode_only(batch: Batch, cache: KVCache) -> Tensor:
        if batch.sequences.decodes == len(batch.sequences.lengths):
            return forward(batch, cache)
        if not any(cache is known for known in filled):
            filled.append(cache)
            fill_noise(cache)
        shape = len(batch.token_ids), model.config.hidden_size
        return batch.kept(torch.zeros(shape, dtype=model.dtype, device=batch.token_ids.device))

    model.forward = decode_only  # type: ignore[method-assign]


def fill_noise(cache: KVCache) -> None:
    for layer in cache.layers:
        for values in (layer.k, layer.v):
            values.random_(-127, 128) if values.dtype == torch.int8 else values.normal_()
        for scales in (layer.k_scale, layer.v_scale):
            if scales is not None:
                scales.fill_(1 / 64)


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    return random.Random(seed * 100003 + length).choices(range(3, vocab_size), k=length)


def generate(number: int, token_ids: list[int], max_tokens: int, **given: Any) -> Request:
    """Exactly `max_tokens` tokens, greedy unless told otherwise."""
    sampling = Sampling(**{"max_tokens": max_tokens, "seed": number, "temperature": 0.0, "ignore_eos": True} | given)
    want = frozenset({"tokens"} if sampling.logprobs is None else {"tokens", "logprobs"})
    return Request(number, NAME, token_ids, sampling, want)  # type: ignore[arg-type]


def score(number: int, token_ids: list[int]) -> Request:
    return Request(number, NAME, token_ids, None, frozenset({"score"}))


def answer(engine: Engine, requests: Iterable[Request]) -> dict[int, list[Output]]:
    """Every request answered; raises what went wrong with one."""
    answers = Hub([engine]).run(requests)
    for outputs in answers.values():
        error = outputs[-1].error
        if error is not None:
            raise RuntimeError(f"request {outputs[-1].request_id}: {error.kind}: {error.message}")
    return answers


def texts(answers: dict[int, list[Output]]) -> dict[int, list[int]]:
    return {number: [token for output in outputs for token in output.token_ids] for number, outputs in answers.items()}


class Decoded(NamedTuple):
    """Steps of which each gave every sequence a token."""

    seconds: list[float]
    context: float  # tokens of a sequence, the mean over sequences and steps


def room_for(context: int, steps: int) -> int:
    """Tokens that a sequence of `decode` may reach."""
    return context + WARM + steps + SPREAD


def decode(
    engine: Engine,
    rows: int,
    context: int,
    steps: int,
    around: AbstractContextManager[Any] | None = None,
    choices: int = 1,
    **sampling: Any,
) -> Decoded:
    """Measures pure decode steps of `rows` sequences with prompts of `context` tokens, of which each has `choices`.

    `around` is entered for the measured steps alone. The engine is left as it was found: the requests are aborted.
    """
    size = engine.card.vocab_size
    wanted = room_for(context, steps) - context
    requests = [
        replace(generate(n + 1, prompt(context, size, n), wanted, **sampling), n=choices)
        for n in range(rows // choices)
    ]
    for request in requests:
        if error := engine.add(request):
            raise RuntimeError(f"{error.kind}: {error.message}")
    tokens = dict.fromkeys((request.id for request in requests), 0)
    while min(tokens.values()) < WARM * choices:
        _count(engine.step(), tokens)
    before = sum(tokens.values()) / rows
    seconds: list[float] = []
    with around or nullcontext():
        for _ in range(steps):
            began = time.perf_counter()
            outputs = engine.step()
            seconds.append(time.perf_counter() - began)
            _count(outputs, tokens)
            if len(outputs) != rows:
                raise RuntimeError(f"a step gave {len(outputs)} tokens, not {rows}")
    for request in requests:
        engine.abort(request.id)
    while engine.has_work:
        engine.step()
    return Decoded(seconds, context + before + steps / 2)


def settle(engine: Engine) -> None:
    """Uses idle time as the server does between requests: what is recorded or compiled then does not disturb later."""
    while engine.idle():
        pass


def _count(outputs: Iterable[Output], tokens: dict[int, int]) -> None:
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id}: {output.error.kind}: {output.error.message}")
        if output.request_id in tokens:
            tokens[output.request_id] += len(output.token_ids)


def named_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """The weights as a checkpoint of Hugging Face has them, a tied head left out."""
    prefix = model.decoder.PREFIX
    parts: list[tuple[str, nn.Module]] = [(prefix if isinstance(prefix, str) else prefix[-1], model.decoder)]
    if not model.config.tied or model.config.labels:
        parts.append(("", model.head))
    for prefix, part in parts:
        for slot in slots_of(part):
            if not slot.optional:
                yield prefix + slot.name, slot.into.T if slot.transposed else slot.into


def copy_weights(source: Model, target: Model) -> None:
    """`target`, on a CUDA device, becomes what `source` is; both of one config."""
    for here, there in ((source.decoder, target.decoder), (source.head, target.head)):
        for one, other in zip(slots_of(here), slots_of(there), strict=True):
            other.take(one)
        for _, linear in linears(there):
            linear.finish()  # what is quantized from a tied matrix
