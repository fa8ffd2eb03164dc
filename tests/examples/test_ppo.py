"""PPO: arithmetic by tables, networks against transformers, prompts, and a tiny run against the real server."""

import base64
import itertools
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import data
import learner
import ppo
import pytest
import rollouts
import sft
import torch
from torch import Tensor

SFT, REWARD = sft.DEMO / "policy", sft.DEMO / "reward"


def sample(**given: Any) -> rollouts.Sample:
    """An answer of three tokens, each twice as likely as under the reference, with reward 2."""
    logprobs = torch.tensor([-1.0, -2.0, -3.0])
    usual = {
        "prompt": [1, 5, 6],
        "answer": [7, 8, 2],
        "ended": True,
        "logprobs": logprobs,
        "reference": logprobs - math.log(2),
        "values": torch.tensor([0.5, 0.6, 0.7]),
        "reward": 2.0,
    }
    return rollouts.Sample(**usual | given)


@pytest.mark.parametrize(
    ("rewards", "values", "lam", "expected"),
    [
        ([0, 0, 1], [0.5, 0.6, 0.7], 0.0, [0.1, 0.1, 0.3]),  # errors of one step
        ([0, 0, 1], [0.5, 0.6, 0.7], 1.0, [0.5, 0.4, 0.3]),  # what came after, less what was expected
        ([0, 0, 1], [0.5, 0.6, 0.7], 0.95, [0.1 + 0.95 * 0.385, 0.1 + 0.95 * 0.3, 0.3]),
        ([-1, 0, 3], [0.0, 0.0, 0.0], 0.5, [-0.25, 1.5, 3.0]),
        ([0, 0, 0], [0.5, 0.6, 0.7, 0.9], 1.0, [0.4, 0.3, 0.2]),  # cut: the last value stands for what would follow
        ([0, 0, 0], [0.5, 0.6, 0.7, 0.9], 0.0, [0.1, 0.1, 0.2]),
        ([2], [0.5], 0.95, [1.5]),
        ([0], [0.5, 0.2], 0.95, [-0.3]),
    ],
)
def test_advantages(rewards: list[float], values: list[float], lam: float, expected: list[float]) -> None:
    found = learner.advantages(torch.tensor(rewards, dtype=torch.float32), torch.tensor(values), lam)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_last_token_earns_the_reward_and_every_token_pays_for_its_distance() -> None:
    cost = 0.1 * math.log(2)
    torch.testing.assert_close(learner.token_rewards(sample(), 0.1), torch.tensor([-cost, -cost, 2 - cost]))
    cut = sample(ended=False, values=torch.tensor([0.5, 0.6, 0.7, 0.9]))
    torch.testing.assert_close(learner.token_rewards(cut, 0.1), torch.full((3,), -cost))
    assert sample().kl == pytest.approx(3 * math.log(2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "outside"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 2.0, -2.4, 1.0),  # no more is gained than at 1.2
        (0.5, 2.0, -1.0, 1.0),  # but what was lost counts in full
        (0.5, -2.0, 1.6, 1.0),
        (1.5, -2.0, 3.0, 1.0),
    ],
)
def test_clipped_loss(ratio: float, advantage: float, loss: float, outside: float) -> None:
    old = torch.tensor([-1.0])
    found = learner.policy_loss(old + math.log(ratio), old, torch.tensor([advantage]), clip=0.2)
    assert [figure.item() for figure in found] == pytest.approx([loss, outside])


def test_a_batch_names_the_places_before_the_tokens_that_count() -> None:
    sequences = [[6, 7, 8, 9, 2], [3, 4, 5], [9], [8, 7], [5, 6, 7, 8]]
    batch = learner.Batch.of(sequences, [[2, 3], [1], [], [0], [0, 2]])
    assert [block.tolist() for block in batch.blocks] == [
        [[9, 0], [8, 7]],
        [[3, 4, 5, 0], [5, 6, 7, 8]],
        [[6, 7, 8, 9, 2]],
    ]
    flat = torch.cat([block.flatten() for block in batch.blocks])
    assert flat[batch.places].tolist() == [8, 9, 4, 8, 5, 7]
    assert batch.tokens.tolist() == [9, 2, 5, 7, 6, 8]


@pytest.fixture
def novice() -> learner.Learner:
    torch.manual_seed(0)
    documents = sft.Encoder(ppo.Tokenizer.from_file(str(SFT / "tokenizer.json"))).documents(data.conversations(0))
    return learner.Learner(SFT, REWARD, learner.Settings(ptx=0.1, ptx_texts=2), documents)


def answered(novice: learner.Learner, texts: list[tuple[str, str]], rewards: list[float]) -> list[rollouts.Sample]:
    """Answers as a server would return them, whose values are all 0."""
    ids = ppo.Ids(ppo.Tokenizer.from_file(str(SFT / "tokenizer.json")))
    samples: list[rollouts.Sample] = []
    for (question, text), reward in zip(texts, rewards, strict=True):
        prompt = ids.encode(data.render([data.user(question)], add_generation_prompt=True))
        answer = ids.encode(text + "<|im_end|>")
        logprobs = alone(novice, prompt, answer)
        samples.append(rollouts.Sample(prompt, answer, True, logprobs, logprobs, torch.zeros(len(answer)), reward))
    return samples


def alone(novice: learner.Learner, prompt: list[int], answer: list[int]) -> Tensor:
    """The policy's log-probabilities of an answer, by transformers and with nothing beside it."""
    with torch.inference_mode():
        logits = novice.policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


TEXTS = [("What is 2 + 3?", "2 + 3 = 5."), ("Hi", "um, hello"), ("What is the capital of France?", "paris")]


def test_a_sample_is_read_alike_alone_and_in_a_batch(novice: learner.Learner) -> None:
    samples = answered(novice, TEXTS, [0.0, 0.0, 0.0])
    before = [[len(s.prompt) - 1 + t for t in range(len(s.answer))] for s in samples]
    batch = learner.Batch.of([s.prompt + s.answer for s in samples], before)
    novice.offset = 1.5
    with torch.inference_mode():
        torch.testing.assert_close(
            novice.logprobs(batch), torch.cat([s.logprobs for s in samples]), atol=1e-4, rtol=1e-4
        )
        # Before a token, the value function says what the reward model says of the text so far.
        first = novice.value(torch.tensor([samples[1].prompt])).logits[0, 0] + 1.5
        torch.testing.assert_close(novice.values(batch)[len(samples[0].answer)], first, atol=1e-4, rtol=1e-4)


def test_what_earned_more_becomes_likelier(novice: learner.Learner) -> None:
    samples = answered(novice, TEXTS, [-1.0, 3.0, -1.0])
    found = [novice.update(samples, rate=0.3) for _ in range(3)]
    changes = [(alone(novice, s.prompt, s.answer) - s.logprobs).sum().item() for s in samples]
    assert changes[1] > 0.05 and changes[1] > max(changes[0], changes[2]), changes
    assert found[0]["mismatch"] < 1e-4
    assert found[-1]["value_loss"] < found[0]["value_loss"]


def test_a_checkpoint_comes_back(novice: learner.Learner, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for model, like in ((novice.policy, SFT), (novice.value, REWARD)):
        learner.save_checkpoint(model, like, tmp_path / like.name)
        stored, pushed = load_file(tmp_path / like.name / "model.safetensors"), learner.weights(model)
        assert set(stored) == set(pushed) == set(load_file(like / "model.safetensors"))
        assert all(torch.equal(stored[name], pushed[name]) for name in stored)
        assert (tmp_path / like.name / "tokenizer.json").read_bytes() == (like / "tokenizer.json").read_bytes()


def encoded(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


def test_a_sequence_of_a_rollout_becomes_a_sample() -> None:
    found = {
        "token_ids": [7, 8],
        "finish_reason": "length",
        "policy_logprobs": encoded(-0.5, -1.5),
        "ref_logprobs": encoded(-0.5, -1.0),
        "values": encoded(1, 2, 3),
        "reward": 0.25,
    }
    made = rollouts.sample_of([1, 2], found)
    assert (made.prompt, made.answer, made.ended, made.reward) == ([1, 2], [7, 8], False, 0.25)
    assert [made.logprobs.tolist(), made.reference.tolist()] == [[-0.5, -1.5], [-0.5, -1.0]]
    assert made.values.tolist() == [1, 2, 3] and made.kl == -0.5
    refused = {"token_ids": [7, 8], "reward": None, "error": {"message": "too long for 'reward'"}}
    with pytest.raises(RuntimeError, match="2 tokens: too long for 'reward'"):
        rollouts.sample_of([1, 2], refused)


def test_prompts_are_not_held_out() -> None:
    """Neither those that rewards are compared on nor those that accuracy is."""
    trained = {e.prompt() for seed in (1, 2, 3) for e in itertools.islice(ppo.training_exercises(seed), 3000)}
    held_out = {exercise.prompt() for exercise in ppo.held_out_exercises(50)}
    judged = {e.prompt() for cell in ppo.CELLS for e in data.exercises(0, "held_out", *cell, 150)}
    assert len(held_out) == 50 * len(ppo.CELLS) and len(trained) > 4000
    assert not trained & (held_out | judged)


def test_report_names_what_is_missed() -> None:
    before, right = ppo.Measured(-1.0, 2.0, 0.0, 0.1), {"facts_en": 0.9, "json_zh": 0.7, "well_formed": 0.5}

    def met(reward: float, kl: float, accuracy: float) -> bool:
        after = ppo.Measured(reward, 1.0, kl, 0.0)
        found = ppo.report(ppo.Run(1, [0.0] * 4, [0.0] * 4), before, after, right, right | {"facts_en": accuracy})
        assert found["gain"] == pytest.approx((reward + 1) / 2) and found["iterations"] == 4
        return found["met"]

    assert met(1.0, 10.0, 0.9) and met(1.5, 3.0, 0.88)
    assert not met(0.9, 3.0, 0.9) and not met(1.0, 10.1, 0.9) and not met(1.0, 3.0, 0.8)


def test_smoke(tmp_path: Path) -> None:
    """Two iterations against the real server, which trains what it serves."""
    command = [sys.executable, str(Path(ppo.__file__)), "--smoke", "--out", str(tmp_path / "ppo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["iterations"] == 2 and found["kl"] != 0 and math.isfinite(found["reward_after"])
    assert "iteration 1 reward" in done.stderr  # a bar that is drawn once a second, not for every iteration
    assert (tmp_path / "ppo" / "ppo.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "ppo" / "policy" / "model.safetensors").exists()
