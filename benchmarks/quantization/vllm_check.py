"""Does vLLM read what `tandem quantize` writes? Its log-probabilities and greedy text beside Tandem's.

`make peer-vllm` makes its environment. Both compute in float32. vLLM leaves the head as it is, and so does Tandem here.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...model.load import load_model
from ...model.model import Model
from ...model.quantize import FORMATS, Source, WrittenScheme, quantize
from ...model.reading import read_texts
from ...server.engine.options import DEMO
from ...server.text.text import Text
from ..bench import engines
from .texts import LocalTokens, passages, read_examples

CHILD = Path(__file__).with_name("vllm_reads.py")
PROMPTS = 24
SECONDS = 600
CLOSE = 1e-3  # int8: the largest difference of a log-probability
# w8a8: sums in another order differ in the last bit, which now and then rounds an activation to the other integer; from
# there on more and more are. Tandem is as far from itself where embeddings are changed by so much; so many times that
# far may vLLM be, on average.
LAST_BIT, TIMES = 1e-7, 1.5


def asked(directory: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What vLLM says of each prompt: `logprobs`, `greedy`. Raises EngineError, and RuntimeError with its last words."""
    done = subprocess.run(
        [str(engines.interpreter("vllm")), str(CHILD), str(directory)],
        input=json.dumps(prompts),
        env={**os.environ, **engines.environment("vllm")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode:
        raise RuntimeError(f"vLLM ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def logprobs(model: Model, ids: list[int]) -> list[float]:
    found = model.logits(read_texts(model, [ids])[0][:-1]).log_softmax(-1)
    return found.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    text = list(ids)
    for _ in range(count):
        text.append(int(model.logits(read_texts(model, [text])[0][-1:]).argmax()))
    return text[len(ids) :]


def check(scheme: WrittenScheme, source: Path, prompts: list[list[int]]) -> dict[str, Any]:
    """Differences of all log-probabilities to vLLM's. For a measure: to those of the unquantized checkpoint, and to
    Tandem's own where embeddings are changed in the last bit."""
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / scheme
        quantize(Source(source), directory, scheme)
        theirs = asked(directory, prompts)
        model = load_model(directory, dtype="float32", lm_head="fp16")
        others = {"quantizing": load_model(source, dtype="float32"), "itself": _nudged(directory)}
        apart: dict[str, list[float]] = {name: [] for name in ("vllm", *others)}
        same = total = 0
        for ids, their in zip(prompts, theirs, strict=True):
            ours = logprobs(model, ids)
            found = {"vllm": their["logprobs"]} | {name: logprobs(other, ids) for name, other in others.items()}
            for name, values in found.items():
                apart[name] += [abs(a - b) for a, b in zip(ours, values, strict=True)]
            text = greedy(model, ids, len(their["greedy"]))
            total += len(text)
            same += next((n for n, (a, b) in enumerate(zip(text, their["greedy"], strict=True)) if a != b), len(text))
    largest, means = max(apart["vllm"]), {name: fmean(values) for name, values in apart.items()}
    near = largest <= CLOSE if scheme == "int8" else means["vllm"] <= max(TIMES * means["itself"], CLOSE)
    return {
        "tokens": len(apart["vllm"]),
        "largest": largest,
        "mean": means["vllm"],
        "quantizing_mean": means["quantizing"],
        "itself_mean": means["itself"],
        "greedy_same": same,
        "greedy_tokens": total,
        "bar": f"{CLOSE:g} at most" if scheme == "int8" else f"mean of {TIMES:g} times {means['itself']:.1e}",
        "ok": near,
    }


def _nudged(directory: Path) -> Model:
    model = load_model(directory, dtype="float32", lm_head="fp16")
    embedding = model.decoder.embedding
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    embedding.mul_(1 + LAST_BIT * noise)
    return model


def run(source: Path = DEMO / "policy") -> dict[str, Any]:
    """Both schemes, with the first of the bundled held-out conversations."""
    tokens = LocalTokens(Text.load(source))
    prompts = [one.token_ids for one in passages(read_examples(None), tokens, 512)[:PROMPTS]]
    return {scheme: check(scheme, source, prompts) for scheme in FORMATS}
