"""Where a GPU's memory goes, by formula: weights, what a step needs at most, graphs, a reserve; KV caches get the rest.

No step is run to find out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...kernels import ops
from ...kernels.attention import CHUNK
from ...kernels.sampling import workspace
from ...model.config import ModelConfig
from .options import EngineOptions, OptionsError

# The CUDA context, kernels, cuBLAS's workspaces, 64 MiB of an int8 matrix as cuBLAS takes it, what the allocator cannot
# use.
RESERVE = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Division:
    """Bytes of one GPU. What the KV caches get is what is left."""

    total: int
    others: int  # taken by other processes
    limit: int  # for this one, all in all
    weights: int
    steps: int
    graphs: int
    reserve: int = RESERVE

    @property
    def rest(self) -> int:
        return self.limit - self.weights - self.steps - self.graphs - self.reserve

    def __str__(self) -> str:
        terms = (
            f"{self.weights / MIB:,.0f} weights, {self.steps / MIB:,.0f} steps, {self.graphs / MIB:,.0f} graphs, "
            f"{self.reserve / MIB:,.0f} reserve"
        )
        return f"of {self.total / MIB:,.0f} MiB, {self.limit / MIB:,.0f} may be used: {terms}"


def row_bytes(config: ModelConfig, itemsize: int) -> int:
    """What one row of a step holds at once, at the widest place of a layer.

    Residual and hidden state beside either qkv, q and the attention's output, or gate, up and their product.
    """
    heads = (config.heads + 2 * config.kv_heads) * config.head_size
    attention = config.hidden_size + heads + 2 * config.heads * config.head_size
    mlp = config.hidden_size + 3 * config.intermediate_size
    return itemsize * (2 * config.hidden_size + max(attention, mlp))


def logits_bytes(config: ModelConfig, itemsize: int, rows: int) -> int:
    """Logits as the head gives them, as float32, and a copy that penalties may change."""
    return rows * config.vocab_size * (itemsize + 4 + 4)


def partials_bytes(config: ModelConfig, options: EngineOptions, context: int) -> int:
    """Attention's partial results of decodes: output, maximum and sum of each chunk of K and V, per query head."""
    chunks = options.max_num_seqs * -(-context // CHUNK)
    return chunks * config.heads * (config.head_size + 2) * 4


def step_bytes(config: ModelConfig, itemsize: int, options: EngineOptions, context: int) -> int:
    """The most that a step of one model takes beside weights and KV cache."""
    rows = options.max_num_batched_tokens * row_bytes(config, itemsize)
    if not config.generates:
        return rows + partials_bytes(config, options, context)
    scoring = ops.DEVICE_LOGIT_ELEMENTS * (itemsize + 4)  # log-probabilities of a prompt, in rounds of rows
    drawing = logits_bytes(config, itemsize, options.max_num_seqs) + workspace(options.max_num_seqs, config.vocab_size)
    return rows + partials_bytes(config, options, context) + max(scoring, drawing)


def graph_bytes(config: ModelConfig, itemsize: int, options: EngineOptions, context: int) -> int:
    """What the decode graphs of one model share: the largest one's tensors."""
    if not config.generates or not options.runs_ahead:
        return 0
    rows = options.max_num_seqs * row_bytes(config, itemsize) + partials_bytes(config, options, context)
    return rows + 2 * logits_bytes(config, itemsize, options.max_num_seqs)


def divide(
    models: Sequence[tuple[ModelConfig, int, int, int]], options: EngineOptions, total: int, free: int, own: int
) -> Division:
    """`models`: (config, bytes per value, bytes of weights, context) of each. `own`: bytes that this process holds.

    Models that take turns on the device need for steps what the largest of them does; graphs are everyone's own.
    """
    steps = [step_bytes(config, size, options, context) for config, size, _, context in models]
    return Division(
        total=total,
        others=max(0, total - free - own),
        limit=int(total * options.gpu_memory_utilization),
        weights=sum(weights for _, _, weights, _ in models),
        steps=sum(steps) if options.role_streams else max(steps),
        graphs=sum(graph_bytes(config, size, options, context) for config, size, _, context in models),
    )


def kv_bytes(division: Division, options: EngineOptions) -> int:
    """Bytes for the KV caches of all models. Raises OptionsError that says what is missing and what to change."""
    left = division.total - division.others - (division.weights + division.steps + division.graphs + division.reserve)
    if options.kv_cache_memory_bytes is not None:
        if options.kv_cache_memory_bytes > left:
            raise OptionsError(
                f"kv_cache_memory_bytes is {options.kv_cache_memory_bytes:,}, but beside weights and steps only "
                f"{max(0, left):,} bytes are left; {division}, {division.others / MIB:,.0f} MiB are other processes'"
            )
        return options.kv_cache_memory_bytes
    if division.rest <= 0:
        raise OptionsError(
            f"nothing is left for the KV cache: {division}. Raise gpu_memory_utilization "
            f"({options.gpu_memory_utilization}), lower max_num_batched_tokens ({options.max_num_batched_tokens}) or "
            f"max_num_seqs ({options.max_num_seqs}), or host fewer models"
        )
    if division.rest > left:
        raise OptionsError(
            f"gpu_memory_utilization {options.gpu_memory_utilization} asks for {division.limit / MIB:,.0f} MiB, but "
            f"other processes hold {division.others / MIB:,.0f} of {division.total / MIB:,.0f} MiB; lower it to "
            f"{max(0.0, (division.total - division.others) / division.total - 0.005):.2f}"
        )
    return division.rest


def measure(device: str) -> tuple[int, int, int]:
    """(total, free, this process's) bytes of a GPU."""
    free, total = torch.cuda.mem_get_info(device)
    return total, free, torch.cuda.memory_reserved(device)
