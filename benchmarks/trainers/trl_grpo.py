"""TRL's GRPOTrainer on a model of the server's: rollouts from /v1/completions, rewards from /classify.

    python benchmarks/trainers/trl_grpo.py URL MODEL_DIRECTORY POLICY REWARD [--steps 2]

It runs where `environments.TRL` is installed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from importlib.metadata import version
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # a rollout_func is experimental

import requests
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

GENERATIONS, TOKENS = 4, 24
QUESTIONS = ["What is 12 + 7?", "What is the capital of France?", "What is 3 * 5?", "Name a fruit."]


def post(url: str, body: dict[str, Any]) -> Any:
    answer = requests.post(url, json=body, timeout=120)
    answer.raise_for_status()
    return answer.json()


class Rollouts:
    """What TRL calls: `rollout` for answers, `reward` for how good they are."""

    def __init__(self, url: str, policy: str, reward: str, tokenizer: Any) -> None:
        self._url, self._policy, self._reward, self._tokenizer = url, policy, reward, tokenizer
        self.first: dict[str, Any] = {}
        self.rewards: list[float] = []

    def rollout(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL names each prompt as often as it wants answers to it, one behind the other."""
        prompt_ids = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        body = {
            "model": self._policy,
            "prompt": prompt_ids[::GENERATIONS],
            "n": GENERATIONS,
            "max_tokens": TOKENS,
            "temperature": 1.0,
            "top_k": 0,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "seed": 1 + trainer.state.global_step,
        }
        choices = post(f"{self._url}/v1/completions", body)["choices"]
        assert [choice["prompt_token_ids"] for choice in choices] == prompt_ids
        found = {
            "prompt_ids": prompt_ids,
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        }
        self.first = self.first or found
        return found

    def reward(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        body = {"model": self._reward, "input": texts, "use_activation": False}
        rewards = [entry["probs"][-1] for entry in post(f"{self._url}/classify", body)["data"]]
        self.rewards += rewards
        return rewards


def largest_difference(model: Any, rollouts: dict[str, Any]) -> float:
    """Between the server's log-probabilities of its answers and the model's own before any step."""
    largest = 0.0
    for prompt, completion, told in zip(*rollouts.values(), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        largest = max(largest, (own - torch.tensor(told)).abs().max().item())
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("url", "directory", "policy", "reward"):
        parser.add_argument(name)
    parser.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.directory)
    model = AutoModelForCausalLM.from_pretrained(options.directory, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(options.directory, dtype=torch.float32).eval()
    rollouts = Rollouts(options.url, options.policy, options.reward, tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        config = GRPOConfig(
            output_dir=directory,
            max_steps=options.steps,
            per_device_train_batch_size=GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=TOKENS,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=rollouts.reward,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": QUESTIONS}),
            processing_class=tokenizer,
            rollout_func=rollouts.rollout,
        )
        trainer.train()
    moved = max((a - b).abs().max().item() for a, b in zip(model.parameters(), before.parameters(), strict=True))
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    report = {
        "version": version("trl"),
        "steps": trainer.state.global_step,
        "rewards": len(rollouts.rewards),
        "mean_reward_by_step": [step["reward"] for step in steps],
        "reward_spread_by_step": [step["reward_std"] for step in steps],
        "grad_norm_by_step": [step["grad_norm"] for step in steps],
        "largest_logprob_difference": largest_difference(before, rollouts.first),
        "largest_weight_change": moved,
        "finite": all(map(math.isfinite, rollouts.rewards)),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
