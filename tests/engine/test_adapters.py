"""Adapters of a hosted model: batched together, replaced and unloaded under load, and no page of another's weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_model, write_checkpoint
from hubs import answer, assert_nothing_is_held, collect, generate, make_hub, prompt
from lora import make_adapter, merge

from tandem.model.errors import CheckpointError
from tandem.server.engine.commands import LoadAdapter, Pause, Refused, Resume, UnloadAdapter, UpdateWeights
from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec, OptionsError
from tandem.server.engine.request import EngineError, Group, Output, Request
from tandem.server.engine.standing import WeightsLost, restore

BASE = "llama-gqa"
ROOM: dict[str, Any] = {"max_loras": 3, "max_lora_rank": 8, "max_model_len": 200}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, three adapters, and a checkpoint with each of them merged in."""
    path = tmp_path_factory.mktemp("adapters")
    write_checkpoint(path / BASE, BASE)
    for seed, name in enumerate(("a", "b", "c"), 1):
        make_adapter(path / name, make_model(BASE), seed=seed, r=2 * seed, size=0.5)
        merge(make_model(BASE), path / name).save_pretrained(path / f"merged-{name}")
    return path


def load(hub: Hub, name: str, path: Path, replace: bool = False) -> tuple[str, ...]:
    return hub.execute(LoadAdapter(BASE, name, str(path), replace)).names


def refused(hub: Hub, command: LoadAdapter | UnloadAdapter) -> EngineError:
    with pytest.raises(Refused) as found:
        hub.execute(command)
    return found.value.error


def with_adapters(directory: Path, *names: str, **options: Any) -> Hub:
    hub = make_hub(directory / BASE, **(ROOM | options))
    for name in names:
        load(hub, name, directory / name)
    return hub


def ask(number: int, adapter: str = "", length: int = 9, **given: Any) -> Request:
    return replace(generate(number, BASE, prompt(length), max_tokens=12, **given), adapter=adapter)


def alone(directory: Path, adapter: str, length: int = 9, **given: Any) -> list[int]:
    """What merged weights write."""
    path = directory / (f"merged-{adapter}" if adapter else BASE)
    request = replace(ask(1, length=length, **given), model=path.name)
    return answer(make_hub(path, enable_prefix_caching=False), request)[0].token_ids


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "ahead"])
def test_base_and_three_adapters_in_one_batch(directory: Path, ahead: bool) -> None:
    """The tokens of merged weights, by the adapter's name or both names, also once all decodes are recorded."""
    hub = with_adapters(directory, "a", "b", "c", run_ahead=ahead)
    names = ["", "a", "b", "c"] * 3
    requests = [ask(number, name, length=9 + number) for number, name in enumerate(names)]
    requests[1] = replace(requests[1], model="a", adapter="")
    for number, found in enumerate(answer(hub, *requests)):
        assert found.token_ids == alone(directory, names[number], length=9 + number), names[number]
    while hub.idle():
        pass
    assert answer(hub, requests[5])[0].token_ids == alone(directory, "a", length=14)


def test_choices_and_preemptions_keep_their_adapter(directory: Path) -> None:
    small = make_hub(directory / BASE, pages=14, **(ROOM | {"max_num_seqs": 6}))
    roomy = make_hub(directory / BASE, **ROOM)
    given: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 3}
    requests = [ask(number, name, length=40, **given) for number, name in enumerate(["a", "", "b"])]
    found: list[list[list[int]]] = []
    for hub in (small, roomy):
        for name in ("a", "b"):
            load(hub, name, directory / name)
        outputs = hub.run(requests)
        found.append([[choice.token_ids for choice in collect(outputs[r.id]).values()] for r in requests])
        assert_nothing_is_held(hub)
    assert found[0] == found[1] and small.engines[0].stats.counts.preemptions > 0


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "ahead"])
def test_a_group_keeps_to_its_adapter(directory: Path, ahead: bool) -> None:
    """Another one in its place has the prompt computed again; one that is unloaded stays until the group is closed."""
    hub = with_adapters(directory, "a", run_ahead=ahead, max_loras=1)
    ids, rest = prompt(20), prompt(6)
    hub.open(Group(99, BASE, ids, 6, adapter="a"))
    member = Request(1, BASE, rest, None, frozenset({"prompt_logprobs"}), prompt_logprobs=0, group=99)

    def assert_rated_by(adapter: str, number: int) -> None:
        found = collect(hub.run([replace(member, id=number)])[number])[0].prompt_logprobs
        merged = directory / f"merged-{adapter}"
        whole = replace(member, model=merged.name, token_ids=ids + rest, first_needed_row=19, group=0)
        expected = answer(make_hub(merged), whole)[0].prompt_logprobs
        assert found and expected and found.values == pytest.approx(expected.values, abs=1e-4)

    assert_rated_by("a", 1)
    load(hub, "a", directory / "c", replace=True)
    assert_rated_by("c", 2)
    hub.execute(UnloadAdapter(BASE, "a"))
    assert_rated_by("c", 3)
    assert hub.engines[0].stats.counts.computed_tokens == 20 + 6 + 20 + 6 + 6
    assert refused(hub, LoadAdapter(BASE, "b", str(directory / "b"))).kind == "overloaded"
    hub.close(99)
    load(hub, "b", directory / "b")
    assert_nothing_is_held(hub)


def cached(hub: Hub, request: Request) -> tuple[int, list[int]]:
    (found,) = answer(hub, request)
    assert found.cached_tokens is not None
    return found.cached_tokens, found.token_ids


def test_pages_are_an_adapters_and_a_loads_own(directory: Path) -> None:
    hub = with_adapters(directory, "a", "b")
    for number, name in enumerate(("", "a", "b")):
        assert cached(hub, ask(number, name, length=50)) == (0, alone(directory, name, length=50))
    for number, name in enumerate(("", "a", "b"), 3):
        assert cached(hub, ask(number, name, length=50)) == (48, alone(directory, name, length=50))
    assert load(hub, "a", directory / "c", replace=True) == ("a", "b")
    assert cached(hub, ask(6, "a", length=50)) == (0, alone(directory, "c", length=50))
    assert cached(hub, ask(7, "b", length=50))[0] == cached(hub, ask(8, length=50))[0] == 48
    hub.execute(UnloadAdapter(BASE, "b"))
    load(hub, "b", directory / "a")
    assert cached(hub, ask(9, "b", length=50)) == (0, alone(directory, "a", length=50))


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "ahead"])
def test_replaced_while_requests_run_and_wait(directory: Path, ahead: bool) -> None:
    """A decode goes on with the new weights; what waits begins with them. What both computed is not published."""
    hub = with_adapters(directory, "a", run_ahead=ahead, max_num_seqs=1)
    running, waiting = ask(1, "a", length=40), ask(2, "a", length=60)
    outputs = {1: hub.submit(running), 2: hub.submit(waiting), 3: []}

    def step() -> None:
        for output in hub.step():
            outputs[output.request_id].append(output)

    for _ in range(6):
        step()
    hub.execute(Pause(BASE))
    load(hub, "a", directory / "b", replace=True)
    hub.execute(Resume(BASE))
    while hub.has_work:
        step()
    before, after = alone(directory, "a", length=40), alone(directory, "b", length=40)
    (first,), (second,) = (collect(outputs[number]).values() for number in (1, 2))
    same = next(place for place, (x, y) in enumerate(zip(first.token_ids, before, strict=True)) if x != y)
    assert 4 <= same < 12 and first.token_ids != after
    assert second.token_ids == alone(directory, "b", length=60) and second.cached_tokens == 0
    assert cached(hub, ask(3, "a", length=40)) == (0, after)


def test_unloaded_while_requests_run(directory: Path) -> None:
    """They go on to their end. New ones do not find it, and its room is free when the last has ended."""
    hub = with_adapters(directory, "a", "b", "c")
    outputs = hub.submit(ask(1, "a"))
    for _ in range(3):
        outputs += hub.step()
    assert hub.execute(UnloadAdapter(BASE, "a")).names == ("b", "c")
    (unknown,) = hub.submit(ask(2, "a"))
    assert unknown.error == EngineError("not_found", f"model {BASE} has no adapter 'a'; it has b, c", "model")
    full = refused(hub, LoadAdapter(BASE, "d", str(directory / "a")))
    assert full.kind == "overloaded" and "2 adapters and room for 3 (--max-loras); 1 more" in full.message
    while hub.has_work:
        outputs += hub.step()
    assert collect(outputs)[0].token_ids == alone(directory, "a")
    load(hub, "a", directory / "b")  # another one of that name
    assert answer(hub, ask(3, "a"))[0].token_ids == alone(directory, "b")


def test_what_cannot_be_loaded(directory: Path) -> None:
    hub = with_adapters(directory, "a", "b", "c")
    path = str(directory / "a")
    cases: list[tuple[LoadAdapter | UnloadAdapter, str, str]] = [
        (LoadAdapter(BASE, "a", path), "invalid", "has an adapter 'a' already; unload it first, or load it in place"),
        (LoadAdapter(BASE, "d", path), "invalid", "3 adapters and room for 3 (--max-loras); unload one first"),
        (
            LoadAdapter(BASE, "a", str(directory / BASE), True),
            "invalid",
            "is no LoRA adapter: it has no adapter_config",
        ),
        (LoadAdapter(BASE, BASE, path), "invalid", f"'{BASE}' is the name of something else here"),
        (LoadAdapter("poet", "d", path), "not_found", "no model 'poet'"),
        (UnloadAdapter(BASE, "d"), "not_found", "has no adapter 'd'; it has a, b, c"),
    ]
    for command, kind, message in cases:
        error = refused(hub, command)
        assert error.kind == kind and message in error.message
    assert "--enable-lora" in refused(make_hub(directory / BASE), LoadAdapter(BASE, "a", path)).message
    assert answer(hub, ask(1, "a"))[0].token_ids == alone(directory, "a")


def test_the_catalog_finds_adapters_like_models(directory: Path) -> None:
    hub = with_adapters(directory, "a", "b")
    catalog = hub.catalog
    assert [card.name for card in catalog.listed] == [BASE, "a", "b"]
    found, base = catalog.find("b"), catalog.find(BASE)
    assert found is not None and base is not None
    assert (found.name, found.parent, base.parent) == ("b", BASE, "")
    assert (found.path, found.context, found.adapters) == (base.path, base.context, ())
    assert [(card.name, card.rank) for card in base.adapters] == [("a", 2), ("b", 4)]


def hosted(directory: Path, modules: Sequence[tuple[str, str]], **options: Any) -> Hub:
    return make_hub(directory / BASE, lora_modules=tuple(modules), **(ROOM | options))


def test_adapters_from_the_start(directory: Path) -> None:
    hub = hosted(directory, [("poet", str(directory / "a"))])
    assert [card.name for card in hub.catalog.listed] == [BASE, "poet"]
    assert answer(hub, ask(1, "poet"))[0].token_ids == alone(directory, "a")
    cases: list[tuple[list[tuple[str, str]], dict[str, Any], str]] = [
        ([(BASE, str(directory / "a"))], {}, f"lora_modules: {BASE} is the name of a hosted model"),
        ([("a", str(directory / "a"))] * 2, {}, "lora_modules: .* has an adapter 'a' already"),
        ([("a", "")] * 4, {}, "max_loras is 3, but lora_modules names 4"),
        ([("b", str(directory / "b"))], {"max_lora_rank": 3}, "adapter b: .*rank 4; there is room for 3"),
    ]
    for modules, options, message in cases:
        with pytest.raises((OptionsError, CheckpointError), match=message):
            hosted(directory, modules, **options)
    write_checkpoint(directory / "judge", "llama-reward")
    with pytest.raises(OptionsError, match="max_loras is 3, but no hosted model is a policy"):
        make_hub(directory / "judge", **ROOM)
    with pytest.raises(OptionsError, match="max_lora_rank 0"):
        EngineOptions(max_lora_rank=0)


@pytest.mark.parametrize("ahead", [False, True], ids=["waits", "ahead"])
def test_an_adapter_that_is_the_models_own(directory: Path, ahead: bool) -> None:
    """Requests that name the model get it, those that run are computed again; the base itself never changes."""
    hub = with_adapters(directory, "c", run_ahead=ahead)
    engine = hub.engines[0]
    outputs = {number: hub.submit(ask(number, name, length=40)) for number, name in ((1, ""), (2, "c"))}

    def note(said: Iterable[Output]) -> None:
        for output in said:
            outputs.setdefault(output.request_id, []).append(output)

    for version, name in enumerate(("a", "b"), 1):
        for _ in range(4):
            note(hub.step())
        hub.execute(Pause(BASE))
        told = hub.execute(UpdateWeights(BASE, "lora", str(directory / name), label=name))
        hub.execute(Resume(BASE))
        assert (told.version, told.label, told.tensors, told.committed) == (version, name, 28, True)
        note(hub.submit(ask(10 + version, length=40)))
    while hub.has_work:
        note(hub.step())
    first, second, third, fourth = (collect(outputs[number])[0] for number in (1, 2, 11, 12))
    assert third.token_ids[:2] == alone(directory, "a", length=40)[:2] and third.cached_tokens == 0
    assert fourth.token_ids == alone(directory, "b", length=40) and fourth.cached_tokens == 0
    assert second.token_ids == alone(directory, "c", length=40)
    assert first.token_ids[:3] == alone(directory, "", length=40)[:3] and len(first.token_ids) == 12
    assert [card.name for card in engine.card.adapters] == ["c"]
    assert cached(hub, ask(3, length=40)) == (32, alone(directory, "b", length=40))
    hub.execute(UpdateWeights(BASE, "disk", str(directory / BASE)))
    assert cached(hub, ask(4, length=40)) == (0, alone(directory, "", length=40))


def test_a_restarted_engine_has_them_again(directory: Path, tmp_path: Path) -> None:
    """If their files are what they were; the model's own must be, others are missed by their requests alone."""
    shutil.copytree(directory / "a", tmp_path / "own")
    shutil.copytree(directory / "b", tmp_path / "poet")
    hub = hosted(directory, [("first", str(directory / "c"))])
    load(hub, "poet", tmp_path / "poet")
    hub.execute(UpdateWeights(BASE, "lora", str(tmp_path / "own")))
    again = hosted(directory, [("first", str(directory / "c"))])
    restore(again, hub.standing)
    assert again.catalog.models[0].adapters[1].name == "poet" and again.catalog.models[0].weight_version == 1
    for number, (name, path) in enumerate((("", "a"), ("poet", "b"), ("first", "c"))):
        assert answer(again, ask(number, name))[0].token_ids == alone(directory, path)
    make_adapter(tmp_path / "poet", make_model(BASE), seed=9)
    again = hosted(directory, [("first", str(directory / "c"))])
    restore(again, hub.standing)
    (missed,) = again.submit(ask(1, "poet"))
    assert missed.error is not None and "it has first" in missed.error.message
    make_adapter(tmp_path / "own", make_model(BASE), seed=9)
    with pytest.raises(WeightsLost, match=r"version 1 of model llama-gqa: the files of .*own have changed"):
        restore(hosted(directory, []), hub.standing)


def test_the_reference_is_the_base_of_an_adapted_policy(directory: Path) -> None:
    """One set of weights: its log-probabilities stay bit for bit, whatever adapter the policy has."""
    specs = [ModelSpec(BASE, str(directory / BASE)), ModelSpec("reference", "", base_of=BASE)]
    hub = Hub.load(specs, EngineOptions(kv_cache_memory_bytes=8 << 20, **ROOM))

    def logprobs(number: int, model: str) -> list[float]:
        request = Request(number, model, prompt(30), None, frozenset({"prompt_logprobs"}), prompt_logprobs=0)
        (found,) = answer(hub, request)
        assert found.prompt_logprobs is not None
        return found.prompt_logprobs.values

    before = [logprobs(number, model) for number, model in enumerate((BASE, "reference"))]
    assert before[0] == before[1]
    hub.execute(UpdateWeights(BASE, "lora", str(directory / "a")))
    load(hub, "poet", directory / "b")
    found = [logprobs(number, model) for number, model in enumerate((BASE, "reference", "poet"), 2)]
    assert found[1] == before[1] and len({tuple(one) for one in found}) == 3
    assert refused(hub, LoadAdapter("reference", "c", str(directory / "c"))).kind == "invalid"


def test_a_group_computes_with_its_adapter(directory: Path) -> None:
    """Members, of a group that was opened before the adapter was replaced and of one opened behind it."""
    hub, plain = with_adapters(directory, "a"), make_hub(directory / "merged-b")
    own: dict[str, Any] = {"want": frozenset({"prompt_logprobs"}), "prompt_logprobs": 0}
    hub.open(Group(100, "a", prompt(40), longest=9))
    answer_of = {number: prompt(7, seed=number) for number in (1, 2, 3)}
    hub.run([Request(1, "a", answer_of[1], group=100, **own)])
    load(hub, "a", directory / "b", replace=True)
    hub.open(Group(200, BASE, prompt(40), longest=9, adapter="a"))
    for number, group in ((2, 100), (3, 200)):
        (found,) = collect(hub.run([Request(number, "a", answer_of[number], group=group, **own)])[number]).values()
        whole = Request(number, "merged-b", [*prompt(40), *answer_of[number]], first_needed_row=39, **own)
        (expected,) = answer(plain, whole)
        assert found.prompt_logprobs is not None and expected.prompt_logprobs is not None
        assert found.prompt_logprobs.values == pytest.approx(expected.prompt_logprobs.values, abs=1e-4)
    for group in (100, 200):
        hub.close(group)
    assert_nothing_is_held(hub)
