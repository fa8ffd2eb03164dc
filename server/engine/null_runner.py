"""A model whose step is free, so that all around it can be measured alone: scheduler, messages, text, HTTP.

`--model null` hosts it. It has the bundled policy's tokenizer and vocabulary and no weights: a token is looked up by a
hash of the request and its position, so the same request gives the same answer whatever else runs. Temperature, top-p
and penalties change nothing but, through the seed, which tokens come; every log-probability is the uniform
distribution's. KV pages are counted at the policy's size and never allocated. `null:5` takes 5 ms for a step, asleep:
at a pace that the rest can follow, every token is a message and an event of its own.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...model.config import read_config
from .plan import Plan, Sampled
from .request import EngineError, Logprobs, Request

CONTEXT = 8192  # tokens; nothing in it costs memory but the scheduler's page table
CYCLE = 4096  # tokens until an answer begins again; a power of two


class NullModel:
    """What the engine asks of a model that it hosts."""

    dtype = torch.bfloat16  # of the KV cache that it does not have
    weight_bytes = 0
    deterministic = True
    digest = "null"

    def __init__(self, directory: str | Path, step_seconds: float = 0.0) -> None:
        """Vocabulary and nominal size are those of the checkpoint in `directory`. Raises CheckpointError."""
        self.config = replace(read_config(directory), architecture="Null", context=CONTEXT, dtype="bfloat16")
        self.step_seconds = step_seconds
        self.cycle = random.Random(0).choices(plain_ids(Path(directory)), k=CYCLE)


def plain_ids(directory: Path) -> list[int]:
    """Tokens of a byte-level vocabulary that are whole ASCII text, so that each shows at once; no special ones."""
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    added = {entry["id"] for entry in content["added_tokens"]}
    vocabulary: dict[str, int] = content["model"]["vocab"]
    ids = sorted(number for token, number in vocabulary.items() if token.removeprefix("Ġ").isascii())
    return [number for number in ids if number not in added]


@dataclass(slots=True)
class NullStep:
    """A step that is over at a moment of `time.perf_counter`."""

    sampled: Sampled
    over: float
    seconds: float | None = None

    def wait(self) -> Sampled:
        left = self.over - time.perf_counter() if self.over else 0.0
        if left > 0:
            time.sleep(left)
        return self.sampled


class NullRunner:
    """Draws for all rows of a plan at once: token at position p of a slot's history = cycle[offset of the slot + p]."""

    def __init__(self, model: NullModel, max_seqs: int, ahead: bool) -> None:
        self.model, self.ahead = model, ahead
        self._cycle = np.array(model.cycle, np.int64)
        self._uniform = -math.log(model.config.vocab_size)
        self._offsets = np.zeros(max_seqs, np.int64)
        self._places: NDArray[np.int64] = np.zeros(0, np.int64)  # of the last pure decode, in the endless cycle
        self._requests: list[Request | None] = [None] * max_seqs
        # By slot where these are wanted: likely tokens beside each drawn one; whether the policy's values, too.
        self._tops: dict[int, tuple[int, bool]] = {}
        self._over = 0.0  # when the last step is

    def prepare(self) -> None:
        pass

    def idle(self) -> bool:
        return False

    def write(self, work: Callable[[], None]) -> None:
        work()

    def renew(self) -> None:
        pass

    def refusal(self, request: Request) -> EngineError | None:
        """What it cannot even pretend to do: to draw no other tokens than those that are allowed."""
        sampling = request.sampling
        for param in ("allowed_ids", "bad_words", "logit_bias", "grammar") if sampling else ():
            if getattr(sampling, param):
                name = {"allowed_ids": "allowed_token_ids", "grammar": "structured_outputs"}.get(param, param)
                return EngineError("invalid", f"the null model {request.model} draws by no weights: no {name}", name)
        return None

    def launch(self, plan: Plan) -> NullStep:
        if plan.left or plan.entered:
            self._apply(plan)
        if plan.decodes < len(plan.slots):
            pairs = [(slot, plan.starts[row] + plan.counts[row]) for row, slot in plan.samples]
            places = self._offsets[[slot for slot, _ in pairs]] + [position for _, position in pairs]
        elif plan.steady:
            self._places += 1
            places = self._places
        else:
            places = self._places = self._offsets[plan.slots] + plan.starts + 1
        sampled = Sampled(self._cycle[places & (CYCLE - 1)].tolist())
        if self._tops:
            wanted = [self._tops.get(slot) for _, slot in plan.samples]
            sampled.logprobs = [one and self._columns(1, *one) for one in wanted]
        for rows in plan.prompt_logprobs:
            request = self._requests[plan.slots[rows.row]]
            assert request is not None
            sampled.prompt_logprobs.append(self._columns(rows.end - rows.first, request.prompt_logprobs or 0))
        return NullStep(sampled, self._ends())

    def _apply(self, plan: Plan) -> None:
        for slot in plan.left:
            self._requests[slot] = None
            self._tops.pop(slot, None)
        for entered in plan.entered:
            request, slot = entered.request, entered.slot
            sampling = request.sampling
            self._requests[slot] = request
            if sampling is None:
                continue
            seed = sampling.seed if sampling.temperature else 0
            prompt = request.token_ids
            self._offsets[slot] = hash((*prompt[-16:], len(prompt), seed, entered.choice)) & (CYCLE - 1)
            if sampling.logprobs is not None:
                self._tops[slot] = sampling.logprobs, sampling.policy_logprobs

    def _columns(self, count: int, top: int, policy: bool = False) -> Logprobs:
        """Of `count` tokens; all are equally likely at any temperature, so each is of the first rank."""
        ids = list(range(min(top, self.model.config.vocab_size)))
        values = [self._uniform] * count
        tops = [ids] * count
        likely = [[self._uniform] * len(ids)] * count
        return Logprobs(values, [1] * count, tops, likely, [*values] if policy else [])

    def _ends(self) -> float:
        """When this step is over: steps follow one another."""
        if not self.model.step_seconds:
            return 0.0
        self._over = max(self._over, time.perf_counter()) + self.model.step_seconds
        return self._over
