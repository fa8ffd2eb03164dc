"""README's figures are those of the records."""

from __future__ import annotations

import pytest

from tandem.benchmarks import readme


def test_readme_has_the_figures_of_the_records() -> None:
    text = readme.README.read_text()
    assert readme.written(text) == text, "make readme"


def test_a_missed_goal_is_said() -> None:
    row = {"name": "x / y", "figure": 0.5, "unit": "×", "least": 0.8, "most": None, "met": False, "beside": "x 1, y 2"}
    assert list(readme.peers({"rows": [row]})) == [("x / y", "0.50 ×", "x 1, y 2; goal ≥ 0.8, **missed**")]
    assert list(readme.peers({"rows": [row | {"met": True}]})) == [("x / y", "0.50 ×", "x 1, y 2; goal ≥ 0.8")]


def test_every_client_has_its_lines() -> None:
    """Of a record as `clients/matrix.py` prints it."""
    checks = {"version": "1.2", "passed": ["models", "chat"], "failed": {"abort": "CheckError: too late"}}
    found = {
        "openai": checks,
        "npm openai": checks | {"failed": {}},
        "langchain": {"react": 9, "tool_calls": 10, "count": 10},
        "lm-eval": {"version": "0.4", "largest_difference": 1.3e-5, "answers_that_differ": 0},
    }
    figures = [figure for _, figure, _ in readme.clients({"clients": found})]
    assert figures == ["2 of 3", "2 of 2", "9 of 10", "10 of 10", "1.3e-05"]


def test_a_run_of_ppo_has_its_line() -> None:
    run = {"seed": 2, "seconds": 594, "gain": 1.25, "kl": 2.31, "met": True}
    run |= {"reward_before": -0.5, "reward_after": 1.0, "accuracy_before": 0.85, "accuracy_after": 0.845}
    (line,) = readme.ppo({"runs": [run]})
    assert line[0].endswith("9.9 min, seed 2: held-out reward") and line[1] == "+1.25 SD"
    assert line[2].startswith("-0.50 → 1.00; KL 2.3 nats, accuracy 0.850 → 0.845; bar") and "missed" not in line[2]
    assert "missed" in next(readme.ppo({"runs": [run | {"met": False}]}))[2]


def test_every_trainer_has_its_line() -> None:
    """Of a record as `trainers/matrix.py` prints it."""
    report = {
        "version": "1.16.0",
        "figure": "2 steps",
        "routes": {"POST /classify": 2, "GET /health": 1},
        "seconds": 41.2,
    }
    lines = list(readme.trainers({"trainers": {"TRL": report}}))
    assert lines == [("TRL 1.16.0, unmodified", "2 steps", "3 calls of 2 routes, 41 s")]


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks"):
        readme.written("# Tandem")
