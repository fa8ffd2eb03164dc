"""Outputs of the engine -> what a choice says: calls and thinking, however the tokens come, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import vocabularies

from tandem.server.api.choices import CallDelta, Choice, Delta
from tandem.server.engine.request import Finish, Logprobs, Output
from tandem.server.engine.stream import merge
from tandem.server.text.text import Text

ONE = '<tool_call>\n{"name": "f", "arguments": {"x": "ü"}}\n</tool_call>'
TWO = f'Both.\n{ONE}\n<tool_call>{{"name": "g", "arguments": {{}}}}</tool_call>'


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    path = vocabularies.qwen(tmp_path_factory.mktemp("qwen"), chat_template="<tool_call>{{ tools }}{{ messages }}")
    return Text.load(path, None, None, "qwen3")


def choice_of(text: Text, one_call: bool = False, stop: Sequence[str] = ()) -> Choice:
    made = text.detokenizer(stop=stop, shows_markers=True)
    return Choice(0, 0, made, (), reader=text.reader(True, "may think", one_call))


def push(choice: Choice, ids: list[int], size: int, finish: Finish = "stop", logprobs: bool = False) -> list[Delta]:
    """`size` tokens at a time, as they come to a reader that lags; the last output says how it ended."""
    deltas: list[Delta] = []
    for at in range(0, len(ids), size):
        some = ids[at : at + size]
        output = Output(1, 0, some, finish=finish if at + size >= len(ids) else None)
        if logprobs:
            output.logprobs = Logprobs([float(-i) for i in range(at, at + len(some))], [1] * len(some))
        ended = choice.push(output)
        deltas.append(choice.take())
        if ended:
            assert choice.finish_reason is not None
            break
    return deltas


def together(deltas: Sequence[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    """(thinking, content, calls) as a client adds chunks up."""
    calls: dict[int, CallDelta] = {}
    for call in [call for delta in deltas for call in delta.calls]:
        kept = calls.setdefault(call.index, CallDelta(call.index))
        kept.id, kept.name = kept.id or call.id, kept.name or call.name
        kept.arguments += call.arguments
    assert list(calls) == list(range(len(calls))) and all(call.id for call in calls.values())
    told = [(call.name or "", call.arguments) for call in calls.values()]
    return "".join(d.reasoning for d in deltas), "".join(d.text for d in deltas), told


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("logprobs", [False, True])
def test_calls_however_the_tokens_come(text: Text, size: int, logprobs: bool) -> None:
    ids = text.encode(f"<think>Two?</think>{TWO}", False)
    choice = choice_of(text)
    deltas = push(choice, ids, size, logprobs=logprobs)
    assert together(deltas) == ("Two?", "Both.", [("f", '{"x": "ü"}'), ("g", "{}")])
    assert choice.finish_reason == "tool_calls" and choice.tokens == len(ids)
    assert [token for delta in deltas for token in delta.token_ids] == ids
    scored = [value for delta in deltas if delta.logprobs for value in delta.logprobs.values]
    assert scored == ([float(-i) for i in range(len(ids))] if logprobs else [])


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("logprobs", [False, True])
def test_one_call_ends_at_the_very_token_that_completes_it(text: Text, size: int, logprobs: bool) -> None:
    ids = text.encode(TWO, False)
    until = next(n for n in range(len(ids)) if text.decode(ids[:n], False).count("}}") == 1)
    choice = choice_of(text, one_call=True)
    deltas = push(choice, ids, size, logprobs=logprobs)
    assert together(deltas) == ("", "Both.", [("f", '{"x": "ü"}')])
    assert choice.finish_reason == "tool_calls" and choice.tokens == until
    assert [token for delta in deltas for token in delta.token_ids] == ids[:until]
    scored = [value for delta in deltas if delta.logprobs for value in delta.logprobs.values]
    assert len(scored) == (until if logprobs else 0)


def test_whether_the_engine_must_be_told_of_the_end(text: Text) -> None:
    ids = text.encode(ONE, False)
    assert choice_of(text, one_call=True).push(Output(1, 0, ids))
    assert not choice_of(text, one_call=True).push(Output(1, 0, ids, finish="stop"))
    assert not choice_of(text).push(Output(1, 0, ids))


@pytest.mark.parametrize(
    ("said", "finish", "reason", "told"),
    [
        ("Hello.", "stop", "stop", ("", "Hello.", [])),
        (ONE, "length", "length", ("", "", [("f", '{"x": "ü"}')])),
        (ONE[:-15], "length", "length", ("", "", [("f", '{"x": "ü"')])),  # cut short: as far as it came
        (ONE[:20], "length", "length", ("", ONE[:20], [])),
        (ONE[:20], "abort", "length", ("", ONE[:20], [])),
        ("<think>Hm", "length", "length", ("Hm", "", [])),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_reasons_to_finish(text: Text, said: str, finish: Finish, reason: str, told: object, size: int) -> None:
    choice = choice_of(text)
    assert together(push(choice, text.encode(said, False), size, finish)) == told
    assert choice.finish_reason == reason


def test_a_stop_string_behind_a_call(text: Text) -> None:
    choice = choice_of(text, stop=["</tool_call>"])
    assert together(push(choice, text.encode(ONE, False), 3))[2] == [("f", '{"x": "ü"}')]
    assert (choice.finish_reason, choice.stop_reason) == ("tool_calls", "</tool_call>")


def test_a_broken_call_is_content(text: Text) -> None:
    broken = ONE.replace('"ü"', "yes")
    ids = text.encode(f"So: {broken} {ONE}", False)
    whole = choice_of(text)
    for i, token in enumerate(ids):  # nobody takes anything before the end, as in an answer that is not streamed
        whole.push(Output(1, 0, [token], finish="stop" if i == len(ids) - 1 else None))
    assert together([whole.take()]) == ("", f"So: {broken}", [("f", '{"x": "ü"}')])
    streamed = together(push(choice_of(text), ids, 1))
    assert streamed[1] == f"So: {broken}"  # nothing is lost, though its beginning was told as a call
    assert streamed[2][1:] == [("f", '{"x": "ü"}')] and streamed[2][0][1].startswith('{"x": yes')


def test_an_only_broken_call_stops_as_text_does(text: Text) -> None:
    choice = choice_of(text, one_call=True)
    push(choice, text.encode(ONE.replace('"ü"', "yes"), False), 1000)
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize("one_call", [False, True])
def test_every_token_is_told_with_the_weights_that_drew_it(text: Text, size: int, one_call: bool) -> None:
    """However many outputs were merged on the way, and where the answer is cut."""
    ids = text.encode(TWO, False)
    versions = [3 if at < 4 else 4 if at < 9 else 6 for at in range(len(ids))]
    choice = choice_of(text, one_call)
    assert choice.weight_spans() == [] and choice.shown_spans(False) == {}
    for at in range(0, len(ids), size):
        merged = Output(1, 0, [ids[at]], weight_version=versions[at])
        for token, version in zip(ids[at + 1 : at + size], versions[at + 1 : at + size], strict=True):
            merge(merged, Output(1, 0, [token], weight_version=version))
        if choice.push(merged):
            break
    told = [span["version"] for span in choice.weight_spans() for _ in range(span["start"], span["end"])]
    assert told == versions[: choice.tokens] and (choice.tokens < len(ids)) == one_call
    assert choice.shown_spans(False) == {"weight_spans": choice.weight_spans()} and len(choice.weight_spans()) == 3


def test_one_version_alone_is_not_told(text: Text) -> None:
    choice = choice_of(text)
    ids = text.encode("Yes.", False)
    for token in ids:
        choice.push(Output(1, 0, [token], weight_version=7))
    choice.push(Output(1, 0, finish="abort", weight_version=8))  # drew nothing
    assert choice.weight_spans() == [{"version": 7, "start": 0, "end": len(ids)}] and choice.shown_spans(False) == {}
