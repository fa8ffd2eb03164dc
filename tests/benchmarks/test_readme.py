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


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks"):
        readme.written("# Tandem")
