"""Decode steps of the engine at real shapes: milliseconds beside the time it takes to read what a step must read."""

from __future__ import annotations

from typing import Any

import torch

from ...model.config import ModelConfig
from ...model.model import Model
from . import engines, profile
from .clock import release, synchronize
from .rows import Report
from .setting import Setting
from .shapes import step_bytes
from .timing import Timing, timing_of

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16


def run(setting: Setting, report: Report) -> None:
    one, many = setting.pick((1, 1024), (1, 20)), setting.pick((256, 1024), (3, 20))
    half = setting.pick((64, 1024), (2, 20))
    title = setting.title
    llama_3 = Loads(setting, report, "llama GQA", BFLOAT16)
    plain = llama_3.measure(*one, f"{title('llama GQA')} bf16, batch 1", goal="batch 1", profiled=True)
    wide = llama_3.measure(
        *many, f"{title('llama GQA')} bf16, {many[0]} × {many[1]}", floor_goal="256 × 1k", profiled=True
    )
    drawn = {"temperature": 1.0, "top_p": 0.95}
    llama_3.measure(*many, f"{title('llama GQA')} bf16, {many[0]} × {many[1]}, top-p 0.95", **drawn)
    llama_3.measure(*half, f"{title('llama GQA')} bf16, {half[0]} × {half[1]}")
    choices = setting.pick(8, 3)
    groups = f"{many[0] // choices} × {choices} choices of {many[1]}"
    llama_3.measure(*many, f"{title('llama GQA')} bf16, {groups}", choices=choices)
    llama_3.measure(*many, f"{title('llama GQA')} bf16, int8 KV, {many[0]} × {many[1]}", kv_int8=True)
    gpt2 = Loads(setting, report, "gpt2", FLOAT16)
    gpt2.measure(*one[:1], setting.pick(896, 20), f"{title('gpt2')} fp16, batch 1", goal="GPT-2 batch 1", profiled=True)
    gpt2.measure(*many[:1], setting.pick(896, 20), f"{title('gpt2')} fp16, {many[0]} × {setting.pick(896, 20)}")
    small = Loads(setting, report, "llama GQA", BFLOAT16, quantization="int8")
    narrow = small.measure(*one, f"{title('llama GQA')} int8 weights, batch 1", profiled=True)
    ratio(report, f"{title('llama GQA')} int8 weights against bf16, batch 1", plain, narrow, "batch 1 int8")
    for rows in setting.pick((8, 64), (2,)):
        small.measure(rows, one[1], f"{title('llama GQA')} int8 weights, {rows} × {one[1]}")
    thin = small.measure(
        *many, f"{title('llama GQA')} int8 weights and KV, {many[0]} × {many[1]}", kv_int8=True, profiled=True
    )
    ratio(report, f"{title('llama GQA')} int8 against bf16, {many[0]} × {many[1]}", wide, thin, "256 × 1k int8")
    both = Loads(setting, report, "llama GQA", BFLOAT16, quantization="w8a8")
    both.measure(*many, f"{title('llama GQA')} w8a8 and int8 KV, {many[0]} × {many[1]}", kv_int8=True)
    fixed = Loads(setting, report, "llama GQA", BFLOAT16, deterministic=True)
    for rows, context in (one, half):
        fixed.measure(rows, context, f"{title('llama GQA')} bf16, {rows} × {context}, deterministic")
    llama = Loads(setting, report, "llama", FLOAT16)
    llama.measure(*one, f"{title('llama')} fp16, batch 1", goal="batch 1")
    llama.measure(*half, f"{title('llama')} fp16, {half[0]} × {half[1]}")
    bloom = Loads(setting, report, "bloom", FLOAT16)
    bloom.measure(*one, f"{title('bloom')} fp16, batch 1", goal="batch 1")
    bloom.measure(*half, f"{title('bloom')} fp16, {half[0]} × {half[1]}")


def ratio(report: Report, name: str, slow: Timing | None, fast: Timing | None, goal: str) -> None:
    if slow is None or fast is None:
        report.absent(name, "one of the two was not measured", goal)
    else:
        report.add(name, slow.median / fast.median, "×", goal=goal)


class Loads:
    """A model, drawn at its first use, and what a decode step of it takes under several loads."""

    def __init__(self, setting: Setting, report: Report, name: str, dtype: torch.dtype, **drawn: Any) -> None:
        release(setting.device)
        self.setting, self.report, self.dtype, self.drawn = setting, report, dtype, drawn
        self.config: ModelConfig = setting.config(name)
        self.model: Model | None = None

    def measure(
        self,
        rows: int,
        context: int,
        name: str,
        *,
        goal: str | None = None,
        floor_goal: str | None = None,
        kv_int8: bool = False,
        profiled: bool = False,
        choices: int = 1,
        **sampling: Any,
    ) -> Timing | None:
        """Steps of `rows` sequences at about `context` tokens: a row, and one against the floor if that has a goal.

        `choices` of each prompt: their K and V of it are read once.
        """
        found: Timing | None = None
        with self.report.case(name, goal or floor_goal):
            found = self._measure(rows, context, name, goal, floor_goal, kv_int8, profiled, choices, **sampling)
        release(self.setting.device)
        return found

    def _measure(
        self,
        rows: int,
        context: int,
        name: str,
        goal: str | None,
        floor_goal: str | None,
        kv_int8: bool,
        profiled: bool,
        choices: int,
        **sampling: Any,
    ) -> Timing:
        setting, report, config = self.setting, self.report, self.config
        if self.model is None:
            self.model = engines.draw_model(setting, config, self.dtype, **self.drawn)
            engines.skip_prompts(self.model)
        steps = setting.pick(64, 6)
        kept = "int8" if kv_int8 else ""
        room, batched = engines.room_for(context, steps), setting.pick(16384, 64)
        engine = engines.make_engine(setting, self.model, rows=rows, context=room, batched=batched, kv_dtype=kept)
        seconds, mean = engines.decode(engine, rows, context, steps, choices=choices, **sampling)
        taken = timing_of(seconds)
        kv_dtype = torch.int8 if kv_int8 else self.model.dtype
        element = 1.0 if self.model.place.quantization.any else float(self.model.dtype.itemsize)
        read = step_bytes(config, element, kv_dtype, mean - context + context / choices, rows)
        floor = read / setting.limits.read
        detail: dict[str, Any] = {
            "bytes": read,
            "rows": rows,
            "context": mean,
            "tokens_per_second": rows / taken.median,
        }
        report.add(name, taken, "ms", scale=1e3, limit=1e3 * floor, share=floor / taken.median, goal=goal, **detail)
        if floor_goal:
            report.add(f"{name}, against the floor", taken.median / floor, "×", limit=1.0, goal=floor_goal)
        if profiled:
            self._profile(engine, rows, context, name, **sampling)
        return taken

    def _profile(self, engine: engines.Engine, rows: int, context: int, name: str, **sampling: Any) -> None:
        """How long the device had nothing to do, and which kernels took its time."""
        goal = "idle" if rows > 1 else None
        if not self.setting.cuda:
            self.report.absent(f"{name}, device idle", "there are no kernels on a CPU", goal)
            return
        steps, recorder = 16, profile.profiler()
        with self.report.case(f"{name}, device idle", goal):
            seconds = engines.decode(engine, rows, context, steps, around=recorder, **sampling).seconds
            synchronize(self.setting.device)
            found = profile.read(recorder)
            kernels = {kernel: round(1e6 * taken / steps, 2) for kernel, taken in found.by_name.items()}
            detail: dict[str, Any] = {"kernels_per_step": found.kernels / steps, "microseconds_per_step": kernels}
            wall = timing_of(seconds).median
            self.report.add(f"{name}, device idle", found.idle, "%", goal=goal, profiled_ms=1e3 * wall, **detail)
