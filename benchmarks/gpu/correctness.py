"""Is what is fast also right? The GPU's test cases, and greedy text of small models against the CPU's definition."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...model.load import random_model
from ...model.model import Model
from ...model.quantization import WantedScheme
from ...server.engine.request import Output
from . import engines
from .rows import Report
from .setting import Setting
from .shapes import TINY, Shape, config_of, rewarding

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/kernels", "tests/engine", "tests/model")
TESTS_SHARE = 0.65  # of the section's time: they compile most of what the rest needs
WORKERS = 4  # test processes at once: compiling kernels takes longer than running them
INI = """[pytest]
addopts = --import-mode=importlib
markers = gpu: needs a CUDA device
pythonpath = {root}/tests/support
"""
# Sizes at which the kernels take their ordinary paths, small enough for a CPU.
SMALL: Mapping[str, Any] = MappingProxyType({"hidden_size": 256, "intermediate_size": 512})
PROMPTS, NEW_TOKENS = (1, 5, 63, 64, 65, 130, 200), 24
# What is quantized, precision of the rest, scheme of the matrices, precision of K and V, goal. Where values are rounded
# to int8, what is the last bit of a float elsewhere may be a whole step.
QUANTIZED: tuple[tuple[str, torch.dtype, WantedScheme, str, str], ...] = (
    ("int8 float32", torch.float32, "int8", "", "greedy fp32"),
    ("int8 and int8 KV float32", torch.float32, "int8", "int8", "greedy half"),
    ("int8 bfloat16", torch.bfloat16, "int8", "", "greedy half"),
    ("w8a8 float32", torch.float32, "w8a8", "", "greedy half"),
)
SHARED, CHOICES = 400, 3  # a prompt that several choices have in common, longer than attention's chunk


def run(setting: Setting, report: Report) -> None:
    with report.case("test cases", "correct"):
        tests(setting, report, TESTS)
    for name in setting.pick(("llama GQA", "llama", "qwen2", "bloom", "gpt2"), ("llama GQA",)):
        for dtype in setting.pick((torch.float32, torch.float16, torch.bfloat16), (torch.float32,)):
            goal = "greedy fp32" if dtype == torch.float32 else "greedy half"
            what = f"greedy text, {name} {str(dtype).removeprefix('torch.')}"
            with report.case(what, goal):
                greedy(setting, report, what, shape_of(setting, name), dtype, goal)
    for kept, dtype, scheme, kv_dtype, goal in setting.pick(QUANTIZED, QUANTIZED[1:2]):
        what = f"greedy text, llama GQA {kept}"
        with report.case(what, goal):
            greedy(setting, report, what, shape_of(setting, "llama GQA"), dtype, goal, scheme, kv_dtype)
    with report.case("scores, llama GQA float32", "greedy fp32"):
        scores(setting, report, shape_of(setting, "llama GQA"))


def shape_of(setting: Setting, name: str) -> Shape:
    given = {**TINY[name], **setting.pick(SMALL, {})}
    if "n_embd" in given:
        given["n_embd"] = given.pop("hidden_size", given["n_embd"])
    return given


def twins(
    setting: Setting, shape: Shape, dtype: torch.dtype, quantization: WantedScheme = "auto"
) -> tuple[Model, Model, Setting]:
    """The same weights on the CPU and on the device, and the setting of the first."""
    name: Any = str(dtype).removeprefix("torch.")
    config, here = config_of(shape), Setting(torch.device("cpu"), setting.out, setting.tiny)
    reference = random_model(config, dtype=name, seed=5, quantization=quantization)
    if not setting.cuda:
        return reference, reference, here
    model = random_model(config, dtype=name, device=setting.device, seed=6, quantization=quantization)
    engines.copy_weights(reference, model)
    return reference, model, here


def greedy(
    setting: Setting,
    report: Report,
    what: str,
    shape: Shape,
    dtype: torch.dtype,
    goal: str,
    quantization: WantedScheme = "auto",
    kv_dtype: str = "",
) -> None:
    """Figure: the reference's gap between its two best tokens where a text first differs, at most; 0 if none does."""
    reference, model, here = twins(setting, shape, dtype, quantization)
    size, lengths = reference.config.vocab_size, (*setting.pick(PROMPTS, PROMPTS[:3]), SHARED)
    given = [engines.prompt(length, size, 7) for length in lengths]
    room: dict[str, Any] = {"rows": len(lengths) + CHOICES - 1, "context": max(lengths) + NEW_TOKENS}
    room["kv_dtype"] = kv_dtype
    requests = [engines.generate(index, ids, NEW_TOKENS, logprobs=2) for index, ids in enumerate(given)]
    expected = engines.answer(engines.make_engine(here, reference, **room), requests)
    plain = [engines.generate(index, ids, NEW_TOKENS) for index, ids in enumerate(given)]
    plain[-1] = replace(plain[-1], n=CHOICES)
    found = by_choice(engines.answer(engines.make_engine(setting, model, **room), plain))
    gaps: list[float] = []
    for (index, _), ids in found.items():
        wanted = engines.texts({index: expected[index]})[index]
        if ids == wanted:
            continue
        first = next(place for place, pair in enumerate(zip(wanted, ids, strict=True)) if pair[0] != pair[1])
        columns = [output.logprobs for output in expected[index] if output.logprobs is not None]
        best = [values for column in columns for values in column.top_values][first]
        gaps.append(best[0] - best[1])
    report.add(what, max(gaps, default=0.0), "nats", goal=goal, texts=len(found), differ=len(gaps), gaps=gaps)


def by_choice(answers: dict[int, list[Output]]) -> dict[tuple[int, int], list[int]]:
    """The tokens of each choice of each request."""
    found: dict[tuple[int, int], list[int]] = {}
    for number, outputs in answers.items():
        for output in outputs:
            found.setdefault((number, output.choice), []).extend(output.token_ids)
    return found


def scores(setting: Setting, report: Report, shape: Shape) -> None:
    reference, model, here = twins(setting, rewarding(shape), torch.float32)
    lengths = setting.pick(PROMPTS, PROMPTS[:3])
    requests = [
        engines.score(index, engines.prompt(length, reference.config.vocab_size, 8))
        for index, length in enumerate(lengths)
    ]
    both = [
        engines.answer(engines.make_engine(place, one, rows=len(lengths), context=max(lengths)), requests)
        for place, one in ((here, reference), (setting, model))
    ]
    far = [
        abs(a - b)
        for n in both[0]
        for a, b in zip(both[0][n][-1].scores or [], both[1][n][-1].scores or [], strict=True)
    ]
    assert len(far) == len(lengths), f"{len(far)} scores for {len(lengths)} texts"
    report.add("scores, llama GQA float32", max(far), "nats", goal="greedy fp32", texts=len(far))


def tests(setting: Setting, report: Report, paths: tuple[str, ...]) -> None:
    """`pytest -m gpu` in a child, without the project's own configuration: that names plugins of a full install."""
    ini = setting.out / "pytest.ini"
    ini.write_text(INI.format(root=ROOT))
    command = [sys.executable, "-m", "pytest", "-m", "gpu" if setting.cuda else "not gpu", "-v", "--tb=short"]
    command += ["-c", str(ini), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command += ["-p", "xdist", "-n", str(WORKERS)] if setting.cuda and find_spec("xdist") else []
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the machine's plugins have no part in this
    log = setting.out / "tests.log"
    limit = max(TESTS_SHARE * setting.left(), 1)
    with log.open("w") as stream:
        child = subprocess.Popen([*command, *paths], cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        try:
            child.wait(timeout=limit)
            ended = f"exit status {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            ended = f"stopped after {limit:.0f} s"
    counts, failed = count(log.read_text())
    bad = counts["FAILED"] + counts["ERROR"]
    reason = "" if child.returncode == 0 else f"{ended}; see {log.name}"
    whole = (child.returncode == 0 and counts["PASSED"] > 0) or bad > 0  # all ran, or the verdict is clear
    reason = reason or ("" if whole else "no test case ran")
    detail: dict[str, Any] = {
        "passed": counts["PASSED"],
        "skipped": counts["SKIPPED"],
        "failed": failed[:20],
        "ended": ended,
    }
    report.add("failed test cases", bad if whole else None, "", goal="correct", reason=reason, **detail)
    report.add("passed test cases", counts["PASSED"])


def count(log: str) -> tuple[Counter[str], list[str]]:
    """Outcomes of a verbose log of pytest, and the tests that failed."""
    found = re.findall(
        r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:(\S*::.*?) )?(PASSED|FAILED|ERROR|SKIPPED)\b(?: (\S*::.*))?", log, re.M
    )
    lines = [(outcome, before or after) for before, outcome, after in found if before or after]
    named = dict.fromkeys(
        (name.split(" - ")[0].strip(), outcome) for outcome, name in lines
    )  # the summary repeats some
    failed = [name for name, outcome in named if outcome in ("FAILED", "ERROR")]
    return Counter(outcome for _, outcome in named), failed
