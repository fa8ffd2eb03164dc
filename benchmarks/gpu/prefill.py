"""Prompts of 1024 to 2048 tokens through the engine: operations per second beside what cuBLAS did in the same run."""

from __future__ import annotations

import random
from typing import Any

import torch

from ...model.quantization import WantedScheme
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
    schemes: tuple[WantedScheme, ...] = ("int8", "w8a8")
    for scheme in schemes:
        name = f"{title} {scheme}, {PROMPTS} × {min(lengths)}..{max(lengths)}"
        narrow = prefill(setting, report, name, lengths, quantization=scheme)
        if plain and narrow:
            report.add(f"{title} {scheme} against bf16, prefill", plain.median / narrow.median, "×")


def spread(least: int, most: int) -> list[int]:
    """PROMPTS lengths, evenly from least to most, in an order that is fixed and not sorted."""
    lengths = [least + (most - least) * index // (PROMPTS - 1) for index in range(PROMPTS)]
    random.Random(0).shuffle(lengths)
    return lengths


def prefill(
    setting: Setting,
    report: Report,
    name: str,
    lengths: list[int],
    *,
    quantization: WantedScheme = "auto",
    goal: str | None = None,
) -> Timing | None:
    """From handing the prompts over until each has its first token, nothing else going on. The limit of w8a8 counts all
    operations as int8's, though attention's are not.
    """
    taken: Timing | None = None
    with report.case(name, goal):
        config = setting.config("llama GQA")
        model = engines.draw_model(setting, config, torch.bfloat16, quantization=quantization)
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
        floor = flops / setting.limits.peak(torch.int8 if quantization == "w8a8" else model.dtype)
        detail: dict[str, Any] = {"flops": flops, "tokens_per_second": sum(lengths) / taken.median}
        report.add(name, taken, "ms", scale=1e3, limit=1e3 * floor, share=floor / taken.median, goal=goal, **detail)
    release(setting.device)
    return taken
