"""A body -> the engine's `Sampling` and `Request`s: everything that depends on the model or on two fields at once."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine.request import ModelCard, Request, Sampling, Want
from ..text.text import Text, TextError
from .errors import ApiError, invalid
from .options import ApiOptions
from .protocol import MAX_IDS, GenerationBody
from .service import Service, check_ids

COMPLETION_TOKENS = 16  # OpenAI's default for completions
MAX_SEQUENCES = 4096  # prompts times n


@dataclass(frozen=True, slots=True)
class Length:
    """How long an answer may get."""

    field: str  # of the body
    asked: int | None
    default: int | None = None  # tokens where nothing is asked; None: all the context that is left
    may_be_none: bool = False  # whether an answer of no tokens says something


def requests_of(
    service: Service,
    body: GenerationBody,
    card: ModelCard,
    text: Text,
    prompts: Sequence[list[int]],
    param: str,
    length: Length,
    logprobs: int | None,
    *,
    prompt_logprobs: int | None = None,
    grammar: str = "",
) -> list[Request]:
    """One request per prompt. `param` names the field the prompts came from.

    `prompt_logprobs`: wanted beside each prompt token besides what the body's field of that name asks for. `grammar`
    is checked already.
    """
    check(body, service.options, length, logprobs)
    n, param_n = (body.n, "n") if body.best_of is None else (body.best_of, "best_of")
    if len(prompts) * n > MAX_SEQUENCES:
        raise invalid(f"{len(prompts)} prompts with {param_n} {n} make {len(prompts) * n} answers; "
                      f"one request may have {MAX_SEQUENCES}", param_n)  # fmt: skip
    beside = max((k for k in (body.prompt_logprobs, prompt_logprobs) if k is not None), default=None)
    ranked = n > body.n and body.rank_by is None  # by log-probability, shown or not
    sampling = sampling_of(body, card, text, service.options, 0 if ranked and logprobs is None else logprobs)
    sampling = replace(sampling, grammar=grammar)
    deadline = service.deadline(body)
    want: set[Want] = {"tokens"}
    if sampling.logprobs is not None:
        want.add("logprobs")
    if beside is not None:
        want.add("prompt_logprobs")
    requests: list[Request] = []
    for ids in prompts:
        ids, tokens = fit(ids, body, card, length, param)
        requests.append(
            Request(
                id=service.client.next_id(),
                model=card.name,
                token_ids=ids,
                sampling=replace(sampling, max_tokens=tokens, seed=seed_of(body)),
                want=frozenset(want),
                n=n,
                prompt_logprobs=beside,
                first_needed_row=None if beside is None else 0,
                priority=body.priority,
                deadline=deadline,
                cache_salt=body.cache_salt,
            )
        )
    return requests


def check(body: GenerationBody, options: ApiOptions, length: Length, logprobs: int | None) -> None:
    """What no field alone can tell."""
    asked, field = length.asked, length.field
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is for stream: true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise invalid("prompt_logprobs cannot be streamed", "prompt_logprobs")
    if body.truncate_prompt_tokens == 0:
        raise invalid("truncate_prompt_tokens is 0; it must be at least 1, or -1 for what fits",
                      "truncate_prompt_tokens")  # fmt: skip
    if asked == 0 and body.prompt_logprobs is None and not length.may_be_none:
        raise invalid(f"{field} is 0; it must be at least 1, or 0 with echo (completions) or prompt_logprobs", field)
    if asked == 0 and body.n > 1:
        raise invalid(f"n is {body.n}; it must be 1 where {field} is 0", "n")
    if asked is not None and body.min_tokens > asked:
        raise invalid(f"min_tokens is {body.min_tokens}; it must be at most {field}, {asked}", "min_tokens")
    for name, value in (("logprobs", logprobs), ("prompt_logprobs", body.prompt_logprobs)):
        if value is not None and value > options.max_logprobs:
            name = "top_logprobs" if name == "logprobs" and hasattr(body, "top_logprobs") else name
            raise invalid(f"{name} is {value}; it must be at most {options.max_logprobs} (--max-logprobs)", name)


def fit(ids: list[int], body: GenerationBody, card: ModelCard, length: Length, param: str) -> tuple[list[int], int]:
    """(prompt, max_tokens) that the model's context and its KV cache can hold."""
    limit = min(card.context, card.max_request_tokens or card.context)
    holder = f"the {'context' if limit == card.context else 'KV cache'} of {card.name!r} holds {limit}"
    least = body.min_tokens or 1
    if body.truncate_prompt_tokens is not None:
        keep = body.truncate_prompt_tokens
        answer = least if length.asked is None else length.asked
        ids = ids[-(max(1, limit - answer) if keep == -1 else keep) :]
    room = limit - len(ids)
    if length.asked is not None and length.asked > room:
        message = f"the prompt has {len(ids)} tokens and {length.field} is {length.asked}; {holder}"
        raise _too_long(message, param if room < 1 else length.field)
    if length.asked is None and room < least:
        raise _too_long(f"the prompt has {len(ids)} tokens; {holder}, the answer of at least {least} included", param)
    if length.asked is not None:
        return ids, length.asked
    return ids, room if length.default is None else min(room, max(length.default, least))


def _too_long(message: str, param: str) -> ApiError:
    return invalid(message, param, "context_length_exceeded")


def sampling_of(
    body: GenerationBody, card: ModelCard, text: Text, options: ApiOptions, logprobs: int | None
) -> Sampling:
    """All of it but max_tokens and the seed, which each prompt has of its own."""
    allowed = body.allowed_token_ids or []
    check_ids(body.stop_token_ids, card, "stop_token_ids")
    check_ids(allowed, card, "allowed_token_ids")
    check_ids(list(body.logit_bias), card, "logit_bias")
    return Sampling(
        max_tokens=0,
        seed=0,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k if 0 < body.top_k < card.vocab_size else 0,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        min_tokens=body.min_tokens,
        stop_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        logit_bias=tuple(body.logit_bias.items()),
        allowed_ids=tuple(sorted(set(allowed))),
        bad_words=bad_words_of(body.bad_words, text),
        logprobs=logprobs,
        logprobs_mode=body.logprobs_mode or options.logprobs_mode,
    )


def seed_of(body: GenerationBody) -> int:
    """Prompts that are sent together share a seed that was given; without one, each is drawn independently."""
    return secrets.randbits(64) if body.seed is None else body.seed % 2**64


def bad_words_of(words: Sequence[str], text: Text) -> tuple[tuple[int, ...], ...]:
    """Each word as it is encoded at a text's start and after a space."""
    found: dict[tuple[int, ...], None] = {}
    try:
        for word in words:
            for written in (word, " " + word.lstrip()):
                ids = tuple(text.encode(written, False, "bad_words"))
                if ids:
                    found[ids] = None
            tokens = sum(map(len, found))
            if tokens > MAX_IDS:
                raise invalid(f"bad_words come to {tokens} or more tokens; there may be at most {MAX_IDS}", "bad_words")
    except TextError as error:
        raise invalid(str(error), error.param) from None
    return tuple(found)
