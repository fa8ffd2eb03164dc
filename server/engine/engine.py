"""One hosted model: its scheduler, its runner, and what the rest of the server knows of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...kernels.attention import CHUNK
from ...model.kv_cache import KVCache
from ...model.model import Model
from .adapters import Adapters, LoadedAdapters
from .building import Building
from .control import ModelState
from .counts import ModelStats
from .device_runner import DeviceRunner
from .guides import Guides, LoadGrammars
from .null_runner import NullModel, NullRunner
from .options import EngineOptions
from .pages import Pages
from .plan import Executor, Plan, Sampled, Ticket
from .request import EngineError, Finish, Gives, Group, ModelCard, Output, Outputs, Request, Want
from .runner import Runner
from .scheduler import Scheduler
from .sequence import Flight, Sequence
from .warm_memory import WarmMemory

BUILDING_SECONDS = 0.005
# What models that do one thing only are asked for, give and are.
SINGLE: tuple[tuple[Want, Gives, str], ...] = (
    ("score", "scores", "a reward"),
    ("values", "values", "a value"),
    ("embedding", "embeddings", "an embedding"),
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """The step whose results came last."""

    tokens: int = 0
    decodes_only: bool = True
    seconds: float | None = None  # of the device; None where the host waited all the while


class Engine:
    """`card.context`, `card.end_ids` and `card.kv_dtype` hold. `pages`: of its KV cache, how many or a pool; `memory`
    [bytes] holds them and one more, nobody's, and is taken now where none is given. Without `grammars` no request may
    have one.

    `step` and everything else is called from one thread.
    """

    def __init__(
        self,
        card: ModelCard,
        model: Model | NullModel,
        *,
        pages: int | Pages,
        options: EngineOptions,
        grammars: LoadGrammars | None = None,
        memory: Tensor | None = None,
    ) -> None:
        pool = pages if isinstance(pages, Pages) else Pages(pages, options.page_size)
        self.kv_pages, self.kv_tokens = pool.count, pool.count * options.page_size
        self._kv_dtype = getattr(torch, card.kv_dtype) if card.kv_dtype else model.dtype
        self._page_bytes = KVCache.bytes_per_page(model.config, options.page_size, self._kv_dtype)
        self.kv_bytes, self.kv_most_tokens = pool.count * self._page_bytes, pool.most * options.page_size
        self.model, self.weight_bytes, self.digest = model, model.weight_bytes, model.digest
        self._score_pooling = model.config.score.pooling
        self.card = replace(card, max_request_tokens=min(card.context, self.kv_tokens))
        self.last_step = Step()
        self._flight: tuple[Flight, Ticket] | None = None
        self._building = Building(options.max_waiting_requests)
        room = 0 if isinstance(model, NullModel) or model.adapters is None else model.adapters.count
        loaded = LoadedAdapters(card.name, room)
        self.refused: EngineError | None = None  # what new requests are told; None: they are taken
        follows = grammars is not None and self.card.gives == "text" and bool(card.end_ids)
        self._guides = Guides(grammars(card), card.vocab_size, card.end_ids) if grammars and follows else None
        self.scheduler = Scheduler(
            pages=pool,
            page_size=options.page_size,
            max_seqs=options.max_num_seqs,
            max_batched_tokens=options.max_num_batched_tokens,
            context=card.context,
            end_ids=card.end_ids,
            max_waiting_requests=options.max_waiting_requests,
            max_waiting_tokens=options.max_waiting_tokens,
            prefix_caching=options.enable_prefix_caching,
            ahead=options.runs_ahead,
            pools=model.config.pools is not None,
            shared_tokens=CHUNK if options.groups_decodes else None,
            weight_version=card.weight_version,
        )
        self._memory = WarmMemory(memory) if memory is not None and options.device == "cpu" else None
        self.runner = self._make_runner(model, memory, options, loaded.slots)
        self.adapters = Adapters(loaded, model, self.scheduler, self.runner)
        self.runner.prepare()

    def _make_runner(
        self, model: Model | NullModel, memory: Tensor | None, options: EngineOptions, adapters: Mapping[str, int]
    ) -> Executor:
        ahead = options.runs_ahead
        if isinstance(model, NullModel):
            return NullRunner(model, options.max_num_seqs, ahead)
        pages = self.kv_pages + 1 if memory is None else len(memory) // self._page_bytes  # the last one is nobody's
        cache = KVCache(model.config, pages, options.page_size, self._kv_dtype, options.device, memory)
        make = partial(DeviceRunner, own_stream=options.role_streams) if ahead else Runner
        return make(
            model,
            cache,
            max_seqs=options.max_num_seqs,
            context=self.card.context,
            end_ids=self.card.end_ids,
            device=options.device,
            attention=options.attention_backend,
            guides=self._guides,
            adapters=adapters,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None or len(self._building) > 0

    @property
    def waits(self) -> bool:
        """Whether all its work is to wait for a grammar that another thread builds."""
        return bool(self._building) and not (self.scheduler.has_work or self._flight or self._building.any_built)

    @property
    def requests(self) -> int:
        """How many are not finished."""
        return len(self.scheduler.requests) + len(self._building)

    @property
    def decoding(self) -> int:
        """Sequences that wait for their next token."""
        return self.scheduler.decoding

    @property
    def stats(self) -> ModelStats:
        scheduler, pages = self.scheduler, self.scheduler.pages
        return ModelStats(
            name=self.card.name,
            role=self.card.role,
            weight_version=scheduler.weight_version,
            waiting=scheduler.waiting,
            running=scheduler.running,
            paused=scheduler.paused,
            page_size=pages.page_size,
            pages=pages.held,
            pages_used=pages.used,
            pages_cached=pages.cached,
            pages_available=pages.available,
            slabs=len(pages.slabs),
            counts=deepcopy(scheduler.counts),
        )

    def idle(self) -> bool:
        """Uses a moment without work for what makes later steps faster; whether more of that is left."""
        reached = self.scheduler.pages.reached * self._page_bytes
        return self.runner.idle() or (self._memory is not None and self._memory.provide(reached))

    def open(self, group: Group) -> None:
        """Begins a group. Why it cannot be is told to its members."""
        key, error = self.adapters.key(group.adapter), self._outside("prompt", group.token_ids)
        if isinstance(key, EngineError):
            self.scheduler.open(group, key)
        else:
            self.scheduler.open(replace(group, adapter=key), error)

    def close(self, group_id: int) -> list[Output]:
        """Ends a group; its members that are not finished are aborted."""
        return self.scheduler.close(group_id)

    def add(self, request: Request) -> EngineError | None:
        """Takes a request, or says why it cannot be answered."""
        if self.refused is not None:
            return self.refused
        error = self._refusal(request)
        if error is None and self.card.pooling:
            request, error = self._pooled(request)
        if error is None and self._guides and request.sampling and request.sampling.grammar:
            future = self._guides.build(request.sampling.grammar)
            if future is not None:
                return self._building.add(request, future)
        return error or self._admit(request)

    def _admit(self, request: Request) -> EngineError | None:
        """Hands it to the scheduler. From now on it is for the adapter that has its name now."""
        key = self.adapters.key(request.adapter)
        if isinstance(key, EngineError):
            return key
        return self.scheduler.add(replace(request, adapter=key) if key else request)

    def _pooled(self, request: Request) -> tuple[Request, EngineError | None]:
        """The request as pooling needs it: all rows, none of them from cache, or the text up to the one that counts."""
        token_ids, mode = request.token_ids, self.card.pooling
        if mode in ("mean", "cls"):
            return replace(request, first_needed_row=0), None
        if self.card.gives == "embeddings" or not token_ids:
            return request, None
        prompt = self.scheduler.prompt_of(request.group) if request.group else []
        try:
            place = self._score_pooling.position([*prompt, *token_ids])
        except LookupError as error:
            return request, EngineError("invalid", f"model {self.card.name}: {error}")
        assert place is not None
        own = place + 1 - len(prompt)
        if own < 1:
            message = f"model {self.card.name} reads scores at {mode}, which is token {place} of the group's prompt"
            return request, EngineError("invalid", f"{message}: all members would have the same one")
        return (request if own == len(token_ids) else replace(request, token_ids=token_ids[:own])), None

    def abort(self, request_id: int, choice: int | None = None, finish: Finish = "abort") -> list[Output]:
        early = self._building.abort(request_id, choice, finish, self.scheduler.weight_version)
        return early or self.scheduler.abort(request_id, choice, finish)

    def abort_all(self, error: EngineError) -> list[Output]:
        """Ends every request: with the tokens that it has, or with the error where it gives something else."""
        outputs = [*self.settle(), *self._building.abort_all(self.scheduler.weight_version)]
        for request in self.scheduler.requests:
            draws = request.sampling is not None and request.sampling.max_tokens > 0
            outputs += self.scheduler.abort(request.id) if draws else [self._fail(request, error)]
        return outputs

    def pause(self) -> Outputs:
        """No step is taken until `resume`. What the last one brought is told."""
        self.scheduler.paused = True
        self.card = replace(self.card, paused=True)
        return self.settle()

    def resume(self) -> None:
        """Steps are taken, and requests."""
        self.scheduler.paused, self.refused = False, None
        self.card = replace(self.card, paused=False)

    def renew(self, label: str) -> int:
        """The model's weights have just been replaced; nothing is launched. Gives how many pages are forgotten."""
        self.runner.renew()
        version = self.scheduler.weight_version + 1
        self.card = replace(self.card, weight_version=version, weight_label=label)
        return self.scheduler.set_version(version)

    def label(self, label: str) -> None:
        self.card = replace(self.card, weight_label=label)

    def restore(self, state: ModelState) -> None:
        """Before the first request: its weights are those of the engine that this one replaces."""
        self.scheduler.weight_version = state.version
        self.card = replace(
            self.card,
            weight_version=state.version,
            weight_label=state.label,
            reward_mean=state.reward_mean,
            reward_std=state.reward_std,
            reward_normalization=state.reward_normalization,
        )
        if state.paused:
            self.pause()

    def expire(self, now: float) -> list[Output]:
        return self._building.expire(now, self.scheduler.weight_version) + self.scheduler.expire(now)

    def step(self, budget: int | None = None) -> Outputs:
        """Computes up to `budget` tokens and says what came of it; where the runner runs ahead, of the step before.

        A step that fails ends its own requests alone. One of an engine that `waits` does so for a moment.
        """
        self.last_step = Step()
        if not self._building:
            return self._step(budget)
        if self.waits:
            self._building.wait(BUILDING_SECONDS)
        early = self._let_in()
        outputs = self._step(budget)
        outputs.others += early
        return outputs

    def _let_in(self) -> list[Output]:
        """Hands the scheduler the requests whose grammars are built."""
        outputs: list[Output] = []
        for request, error, aborted in self._building.built():
            error = error or self._admit(request)
            if error is not None:
                outputs.append(self._fail(request, error))
            for choice in aborted:  # told already
                self.scheduler.abort(request.id, choice)
        return outputs

    def _step(self, budget: int | None) -> Outputs:
        plan = self.scheduler.plan(budget)
        if plan is None:
            return self.settle()
        try:
            ticket = self.runner.launch(plan)
        except Exception as error:
            outputs = self.settle()
            if self.scheduler.planned:
                outputs.others += self._fail_step(plan, error)
            return outputs
        outputs = self.settle()
        if self.scheduler.planned:  # not failed together with the step before
            self._flight = (self.scheduler.advance(plan), ticket)
            if not self.runner.ahead:
                outputs.extend(self.settle())
        return outputs

    def settle(self) -> Outputs:
        """Waits for the launched step, if there is one, and brings in what came of it."""
        if self._flight is None:
            return Outputs()
        (flight, ticket), self._flight = self._flight, None
        plan = flight.plan
        try:
            sampled = ticket.wait()
        except Exception as error:
            return Outputs(self._fail_step(plan, error))
        self.last_step = Step(plan.tokens, plan.decodes == plan.tokens, ticket.seconds)
        failed = [self._fail(request, error) for request, error in self._failures(flight, sampled)]
        outputs = self.scheduler.resolve(flight, sampled)
        outputs.others += failed
        return outputs

    def _fail_step(self, plan: Plan, error: Exception) -> list[Output]:
        log.error("a step of model %s with %d rows failed", self.card.name, len(plan.slots), exc_info=error)
        what = f"a step of model {self.card.name} failed ({type(error).__name__}); the log has the traceback"
        if isinstance(error, torch.OutOfMemoryError):  # its message says what was asked for and what was free
            asked = ". ".join(str(error).split(". ")[:3])
            what = (
                f"a step of model {self.card.name} with {plan.tokens} tokens ran out of memory: {asked}. Lower "
                "--max-num-batched-tokens, or --gpu-memory-utilization so that the KV cache takes less"
            )
        return self.scheduler.fail(EngineError("internal", what))

    def _refusal(self, request: Request) -> EngineError | None:
        card, sampling, want = self.card, request.sampling, request.want
        if isinstance(self.runner, NullRunner) and (error := self.runner.refusal(request)):
            return error
        if request.group and (sampling is not None or request.n != 1 or "embedding" in want):
            message = "a member of a group is given with its tokens: it has neither sampling nor n, and no embedding"
            return EngineError("invalid", message, "group")
        if isinstance(unknown := self.adapters.key(request.adapter), EngineError):
            return unknown
        if card.gives == "text" and (asked := [gives for one, gives, _ in SINGLE if one in want]):
            return EngineError("invalid", f"model {card.name} is a language model: it gives no {asked[0]}", "model")
        for only, gives, kind in SINGLE:
            plain = len(want) == 1 and only in want and sampling is None and request.prompt_logprobs is None
            if card.gives == gives and not plain:
                message = f"model {card.name} is {kind} model: it gives {gives}, nothing else"
                return EngineError("invalid", message, "model")
        if "tokens" in want and sampling is None:
            return EngineError("invalid", "tokens are wanted, but no sampling parameters are given", "sampling")
        if "logprobs" in want and (sampling is None or sampling.logprobs is None):
            return EngineError("invalid", "logprobs are wanted, but not how many beside each token", "logprobs")
        if sampling and sampling.policy_logprobs and sampling.logprobs is None:
            message = "policy_logprobs are given beside logprobs: say how many of these beside each token (0: none)"
            return EngineError("invalid", message, "logprobs")
        if "prompt_logprobs" in want and request.prompt_logprobs is None:
            message = "prompt_logprobs are wanted, but not how many beside each token"
            return EngineError("invalid", message, "prompt_logprobs")
        if request.n != 1 and (request.n < 1 or sampling is None or sampling.max_tokens < 1):
            return EngineError("invalid", f"n is {request.n}: at least 1, and 1 where no token is drawn", "n")
        if sampling and sampling.grammar and self._guides is None:
            reason = "none is loaded by this engine" if card.end_ids else "it has no end-of-text token"
            return EngineError("invalid", f"model {card.name} cannot follow a grammar: {reason}", "structured_outputs")
        if sampling and sampling.grammar and sampling.ignore_eos:
            message = "ignore_eos is for answers without a grammar: these end with an end-of-text token"
            return EngineError("invalid", message, "ignore_eos")
        return (
            self._outside("prompt", request.token_ids)
            or (sampling and self._outside("stop_token_ids", sampling.stop_ids))
            or (sampling and self._outside("logit_bias", (token for token, _ in sampling.logit_bias)))
            or (sampling and self._outside("allowed_token_ids", sampling.allowed_ids))
            or (sampling and self._outside("bad_words", (token for word in sampling.bad_words for token in word)))
        )

    def _outside(self, param: str, token_ids: Iterable[int]) -> EngineError | None:
        """An id that the model does not have would end the whole step."""
        ids = token_ids if isinstance(token_ids, list) else list(token_ids)
        size = self.card.vocab_size
        if not ids or (min(ids) >= 0 and max(ids) < size):
            return None
        wrong = next(token for token in ids if not 0 <= token < size)
        return EngineError("invalid", f"token id {wrong} in {param} is outside the vocabulary of {size}", param)

    def _failures(self, flight: Flight, sampled: Sampled) -> list[tuple[Request, EngineError]]:
        """Requests of the step for which nothing usable came out: a failed score is an error, never a number."""
        failed: dict[int, tuple[Request, EngineError]] = {}
        plan = flight.plan

        def note(sequence: Sequence, what: str) -> None:
            if sequence.gone:
                return
            request, name = sequence.job.request, self.card.name
            sampling = request.sampling
            excludes = sampling and (
                sampling.allowed_ids
                or sampling.bad_words
                or sampling.min_tokens
                or sampling.logit_bias
                or sampling.grammar
            )
            if what == "token" and excludes:
                message = "allowed_token_ids, bad_words, logit_bias and min_tokens leave no token that may come next"
                if sampling and sampling.grammar:
                    message = f"the grammar, {message}"
                failed[request.id] = (request, EngineError("invalid", message, "allowed_token_ids"))
            else:
                failed[request.id] = (
                    request,
                    EngineError("internal", f"model {name} gave a {what} that is not finite"),
                )

        if sampled.tokens and min(sampled.tokens) < 0:
            for place, (sequence, token) in enumerate(zip(flight.sampling, sampled.tokens, strict=True)):
                if place in sampled.failures and not sequence.gone:
                    request = sequence.job.request
                    failed[request.id] = (request, EngineError("invalid", sampled.failures[place]))
                elif token < 0:
                    note(sequence, "token")
        for (row, _), scores in zip(plan.scores, sampled.scores, strict=True):
            if not all(map(math.isfinite, scores)):
                note(flight.rows[row], "score")
        for rows, values in zip(plan.values, sampled.values, strict=True):
            if not all(map(math.isfinite, values)):
                note(flight.rows[rows.row], "value")
        last = [row for row, complete, _ in plan.pooled if complete]
        for row, found in zip(last, sampled.pooled, strict=True):
            if not all(map(math.isfinite, found)):
                note(flight.rows[row], "score" if self.card.gives == "scores" else "embedding")
        for rows, logprobs in zip(plan.prompt_logprobs, sampled.prompt_logprobs, strict=True):
            if any(map(math.isnan, logprobs.values)):
                note(flight.rows[rows.row], "log-probability")
        return list(failed.values())

    def _fail(self, request: Request, error: EngineError) -> Output:
        if error.kind == "internal":
            log.error("request %d: %s", request.id, error.message)
            self.scheduler.counts.corrupted += 1
        self.scheduler.abort(request.id, finish="error")
        return Output(request.id, finish="error", weight_version=self.scheduler.weight_version, error=error)
