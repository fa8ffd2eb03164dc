"""What AReaL's two engines send and read: its SGLangBackend and VLLMBackend, each asked for every request it builds.

The two files are loaded by themselves, without AReaL's package, which wants ray, datasets and a hundred others; what
they import of it are types and names.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
from transformers import AutoTokenizer

BORROWED = (
    *("areal", "areal.api", "areal.api.cli_args", "areal.api.io_struct", "areal.infra", "areal.infra.platforms"),
    *("areal.infra.utils", "areal.infra.utils.launcher", "areal.utils", "areal.utils.network"),
    *("pybase64", "torchdata", "torchdata.stateful_dataloader"),
)
TOKENS, TARGET = 24, 4
CLOSE = 1e-3


@dataclass
class HttpRequest:
    endpoint: str
    payload: dict[str, Any]
    method: str = "POST"
    best_effort: bool = False


@contextmanager
def borrowed() -> Iterator[None]:
    """Modules that the files import from, as long as they are loaded."""
    before = {name: sys.modules.get(name) for name in BORROWED}
    sys.modules.update({name: MagicMock() for name in BORROWED})
    names: Any = sys.modules["areal.api.io_struct"]
    names.HttpRequest, names.HttpGenerationResult = HttpRequest, SimpleNamespace
    names.WeightUpdateRequests = SimpleNamespace
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"areal_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with borrowed():
        spec.loader.exec_module(module)
    return module


class Engine:
    """One of the two: its requests go to the server, its parsers read the answers."""

    def __init__(self, client: httpx.Client, backend: Any) -> None:
        self._client, self.backend = client, backend

    def send(self, request: HttpRequest) -> Any:
        answer = self._client.request(request.method, request.endpoint, json=request.payload)
        assert answer.status_code == 200, f"{request.endpoint}: {answer.status_code} {answer.text}"
        return answer.json()

    def generate(self, ids: list[int]) -> Any:
        wanted = SimpleNamespace(
            max_new_tokens=TOKENS,
            greedy=True,
            temperature=1.0,
            top_p=1.0,
            top_k=int(1e8),
            stop_token_ids=[],
            stop=None,
            ignore_eos=False,
            skip_special_tokens=True,
            frequency_penalty=0.0,
            use_beam_search=False,
        )
        asked = SimpleNamespace(input_ids=ids, gconfig=wanted, image_data=[], vision_msg_vllm=None, metadata={})
        request = self.backend.build_generation_request(asked, False, 0)
        return self.backend.parse_generation_response(self.send(request))

    def score(self, ids: list[int]) -> list[float]:
        request = self.backend.build_score_request(ids, TARGET, False, 0)
        return self.backend.parse_score_response(self.send(request), TARGET)

    def update(self, directory: Path) -> None:
        """As AReaL does between two steps: stop, load, go on."""
        self.send(self.backend.get_health_check_request())
        self.send(self.backend.get_pause_request())
        meta = SimpleNamespace(use_lora=False, path=directory)
        for request in self.backend.build_disk_weight_update_requests(meta).requests:
            self.send(request)
        self.send(self.backend.get_resume_request())


def run(url: str, package: Path, directory: Path) -> dict[str, Any]:
    """`package`: the unpacked wheel; `directory`: a checkpoint for the policy, which is given to it anew."""
    ids = AutoTokenizer.from_pretrained(directory)("What is the capital of France?")["input_ids"]
    with httpx.Client(base_url=url, timeout=120) as client:
        engines = {
            "sglang": Engine(client, load(package / "areal" / "engine" / "sglang_remote.py").SGLangBackend()),
            "vllm": Engine(client, load(package / "areal" / "engine" / "vllm_remote.py").VLLMBackend()),
        }
        failed: dict[str, str] = {}
        answers, scores = {}, {}
        for name, engine in engines.items():
            try:
                engine.update(directory)
                answers[name], scores[name] = engine.generate(ids), engine.score(ids)
                assert answers[name].stop_reason in ("stop", "length"), answers[name].stop_reason
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"[:300]
    if not failed and not all(
        len(one.output_tokens) == len(one.output_logprobs) and math.isfinite(sum(one.output_logprobs))
        for one in answers.values()
    ):
        failed["answers"] = str(answers)
    elif not failed and answers["sglang"].output_tokens != answers["vllm"].output_tokens:
        failed["answers"] = f"they differ: {answers}"
    elif not failed and max(abs(a - b) for a, b in zip(scores["sglang"], scores["vllm"], strict=True)) > CLOSE:
        failed["scores"] = f"they differ: {scores}"
    names = ("sglang", "vllm", "answers", "scores")
    return {"passed": [name for name in names if name not in failed], "failed": failed}
