"""From starting a process to its first token, with kernels compiled before and not; and what the KV cache got.

The checkpoint is written once, to memory or disk, and its pages are then warm: what is timed is reading them, not a
disk. The process is the engine's alone; the HTTP side is measured by `tandem bench startup` wherever it is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...model.kv_cache import KVCache
from . import engines
from .clock import release
from .rows import Absent, Report
from .setting import Setting
from .shapes import Shape, config_of, step_bytes, write_config

SUITE = Path(__file__).resolve().parents[1] / "gpu_suite.py"
SHARD = 4 << 30  # bytes of a weight file
PLACES = ("/dev/shm", tempfile.gettempdir(), ".")
PROMPT = 512


def run(setting: Setting, report: Report) -> None:
    title = setting.title("llama GQA")
    config = setting.config("llama GQA")
    for name in ("llama GQA", "gpt2"):
        one = setting.config(name)
        ratio = KVCache.bytes_per_page(one, 64, torch.float16) / KVCache.bytes_per_page(one, 64, torch.int8)
        report.add(f"KV tokens, int8 against fp16, {setting.title(name)}, by formula", ratio, "×")
    with report.case("KV tokens, int8 against fp16", "int8 KV"):
        tokens_with_int8(setting, report)
    cold, warm = f"{title} bf16, start to first token, cold kernel cache", f"{title} bf16, start to first token"
    with report.case(cold, "start cold"):
        size = int(1.3 * step_bytes(config, 4.0, torch.float16, 0, 0) / setting.pick(2, 1))
        with tempfile.TemporaryDirectory(dir=place_for(size)) as directory:
            checkpoint, cache = Path(directory) / "model", Path(directory) / "kernels"
            with report.case("writing the checkpoint"):
                write_checkpoint(setting, setting.shape("llama GQA"), checkpoint)
            found = first_token(setting, checkpoint, cache)
            report.add(cold, found["first_token"], "s", goal="start cold", **found)
            with report.case(warm, "start warm"):
                again = [first_token(setting, checkpoint, cache) for _ in range(setting.pick(2, 1))]
                best = sorted(again, key=lambda one: one["first_token"])[len(again) // 2]
                others = [one["first_token"] for one in again]
                report.add(warm, best["first_token"], "s", goal="start warm", runs=others, **best)
            memory(report, title, found)


def tokens_with_int8(setting: Setting, report: Report) -> None:
    """Tokens that engines with the same number of bytes hold."""
    model = engines.draw_model(setting, setting.config("gpt2"), torch.float16)
    room: dict[str, Any] = {"rows": 4, "context": setting.pick(1024, 64)}
    plain = engines.make_engine(setting, model, **room)
    narrow = engines.make_engine(setting, model, **room, kv_dtype="int8")
    ratio = (narrow.kv_tokens / narrow.kv_bytes) / (plain.kv_tokens / plain.kv_bytes)
    report.add("KV tokens, int8 against fp16", ratio, "×", goal="int8 KV")


def place_for(size: int) -> str:
    """A directory with room for the checkpoint, in memory if possible."""
    for place in PLACES:
        with suppress(OSError):
            if shutil.disk_usage(place).free > size and os.access(place, os.W_OK):
                return place
    raise Absent(f"no place for a checkpoint of {size / 2**30:.0f} GiB")


def write_checkpoint(setting: Setting, shape: Shape, directory: Path) -> None:
    """Random weights as Hugging Face stores them, in several files with an index."""
    directory.mkdir()
    write_config(shape, directory)
    model = engines.draw_model(setting, config_of(shape), torch.bfloat16)
    where: dict[str, str] = {}
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        name = f"model-{len(set(where.values())):05}.safetensors"
        save_file(shard, directory / name)
        where.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in engines.named_tensors(model):
        shard[name] = tensor.to("cpu", torch.bfloat16).contiguous()
        if sum(part.nbytes for part in shard.values()) > SHARD:
            flush()
    flush()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    del model
    release(setting.device)


def first_token(setting: Setting, checkpoint: Path, cache: Path) -> dict[str, Any]:
    """Seconds since the process was started, and what it said of its memory."""
    out = Path(tempfile.mkdtemp(dir=checkpoint.parent))
    request = {"checkpoint": str(checkpoint), "prompt": setting.pick(PROMPT, 8)}
    (out / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(SUITE), "--out", str(out), "--only", "first_token", "--device", setting.device.type]
    command += ["--tiny"] if setting.tiny else []
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    began = time.time()
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=max(setting.left(), 1))
    answer = out / "answer.json"
    if not answer.exists():
        raise RuntimeError(f"the process ended with {child.returncode}: {child.stdout[-400:]}{child.stderr[-800:]}")
    found = json.loads(answer.read_text())
    moments = {name: round(moment - began, 3) for name, moment in found.pop("moments").items()}
    return moments | found


def memory(report: Report, title: str, found: dict[str, Any]) -> None:
    """The KV cache beside what the plan leaves of utilization · total: after weights, steps, graphs and 1 GiB."""
    name, plan = f"{title} bf16, KV cache of what is left", found["plan"]
    if plan is None:
        report.absent(name, "there is no device memory on a CPU", "KV memory")
        return
    tokens, division = found["kv_tokens"], found["division"]
    report.add(
        name, found["kv_bytes"] / plan["rest"], "%", goal="KV memory", kv_tokens=tokens, division=division, **plan
    )
    held = plan["held"] / plan["limit"]
    report.add(f"{title} bf16, memory held at most, of the limit", held, "%")
