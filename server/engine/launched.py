"""A step that is on its way on a device, and what it brings once it is over."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch types some of the functions used here only in part, and Tensor.tolist not at all.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.ops import TokenLogprobs
from .plan import Sampled
from .request import Logprobs


def to_host(tensor: Tensor) -> Tensor:
    """A copy that is complete once an event recorded after it has come; on CUDA into pinned memory."""
    return tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor.clone()


def logprobs_to_host(found: TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(*map(to_host, found))


class Clock:
    """The device's time between two points of its stream; without CUDA there is none."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._began = torch.cuda.Event(enable_timing=True) if cuda else None
        self._ended = torch.cuda.Event(enable_timing=True) if cuda else None
        if self._began is not None:
            self._began.record()

    def stop(self) -> None:
        if self._ended is not None:
            self._ended.record()

    def wait(self) -> float | None:
        """Seconds between the two points, once the second has come."""
        if self._began is None or self._ended is None:
            return None
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1000


@dataclass(slots=True)
class Launched:
    """Host copies of the results, good once the clock has stopped.

    `tops` says per drawn token how many likely tokens are wanted beside it, None where no log-probability is;
    `policies` whether the policy's is, too; `prompts` (first row, end, likely tokens) of each part of a prompt in
    `prompt_logprobs`; `parts` how many values belong to each.
    """

    clock: Clock
    tokens: Tensor | None = None  # [R] int64
    logprobs: TokenLogprobs | None = None  # of the drawn tokens
    tops: list[int | None] = field(default_factory=list[int | None])
    policy: Tensor | None = None  # [R] float32
    policies: list[bool] = field(default_factory=list[bool])
    scores: Tensor | None = None  # [rows, labels]
    values: Tensor | None = None  # [rows] float32
    parts: list[int] = field(default_factory=list[int])
    pooled: Tensor | None = None  # [texts, D or labels] float32
    prompt_logprobs: TokenLogprobs | None = None
    prompts: list[tuple[int, int, int]] = field(default_factory=list[tuple[int, int, int]])
    advance: Callable[[list[int]], dict[int, str]] | None = None  # tells the guides what was drawn; gives failures
    seconds: float | None = None

    def wait(self) -> Sampled:
        self.seconds = self.clock.wait()
        result = Sampled([] if self.tokens is None else self.tokens.tolist())
        if self.advance is not None:
            result.failures = self.advance(result.tokens)
        if self.logprobs is not None:
            columns = [column.tolist() for column in self.logprobs]
            result.logprobs = [
                None if top is None else _cut(columns, row, row + 1, top) for row, top in enumerate(self.tops)
            ]
            if self.policy is not None:
                for found, wanted, value in zip(result.logprobs, self.policies, self.policy.tolist(), strict=True):
                    if found and wanted:
                        found.policy.append(value)
        if self.scores is not None:
            result.scores = self.scores.tolist()
        if self.values is not None:
            result.values = [part.tolist() for part in self.values.split(self.parts)]
        if self.pooled is not None:
            result.pooled = self.pooled.tolist()
        if self.prompt_logprobs is not None:
            columns = [column.tolist() for column in self.prompt_logprobs]
            result.prompt_logprobs = [_cut(columns, first, end, top) for first, end, top in self.prompts]
        return result


def _cut(columns: list[Any], first: int, end: int, top: int) -> Logprobs:
    """Rows `first` to `end` of TokenLogprobs' columns, without likely tokens that cannot be drawn."""
    values, ranks, top_values, top_ids = (column[first:end] for column in columns)
    widths = [sum(value > -math.inf for value in row[:top]) for row in top_values]
    return Logprobs(
        values,
        ranks,
        [row[:width] for row, width in zip(top_ids, widths, strict=True)],
        [row[:width] for row, width in zip(top_values, widths, strict=True)],
    )
