"""What the sequences of a group share, however prompt and completions are sent."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.server.api.errors import ApiError
from tandem.server.api.rlhf.prompts import Answer, Reader, Source, shared
from tandem.server.api.rlhf.translation import Translation
from tandem.server.text.text import Text

CHAT: list[dict[str, Any]] = [{"role": "user", "content": "Is it?"}]
CARD: Any = SimpleNamespace(name="reward", vocab_size=320, end_ids=(2,))


@pytest.fixture(scope="module")
def reader(text: Text) -> Reader:
    return Reader(CARD, text)


@pytest.mark.parametrize(
    ("prompt", "wholes", "cut"),
    [
        ([1, 2, 3], [[1, 2, 3, 4], [1, 2, 3, 5, 6]], 3),
        ([1, 2, 3], [[1, 2, 9, 4], [1, 2, 3, 5]], 2),  # tokens merge across the border
        ([1, 2, 3], [[1, 2, 3], [1, 2, 3, 4]], 2),  # every member keeps a token
        ([1, 2, 3], [[7, 8]], 0),
        ([1, 2, 3, 4], [[1, 2]], 1),
    ],
)
def test_sequences_are_cut_where_they_part(prompt: list[int], wholes: list[list[int]], cut: int) -> None:
    group = shared(prompt, wholes)
    assert group.prompt == prompt[:cut]
    assert [group.prompt + member for member in group.members] == wholes
    assert group.tokens == cut + sum(len(whole) - cut for whole in wholes)
    assert group.tokens_unshared == sum(map(len, wholes))


def test_texts_are_encoded_as_one(reader: Reader, text: Text) -> None:
    answers = [Answer("", text=" cat"), Answer("", text="t sat"), Answer("", text="!")]
    group = reader.group(Source("", text="The ca"), answers)
    assert [group.prompt + member for member in group.members] == [
        text.encode("The ca" + answer.text) for answer in answers if answer.text
    ]
    assert group.prompt[0] == 1 and 1 not in group.members[0]  # BOS once
    assert len(group.prompt) < len(text.encode("The ca"))  # "cat" is a token, and changes the prompt's last one
    again = reader.group(Source("", text="<s>The ca"), answers)
    assert again == group


def test_messages_share_all_but_the_answer(reader: Reader, text: Text) -> None:
    answers = [Answer("", text="It is."), Answer("", message={"role": "assistant", "content": "No."})]
    group = reader.group(Source("", messages=CHAT), answers)
    assert group.prompt == text.render(CHAT)
    contents = ["It is.", "No."]
    assert [group.prompt + member for member in group.members] == [
        text.render([*CHAT, {"role": "assistant", "content": content}], add_generation_prompt=False)
        for content in contents
    ]


def test_an_unfinished_answer_stays_open(reader: Reader) -> None:
    open_, closed = (
        reader.whole(Source("", messages=CHAT), Answer("", text="It is", ended=ended)) for ended in (False, True)
    )
    assert closed == [*open_, 2]


def test_a_template_that_changes_the_prompt_shares_less(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = "{{ bos_token }}{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    (tmp_path / "odd.jinja").write_text(source)
    odd = Text.load(checkpoints["policy"], str(tmp_path / "odd.jinja"))
    group = Reader(CARD, odd).group(Source("", messages=CHAT), [Answer("", text="Yes"), Answer("", text="No")])
    assert len(group.prompt) == 1  # BOS alone: the count of messages follows
    assert group.prompt + group.members[0] == odd.render(
        [*CHAT, {"role": "assistant", "content": "Yes"}], add_generation_prompt=False
    )


@pytest.mark.parametrize(
    ("source", "answer", "words"),
    [
        (Source("", ids=[5]), Answer("c", text="a"), "token ids, which has no one encoding"),
        (Source("", text="a"), Answer("c", message={"role": "assistant", "content": "a"}), "prompt must be messages"),
        (Source("", ids=[5]), Answer("c", ids=[320]), "token id 320"),
        (Source("groups[1]", ids=[-1]), Answer("c", ids=[5]), "groups[1].prompt_token_ids"),
    ],
)
def test_what_does_not_go_together(reader: Reader, source: Source, answer: Answer, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        reader.whole(source, answer)
    assert words in caught.value.message and caught.value.status == 400


@pytest.mark.parametrize(
    ("given", "may_be_both", "good"),
    [
        ({"prompt": "a"}, False, True),
        ({"prompt": "a", "prompt_token_ids": [5]}, False, False),
        ({"prompt": "a", "prompt_token_ids": [5]}, True, True),
        ({"messages": CHAT, "prompt": "a"}, True, False),
        ({}, True, False),
    ],
)
def test_a_prompt_is_one_thing(given: dict[str, Any], may_be_both: bool, good: bool) -> None:
    body = SimpleNamespace(**{"prompt": None, "prompt_token_ids": None, "messages": None, **given})
    if good:
        assert Source.of(body, "", may_be_both)
    else:
        with pytest.raises(ApiError, match="one of prompt"):
            Source.of(body, "", may_be_both)


def test_tokens_of_another_tokenizer_are_read_anew(text: Text, judge_text: Text, checkpoints: dict[str, Path]) -> None:
    judge: Any = SimpleNamespace(name="judge", vocab_size=2048)
    policy: Any = SimpleNamespace(name="policy", end_ids=(2,))
    translation = Translation(policy, text, Reader(judge, judge_text))
    answer = text.encode("It is.", False)
    chat = translation.group(Source("", messages=CHAT), [([*answer, 2], True), (answer, False)], "")
    whole = judge_text.render([*CHAT, {"role": "assistant", "content": "It is."}], add_generation_prompt=False)
    assert chat.prompt + chat.members[0] == whole
    assert chat.prompt + chat.members[1] == whole[:-1]  # cut off: the turn stays open
    plain = translation.group(Source("", ids=text.encode("Is it?")), [([*answer, 2], True)], "")
    assert plain.prompt + plain.members[0] == [*judge_text.encode("Is it?It is."), *judge_text.end_ids[:1]]
    with pytest.raises(ApiError, match="send the prompt as messages, too"):
        translation.source(Source("groups[0]", ids=text.render(CHAT)))
