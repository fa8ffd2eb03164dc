"""The bundled models: their size, that they load as ordinary checkpoints, and what they can do on held-out prompts."""

import json
import math
import subprocess
import sys
from pathlib import Path

import data
import evaluate
import pytest
import sft
import torch

SCRIPTS = Path(sft.__file__).parent
DEMO = sft.DEMO


def test_size_of_the_demo() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".jinja"}


def test_checkpoint_gives_the_trained_models_logits() -> None:
    from transformers import AutoModelForCausalLM

    model, tokenizer = evaluate.load(DEMO / "policy", AutoModelForCausalLM)
    trunk, _ = sft.load_policy(DEMO / "policy")
    texts = [next(data.conversations(seed)).text() for seed in range(6)]
    sequences = [tokenizer(text, add_special_tokens=False)["input_ids"][: sft.CONTEXT] for text in texts]
    flat = sft.flatten(sequences, groups=3)
    with torch.inference_mode():
        ours = trunk(flat) @ trunk.embed_tokens.weight.T
        for start, ids in zip(flat.starts, sequences, strict=True):
            theirs = model(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(ours[start : start + len(ids)], theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["policy", "reward"])
def test_chat_template_is_the_trained_one(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    for kind in data.KINDS:
        for exercise in data.exercises(1, "held_out", kind, "zh", 10):
            messages, tools = list(exercise.messages), list(exercise.tools) or None
            rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
            assert rendered == exercise.prompt()


@pytest.fixture(scope="module")
def accuracy() -> dict[str, float]:
    return evaluate.evaluate_policy(DEMO / "policy", count=40)


@pytest.mark.parametrize("cell", ["arithmetic_en", "arithmetic_zh", "facts_en", "facts_zh"])
def test_policy_answers_held_out_questions(accuracy: dict[str, float], cell: str) -> None:
    assert accuracy[cell] >= 0.8, accuracy


def test_reward_prefers_the_better_of_two() -> None:
    report = evaluate.evaluate_reward(DEMO / "reward", count=60)
    assert report["pairs"] >= 0.9, report


def test_what_is_served_is_as_good() -> None:
    found = evaluate.served(DEMO, ",dtype=float32", 1, 1)
    assert found["policy"] == evaluate.evaluate_policy(DEMO / "policy", 1, 1)
    assert found["reward"] == evaluate.evaluate_reward(DEMO / "reward", 3, 1)


@pytest.mark.parametrize("script", ["sft", "reward"])
def test_smoke(script: str, tmp_path: Path) -> None:
    """The script trains, writes a checkpoint that loads, and ends with one line of JSON."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--smoke", "--out", str(tmp_path / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["steps"] > 0 and math.isfinite(report["loss"]) and report["tokens"] > 0
    assert set(report["held_out"]) & {"arithmetic_en", "pairs"}
    assert (tmp_path / script / "model.safetensors").exists()
