"""Answers under a grammar: on the runner that waits and on the one that runs ahead, alone and beside plain rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from checkpoints import EOS_ID, write_checkpoint
from hubs import Answer, assert_nothing_is_held, collect, generate, make_hub, prompt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec
from tandem.server.engine.request import Output, Request
from tandem.server.text import grammar as grammars
from tandem.server.text.text import Text

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "minimum": -99, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["ok", "n", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("guides") / "policy", "llama")


@pytest.fixture(scope="module")
def text(checkpoint: Path) -> Text:
    return Text.load(checkpoint)


@pytest.fixture(scope="module", params=[False, True], ids=["waiting", "ahead"])
def hub(request: pytest.FixtureRequest, checkpoint: Path) -> Hub:
    return make_hub(checkpoint, run_ahead=request.param, max_num_seqs=12)


def compact(schema: dict[str, Any]) -> str:
    """Without white space between tokens, so that an answer of random weights ends within the tokens it has."""
    return grammars.of_schema(schema | {"x-guidance": {"whitespace_flexible": False}})


def follow(number: int, grammar: str, seed: int = 0, **sampling: Any) -> Request:
    given: dict[str, Any] = {"max_tokens": 200, "temperature": 2.0, "seed": seed, "grammar": grammar}
    return generate(number, "policy", prompt(9, seed=number), **(given | sampling))


def ask(hub: Hub, *requests: Request) -> list[dict[int, Answer]]:
    outputs = hub.run(requests)
    assert_nothing_is_held(hub)
    return [collect(outputs[request.id]) for request in requests]


def test_an_answer_is_what_the_schema_asks_for(hub: Hub, text: Text) -> None:
    requests = [follow(number, compact(SCHEMA), seed=number) for number in range(8)]
    found: set[str] = set()
    for (answer,) in (choices.values() for choices in ask(hub, *requests)):
        assert answer.error is None
        assert (answer.finish, answer.stop_id, answer.token_ids[-1]) == ("stop", EOS_ID, EOS_ID)
        found.add(text.decode(answer.token_ids))
        jsonschema.validate(json.loads(text.decode(answer.token_ids)), SCHEMA)
    assert len(found) > 1


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    scalars = st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": 0, "maximum": 120},
            {"enum": ["a", 1, None, [True]]},
            {"type": "string", "maxLength": 3},
            {"type": "string", "pattern": "^[a-f]{2,4}$"},
            {"const": {"k": "naïve 😀"}},
            {"anyOf": [{"type": "boolean"}, {"type": "string", "enum": ["x", "y"]}]},
        ]
    )

    def wider(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        names = st.sampled_from(["a", "b", "long name", "é"])
        objects = st.dictionaries(names, inner, max_size=3).flatmap(
            lambda properties: st.builds(
                lambda required: {
                    "type": "object",
                    "properties": properties,
                    "required": required,
                    "additionalProperties": False,
                },
                st.lists(st.sampled_from(sorted(properties)), unique=True) if properties else st.just([]),
            )
        )
        arrays = st.builds(
            lambda items, least: {"type": "array", "items": items, "minItems": least, "maxItems": least + 1},
            inner,
            st.integers(0, 1),
        )
        return objects | arrays

    return st.recursive(scalars, wider, max_leaves=4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_any_answer_at_any_temperature_validates(hub: Hub, text: Text, schema: dict[str, Any], seed: int) -> None:
    ((answer,),) = (choices.values() for choices in ask(hub, follow(1, compact(schema), seed, max_tokens=480)))
    assert answer.error is None and answer.finish == "stop", answer
    jsonschema.validate(json.loads(text.decode(answer.token_ids)), schema)


def mixed(seed: int) -> list[Request]:
    """Plain rows, rows under several grammars, with every parameter that a grammar meets, and choices that fork."""
    draw = random.Random(seed)
    makers = [
        grammars.of_schema(SCHEMA),
        grammars.of_regex("[a-d]{3,20}"),
        grammars.of_choice(["yes", "no", "perhaps not"]),
        grammars.json_object(),
    ]
    requests: list[Request] = []
    for number in range(18):
        sampling: dict[str, Any] = {"temperature": draw.choice([0.0, 0.7, 2.0]), "max_tokens": draw.choice([5, 20, 40])}
        sampling |= draw.choice([{}, {}, {"top_p": 0.8}, {"repetition_penalty": 1.3}, {"logit_bias": ((5, 2.0),)}])
        sampling |= draw.choice([{}, {"logprobs": 2}, {"logprobs": 1, "logprobs_mode": "processed"}])
        sampling["grammar"] = draw.choice([*makers, "", "", ""])
        n = draw.choice([1, 1, 3])
        requests.append(generate(number, "policy", prompt(5 + number % 7, seed=number), n=n, seed=number, **sampling))
    return requests


def waves(hub: Hub, requests: list[Request]) -> list[dict[int, Answer]]:
    outputs: dict[int, list[Output]] = {request.id: [] for request in requests}
    waiting, steps = list(requests), 0
    while waiting or hub.has_work:
        if waiting and steps % 3 == 0:
            for request in [waiting.pop(0) for _ in range(min(4, len(waiting)))]:
                outputs[request.id] += hub.submit(request)
        for output in hub.step():
            outputs[output.request_id].append(output)
        steps += 1
    assert_nothing_is_held(hub)
    return [collect(outputs[request.id]) for request in requests]


def told(answers: list[dict[int, Answer]]) -> list[Any]:
    return [
        {choice: (one.token_ids, one.finish, one.logprobs.ranks, one.error) for choice, one in choices.items()}
        for choices in answers
    ]


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> list[Any]:
    hub = make_hub(checkpoint, run_ahead=False)
    return told([ask(hub, request)[0] for request in mixed(seed=5)])


@pytest.mark.parametrize("pages", [None, 8], ids=["roomy", "preempting"])
@pytest.mark.parametrize("ahead", [False, True], ids=["waiting", "ahead"])
def test_answers_are_the_same_alone_and_in_any_company(
    checkpoint: Path, alone: list[Any], ahead: bool, pages: int | None
) -> None:
    hub = make_hub(checkpoint, pages=pages, run_ahead=ahead, max_num_seqs=6)
    assert told(waves(hub, mixed(seed=5))) == alone
    assert (hub.engines[0].stats.counts.preemptions > 0) == (pages is not None)


def test_plain_rows_go_on_while_one_with_a_grammar_sits_out(checkpoint: Path) -> None:
    """Its row is there in every second step, and the others' stay as they are."""
    hub = make_hub(checkpoint, run_ahead=True, max_num_seqs=8)
    plans: list[tuple[int, int, bool]] = []
    launch = hub.engines[0].runner.launch

    def watch(plan: Any) -> Any:
        plans.append((plan.decodes, plan.synchronous, plan.steady))
        return launch(plan)

    hub.engines[0].runner.launch = watch  # pyright: ignore[reportAttributeAccessIssue]
    plain = [generate(number, "policy", prompt(9, seed=number), max_tokens=60, ignore_eos=True) for number in range(5)]
    ask(hub, *plain, follow(9, grammars.of_regex("[ab]{20}"), max_tokens=20))
    both = [plan for plan in plans if plan[1]]
    assert len(both) == 19 and {plan[0] for plan in both} == {6}
    assert sum(steady for _, _, steady in plans) >= len(plans) - 4


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"allowed_ids": (3, 4)}, "the grammar, allowed_token_ids"),
        ({"min_tokens": 30}, "min_tokens"),
        ({"bad_words": tuple((token,) for token in range(320) if token != EOS_ID)}, "bad_words"),
        ({"grammar": grammars.of_regex("(a{1000}){1000}")}, "too many expressions"),
        ({"grammar": "start: ("}, "the grammar cannot be used"),
        ({"ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_leaves_no_token_ends_its_own_request(hub: Hub, sampling: dict[str, Any], words: str) -> None:
    wrong = follow(1, grammars.of_choice(["yes", "no"]))
    sound = follow(2, grammars.of_choice(["yes", "no"]))
    wrong = generate(1, "policy", wrong.token_ids, max_tokens=40, **({"grammar": wrong.sampling.grammar} | sampling))  # pyright: ignore
    plain = generate(3, "policy", prompt(9), max_tokens=20, ignore_eos=True)
    failed, answered, other = ask(hub, wrong, sound, plain)
    error = failed[0].error
    assert error is not None and error.kind == "invalid" and words in error.message, error
    assert answered[0].finish == "stop" and other[0].finish == "length"


def test_ids_of_the_user_narrow_what_the_grammar_allows(hub: Hub, text: Text) -> None:
    only = (*text.encode("ac", add_special_tokens=False), EOS_ID)
    (answer,) = ask(hub, follow(1, grammars.of_regex("[a-d]{6}"), allowed_ids=only, temperature=1.0))
    written = text.decode(answer[0].token_ids)
    assert len(written) == 6 and set(written) <= set("ac")


def test_a_matcher_that_fails_fails_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tandem.server.text.matching import LoadedMatcher

    advance = LoadedMatcher.advance
    for ahead in (False, True):
        hub = make_hub(checkpoint, run_ahead=ahead)
        steps: list[int] = []

        def breaks(self: LoadedMatcher, token: int, steps: list[int] = steps) -> None:
            steps.append(token)
            if len(steps) == 3:
                raise RuntimeError("a bug")
            advance(self, token)

        monkeypatch.setattr(LoadedMatcher, "advance", breaks)
        broken = ask(hub, follow(1, grammars.of_regex("a{20}")), generate(2, "policy", prompt(5), max_tokens=30))
        assert broken[0][0].error is not None and "RuntimeError" in broken[0][0].error.message
        assert broken[1][0].error is None
        monkeypatch.undo()


def test_every_end_of_the_model_ends_an_answer(tmp_path: Path) -> None:
    """config.json's and the tokenizer's; ids beyond the tokenizer's are never drawn."""
    path = write_checkpoint(tmp_path / "policy", "llama", vocab_size=352, eos_token_id=[2, 340])
    hub = make_hub(path)
    assert set(hub.engines[0].card.end_ids) == {2, 340}
    grammar = grammars.of_regex("(.|\\n)*")
    requests = [follow(number, grammar, seed=number, max_tokens=60) for number in range(32)]
    answers = [choices[0] for choices in ask(hub, *requests)]
    assert {answer.stop_id for answer in answers if answer.finish == "stop"} == {2, 340}
    drawn = {token for answer in answers for token in answer.token_ids}
    assert max(drawn - {340}) < 320 and not drawn & {0, 1, 3, 4, 5}  # nor special tokens, which are no text


def test_what_waits_for_its_grammar_can_be_aborted_and_expires(checkpoint: Path) -> None:
    hub = make_hub(checkpoint)
    grammar = grammars.of_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(600)}})
    first = follow(1, grammar)
    late = Request(2, "policy", [5, 6], first.sampling, n=2, deadline=1.0)
    third = Request(3, "policy", [5, 6], follow(3, grammars.of_choice(["yes"])).sampling, n=3)
    assert not [*hub.submit(first), *hub.submit(late), *hub.submit(third)]
    assert hub.has_work and not hub.engines[0].scheduler.has_work
    assert [(output.choice, output.finish) for output in hub.abort(3, 1)] == [(1, "abort")]
    assert [output.finish for output in hub.abort(1)] == ["abort"]
    (expired,) = hub.expire(2.0)
    assert expired.error is not None and expired.error.kind == "deadline" and expired.request_id == 2
    outputs: list[Output] = []
    while hub.has_work:
        outputs += hub.step()
    assert {output.choice for output in outputs if output.finish == "stop"} == {0, 2}
    assert {output.request_id for output in outputs} == {3}
    assert_nothing_is_held(hub)


def test_an_engine_without_grammars_says_so(checkpoint: Path) -> None:
    hub = Hub.load([ModelSpec("policy", str(checkpoint))], EngineOptions(kv_cache_memory_bytes=4 << 20))
    (output,) = hub.submit(follow(1, grammars.of_choice(["yes"])))
    assert output.error is not None and output.error.kind == "invalid" and "grammar" in output.error.message


def test_a_model_that_waits_for_a_grammar_holds_up_no_other(tmp_path: Path, checkpoint: Path) -> None:
    """While one model's only request has its grammar built, the other one's steps follow each other."""
    hub = make_hub(checkpoint, write_checkpoint(tmp_path / "other", "gpt2"))
    engine = hub.engines[0]
    grammar = grammars.of_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(600)}})
    hub.submit(follow(1, grammar, max_tokens=2))
    hub.submit(generate(2, "other", prompt(9), max_tokens=5, ignore_eos=True))
    waited: list[float] = []
    engine._building.wait = waited.append  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    while hub.engines[1].has_work:
        hub.step()
    assert not waited
    del engine._building.wait  # pyright: ignore[reportPrivateUsage]
    while hub.has_work:
        hub.step()


@pytest.mark.gpu
def test_answers_from_recorded_steps_follow_it(checkpoint: Path, text: Text) -> None:
    """On a GPU: masks are written between a replayed forward pass and the draw, beside rows that run ahead."""
    hub = make_hub(checkpoint, device="cuda", max_num_seqs=12)
    plain = [generate(number, "policy", prompt(9, seed=number), max_tokens=60, ignore_eos=True) for number in range(4)]
    guided = [follow(number, compact(SCHEMA), seed=number) for number in range(10, 16)]
    for (answer,) in (choices.values() for choices in ask(hub, *plain, *guided)[4:]):
        assert answer.finish == "stop", answer
        jsonschema.validate(json.loads(text.decode(answer.token_ids)), SCHEMA)
