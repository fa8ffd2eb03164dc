"""From what shall be hosted to engines that hold it: models are loaded, and the memory is divided."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...kernels import flash
from ...kernels.cpu.native import described
from ...model.errors import CheckpointError
from ...model.kv_cache import KVCache
from ...model.model import Model
from .arena import Arena, Lender
from .arena_layout import Layout
from .device_memory import MIB, divide, kv_bytes, measure
from .engine import Engine
from .guides import LoadGrammars
from .heap import keep_heap
from .loading import Progress, load_models, role_of
from .memory import available_memory, divide_arena, kv_cache_bytes, shares
from .null_runner import NullModel
from .options import EngineOptions, ModelSpec, OptionsError, owner_of
from .pages import Pages
from .request import ModelCard
from .tokenizer_files import fingerprint, read_object, tokenizer_end_ids


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
    shares(specs)  # what is wrong with them is said before anything is read
    models = load_models(specs, options, on_progress)
    for spec, model in zip(specs, models, strict=True):
        _check_attention(spec, model, options)
    cards = [_card(spec, owner_of(spec, specs), model, options) for spec, model in zip(specs, models, strict=True)]
    if options.pooling is not None and not any(card.embedding_size for card in cards):
        raise OptionsError(f"pooling is {options.pooling}, but no hosted model embeds: give one role=embedding")
    if options.max_loras and all(isinstance(model, NullModel) or model.adapters is None for model in models):
        raise OptionsError(f"max_loras is {options.max_loras}, but no hosted model is a policy that can have adapters")
    memory, terms = _memory(models, cards, options)
    page_bytes = [
        KVCache.bytes_per_page(model.config, options.page_size, _kv_dtype(spec, model))
        for spec, model in zip(specs, models, strict=True)
    ]
    layout = divide_arena(specs, [card.context for card in cards], page_bytes, memory, options)
    engines = _engines(models, cards, layout, options, grammars)
    _load_adapters(engines, names, options)
    return engines, f"{_described(cards, layout, memory)}; {terms}"


def _engines(
    models: list[Model | NullModel],
    cards: list[ModelCard],
    layout: Layout,
    options: EngineOptions,
    grammars: LoadGrammars | None,
) -> list[Engine]:
    """Takes the arena's memory. Where models compute side by side, a slab goes over when the device is idle."""
    buffer = None
    if not all(isinstance(model, NullModel) for model in models):
        buffer = torch.empty(layout.bytes, dtype=torch.uint8, device=options.device)
    settle = partial(torch.cuda.synchronize, options.device) if options.role_streams else None
    arena = Arena([place.slabs for place in layout.places], settle)
    return [
        Engine(
            card,
            model,
            pages=Pages(place.own, options.page_size, Lender(arena, number)),
            options=options,
            grammars=grammars,
            memory=None if buffer is None else buffer[place.begin : place.end],
        )
        for number, (card, model, place) in enumerate(zip(cards, models, layout.places, strict=True))
    ]


def _described(cards: list[ModelCard], layout: Layout, memory: int) -> str:
    own = [place.own * place.page_bytes / MIB for place in layout.places]
    taken = f"KV caches take {sum(own) + layout.shared / MIB:,.0f} of {memory / MIB:,.0f} MiB allowed"
    if len(cards) == 1:
        return taken
    kept = ", ".join(f"{card.name} {size:,.1f}" for card, size in zip(cards, own, strict=True))
    if not layout.slabs:
        return f"{taken}, for good {kept}: nothing is left to be lent"
    parts = [(card.name, f"{layout.usable(number):.1%}") for number, card in enumerate(cards)]
    less = ", ".join(f"{name} can use {part} of a slab" for name, part in parts if part != "100.0%")
    return (
        f"{taken}: for good {kept}, and {layout.shared / MIB:,.1f} to be lent in {layout.slabs} slabs of "
        f"{layout.slab_bytes / MIB:,.2f} MiB{less and f' ({less})'}"
    )


def _load_adapters(engines: list[Engine], taken: list[str], options: EngineOptions) -> None:
    """Those that are named at the start. Raises CheckpointError and OptionsError."""
    able = [engine for engine in engines if engine.adapters.possible]
    if options.lora_modules and len(able) != 1:
        names = ", ".join(engine.card.name for engine in able)
        raise OptionsError(
            f"lora_modules is for one policy, and there are {names}; load their adapters once they serve"
        )
    for name, path in options.lora_modules:
        if name in taken:
            raise OptionsError(f"lora_modules: {name} is the name of a hosted model; give the adapter another one")
        try:
            error = able[0].adapters.load(name, able[0].adapters.read(path))
        except CheckpointError as broken:
            raise CheckpointError(f"adapter {name}: {broken}") from broken
        if error is not None:
            raise OptionsError(f"lora_modules: {error.message}")
    for engine in able:
        engine.card = replace(engine.card, adapters=engine.adapters.cards)


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


def _kv_dtype(spec: ModelSpec, model: Model | NullModel) -> torch.dtype:
    return model.dtype if spec.kv_dtype == "auto" else getattr(torch, spec.kv_dtype)


def _check_attention(spec: ModelSpec, model: Model | NullModel, options: EngineOptions) -> None:
    if options.attention_backend == "flash":
        try:
            kept = _kv_dtype(spec, model)
            flash.check(model.config.head_size, options.page_size, model.dtype, kept, options.deterministic)
        except flash.FlashUnavailable as error:
            raise OptionsError(f"model {spec.name}: attention_backend is flash: {error}") from error


def _card(spec: ModelSpec, owner: ModelSpec, model: Model | NullModel, options: EngineOptions) -> ModelCard:
    """`owner`: the spec whose weights the model has, mostly its own."""
    config, pooling, text = model.config, model.config.pooling, Path(owner.text_path)
    limit, whose = config.context, "its context"
    if owner is not spec:
        limit, whose = min(limit, owner.max_model_len or options.max_model_len or limit), f"{owner.name}'s context"
    if spec.max_model_len is not None and spec.max_model_len > limit:
        raise OptionsError(f"model {spec.name}: max_model_len {spec.max_model_len} exceeds {whose} of {limit}")
    return ModelCard(
        name=spec.name,
        role=role_of(spec, config),
        path=str(text),
        architecture=config.architecture,
        dtype=str(model.dtype).removeprefix("torch."),
        context=min(limit, spec.max_model_len or options.max_model_len or limit),
        vocab_size=config.vocab_size,
        end_ids=tuple(sorted({*config.end_ids, *tokenizer_end_ids(text)})),
        labels=config.labels,
        weight_version=0,
        created=int(time.time()),
        aliases=spec.aliases,
        embedding_size=0 if pooling is None else config.output_size,
        pooling=config.score.pooling.mode if config.kind == "score" else pooling.mode if pooling else "",
        normalized=pooling is None or pooling.normalized,
        head=config.score.format if config.labels else "",
        reward_mean=config.score.mean,
        reward_std=config.score.std,
        reward_normalization="none" if (config.score.mean, config.score.std) == (0, 1) else "checkpoint",
        fingerprint=fingerprint(text),
        shares=spec.shares,
        label_names=label_names(Path(spec.path), config.labels),
        quantization="none" if isinstance(model, NullModel) else model.place.quantization.matrices,
        lm_head="none" if isinstance(model, NullModel) else model.place.quantization.head,
        kv_dtype=str(_kv_dtype(spec, model)).removeprefix("torch."),
    )


def label_names(directory: Path, labels: int) -> tuple[str, ...]:
    """What the checkpoint calls its score head's outputs; transformers' own names where it does not say."""
    named: dict[str, Any] = read_object(directory / "config.json").get("id2label") or {}
    return tuple(str(named.get(str(label), f"LABEL_{label}")) for label in range(labels))
