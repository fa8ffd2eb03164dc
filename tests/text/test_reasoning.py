"""Thinking told from the answer behind it, however the prompt and the model open and close it."""

from __future__ import annotations

from pathlib import Path

import pytest
import vocabularies
from hypothesis import given
from hypothesis import strategies as st

from tandem.server.text.events import CallBegins, Content, Reasoning
from tandem.server.text.reasoning import Thinking, stage_of
from tandem.server.text.text import Text

CHATML = """\
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- if opens %}{{ '<think>\\n' }}{% endif %}{% endif %}"""
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
USER = [{"role": "user", "content": "Say <think> twice"}]


def split(text: str, thinks: bool, pieces: list[str] | None = None) -> tuple[str, str]:
    thinking = Thinking("thinks" if thinks else "may think")
    parts = [thinking.push(piece) for piece in pieces or [text]] + [thinking.rest()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "thinks", "thought", "answer"),
    [
        ("<think>\nWhy?\n</think>\n\nSo.", False, "Why?", "So."),
        ("\n<think>Why?</think>So. ", False, "Why?", "So. "),
        ("Why?\n\nOr not?\n</think>\n\nSo.", True, "Why?\n\nOr not?", "So."),  # the prompt has opened it
        ("<think>\nWhy?\n</think>So.", True, "Why?", "So."),  # and the model again
        ("<think>\n\n</think>\n\nSo.", False, "", "So."),
        (" So. <think>x</think>", False, "", " So. <think>x</think>"),  # an answer that has begun does not think
        ("So </think> it is", False, "", "So </think> it is"),
        ("<think>a</think> b <think>c</think>", False, "a", "b <think>c</think>"),
        ("<think>cut off ", False, "cut off", ""),
        ("cut off </thi", True, "cut off </thi", ""),
        ("<thin", False, "", "<thin"),
        ("<thin", True, "<thin", ""),
        ("<think> ", False, "", ""),
        ("", True, "", ""),
        ("  ", False, "", "  "),
    ],
)
def test_thinking_and_answer(text: str, thinks: bool, thought: str, answer: str) -> None:
    assert split(text, thinks) == (thought, answer)
    assert split(text, thinks, list(text)) == (thought, answer)
    for at in range(1, len(text)):
        assert split(text, thinks, [text[:at], text[at:]]) == (thought, answer), at


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<", "think", ">", " ", "\n", "a"]), max_size=10), st.booleans()
)
def test_any_text_is_told_apart_the_same_in_pieces(parts: list[str], thinks: bool) -> None:
    text = "".join(parts)
    assert split(text, thinks) == split(text, thinks, [*parts, ""]) == split(text, thinks, [*text, ""])


def test_what_a_prompt_says() -> None:
    assert stage_of("assistant\n<think>\n", False) == "thinks"
    assert stage_of("assistant\n<think>\n\n</think>\n\n", True) == "answers"
    assert stage_of("user\nSay <think> twice\nassistant\n", False) == "may think"


@pytest.mark.parametrize(
    ("parser", "kwargs", "stage"),
    [
        ("qwen3", {}, "may think"),
        ("qwen3", {"opens": True}, "thinks"),
        ("qwen3", {"enable_thinking": False}, "answers"),
        ("deepseek_r1", {}, "thinks"),
        ("deepseek_r1", {"enable_thinking": False}, "answers"),
        (None, {"opens": True}, "answers"),
    ],
)
def test_whether_an_answer_begins_with_thinking(tmp_path: Path, parser: str | None, kwargs: dict, stage: str) -> None:
    text = Text.load(vocabularies.qwen(tmp_path, chat_template=CHATML), None, None, parser)
    assert text.stage(text.render(USER, kwargs=kwargs)) == stage


def test_an_answer_that_is_continued(tmp_path: Path) -> None:
    text = Text.load(vocabularies.qwen(tmp_path, chat_template=CHATML), None, None, "qwen3")
    assert text.stage([], "<think>I wonder") == "thinks"
    assert text.stage([], "<think>I know</think>So") == text.stage([], "So") == "answers"


def test_calls_are_looked_for_behind_the_thinking(tmp_path: Path) -> None:
    text = Text.load(vocabularies.qwen(tmp_path, chat_template=CHATML + "<tool_call>{{ tools }}"), None, None, "qwen3")
    reader = text.reader(calls=True, stage="may think")
    assert reader is not None
    events = reader.push(f"<think>I could write {CALL}.</think>\n\nSo:\n{CALL}") + reader.finish("ended")
    assert events[0] == Reasoning(f"I could write {CALL}.")
    assert events[1:3] == [Content("So:"), CallBegins("f")] and reader.calls == 1


def test_tags_are_seen_though_they_are_special_tokens(tmp_path: Path) -> None:
    """Qwen's are no special tokens; other models' are, and would be skipped with these."""
    path = vocabularies.qwen(tmp_path, chat_template=CHATML, extra_special_tokens=["<think>", "</think>"])
    ids = Text.load(path).encode("<think>a</think>b<|im_end|>", add_special_tokens=False)
    for parser, shown in (("qwen3", "<think>a</think>b"), (None, "ab")):
        text = Text.load(path, None, None, parser)
        assert text.detokenizer(shows_markers=True).push(ids, True).text == shown
        assert text.detokenizer().push(ids, True).text == "ab"
