"""`tandem bench score`: rewards of K answers to each of G prompts, the prompt computed once (shared) or with each.

Shared: one answer of a group goes first and leaves its prompt's pages to the others, which follow as soon as it is
scored. Unshared: all at once, each with a cache salt of its own, so that nothing is found. Both are the same engine,
take turns, and must give the same scores; the largest difference is part of the result. Other engines
(`--engine tandem,transformers`) score the same token ids in processes of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...server.engine.request import Request
from . import engines, offline, result
from .datasets import FIRST_ID
from .limits import Asked, least_seconds
from .local import Answer, Local, score
from .models import UsageError, is_null, path_of, spec_of
from .progress import progress
from .sides import REWARD, LimitsOf, Setup, Watch, child_options, held_of
from .stats import interleaved, ratio, spread

SHARED, UNSHARED = "shared", "unshared"


@dataclass(frozen=True)
class Groups:
    """Lengths in tokens."""

    groups: int = 8
    answers: int = 8
    prompt_len: int = 512
    answer_len: int = 128
    seed: int = 0

    @property
    def count(self) -> int:
        return self.groups * self.answers

    @property
    def tokens(self) -> int:
        """Of all texts, each with its prompt."""
        return self.count * (self.prompt_len + self.answer_len)


@dataclass(frozen=True)
class Scored:
    """One run. What an engine does not tell is None."""

    seconds: float
    cpu_seconds: float
    scores: list[float]  # by group and answer
    computed_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_tokens: int | None = None
    others: float = 0.0  # CPU seconds that the rest of the machine used meanwhile


Side = Callable[[int], Scored]


def texts(groups: Groups, vocab_size: int) -> list[list[int]]:
    """Prompt and answer, by group and answer."""
    draw, known = random.Random(groups.seed), range(FIRST_ID, vocab_size)
    found: list[list[int]] = []
    for _ in range(groups.groups):
        prompt = draw.choices(known, k=groups.prompt_len)
        found += [prompt + draw.choices(known, k=groups.answer_len) for _ in range(groups.answers)]
    return found


def in_process(local: Local, groups: Groups, ids: Sequence[list[int]], shared: bool) -> Scored:
    local.forget()
    if shared:
        first = [score(number, REWARD, ids[number]) for number in range(0, groups.count, groups.answers)]

        def follow(request: Request, answer: Answer) -> list[Request]:
            if request.id % groups.answers:
                return []
            return [score(n, REWARD, ids[n]) for n in range(request.id + 1, request.id + groups.answers)]

        run = local.run(first, follow)
    else:
        run = local.run([score(number, REWARD, one, salt=str(number)) for number, one in enumerate(ids)])
    scores = [run.answers[number].scores for number in range(groups.count)]
    counted = run.counted[REWARD]
    return Scored(
        run.seconds,
        run.cpu_seconds,
        [value for one in scores for value in one or ()],
        counted.computed_tokens,
        counted.cached_tokens,
        counted.prompt_tokens,
    )


def run_scores(setup: Setup, groups: Groups) -> dict[str, Any]:
    """The result as JSON. Raises UsageError and what the engines raise where they cannot be measured."""
    if setup.engines[0] != "tandem":
        raise UsageError("--engine: tandem comes first here, with its prefix shared and not; others may follow")
    if is_null(setup.model):
        raise UsageError(f"--model {setup.model}: it gives no scores; give a reward model's directory or demo")
    length = groups.prompt_len + groups.answer_len
    context, _ = offline.sizes_of(path_of(setup.model, "reward"))
    if length > context:
        raise UsageError(
            f"a prompt and its answer have {length} tokens, the model's context is {context}: ask for less"
        )
    held = held_of(setup, "reward")
    assert held is not None
    limits = LimitsOf(setup, held)
    local = Local([spec_of(setup.model, REWARD, "reward", **setup.precision)], setup.options)
    card = local.engine(REWARD).card
    ids = texts(groups, card.vocab_size)
    told: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        sides: dict[str, Side] = {
            SHARED: lambda number: in_process(local, groups, ids, shared=True),
            UNSHARED: lambda number: in_process(local, groups, ids, shared=False),
        }
        for name in setup.engines[1:]:
            child = stack.enter_context(engines.start(name, threads=setup.options.threads))
            told[name] = child.load(path_of(setup.model, "reward"), child_options(setup))

            def by_child(number: int, child: Any = child) -> Scored:
                found = child.score(ids)
                return Scored(found["seconds"], found["cpu_seconds"], [x for one in found["scores"] for x in one])

            sides[name] = by_child
        with progress("score", (setup.runs + setup.warmups) * len(sides)) as show:
            done = iter(range(1, 1 << 30))
            turns = {name: watched(side) for name, side in sides.items()}
            found = interleaved(turns, setup.runs, setup.warmups, lambda name, number: show(next(done), name))
    reached = limits.after()
    assert reached is not None
    whole = [Asked(length, 0)] * groups.count
    once = [Asked(length, 0, cached=groups.prompt_len if n % groups.answers else 0) for n in range(groups.count)]
    least = {name: least_seconds(held, once if name == SHARED else whole, reached) for name in found}
    return {
        "benchmark": "score",
        "model_id": setup.model,
        "groups": groups.groups,
        "answers": groups.answers,
        "prompt_len": groups.prompt_len,
        "answer_len": groups.answer_len,
        "dtype": card.precision,
        "threads": torch.get_num_threads(),
        "runs": setup.runs,
        "warmups": setup.warmups,
        "sides": {name: told.get(name, {}) | figures(groups, found[name], least[name]) for name in found},
        "ratios": {
            f"{SHARED} / {name}": asdict(ratio([one.seconds for one in runs], [one.seconds for one in found[SHARED]]))
            for name, runs in found.items()
            if name != SHARED
        },
        "max_score_difference": {name: difference(found[SHARED], found[name]) for name in found if name != SHARED},
        "score_spread": max(found[SHARED][0].scores) - min(found[SHARED][0].scores),
        "limits": reached.as_json(),
    } | result.describe(setup.device)


def watched(side: Side) -> Side:
    def call(number: int) -> Scored:
        watch = Watch()
        scored = side(number)
        return replace(scored, others=watch.others(scored.cpu_seconds))

    return call


def figures(groups: Groups, runs: Sequence[Scored], least: float) -> dict[str, Any]:
    """Of one side: spreads over the runs."""
    seconds = [one.seconds for one in runs]
    found: dict[str, Any] = {
        "elapsed_times": seconds,
        "scores_per_second": asdict(spread([groups.count / one for one in seconds])),
        "total_tokens_per_second": asdict(spread([groups.tokens / one for one in seconds])),
        "cpu_seconds_per_score": asdict(spread([one.cpu_seconds / groups.count for one in runs])),
        "others_cpu_cores": sum(one.others for one in runs) / sum(seconds),
        "least_seconds": least,
        "fraction_of_limit": asdict(spread([least / one for one in seconds])),
    }
    counted = [(one, one.computed_tokens) for one in runs if one.computed_tokens is not None]
    if counted:
        last = counted[-1][0]
        found["computed_tokens"] = last.computed_tokens
        found["computed_tokens_per_second"] = asdict(spread([tokens / one.seconds for one, tokens in counted]))
        found["prefix_cache_share"] = (last.cached_tokens or 0) / max(last.prompt_tokens or 0, 1)
    return found


def difference(some: Sequence[Scored], others: Sequence[Scored]) -> float:
    """The largest between two sides' scores of one text, over all runs. Raises UsageError where one side lacks some."""
    largest = 0.0
    for one, other in zip(some, others, strict=True):
        if len(one.scores) != len(other.scores):
            raise UsageError(f"one side gave {len(one.scores)} scores, the other {len(other.scores)}")
        largest = max(largest, *(abs(a - b) for a, b in zip(one.scores, other.scores, strict=True)))
    return largest


def lines(found: dict[str, Any]) -> list[str]:
    row, shown_as = offline.row, offline.text_of_spread
    shown = [
        f"Tandem: {found['model_id']}, {found['dtype']}, {found['threads']} threads; {found['groups']} groups of "
        f"{found['answers']} answers, {found['prompt_len']} + {found['answer_len']} tokens; median of {found['runs']} "
        f"runs after {offline.warmups_text(found['warmups'])} [10 %, 90 %]"
    ]
    for name, side in found["sides"].items():
        shown.append(row(f"{name}: scores/s", shown_as(side["scores_per_second"])))
        text = shown_as(side["total_tokens_per_second"])
        if "computed_tokens" in side:
            computed = shown_as(side["computed_tokens_per_second"])
            text += f" in all, {computed} computed ({side['computed_tokens']:,} of {tokens_of(found):,})"
        shown.append(row(f"{name}: tokens/s", text))
        if "prefix_cache_share" in side:
            shown.append(row(f"{name}: prefix-cache share", f"{side['prefix_cache_share']:.1%} of prompt tokens"))
        shown.append(row(f"{name}: CPU per score", shown_as(side["cpu_seconds_per_score"], " ms", 1e3)))
        least = f"; at least {side['least_seconds']:.3f} s by bytes and operations"
        shown.append(row(f"{name}: share of the limit", shown_as(side["fraction_of_limit"], " %", 100) + least))
        if side["others_cpu_cores"] >= offline.BUSY:
            shown.append(row(f"{name}: CPU used by others", offline.busy_text(side["others_cpu_cores"])))
        if side.get("versions"):
            shown.append(
                row(f"{name}: versions", ", ".join(f"{key} {value}" for key, value in side["versions"].items()))
            )
    for name, value in found["ratios"].items():
        shown.append(row(f"speed, {name}", shown_as(value, "×")))
    for name, value in found["max_score_difference"].items():
        text = f"{value:.3g} (the scores span {found['score_spread']:.3g})"
        shown.append(row(f"largest difference, {SHARED} and {name}", text))
    shown.append(row("limit of this machine", offline.limit_text(found["limits"])))
    return [*shown, row("versions", offline.versions_text(found["versions"]))]


def tokens_of(found: dict[str, Any]) -> int:
    return found["groups"] * found["answers"] * (found["prompt_len"] + found["answer_len"])
