"""What arrives in pieces is what decoding all ids at once gives, cut where a brute-force search finds the stop."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import vocabularies
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tandem.server.text.text import Text

slow = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def wordpiece(path: Path) -> Path:
    """A decoder without a table of its own."""
    words = ["[UNK]", "un", "##believ", "##able", "stop", "##s", "!", "the"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return vocabularies.save(path, tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast"})


def no_decoder(path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["a", "b", "stop", "?"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return vocabularies.save(path, tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast"})


def metaspace(path: Path) -> Path:
    """The Metaspace decoder, whose first token loses its ▁."""
    source = Tokenizer.from_file(str(vocabularies.llama(path) / "tokenizer.json"))
    source.decoder = decoders.Metaspace()
    return vocabularies.save(path, source, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})


KINDS = {**vocabularies.KINDS, "metaspace": metaspace, "wordpiece": wordpiece, "no decoder": no_decoder}


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def text(path: Path) -> Text:
    return Text.load(path)


@pytest.fixture(scope="module")
def reference(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def draw_ids(data: st.DataObject, text: Text, most: int = 24) -> list[int]:
    """Random ids, among them many bytes and halves of characters."""
    some = st.one_of(st.integers(0, 430), st.integers(0, 9))  # the vocabularies have 4 to 425 tokens
    samples = ["hello world", "你好 🙂", "stop STOP", " 🙂🙂", "  a", "é\ufffd"]
    whole = st.sampled_from(samples).map(lambda s: text.encode(s, add_special_tokens=False))
    parts = data.draw(
        st.lists(st.one_of(some.map(lambda i: [i]), whole, whole.map(lambda ids: ids[:-1])), max_size=most)
    )
    return [i for part in parts for i in part]


def draw_split(data: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in pairwise([0, *cuts, len(ids)])]


@slow
@given(data=st.data(), skip=st.booleans())
def test_any_split_gives_the_text_of_all_ids(text: Text, reference: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = draw_ids(data, text)
    expected = reference.decode(ids, skip_special_tokens=skip)
    detokenizer = text.detokenizer(skip_special_tokens=skip)
    pieces = [detokenizer.push(part).text for part in draw_split(data, ids)]
    for piece in pieces[:-1]:
        assert "\ufffd" not in piece or "\ufffd" in expected
    pieces.append(detokenizer.push([], finished=True).text)
    assert "".join(pieces) == expected == text.decode(ids, skip)


@slow
@given(data=st.data(), skip=st.booleans())
def test_nothing_comes_out_that_later_tokens_change(text: Text, data: st.DataObject, skip: bool) -> None:
    ids = draw_ids(data, text)
    detokenizer = text.detokenizer(skip_special_tokens=skip)
    so_far = ""
    for end, token_id in enumerate(ids, 1):
        so_far += detokenizer.push([token_id]).text
        for tail in ([], [0], ids[end : end + 1], ids[end:]):
            assert text.decode(ids[:end] + tail, skip).startswith(so_far)


def stable_texts(text: Text, ids: list[int]) -> list[str]:
    """After each token, and at the end: the text that is certain."""
    detokenizer = text.detokenizer()
    texts = [""]
    for token_id in ids:
        texts.append(texts[-1] + detokenizer.push([token_id]).text)
    return [*texts, texts[-1] + detokenizer.push([], finished=True).text]


def brute_force(text: Text, ids: list[int], stops: list[str], include: bool, least: int) -> tuple[str, str | None, int]:
    """Every occurrence of every stop in the whole text; the first to end wins, then the longest."""
    texts = stable_texts(text, ids)
    whole = texts[-1]
    found: list[tuple[int, int, str, int]] = []
    for stop in stops:
        for start in range(len(whole)):
            end = start + len(stop)
            if whole.startswith(stop, start):
                tokens = min(next(i for i, t in enumerate(texts) if len(t) >= end), len(ids))
                if tokens >= least:
                    found.append((end, start, stop, tokens))
    if not found:
        return whole, None, len(ids)
    end, start, stop, tokens = min(found)
    return whole[: end if include else start], stop, tokens


@slow
@given(data=st.data(), include=st.booleans(), least=st.integers(0, 6))
def test_stops_are_cut_where_brute_force_cuts(text: Text, data: st.DataObject, include: bool, least: int) -> None:
    ids = draw_ids(data, text)
    whole = text.decode(ids)
    inside = st.integers(0, max(len(whole) - 1, 0)).flatmap(
        lambda a: st.integers(1, 6).map(lambda n: whole[a : a + n] or "x")
    )
    stops = data.draw(st.lists(st.one_of(inside, st.text("ab stop", min_size=1, max_size=4)), min_size=1, max_size=3))
    expected, stop, tokens = brute_force(text, ids, stops, include, least)
    detokenizer = text.detokenizer(stop=stops, include_stop=include, min_tokens=least)
    pieces = [detokenizer.push(part) for part in draw_split(data, ids)]
    pieces.append(detokenizer.push([], finished=True))
    got = "".join(piece.text for piece in pieces)
    assert (got, pieces[-1].stop, pieces[-1].tokens) == (expected, stop, tokens)
    if not include and not least:
        assert not any(s in got for s in stops)


@slow
@given(data=st.data())
def test_offsets_point_at_each_token_s_text(text: Text, data: st.DataObject) -> None:
    ids = draw_ids(data, text)
    detokenizer = text.detokenizer(offsets=True)
    offsets = [offset for part in draw_split(data, ids) for offset in detokenizer.push(part).offsets]
    assert offsets == [len(t) for t in stable_texts(text, ids)[: len(ids)]]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(vocabularies.qwen(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Text:
    return Text.load(vocabularies.llama(tmp_path_factory.mktemp("llama")))


def test_text_that_may_become_a_stop_waits(qwen: Text) -> None:
    detokenizer = qwen.detokenizer(stop=["STOPPING"])
    ids = qwen.encode("go STOP")
    assert "".join(detokenizer.push([i]).text for i in ids) == "go "
    assert detokenizer.push(qwen.encode("S here")).text == "STOPS here"


def test_what_waits_comes_out_at_the_end(qwen: Text) -> None:
    detokenizer = qwen.detokenizer(stop=["STOPPING"])
    detokenizer.push(qwen.encode("go STOPP"))
    piece = detokenizer.push([], finished=True)
    assert (piece.text, piece.stop) == ("STOPP", None)


def test_after_a_stop_nothing_follows(qwen: Text) -> None:
    detokenizer = qwen.detokenizer(stop=["\n"])
    ids = qwen.encode("a\nb")
    piece = detokenizer.push(ids)
    assert (piece.text, piece.stop, piece.tokens) == ("a", "\n", 2)
    piece = detokenizer.push(ids, finished=True)
    assert (piece.text, piece.stop, piece.tokens) == ("", "\n", 2)


def test_the_first_match_to_end_wins_then_the_longest(qwen: Text) -> None:
    ids = qwen.encode("xabcdx")
    for stops, cut in ((["abcd", "bc"], "xa"), (["bc", "abc"], "x"), (["c", "bc", "d"], "xa")):
        detokenizer = qwen.detokenizer(stop=stops)
        assert detokenizer.push(ids).text == cut


def test_a_stop_id_counts_as_token_but_not_as_text(qwen: Text) -> None:
    ids = qwen.encode("hello<|im_end|>")
    for include, expected in ((False, "hello"), (True, "hello<|im_end|>")):
        detokenizer = qwen.detokenizer(include_stop=include, skip_special_tokens=False)
        piece = detokenizer.push(ids, finished=True, stop_id=ids[-1])
        assert (piece.text, piece.tokens) == (expected, len(ids))
    detokenizer = qwen.detokenizer(stop=["?"], skip_special_tokens=False)
    piece = detokenizer.push(ids, finished=True, stop_id=ids[-1])
    assert (piece.text, piece.tokens) == ("hello", len(ids))


def test_an_answer_keeps_the_space_after_its_prompt(llama: Text) -> None:
    ids = llama.encode("hello world", add_special_tokens=False)
    assert llama.detokenizer().push(ids).text == "hello world"
    assert llama.detokenizer([1]).push(ids).text == "hello world"  # BOS alone is no text
    assert llama.detokenizer(llama.encode("the")).push(ids).text == " hello world"


def test_a_character_the_prompt_leaves_open_is_completed(qwen: Text, llama: Text) -> None:
    for text in (qwen, llama):
        ids = text.encode("the 🦜", add_special_tokens=False)
        for last in (1, 2):
            detokenizer = text.detokenizer(ids[:-last])
            assert detokenizer.push(ids[-last:], finished=True).text == "🦜"


def test_characters_come_whole(qwen: Text) -> None:
    detokenizer = qwen.detokenizer()
    assert [piece for i in qwen.encode("🙂世") if (piece := detokenizer.push([i]).text)] == ["🙂", "世"]
    broken = qwen.detokenizer()
    assert broken.push(qwen.encode("ok🙂")[:-1]).text == "ok"
    assert broken.push([], finished=True).text == "\ufffd"


def test_added_tokens_outside_the_byte_alphabet(tmp_path: Path) -> None:
    path = vocabularies.gpt2(tmp_path)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_tokens(["<two words>", "你好", "née"])
    tokenizer.save(str(path / "tokenizer.json"))
    ids = tokenizer.encode("a<two words>你好née b").ids
    assert Text.load(path).decode(ids) == tokenizer.decode(ids)
