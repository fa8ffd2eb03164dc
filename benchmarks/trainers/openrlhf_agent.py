"""OpenRLHF's SingleTurnAgentExecutor: answers from /v1/completions, rewards from /get_reward.

`run(url, file, …)` loads the file as OpenRLHF's own test of it does; the engine it generates with is the server's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
from transformers import AutoTokenizer

PROMPTS = ["What is 12 + 7?", "What is the capital of France?", "Name a fruit.", "你好"]
TOKENS = 24
CLOSE = 1e-5


def agent_module(file: Path) -> ModuleType:
    logger: Any = SimpleNamespace(init_logger=logging.getLogger)
    sys.modules.setdefault("openrlhf.utils.logging_utils", logger)
    spec = importlib.util.spec_from_file_location("openrlhf_agent_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """What the executor takes for its vLLM actor."""

    def __init__(self, client: httpx.AsyncClient, policy: str) -> None:
        self._client, self._policy = client, policy

    async def generate(self, prompt_token_ids: list[int], params: Any, multi_modal_data: None = None) -> Any:
        body = {
            "model": self._policy,
            "prompt": prompt_token_ids,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "logprobs": params.logprobs,
            "seed": params.seed,
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        answer = await self._client.post("/v1/completions", json=body)
        choice = answer.raise_for_status().json()["choices"][0]
        told = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
        logprobs = [{token: SimpleNamespace(logprob=value)} for token, value in told]
        output = SimpleNamespace(
            token_ids=choice["token_ids"],
            text=choice["text"],
            finish_reason=choice["finish_reason"],
            logprobs=logprobs,
        )
        return SimpleNamespace(outputs=[output])


async def rollouts(url: str, file: Path, directory: Path, policy: str, reward: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    executor = agent_module(file).SingleTurnAgentExecutor([f"{url}/get_reward?model={reward}"])
    params = SimpleNamespace(max_tokens=TOKENS, temperature=1.0, logprobs=0, seed=7)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        engine = Engine(client, policy)
        asked = [executor.execute(text, str(i), params, 512, tokenizer, engine) for i, text in enumerate(PROMPTS)]
        found = await asyncio.gather(*asked)
        queries = [tokenizer.decode(one["observation_tokens"], skip_special_tokens=False) for one in found]
        scored = await client.post("/v1/rewards", json={"model": reward, "input": queries})
    expected = [entry["reward"] for entry in scored.raise_for_status().json()["data"]]
    rewards = [one["reward"] for one in found]
    failed: dict[str, str] = {}
    if not all(isinstance(one, list) and len(one) == 1 and math.isfinite(one[0]) for one in rewards):
        failed["rewards"] = f"the executor has {rewards}"
    elif max(abs(one[0] - other) for one, other in zip(rewards, expected, strict=True)) > CLOSE:
        failed["rewards"] = f"{rewards} are not /v1/rewards' {expected}"
    if any(one["scores"] != one["reward"] or one["extra_logs"] != {"raw_reward": one["reward"]} for one in found):
        failed["scores and logs"] = str([(one["scores"], one["extra_logs"]) for one in found])
    names = ("rewards", "scores and logs")
    return {"passed": [name for name in names if name not in failed], "failed": failed, "rollouts": len(found)}


def run(url: str, file: Path, directory: Path, policy: str, reward: str) -> dict[str, Any]:
    return asyncio.run(rollouts(url, file, directory, policy, reward))
