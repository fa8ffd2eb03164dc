"""`make evidence-quantization`: that its checks see what is wrong, and the lines it has in the README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from tandem.benchmarks import readme
from tandem.benchmarks.quantization import proof, vllm_check
from tandem.model.load import load_model

PROMPTS = [[5, 6, 7, 8, 9], [40, 41, 42]]


@pytest.mark.parametrize("off", [0.0, 0.3])
def test_another_engine_is_held_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    def asked(directory: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
        model = load_model(directory, dtype="float32")
        return [
            {
                "logprobs": [value + off for value in vllm_check.logprobs(model, ids)],
                "greedy": vllm_check.greedy(model, ids, 4),
            }
            for ids in prompts
        ]

    monkeypatch.setattr(vllm_check, "asked", asked)
    source = write_checkpoint(tmp_path, "llama")
    for scheme in ("int8", "w8a8"):
        found = vllm_check.check(scheme, source, PROMPTS)
        assert found["tokens"] == 6 and found["greedy_same"] == found["greedy_tokens"] == 8
        assert found["largest"] == pytest.approx(off, abs=1e-6) and found["ok"] == (off == 0)
        assert found["quantizing_mean"] > 1e-3


def test_kinds_are_both_languages() -> None:
    found = {"policy": {"facts_en": 0.5, "facts_zh": 1.0, "well_formed": 0.1}, "reward": {"pairs": 0.9, "facts": 0.8}}
    assert proof.by_kind(found) == {"facts": 0.75, "reward pairs": 0.9}


def test_the_readme_says_what_was_found_and_missed() -> None:
    settings = "quantization=int8,kv_dtype=int8"
    one = {"mean": 1e-5, "largest": 2e-4, "greedy_same": 9, "greedy_tokens": 10, "bar": "0.001 at most"}
    found = {
        "quality": {
            f"policy,{settings}": {"perplexity_change": -0.0004, "top1_agreement": 0.998},
            f"reward,{settings}": {"ranking_agreement": 0.995},
        },
        "accuracy": {"bfloat16": {"facts": 0.9, "chat": 0.8}, settings: {"facts": 0.895, "chat": 0.802}},
        "logits": {"int8": 0.04},
        "vllm": {"int8": one},
        "missed": ["something"],
    }
    lines = list(readme.quantization(found))
    assert lines[0] == (
        "bundled policy in int8 with int8 KV: perplexity, same most likely token",
        "-0.04%, 99.80%",
        "bar 1 %, 99 %; accuracy per kind within 0.5 points, bar 1",
    )
    assert [figure for _, figure, _ in lines[1:]] == [
        "99.50%",
        "int8 4.00%",
        "1.0e-05 mean, 2.0e-04 at most",
        "**missed**",
    ]
