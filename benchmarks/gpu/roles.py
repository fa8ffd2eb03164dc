"""A policy that decodes while a reward model scores: in turns on the device, and on streams of their own."""

from __future__ import annotations

import time
from typing import Any

import torch

from ...server.engine.hub import Hub
from . import engines
from .clock import release, synchronize
from .rows import Report
from .setting import Setting
from .shapes import config_of, rewarding
from .timing import Timing, timing_of

ROLLOUTS, PROMPT, ANSWER = 64, 512, 128
TEXTS = 128  # to score, of PROMPT + ANSWER tokens
ROUNDS = 3
KINDS = {"in turns": False, "on streams of their own": True}


def run(setting: Setting, report: Report) -> None:
    name = setting.title("llama GQA")
    title = f"{name} bf16 and its reward model, {setting.pick(ROLLOUTS, 3)} rollouts beside scores"
    found: dict[str, Timing] = {}
    with report.case(title):
        config = setting.config("llama GQA")
        policy = engines.draw_model(setting, config, torch.bfloat16)
        judge = engines.draw_model(setting, config_of(rewarding(setting.shape("llama GQA"))), torch.bfloat16)
        for name, streams in KINDS.items():
            taken, between = together(setting, policy, judge, streams)
            found[name] = taken
            report.add(f"{title}, {name}", taken, "s", between_tokens=between)
            release(setting.device)
    if len(found) == len(KINDS):
        turns, streams = found.values()
        report.add(f"{title}, streams against turns", turns.median / streams.median, "×")


def together(setting: Setting, policy: Any, judge: Any, streams: bool) -> tuple[Timing, float]:
    """Seconds until everything is answered, and the median time between two steps of the policy's decodes."""
    rollouts, given, wanted, texts = setting.pick((ROLLOUTS, PROMPT, ANSWER, TEXTS), (3, 12, 4, 4))
    options: dict[str, Any] = {"context": given + wanted + 1, "batched": setting.pick(8192, 64)}
    options |= {"role_streams": streams}
    writer = engines.make_engine(setting, policy, rows=rollouts, **options)
    reader = engines.make_engine(setting, judge, rows=setting.pick(32, 4), **options)
    hub, size = Hub([writer, reader]), writer.card.vocab_size
    seconds: list[float] = []
    gaps: list[float] = []
    for attempt in range(ROUNDS + 1):  # the first one warms up
        for n in range(rollouts):
            writer.add(engines.generate(n, engines.prompt(given, size, 1000 * attempt + n), wanted))
        for n in range(texts):
            text = engines.prompt(given + wanted, size, 1000 * attempt + rollouts + n)
            reader.add(engines.score(rollouts + n, text))
        synchronize(setting.device)
        began = last = time.perf_counter()
        while hub.has_work:
            outputs = hub.step()
            if failed := [output.error for output in outputs if output.error is not None]:
                raise RuntimeError(f"{failed[0].kind}: {failed[0].message}")
            if attempt and sum(output.request_id < rollouts for output in outputs) == rollouts:
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
        synchronize(setting.device)
        if attempt:
            seconds.append(time.perf_counter() - began)
        else:
            engines.settle(writer)
    return timing_of(seconds), timing_of(gaps).median if gaps else float("nan")
