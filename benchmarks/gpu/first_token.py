"""A process of its own for `start`: load a checkpoint, answer one request, say when what had happened."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import torch

from ...server.engine.device_memory import divide
from ...server.engine.engine import Engine
from ...server.engine.hub import Hub
from ...server.engine.options import EngineOptions, ModelSpec
from .engines import NAME, generate, prompt
from .rows import Report
from .setting import Setting

SEQUENCES = 256


def run(setting: Setting, report: Report) -> None:
    moments = {"imported": time.time()}
    asked = json.loads((setting.out / "request.json").read_text())
    options = EngineOptions(
        device=setting.device.type,
        page_size=64 if setting.cuda else 16,
        max_num_seqs=setting.pick(SEQUENCES, 4),
        max_num_batched_tokens=setting.pick(8192, 64),
        kv_cache_memory_bytes=None if setting.cuda else 1 << 24,
    )
    hub = Hub.load([ModelSpec(NAME, asked["checkpoint"])], options)
    moments["loaded"] = time.time()
    engine = hub.engines[0]
    for number, moment in ((1, "first_token"), (2, "second_first_token")):
        if number == 2:
            moments["second_asked"] = time.time()
        hub.submit(generate(number, prompt(asked["prompt"], engine.card.vocab_size, number), 2))
        while moment not in moments:
            outputs = hub.step()
            if any(output.error for output in outputs):
                raise RuntimeError(str(outputs))
            if any(output.token_ids for output in outputs if output.request_id == number):
                moments[moment] = time.time()
        while hub.has_work:
            hub.step()
    answer = {
        "moments": moments,
        "kv_tokens": engine.kv_tokens,
        "kv_bytes": engine.kv_bytes,
        "weight_bytes": engine.weight_bytes,
        "division": hub.division,
        "plan": plan(setting, engine, options),
    }
    (setting.out / "answer.json").write_text(json.dumps(answer))


def plan(setting: Setting, engine: Engine, options: EngineOptions) -> dict[str, int] | None:
    """Bytes of the device by the formula, and what was really held at most."""
    if not setting.cuda:
        return None
    config, dtype = setting.config("llama GQA"), getattr(torch, engine.card.dtype)
    part = (config, dtype.itemsize, engine.weight_bytes, engine.card.context)
    total = torch.cuda.mem_get_info()[1]
    found = divide([part], options, total, total, 0)
    return asdict(found) | {"rest": found.rest, "held": torch.cuda.max_memory_reserved()}
