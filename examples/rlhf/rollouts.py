"""What a PPO trainer asks of Tandem: answers with all that scores them, rewards that start at zero, new weights.

The server hosts one model of each role: policy, reference, reward and value. One call per iteration brings everything
that a PPO step needs; numbers travel as base64 of little-endian float32.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import httpx
import torch
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """An answer of T tokens, as the server sampled and scored it."""

    prompt: list[int]
    answer: list[int]  # T ids; the last one is the end-of-turn token, unless the answer was cut
    ended: bool
    logprobs: Tensor  # [T], under the policy that sampled it
    reference: Tensor  # [T], under the SFT model
    values: Tensor  # [T] before each token, [T + 1] where it was cut: the last is of what would have followed
    reward: float  # normalised

    @property
    def kl(self) -> float:
        """How far the policy is from the reference on this answer, in nats: over answers, an unbiased estimate."""
        return float((self.logprobs - self.reference).sum())


class Tandem:
    """The routes that a PPO run calls. A status other than 200 raises RuntimeError with the server's own words."""

    def __init__(self, url: str, api_key: str = "none") -> None:
        headers = {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(600, connect=10))

    def rollout(self, prompts: list[list[int]], *, n: int, max_tokens: int, seed: int) -> list[Sample]:
        """n sampled answers to each prompt, prompt by prompt, each with what all four models say of it."""
        asked = {
            "prompts": prompts,
            "n": n,
            "sampling": {"temperature": 1.0, "max_tokens": max_tokens, "seed": seed},
            "want": ["policy_logprobs", "ref_logprobs", "values", "reward"],
            "normalize": True,
            "encoding": "b64_f32",
        }
        found = self._post("/v1/rlhf/rollout", asked)["sequences"]
        return [sample_of(prompts[sequence["prompt_index"]], sequence) for sequence in found]

    def normalize(self, demonstrations: list[tuple[list[int], list[int]]]) -> float:
        """What is added to scores from now on, so that (prompt, answer) demonstrations have 0 on average."""
        pairs = [{"prompt_token_ids": prompt, "completion": {"token_ids": answer}} for prompt, answer in demonstrations]
        return self._post("/v1/rlhf/normalize", {"demonstrations": pairs, "mode": "bias"})["bias"]

    def push(self, model: str, weights: dict[str, Tensor], version: str) -> None:
        """Replaces a model's weights by safetensors bytes in shared memory. No request is under way meanwhile."""
        content = save(weights)
        memory = SharedMemory(create=True, size=len(content))
        try:
            memory.buf[: len(content)] = content
            asked = {"model": model, "source": "shm", "path": memory.name, "size": len(content), "version": version}
            self._post("/v1/rlhf/weights", asked)
        finally:
            memory.close()
            memory.unlink()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._http.post(path, json=body)
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: status {answer.status_code}: {answer.text}")
        return answer.json()


def sample_of(prompt: list[int], sequence: dict[str, Any]) -> Sample:
    """One sequence of a rollout. Raises RuntimeError where a model could not say what it was asked."""
    if "error" in sequence:
        raise RuntimeError(f"an answer of {len(sequence['token_ids'])} tokens: {sequence['error']['message']}")
    arrays = (floats(sequence[name]) for name in ("policy_logprobs", "ref_logprobs", "values"))
    return Sample(prompt, sequence["token_ids"], sequence["finish_reason"] == "stop", *arrays, sequence["reward"])


def floats(encoded: str) -> Tensor:
    """The numbers in base64 of little-endian float32."""
    return torch.frombuffer(bytearray(base64.b64decode(encoded)), dtype=torch.float32)
