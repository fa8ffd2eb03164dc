"""Many requests at once, from the first prompt to the last token; and what a decode step costs the host."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from ...server.engine.request import Request
from . import engines, profile
from .clock import release, synchronize
from .rows import Report
from .setting import Setting
from .shapes import TINY, config_of
from .timing import Timing, timing_of

SEQUENCES = 256
SHORT = "short answers"  # the load that peers get, too


def run(setting: Setting, report: Report) -> None:
    host_work(setting, report)
    count = setting.pick(SEQUENCES, 4)
    small = setting.title("qwen2")
    lengths = setting.pick((100, 1024), (4, 12))
    with report.case(f"{small} bf16, {count} requests, in and out U{lengths}"):
        mixed(setting, report, f"{small} bf16, {count} requests, in and out U{lengths}", lengths, lengths)
    with report.case(short_name(setting)):
        mixed(setting, report, short_name(setting), *short_load(setting))
    release(setting.device)
    given, wanted = setting.pick((1024, 128), (12, 4))
    name = f"{setting.title('llama GQA')} bf16, {count} requests, {given} in, {wanted} out"
    with report.case(name):
        even(setting, report, name, given, wanted)
    release(setting.device)


def short_load(setting: Setting) -> tuple[tuple[int, int], tuple[int, int]]:
    return setting.pick(((100, 1024), (16, 160)), ((4, 12), (2, 4)))


def short_name(setting: Setting) -> str:
    count, (given, wanted) = setting.pick(SEQUENCES, 4), short_load(setting)
    return f"{setting.title('qwen2')} bf16, {count} requests, in U{given}, out U{wanted}"


def load(
    count: int, vocab_size: int, given: tuple[int, int], wanted: tuple[int, int], seed: int = 0
) -> list[tuple[list[int], int]]:
    """(prompt, tokens to generate) of each request, lengths uniform between the two of each pair."""
    draw = random.Random(seed)
    sizes = [(draw.randint(*given), draw.randint(*wanted)) for _ in range(count)]
    return [(engines.prompt(size, vocab_size, seed * count + n), tokens) for n, (size, tokens) in enumerate(sizes)]


def mixed(setting: Setting, report: Report, name: str, given: tuple[int, int], wanted: tuple[int, int]) -> None:
    config = setting.config("qwen2")
    model = engines.draw_model(setting, config, torch.bfloat16)
    count = setting.pick(SEQUENCES, 4)
    room = {"rows": count, "context": given[1] + wanted[1] + 1}
    engine = engines.make_engine(setting, model, **room, batched=setting.pick(16384, 64))
    loads = [
        [engines.generate(n, *one) for n, one in enumerate(load(count, config.vocab_size, given, wanted, seed))]
        for seed in range(setting.pick(5, 2))
    ]
    measured(setting, report, name, engine, loads)


def even(setting: Setting, report: Report, name: str, given: int, wanted: int) -> None:
    config = setting.config("llama GQA")
    model = engines.draw_model(setting, config, torch.bfloat16)
    count = setting.pick(SEQUENCES, 4)
    engine = engines.make_engine(
        setting, model, rows=count, context=given + wanted + 1, batched=setting.pick(16384, 64)
    )
    requests = [engines.generate(n, engines.prompt(given, config.vocab_size, n), wanted) for n in range(count)]
    measured(setting, report, name, engine, [requests])


def measured(setting: Setting, report: Report, name: str, engine: engines.Engine, loads: list[list[Request]]) -> None:
    """Output tokens per second, of as many loads as a quarter of the time that is left allows; at least one."""
    size = engine.card.vocab_size
    engines.answer(engine, [engines.generate(n, engines.prompt(8 + n, size, n), 8) for n in range(2)])
    engines.settle(engine)
    until = time.monotonic() + setting.left() / 4
    seconds: list[float] = []
    rates: list[float] = []
    for requests in loads:
        synchronize(setting.device)
        began = time.perf_counter()
        answers = engines.texts(engines.answer(engine, requests))
        synchronize(setting.device)
        seconds.append(time.perf_counter() - began)
        rates.append(sum(map(len, answers.values())) / seconds[-1])
        if time.monotonic() + seconds[-1] > until:
            break
    read = sum(len(request.token_ids) for request in loads[0])
    report.add(name, timing_of(rates), "tok/s", seconds=seconds, prompt_tokens=read)


def host_work(setting: Setting, report: Report) -> None:
    """Wall time of a decode step of a model so small that the host is what it waits for: at least the host's work."""
    count, context = setting.pick((SEQUENCES, 1024), (3, 16))
    shape = {**TINY["llama GQA"], "num_hidden_layers": 1, "max_position_embeddings": 4096}
    model = engines.draw_model(setting, config_of(shape), torch.bfloat16)
    engines.skip_prompts(model)
    steps = setting.pick(200, 6)
    kinds: dict[str, dict[str, Any]] = {"greedy": {}, "top-p 0.95": {"temperature": 1.0, "top_p": 0.95}}
    for name, sampling in kinds.items():
        what = f"host work of a decode step, {count} sequences, {name}"
        with report.case(what, "host work"):
            room, batched = engines.room_for(context, steps), setting.pick(16384, 64)
            engine = engines.make_engine(setting, model, rows=count, context=room, batched=batched)
            began = time.thread_time()
            taken = timing_of(engines.decode(engine, count, context, steps, **sampling).seconds)
            goal = "host work" if name == "greedy" else None
            detail: dict[str, Any] = {"thread_seconds": time.thread_time() - began}
            report.add(what, taken, "µs", scale=1e6, goal=goal, **detail)
            if setting.cuda:
                idle(setting, report, what, engine, count, context, taken)
        release(setting.device)


def idle(
    setting: Setting, report: Report, what: str, engine: engines.Engine, count: int, context: int, taken: Timing
) -> None:
    """What of that step the device worked, so that it is seen whose time it was."""
    steps, recorder = 32, profile.profiler()
    engines.decode(engine, count, context, steps, around=recorder)
    synchronize(setting.device)
    found = profile.read(recorder)
    report.add(f"{what}: device busy", 1e6 * found.busy / steps, "µs", kernels=found.kernels / steps)
