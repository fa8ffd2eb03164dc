"""The held-out conversations that come with Tandem."""

from __future__ import annotations

import json

import data
import held_out


def test_the_bundled_file_is_what_the_script_writes() -> None:
    lines = [json.loads(line) for line in held_out.FILE.read_text("utf-8").splitlines()]
    assert json.loads(json.dumps(held_out.lines(30, 0))) == lines


def test_lines_hold_answers_best_first_and_no_react() -> None:
    lines = held_out.lines(2, 5)
    drawn = [
        exercise
        for kind in held_out.KINDS
        for language in ("en", "zh")
        for exercise in data.exercises(5, "held_out", kind, language, 2)
    ]
    assert len(lines) == 20 and "react" not in held_out.KINDS
    for exercise in drawn:
        (line,) = [one for one in lines if one["messages"] == exercise.messages]
        assert line["answers"][0] == exercise.answer and len(set(line["answers"])) == len(line["answers"])
        assert (len(line["answers"]) > 2) == (exercise.kind in held_out.RANKED)
