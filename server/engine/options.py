"""What the engine is told at its start: frozen, made once at the edge, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .request import Role

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class OptionsError(ValueError):
    """An option that cannot be met. The message names it, with the value and what would do."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to host."""

    name: str
    path: str  # directory of a Hugging Face checkpoint
    role: Role | None = None  # None: found from the checkpoint
    dtype: Dtype = "auto"
    aliases: tuple[str, ...] = ()
    kv_share: float | None = None  # part of the KV cache's memory, 0..1; None: an equal part of what the others leave
    weight: float = 1.0  # share of the device's time beside the other models while all are busy
    max_model_len: int | None = None  # None: the engine's
    chat_template: str | None = None  # file or built-in name; read by the workers


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the hosted models share one engine process."""

    device: str = "cpu"
    threads: int | None = None  # of torch on CPU; None: torch's own choice
    max_model_len: int | None = None  # tokens, prompt and answer together; None: each checkpoint's context
    max_num_seqs: int = 64  # sequences of one model that run at once
    max_num_batched_tokens: int = 2048  # of one step
    page_size: int = 16  # tokens
    kv_cache_memory_bytes: int | None = None  # all models together; None: by formula, from the memory that is free
    enable_prefix_caching: bool = True
    max_waiting_requests: int = 4096  # of one model
    max_waiting_tokens: int = 1 << 22
    cpu_decode_copy: Literal["fp16"] | None = None
    step_target_ms: float | None = None  # longest step while another model decodes; None: one step of that model

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_waiting_requests"):
            if getattr(self, name) < 1:
                raise OptionsError(f"{name} is {getattr(self, name)}: at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise OptionsError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}: at least max_num_seqs "
                f"({self.max_num_seqs}), so that one step can advance every sequence"
            )
