"""The same loads through other engines that are found on the machine, in the same run."""

from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import engines, hf, throughput
from .clock import release, synchronize
from .rows import Absent, Report
from .setting import Setting
from .shapes import write_config
from .timing import Timing, timing_of

TOKENS = 32


def run(setting: Setting, report: Report) -> None:
    with report.case("transformers, continuous batching"):
        continuous(setting, report)
    release(setting.device)
    generate(setting, report)
    release(setting.device)
    with report.case("vLLM"):
        vllm(setting, report)


def against(report: Report, name: str, theirs: float, own: float | None, faster: bool = True) -> None:
    """How many times as fast as the peer Tandem was; `faster`: larger figures are better."""
    if own is None:
        report.absent(name, "Tandem's own figure of this run is missing")
    else:
        report.add(name, own / theirs if faster else theirs / own, "×")


def generate(setting: Setting, report: Report) -> None:
    """One sequence through `generate`: with a growing cache, and with a static one under torch.compile."""
    shape, title = setting.shape("llama GQA"), setting.title("llama GQA")
    own = setting.figure("decode", f"{title} bf16, batch 1")
    length = setting.pick(1024, 16)
    model = engines.draw_model(setting, setting.config("llama GQA"), torch.bfloat16)
    peer: Any = None
    ids = torch.tensor([engines.prompt(length, model.config.vocab_size, 1)], device=setting.device)
    for kind, given in (("dynamic cache", {}), ("static cache, compiled", {"cache_implementation": "static"})):
        name = f"{title} bf16, batch 1, transformers generate, {kind}"
        with report.case(name):
            if given and not setting.cuda:
                raise Absent("transformers compiles on CUDA only")
            peer = hf.make(setting, shape, model) if peer is None else peer
            taken = per_token(setting, peer, ids, given)
            report.add(name, taken, "ms", scale=1e3)
            against(report, f"{name}: Tandem is", 1e3 * taken.median, own, faster=False)


def per_token(setting: Setting, peer: Any, ids: torch.Tensor, given: dict[str, Any]) -> Timing:
    """Seconds from one token to the next, of the last of three answers: what is compiled and recorded is done by then.

    `generate` asks its stopping criteria after every token, with the device done.
    """
    moments: list[float] = []

    def note(ids: torch.Tensor, scores: torch.Tensor, **rest: Any) -> torch.Tensor:
        synchronize(setting.device)
        moments.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    criteria = hf.library().StoppingCriteriaList([note])
    limits = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    for _ in range(3):
        moments.clear()
        with torch.inference_mode():
            peer.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=criteria, **limits, **given)
    return timing_of([later - earlier for earlier, later in itertools.pairwise(moments)])


def continuous(setting: Setting, report: Report) -> None:
    """transformers' own continuous batching over pages, on the short load of `throughput`."""
    transformers = hf.library()
    shape, own_name = setting.shape("qwen2"), throughput.short_name(setting)
    count = setting.pick(throughput.SEQUENCES, 4)
    model = engines.draw_model(setting, setting.config("qwen2"), torch.bfloat16)
    peer = hf.make(setting, shape, model)
    if not hasattr(peer, "generate_batch"):
        raise Absent("this version of transformers has no continuous batching")
    requests = throughput.load(count, model.config.vocab_size, *throughput.short_load(setting))
    rates: list[float] = []
    config = getattr(transformers, "ContinuousBatchingConfig", None)
    wanted = {"use_cuda_graph": setting.cuda, "use_async_batching": setting.cuda, "max_memory_percent": 0.6}
    wanted |= setting.pick({}, {"num_blocks": 64, "max_batch_tokens": 64})
    known = inspect.signature(config).parameters if config else {}
    given = {name: value for name, value in wanted.items() if name in known}
    for attempt in range(setting.pick(4, 1)):
        generated, seconds = one_batch(transformers, peer, requests, config(**given) if config else None)
        if attempt or setting.tiny or setting.left() < 3 * seconds:  # the first one records graphs
            rates.append(generated / seconds)
        if setting.left() < 3 * seconds:
            break
    name = f"{own_name}, transformers continuous batching"
    report.add(name, timing_of(rates), "tok/s", given=given)
    own = setting.figure("throughput", own_name)
    against(report, f"{name}: Tandem is", max(rates), own)


def one_batch(transformers: Any, peer: Any, requests: list[tuple[list[int], int]], config: Any) -> tuple[int, float]:
    """Tokens generated, and seconds. Requests want different numbers of tokens, so they are handed over one by one."""
    generation = transformers.GenerationConfig(
        max_new_tokens=max(tokens for _, tokens in requests), do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    given = {} if config is None else {"continuous_batching_config": config}
    manager = peer.init_continuous_batching(generation_config=generation, **given)
    manager.start()
    try:
        began = time.perf_counter()
        for number, (ids, tokens) in enumerate(requests):
            manager.add_request(ids, request_id=f"r{number}", max_new_tokens=tokens)
        generated, finished = 0, 0
        while finished < len(requests):
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching stopped without an answer")
                continue
            if result.is_finished():
                generated += len(result.generated_tokens)
                finished += 1
        return generated, time.perf_counter() - began
    finally:
        manager.stop(block=True)


VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
path, requests = sys.argv[1], json.load(open(sys.argv[2]))
llm = LLM(path, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, enable_prefix_caching=False)
prompts = [TokensPrompt(prompt_token_ids=ids) for ids, _ in requests]
params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for _, n in requests]
rates = []
for _ in range(4):
    began = time.perf_counter()
    answers = llm.generate(prompts, params, use_tqdm=False)
    rates.append(sum(len(a.outputs[0].token_ids) for a in answers) / (time.perf_counter() - began))
json.dump(rates[1:], open(sys.argv[3], "w"))
"""


def vllm(setting: Setting, report: Report) -> None:
    """vLLM with dummy weights of the same shape, on the short load of `throughput`, in a process of its own."""
    if find_spec("vllm") is None:
        raise Absent("vllm is not installed")
    config = setting.config("qwen2")
    requests = throughput.load(
        setting.pick(throughput.SEQUENCES, 4), config.vocab_size, *throughput.short_load(setting)
    )
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("requests.json", "rates.json")]
        write_config(setting.shape("qwen2"), Path(directory))
        paths[0].write_text(json.dumps(requests))
        command = [sys.executable, "-c", VLLM, directory, *map(str, paths)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=max(setting.left(), 1))
        if not paths[1].exists():
            raise RuntimeError(f"vLLM ended with {child.returncode}: {child.stderr[-800:]}")
        rates = json.loads(paths[1].read_text())
    name = f"{throughput.short_name(setting)}, vLLM"
    report.add(name, timing_of(rates), "tok/s")
    own = setting.figure("throughput", throughput.short_name(setting))
    against(report, f"{name}: Tandem is", timing_of(rates).median, own)
