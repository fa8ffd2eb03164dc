"""Prompts of 1024 to 2048 tokens through the engine: operations per second beside what cuBLAS did in the same run."""

from __future__ import annotations

import random
from typing import Any

import torch

from . import engines
from .clock import release, wall_time
from .rows import Report
from .setting import Setting
from .shapes import prefill_flops
from .timing import Timing

PROMPTS = 8


def run(setting: Setting, report: Report) -> None:
    title = setting.title("llama GQA")
    lengths = setting.pick(spread(1024, 2048), spread(10, 20))
    name = f"{title} bf16, {PROMPTS} × {min(lengths)}..{max(lengths)}"
    plain = prefill(setting, report, name, lengths, goal="prefill")
    same = setting.pick([512] * PROMPTS, [8] * PROMPTS)
    prefill(setting, report, f"{title} bf16, {PROMPTS} × {same[0]}", same)
    prefill(setting, report, f"{title} bf16, 1 × {same[0]} (time to first token)", same[:1])
    narrow = prefill(
        setting, report, f"{title} int8 weights, {PROMPTS} × {min(lengths)}..{max(lengths)}", lengths, int8=True
    )
    if plain and narrow:
        report.add(f"{title} int8 weights against bf16, prefill", plain.median / narrow.median, "×")


def spread(least: int, most: int) -> list[int]:
    """PROMPTS lengths, evenly from least to most, in an order that is fixed and not sorted."""
    lengths = [least + (most - least) * index // (PROMPTS - 1) for index in range(PROMPTS)]
    random.Random(0).shuffle(lengths)
    return lengths


def prefill(
    setting: Setting, report: Report, name: str, lengths: list[int], *, int8: bool = False, goal: str | None = None
) -> Timing | None:
    """From handing the prompts over until each has its first token, nothing else going on."""
    taken: Timing | None = None
    with report.case(name, goal):
        config = setting.config("llama GQA")
        model = engines.draw_model(setting, config, torch.bfloat16, int8=int8)
        room = {"rows": len(lengths), "context": max(lengths) + 1}
        engine = engines.make_engine(setting, model, **room, batched=setting.pick(16384, 64))
        samples, warm = setting.pick(7, 5), 2
        loads = iter(
            [
                [
                    engines.generate(index, engines.prompt(length, config.vocab_size, seed), 1)
                    for index, length in enumerate(lengths)
                ]
                for seed in range(samples + warm)
            ]
        )
        taken = wall_time(lambda: engines.answer(engine, next(loads)), setting.device, samples=samples, warm=warm)
        flops = prefill_flops(config, lengths, head_rows=len(lengths))
        floor = flops / setting.limits.peak(model.dtype)
        detail: dict[str, Any] = {"flops": flops, "tokens_per_second": sum(lengths) / taken.median}
        report.add(name, taken, "ms", scale=1e3, limit=1e3 * floor, share=floor / taken.median, goal=goal, **detail)
    release(setting.device)
    return taken
