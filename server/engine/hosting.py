"""From what shall be hosted to engines that hold it: checkpoints are read, and the memory is divided."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ...kernels import flash
from ...kernels.cpu.native import described
from ...model.config import ModelConfig, read_config
from ...model.errors import CheckpointError
from ...model.kv_cache import KVCache
from ...model.load import load_model
from ...model.model import Model
from ...model.pooling import is_embedding_model
from .device_memory import MIB, divide, kv_bytes, measure
from .engine import Engine
from .guides import LoadGrammars
from .heap import keep_heap
from .memory import available_memory, kv_cache_bytes, page_count, shares
from .null_runner import NullModel
from .options import EngineOptions, ModelSpec, OptionsError
from .request import ModelCard, Role

Progress = Callable[[str, int, int], None]  # model, bytes done, bytes in all


def load_engines(
    specs: Sequence[ModelSpec],
    options: EngineOptions,
    on_progress: Progress | None = None,
    grammars: LoadGrammars | None = None,
) -> tuple[list[Engine], str]:
    """The engines, and in one sentence how the memory was divided.

    Raises CheckpointError and OptionsError, naming the model or the option.
    """
    options = replace(options, device=_device(options.device))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_heap()
    names = [name for spec in specs for name in (spec.name, *spec.aliases)]
    for name in names:
        if names.count(name) > 1:
            raise OptionsError(f"two hosted models are called {name}: give each its own name")
    parts = shares(specs)
    models = [_load(spec, options, on_progress) for spec in specs]
    for spec, model in zip(specs, models, strict=True):
        _check_attention(spec, model, options)
    cards = [_card(spec, model, options) for spec, model in zip(specs, models, strict=True)]
    if options.pooling is not None and not any(card.embedding_size for card in cards):
        raise OptionsError(f"pooling is {options.pooling}, but no hosted model embeds: give one role=embedding")
    memory, terms = _memory(models, cards, options)
    engines: list[Engine] = []
    for spec, card, model, part in zip(specs, cards, models, parts, strict=True):
        page = KVCache.bytes_per_page(model.config, options.page_size, model.dtype)
        pages = page_count(spec.name, int(memory * part), page, options, card.context)
        engines.append(Engine(card, model, pages=pages, options=options, grammars=grammars))
    taken = sum(engine.kv_bytes for engine in engines)
    return engines, f"KV caches take {taken / MIB:,.0f} of {memory / MIB:,.0f} MiB allowed; {terms}"


def _memory(models: list[Model | NullModel], cards: list[ModelCard], options: EngineOptions) -> tuple[int, str]:
    """Bytes for all KV caches, and the terms that they are left by. Raises OptionsError."""
    if options.device.startswith("cuda"):
        parts = [
            (model.config, model.dtype.itemsize, model.weight_bytes, card.context)
            for model, card in zip(models, cards, strict=True)
        ]
        division = divide(parts, options, *measure(options.device))
        return kv_bytes(division, options), str(division)
    available = available_memory()
    weights = sum(model.weight_bytes for model in models) / MIB
    terms = f"{weights:,.0f} MiB of weights, {available / MIB:,.0f} MiB were free; kernels: {described()}"
    return kv_cache_bytes(options, available), terms


def _device(wanted: str) -> str:
    """Where the models shall live. Raises OptionsError for a GPU that is not there."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return wanted
    count, number = torch.cuda.device_count(), int(wanted.partition(":")[2] or 0)
    if number >= count:
        raise OptionsError(
            f"device is {wanted}, but torch {torch.__version__} finds {count} GPUs here; use auto or cpu"
        )
    return wanted


def _load(spec: ModelSpec, options: EngineOptions, on_progress: Progress | None) -> Model | NullModel:
    def progress(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(spec.name, done, total)

    try:
        if spec.is_null:
            null = NullModel(spec.text_path, spec.step_seconds)
            _check_role(spec, null.config)
            return null
        embedding = spec.role == "embedding" or (spec.role is None and is_embedding_model(Path(spec.path)))
        pooling = spec.pooling or options.pooling
        _check_role(spec, read_config(spec.path, embedding=embedding, pooling=pooling))
        return load_model(
            spec.path,
            dtype=spec.dtype,
            device=options.device,
            deterministic=options.deterministic,
            context=spec.max_model_len or options.max_model_len,
            embedding=embedding,
            pooling=pooling,
            on_progress=progress,
        )
    except CheckpointError as error:
        raise CheckpointError(f"model {spec.name}: {error}") from error


def _check_attention(spec: ModelSpec, model: Model | NullModel, options: EngineOptions) -> None:
    if options.attention_backend == "flash":
        try:
            flash.check(model.config.head_size, options.page_size, model.dtype, model.dtype, options.deterministic)
        except flash.FlashUnavailable as error:
            raise OptionsError(f"model {spec.name}: attention_backend is flash: {error}") from error


def _check_role(spec: ModelSpec, config: ModelConfig) -> Role:
    """The role a model was given, or the one its head says."""
    if spec.role == "value":
        raise OptionsError(
            f"model {spec.name}: role value is not supported; policy, reference, reward and embedding are"
        )
    labels, embeds = config.labels, config.pooling is not None
    found: Role = "embedding" if embeds else "reward" if labels else "policy"
    role: Role = found if spec.role is None else spec.role
    if spec.pooling is not None and not embeds:
        raise OptionsError(f"model {spec.name}: pooling={spec.pooling} is for role embedding, not {role}")
    if role != found and (found, role) != ("policy", "reference"):
        head = "no head" if embeds else f"a score head with {labels} outputs" if labels else "a language model head"
        raise OptionsError(f"model {spec.name}: its checkpoint has {head}, so its role cannot be {role}")
    return role


def _card(spec: ModelSpec, model: Model | NullModel, options: EngineOptions) -> ModelCard:
    config, pooling = model.config, model.config.pooling
    wanted = spec.max_model_len or options.max_model_len
    if spec.max_model_len is not None and spec.max_model_len > config.context:
        raise OptionsError(
            f"model {spec.name}: max_model_len {spec.max_model_len} exceeds its context of {config.context}"
        )
    return ModelCard(
        name=spec.name,
        role=_check_role(spec, config),
        path=spec.text_path,
        architecture=config.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        context=min(config.context, wanted or config.context),
        vocab_size=config.vocab_size,
        end_ids=tuple(sorted({*config.end_ids, *tokenizer_end_ids(Path(spec.text_path))})),
        labels=config.labels,
        weight_version=0,
        created=int(time.time()),
        aliases=spec.aliases,
        embedding_size=0 if pooling is None else config.output_size,
        pooling="" if pooling is None else pooling.mode,
        normalized=pooling is None or pooling.normalized,
        label_names=label_names(Path(spec.path), config.labels),
    )


def label_names(directory: Path, labels: int) -> tuple[str, ...]:
    """What the checkpoint calls its score head's outputs; transformers' own names where it does not say."""
    named: dict[str, Any] = _read_object(directory / "config.json").get("id2label") or {}
    return tuple(str(named.get(str(label), f"LABEL_{label}")) for label in range(labels))


def tokenizer_end_ids(directory: Path) -> set[int]:
    """The id of the tokenizer's own end-of-text token, where its configuration names one and its files know it."""
    config = _read_object(directory / "tokenizer_config.json")
    token = config.get("eos_token")
    if isinstance(token, dict):
        token = cast("dict[str, Any]", token).get("content")
    if not isinstance(token, str):
        return set()
    listed = config.get("added_tokens_decoder")
    if ids := {int(number) for number, entry in _entries(listed) if entry.get("content") == token}:
        return ids
    whole = _read_object(directory / "tokenizer.json")
    added = enumerate(cast("list[Any]", whole.get("added_tokens") or []))
    if ids := {int(entry["id"]) for _, entry in _entries(dict(added)) if entry.get("content") == token}:
        return ids
    model: dict[str, Any] = whole.get("model") or {}
    vocabulary = model.get("vocab")  # SentencePiece's Unigram has a list there; its special tokens are listed as added
    number = cast("dict[str, int]", vocabulary).get(token) if isinstance(vocabulary, dict) else None
    return set() if number is None else {number}


def _entries(listed: object) -> list[tuple[Any, dict[str, Any]]]:
    """The pairs whose value is an object; what else stands there is the tokenizer's own loader to refuse."""
    pairs = cast("dict[Any, Any]", listed).items() if isinstance(listed, dict) else ()
    return [(key, cast("dict[str, Any]", value)) for key, value in pairs if isinstance(value, dict)]


def _read_object(path: Path) -> dict[str, Any]:
    """Empty where the file is missing or broken: the tokenizer's own loader says what is wrong with it."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return cast("dict[str, Any]", content) if isinstance(content, dict) else {}
