"""Rewards of K answers to one prompt: the prompt computed once, computed K times, and by transformers."""

from __future__ import annotations

from typing import Any

import torch

from ...model.model import Model
from . import engines, hf
from .clock import release, wall_time
from .rows import Report
from .setting import Setting
from .shapes import Shape, config_of, prefill_flops, rewarding
from .timing import Timing

GROUPS, ANSWERS = 4, 8
SAMPLES = 5

Groups = list[list[list[int]]]  # by group, by answer: token ids of prompt and answer


def run(setting: Setting, report: Report) -> None:
    shape = rewarding(setting.shape("llama GQA"))
    config = config_of(shape)
    prompt, answer = setting.pick((512, 256), (32, 16))
    title = f"{setting.title('llama GQA')} bf16, {GROUPS} × {ANSWERS} answers of {answer} to prompts of {prompt}"
    model = engines.draw_model(setting, config, torch.bfloat16)
    loads = [groups(config.vocab_size, prompt, answer, seed) for seed in range(SAMPLES + 1)]
    shared = unshared = theirs = None
    own: list[float] = []
    with report.case(f"{title}, shared"):
        shared, own = score(setting, model, loads, shared=True)
        lengths = [prompt + answer] * (GROUPS * ANSWERS)
        flops = prefill_flops(config, lengths, cached=prompt) + prefill_flops(config, [prompt] * GROUPS)
        add(setting, report, f"{title}, shared", shared, flops, model.dtype)
    release(setting.device)
    with report.case(f"{title}, unshared"):
        unshared, other = score(setting, model, loads, shared=False)
        flops = prefill_flops(config, [prompt + answer] * (GROUPS * ANSWERS))
        difference = max(abs(a - b) for a, b in zip(own, other, strict=True)) if own else None
        add(setting, report, f"{title}, unshared", unshared, flops, model.dtype, largest_difference=difference)
    release(setting.device)
    with report.case(f"{title}, transformers"):
        theirs, other = score_with_transformers(setting, shape, model, loads)
        difference = max(abs(a - b) for a, b in zip(own, other, strict=True)) if own else None
        add(setting, report, f"{title}, transformers", theirs, flops, model.dtype, largest_difference=difference)
    release(setting.device)
    for name, slow, goal in (
        ("unshared", unshared, "scoring against unshared"),
        ("transformers", theirs, "scoring against transformers"),
    ):
        if shared and slow:
            report.add(f"scoring, shared against {name}", slow.median / shared.median, "×", goal=goal)
        else:
            report.absent(f"scoring, shared against {name}", "one of the two was not measured", goal)


def add(
    setting: Setting, report: Report, name: str, taken: Timing, flops: float, dtype: torch.dtype, **detail: Any
) -> None:
    floor = flops / setting.limits.peak(dtype)
    detail |= {"flops": flops, "answers_per_second": GROUPS * ANSWERS / taken.median}
    report.add(name, taken, "ms", scale=1e3, limit=1e3 * floor, share=floor / taken.median, **detail)


def groups(vocab_size: int, prompt: int, answer: int, seed: int) -> Groups:
    """Texts that no other seed has."""
    found: Groups = []
    for group in range(GROUPS):
        start = engines.prompt(prompt, vocab_size, 1000 * seed + group)
        ends = [engines.prompt(answer, vocab_size, 1000 * seed + GROUPS + group * ANSWERS + k) for k in range(ANSWERS)]
        found.append([start + end for end in ends])
    return found


def score(setting: Setting, model: Model, loads: list[Groups], shared: bool) -> tuple[Timing, list[float]]:
    """How long it takes, and the scores of the last load. The first load warms up.

    Shared: one answer per group goes first and leaves the prompt's pages to the others.
    """
    length = len(loads[0][0][0])
    rows = GROUPS * ANSWERS
    room = {"rows": rows, "context": length, "tokens": 2 * rows * length}
    engine = engines.make_engine(setting, model, **room, batched=setting.pick(16384, 64), enable_prefix_caching=shared)
    found: list[float] = []
    remaining = iter(loads)

    def once() -> None:
        load = next(remaining)
        found.clear()
        scores: dict[int, float] = {}
        waves = [range(1), range(1, ANSWERS)] if shared else [range(ANSWERS)]
        for wave in waves:
            requests = [engines.score(group * ANSWERS + k, load[group][k]) for group in range(GROUPS) for k in wave]
            for number, outputs in engines.answer(engine, requests).items():
                assert outputs[-1].scores is not None
                scores[number] = outputs[-1].scores[0]
        found.extend(scores[number] for number in sorted(scores))

    return wall_time(once, setting.device, samples=len(loads) - 1, warm=1), found


def score_with_transformers(
    setting: Setting, shape: Shape, model: Model, loads: list[Groups]
) -> tuple[Timing, list[float]]:
    """The texts of a group as one batch; all are equally long, so nothing is padded."""
    peer = hf.make(setting, shape, model)
    found: list[float] = []
    remaining = iter([torch.tensor(load) for load in loads])

    @torch.inference_mode()
    def once() -> None:
        found.clear()
        for texts in next(remaining):  # [ANSWERS, length]
            logits = peer(input_ids=texts.to(setting.device), use_cache=False).logits
            found.extend(logits[:, 0].float().tolist())

    return wall_time(once, setting.device, samples=len(loads) - 1, warm=1), found
