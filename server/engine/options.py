"""What the engine is told at its start: frozen, made once at the edge, without torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .request import PoolingMode, Role, ScorePoolingMode

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Scheme = Literal["auto", "none", "int8", "w8a8"]  # of matrices; auto: as the checkpoint has them
HeadDtype = Literal["auto", "int8", "fp16"]  # of a language model's head; auto: as its matrices, fp16: the model's own
KVDtype = Literal["auto", "int8", "float32", "bfloat16", "float16"]  # auto: the model's own
AttentionBackend = Literal["triton", "flash", "torch"]

DEMO = Path(__file__).parents[2] / "model" / "demo"  # the bundled models
MOST_LORA_RANK = 512
NULL = "null"  # the path of the model whose step is free


class OptionsError(ValueError):
    """An option that cannot be met. The message names it, with the value and what would do."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model to host."""

    name: str
    path: str  # directory of a Hugging Face checkpoint; null, or null:5 for 5 ms a step: `null_runner.NullModel`; of a
    # model with `trunk` its head's directory, empty where that starts as a copy; empty with `base_of`
    role: Role | None = None  # None: found from the checkpoint
    dtype: Dtype = "auto"
    aliases: tuple[str, ...] = ()
    kv_share: float | None = None  # part of the KV caches' memory for good, 0..1; None: `memory.divide_arena`
    weight: float = 1.0  # share of the device's time beside the other models while all are busy
    max_model_len: int | None = None  # None: the engine's
    chat_template: str | None = None  # file or built-in name; read by the workers, as are the next two
    tool_call_parser: str | None = None  # of `server.text.tools.formats`, or none; None: by the chat template
    reasoning_parser: str | None = None  # of `server.text.reasoning`; None: thinking is text
    pooling: PoolingMode | ScorePoolingMode | None = None  # None: the engine's for embeddings, else the checkpoint's
    base_of: str | None = None  # a reference with that model's weights, without any adapter
    trunk: str | None = None  # a value model whose decoder is that model's
    quantization: Scheme = "auto"
    lm_head: HeadDtype = "auto"
    kv_dtype: KVDtype = "auto"

    @property
    def is_null(self) -> bool:
        return self.path.partition(":")[0] == NULL

    @property
    def shares(self) -> str:
        """The model whose weights it has; empty: it has its own."""
        return self.base_of or self.trunk or ""

    @property
    def text_path(self) -> str:
        """Where the tokenizer and the chat template lie."""
        return str(DEMO / "policy") if self.is_null else self.path

    @property
    def step_seconds(self) -> float:
        """What a step of the null model takes, 0 unless its path says so. Raises OptionsError."""
        _, colon, pace = self.path.partition(":")
        if not self.is_null or not colon:
            return 0.0
        if not re.fullmatch(r"\d+(\.\d+)?", pace):
            raise OptionsError(f"model {self.name}: {self.path}: null, or null:5 for steps of 5 milliseconds")
        return float(pace) / 1000


def owner_of(spec: ModelSpec, specs: Sequence[ModelSpec]) -> ModelSpec:
    """The spec whose weights, tokenizer and templates a model has: itself, or the one that it names."""
    return next((other for other in specs if spec.shares and other.name == spec.shares), spec)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the hosted models share one engine process."""

    device: str = "cpu"  # or cuda, cuda:N, auto: a GPU where torch finds one
    threads: int | None = None  # of torch on CPU; None: torch's own choice
    max_model_len: int | None = None  # tokens, prompt and answer together; None: each checkpoint's context
    max_num_seqs: int = 256  # sequences of one model that run at once
    max_num_batched_tokens: int = 2048  # of one step
    page_size: int = 16  # tokens
    kv_cache_memory_bytes: int | None = None  # all models together; None: by formula, from the memory that is free
    gpu_memory_utilization: float = 0.9  # of a GPU's whole memory: weights, what steps need, KV caches
    attention_backend: AttentionBackend = "triton"  # on GPUs; on CPUs the definitions run
    deterministic: bool = False  # a token's bits do not depend on what else is in the step
    role_streams: bool = False  # models of one GPU compute side by side instead of in turns
    run_ahead: bool | None = None  # launch the next step before the last one's tokens are read; None: not on CPUs
    enable_prefix_caching: bool = True
    max_waiting_requests: int = 4096  # of one model
    max_waiting_tokens: int = 1 << 22
    pooling: PoolingMode | None = None  # of embedding models; None: as each checkpoint says, or the last token
    max_loras: int = 0  # LoRA adapters that a policy may have at once; their memory is taken at the start
    max_lora_rank: int = 16
    lora_modules: tuple[tuple[str, str], ...] = ()  # name and directory of adapters of the one policy
    step_target_ms: float | None = None  # longest step while another model decodes; None: one step of that model

    @property
    def runs_ahead(self) -> bool:
        return self.device != "cpu" if self.run_ahead is None else self.run_ahead

    @property
    def groups_decodes(self) -> bool:
        """Whether attention reads what decodes have in common once for all of them; their sums are not those of one row
        alone then."""
        return self.runs_ahead and self.attention_backend == "triton" and not self.deterministic

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise OptionsError(f"device is {self.device}: auto, cpu, cuda or cuda:N")
        if self.max_loras < 0 or not 1 <= self.max_lora_rank <= MOST_LORA_RANK:
            raise OptionsError(
                f"max_loras is {self.max_loras} and max_lora_rank {self.max_lora_rank}: at least 0, and 1 to "
                f"{MOST_LORA_RANK}"
            )
        if len(self.lora_modules) > self.max_loras:
            raise OptionsError(f"max_loras is {self.max_loras}, but lora_modules names {len(self.lora_modules)}")
        for name in ("max_num_seqs", "max_num_batched_tokens", "page_size", "max_waiting_requests"):
            if getattr(self, name) < 1:
                raise OptionsError(f"{name} is {getattr(self, name)}: at least 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise OptionsError(f"gpu_memory_utilization is {self.gpu_memory_utilization}: above 0 and at most 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise OptionsError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}: at least max_num_seqs "
                f"({self.max_num_seqs}), so that one step can advance every sequence"
            )
