"""Weights are replaced under load: every token tells its version, nothing stale is used, and what is wrong changes
nothing. Two checkpoints take turns that give themselves away: one draws only even tokens, the other only odd ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from hubs import answer, assert_nothing_is_held, collect, generate, make_hub, prompt, score
from safetensors.torch import load_file, save_file

from tandem.server.engine import standing
from tandem.server.engine.commands import (
    FinishUpdate,
    IpcTensor,
    LabelWeights,
    Pause,
    Refused,
    Resume,
    StartUpdate,
    Updated,
    UpdateWeights,
)
from tandem.server.engine.control import Standing
from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec
from tandem.server.engine.request import Group, Output, Request

LONG = 4096  # context: an answer may go on while many updates are staged, however fast its steps are
ahead = pytest.mark.parametrize("run_ahead", [False, True], ids=["waits", "ahead"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`policy` draws even tokens, `odd` odd ones; `reference` and `reward` are others."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name, seed, drawn in (("policy", 1, 0), ("odd", 2, 1)):
        write_checkpoint(directory / name, "llama-gqa", seed=seed, tokenizer=False, max_position_embeddings=LONG)
        file = directory / name / "model.safetensors"
        tensors = load_file(file)
        tensors["lm_head.weight"][1 - drawn :: 2] = 0  # some other logit is always above 0
        save_file(tensors, file)
    write_checkpoint(directory / "reference", "llama-gqa", seed=3, tokenizer=False)
    write_checkpoint(directory / "reward", "llama-reward", seed=4, tokenizer=False)
    return directory


def send(hub: Hub, path: Path, **how: object) -> Updated:
    return hub.execute(UpdateWeights("policy", "disk", str(path), **how))  # pyright: ignore[reportArgumentType]


def send_at_once(hub: Hub, path: Path) -> None:
    """No step is taken meanwhile."""
    task = hub.order(UpdateWeights("policy", "disk", str(path)))
    while not task.done:
        hub.turn()
    assert isinstance(task.result(), Updated)


def logprobs(number: int, model: str, token_ids: list[int]) -> Request:
    return Request(number, model, token_ids, None, frozenset({"prompt_logprobs"}), prompt_logprobs=0)


def check_parity(output: Output) -> None:
    """Even versions are the policy's own weights."""
    assert {token % 2 for token in output.token_ids} <= {output.weight_version % 2}


@ahead
def test_every_token_tells_the_version_that_drew_it(checkpoints: Path, run_ahead: bool) -> None:
    hub = make_hub(checkpoints / "policy", run_ahead=run_ahead)
    lengths = [2000] + [480] * 11
    requests = [
        generate(i, "policy", prompt(20, i), max_tokens=length, ignore_eos=True, logprobs=0)
        for i, length in enumerate(lengths)
    ]
    for request in requests[:10]:
        assert hub.submit(request) == []
    outputs: list[Output] = []
    for number in range(12):
        for _ in range(5):
            outputs += hub.step()
        if number < 2:
            assert hub.submit(requests[10 + number]) == []
        updated = send(hub, checkpoints / ("policy" if number % 2 else "odd"), label=f"step-{number}")
        assert updated.version == number + 1 and updated.committed
        assert hub.catalog.models[0].weight_version == number + 1
        assert hub.catalog.models[0].weight_label == f"step-{number}"
    while hub.has_work:
        outputs += hub.step()
    for request, length in zip(requests, lengths, strict=True):
        mine = [output for output in outputs if output.request_id == request.id]
        assert len(collect(mine)[0].token_ids) == length
        for output in mine:
            check_parity(output)
    assert len({output.weight_version for output in outputs if output.request_id == 0}) > 8
    counts = hub.engines[0].stats.counts
    assert counts.weight_updates == counts.weight_update_seconds.count == counts.weight_commit_seconds.count == 12
    assert_nothing_is_held(hub)


@ahead
def test_no_page_of_other_weights_is_used(checkpoints: Path, run_ahead: bool) -> None:
    hub = make_hub(checkpoints / "policy", run_ahead=run_ahead)
    fresh = make_hub(checkpoints / "odd", run_ahead=run_ahead)
    request = generate(1, "policy", prompt(70), max_tokens=40, ignore_eos=True)
    expected = answer(fresh, replace(request, model="odd"))[0].token_ids
    before = answer(hub, request)[0].token_ids
    running = replace(request, id=2, sampling=replace(request.sampling, max_tokens=120))
    assert hub.submit(running) == []
    for _ in range(30):
        hub.step()
    updated = send(hub, checkpoints / "odd")
    assert updated.kv_invalidated > 0
    again = collect(hub.run([replace(request, id=3)])[3])[0]  # what runs has pages of the old weights
    assert again.token_ids == expected and again.cached_tokens == 0
    assert answer(hub, replace(request, id=4))[0].cached_tokens == 64
    send(hub, checkpoints / "policy")
    last = answer(hub, replace(request, id=5))[0]
    assert last.token_ids == before and last.cached_tokens == 0


@ahead
def test_a_prompt_that_is_half_computed_begins_again(checkpoints: Path, run_ahead: bool) -> None:
    """Nothing of it was told, so nothing of it need be of two versions."""
    hub = make_hub(checkpoints / "policy", run_ahead=run_ahead, max_num_batched_tokens=32)
    fresh = make_hub(checkpoints / "odd", run_ahead=run_ahead, max_num_batched_tokens=32)
    asked = [logprobs(1, "policy", prompt(100)), generate(2, "policy", prompt(100, 1), max_tokens=5, ignore_eos=True)]
    for request in asked:
        assert hub.submit(request) == []
    outputs = [output for _ in range(2) for output in hub.step()]
    assert not outputs
    send_at_once(hub, checkpoints / "odd")
    while hub.has_work:
        outputs += hub.step()
    for request in asked:
        found = collect(output for output in outputs if output.request_id == request.id)[0]
        expected = answer(fresh, replace(request, model="odd"))[0]
        assert found.token_ids == expected.token_ids and found.prompt_logprobs == expected.prompt_logprobs
    assert {output.weight_version for output in outputs} == {1}


@ahead
def test_the_prompt_of_an_open_group_is_computed_again(checkpoints: Path, run_ahead: bool, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", "llama-reward", seed=5, tokenizer=False)
    hub, fresh = (make_hub(path, run_ahead=run_ahead) for path in (checkpoints / "reward", other))
    shared, member = prompt(50), prompt(12, 1)
    hub.open(Group(100, "reward", shared, longest=20))
    found: list[list[float] | None] = []
    for number in range(4):
        found.append(collect(hub.run([replace(score(number, "reward", member), group=100)])[number])[0].scores)
        if number == 1:
            hub.execute(UpdateWeights("reward", "disk", str(other)))
    expected = answer(fresh, score(9, "other", [*shared, *member]))[0].scores
    assert expected is not None
    assert found[0] == found[1] != found[2] == found[3] and found[3] == pytest.approx(expected, abs=1e-5)
    hub.close(100)
    assert_nothing_is_held(hub)


def test_other_models_do_not_change_by_a_bit(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "policy", checkpoints / "reference", checkpoints / "reward")
    asked = [logprobs(1, "reference", prompt(60)), score(2, "reward", prompt(60)), logprobs(3, "policy", prompt(60))]
    before = answer(hub, *asked)
    send(hub, checkpoints / "odd")
    after = answer(hub, *asked)
    assert after[0].prompt_logprobs == before[0].prompt_logprobs and after[1].scores == before[1].scores
    assert after[2].prompt_logprobs != before[2].prompt_logprobs
    assert [card.weight_version for card in hub.catalog.models] == [1, 0, 0]


@ahead
def test_requests_in_flight_end_where_that_is_asked_for(checkpoints: Path, run_ahead: bool) -> None:
    hub = make_hub(checkpoints / "policy", run_ahead=run_ahead)
    running = generate(1, "policy", prompt(20), max_tokens=800, ignore_eos=True)
    assert hub.submit(running) == []
    outputs = [output for _ in range(10) for output in hub.step()]
    send(hub, checkpoints / "odd", in_flight="abort")
    outputs += hub.step()
    found = collect(outputs)[0]
    assert found.finish == "abort" and len(found.token_ids) >= 8
    assert hub.submit(replace(running, id=2)) == []
    finished = [output for _ in range(5) for output in hub.step()]
    send(hub, checkpoints / "policy", in_flight="wait")
    finished += hub.step()
    assert {output.weight_version for output in finished} == {1} and finished[-1].finish == "length"
    assert {token % 2 for token in answer(hub, replace(running, id=3))[0].token_ids} == {0}


def test_a_paused_model_stays_paused_and_goes_on_with_the_new_weights(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "policy")
    assert hub.submit(generate(1, "policy", prompt(20), max_tokens=30, ignore_eos=True)) == []
    outputs = [output for _ in range(10) for output in hub.step()]
    hub.execute(Pause("policy"))
    send(hub, checkpoints / "odd")
    assert hub.catalog.models[0].paused and not hub.has_work
    with pytest.raises(Refused, match="paused with 1 requests"):
        send(hub, checkpoints / "odd", in_flight="wait")
    hub.execute(Resume())
    while hub.has_work:
        outputs += hub.step()
    for output in outputs:
        check_parity(output)
    assert [output.weight_version for output in outputs].count(1) >= 20


def test_what_is_wrong_is_named_and_the_old_weights_serve_on(checkpoints: Path, tmp_path: Path) -> None:
    hub = make_hub(checkpoints / "policy", checkpoints / "reward")
    asked = generate(1, "policy", prompt(20), max_tokens=10)
    before = answer(hub, asked)
    tensors = load_file(checkpoints / "odd" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, tmp_path / "infinite.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "norm.safetensors")
    cases = [
        (
            UpdateWeights("policy", "disk", str(tmp_path / "infinite.safetensors")),
            "layers.1.mlp.up_proj.weight has val",
        ),
        (UpdateWeights("policy", "disk", str(tmp_path / "norm.safetensors")), "20 missing"),
        (UpdateWeights("policy", "disk", str(checkpoints / "reward")), "not part of this architecture: score.weight"),
        (UpdateWeights("policy", "disk", str(tmp_path / "none")), "none does not exist"),
        (UpdateWeights("policy", "shm", "no-such-memory"), "no-such-memory cannot be read"),
        (UpdateWeights("policy", "cuda_ipc"), "cuda_ipc needs a GPU"),
        (UpdateWeights("policy", "distributed", group="g"), "no transfer group 'g'"),
        (UpdateWeights("other", "disk"), "no model 'other'"),
        (FinishUpdate("policy"), "nothing is staged"),
        (UpdateWeights("policy", "disk", str(checkpoints / "odd"), also=("reward",)), "reward shares none"),
    ]
    for command, message in cases:
        with pytest.raises(Refused, match=message):
            hub.execute(command)
    assert answer(hub, replace(asked, id=2)) == [replace(before[0], cached_tokens=16)]
    assert hub.catalog.models[0].weight_version == 0 and hub.standing.changes == ()
    assert send(hub, checkpoints / "odd").version == 1


def test_an_update_in_pieces_is_committed_as_one(checkpoints: Path, tmp_path: Path) -> None:
    hub = make_hub(checkpoints / "policy")
    tensors = load_file(checkpoints / "odd" / "model.safetensors")
    names = list(tensors)
    for part, some in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in some}, tmp_path / f"{part}.safetensors")
    hub.execute(StartUpdate("policy"))
    staged = send(hub, tmp_path / "0.safetensors")
    assert (staged.committed, staged.version, staged.tensors) == (False, 0, 5)
    with pytest.raises(Refused, match="16 missing"):
        hub.execute(FinishUpdate("policy"))
    hub.execute(StartUpdate("policy"))
    send(hub, tmp_path / "0.safetensors")
    send(hub, tmp_path / "1.safetensors", label="half")
    done = hub.execute(FinishUpdate("policy", label="whole"))
    assert (done.committed, done.version, done.label, done.tensors) == (True, 1, "whole", len(tensors))
    asked = generate(1, "policy", prompt(20), max_tokens=10)
    fresh = make_hub(checkpoints / "odd")
    assert answer(hub, asked)[0].token_ids == answer(fresh, replace(asked, model="odd"))[0].token_ids
    hub.execute(StartUpdate("policy"))
    with pytest.raises(Refused, match="does not exist"):
        send(hub, tmp_path / "2.safetensors")
    with pytest.raises(Refused, match="nothing is staged"):  # what was given is spoilt
        hub.execute(FinishUpdate("policy"))
    hub.execute(StartUpdate("policy"))
    send(hub, tmp_path / "0.safetensors")
    alone = send(hub, checkpoints / "odd", alone=True)  # whoever started is not waited for
    assert (alone.committed, alone.version) == (True, 2)
    with pytest.raises(Refused, match="nothing is staged"):
        hub.execute(FinishUpdate("policy"))
    assert hub.execute(LabelWeights("policy", "renamed")).version == 2
    assert hub.catalog.models[0].weight_label == "renamed"


def test_one_update_of_a_model_at_a_time(checkpoints: Path) -> None:
    hub = make_hub(checkpoints / "policy")
    first = hub.order(UpdateWeights("policy", "disk", str(checkpoints / "odd")))
    second = hub.order(UpdateWeights("policy", "disk", str(checkpoints / "odd")))
    hub.turn()
    with pytest.raises(Refused, match="another command is staging") as refused:
        second.result()
    assert refused.value.error.kind == "conflict"
    while not first.done:
        hub.turn()
    assert hub.catalog.models[0].weight_version == 1


def test_shared_weights_change_only_for_all_who_share_them(checkpoints: Path, tmp_path: Path) -> None:
    specs = [
        ModelSpec("policy", str(checkpoints / "policy")),
        ModelSpec("base", "", base_of="policy"),
        ModelSpec("reward", str(checkpoints / "reward")),
        ModelSpec("value", "", trunk="reward"),
    ]
    hub = Hub.load(specs, EngineOptions(kv_cache_memory_bytes=16 << 20))
    with pytest.raises(Refused, match="shared with base") as refused:
        send(hub, checkpoints / "odd")
    assert refused.value.error.kind == "conflict"
    assert [card.weight_version for card in hub.catalog.models] == [0] * 4
    updated = send(hub, checkpoints / "odd", also=("base",), label="both")
    assert updated.models == ("policy", "base")
    assert [(card.weight_version, card.weight_label) for card in hub.catalog.models[:2]] == [(1, "both")] * 2
    for number, name in enumerate(("policy", "base")):
        found = answer(hub, generate(number, name, prompt(20), max_tokens=10, ignore_eos=True))
        assert {token % 2 for token in found[0].token_ids} == {1}

    head = load_file(checkpoints / "reward" / "model.safetensors")["score.weight"]
    save_file({"score.weight": -head}, tmp_path / "head.safetensors")
    before = answer(hub, score(1, "reward", prompt(30)))[0].scores
    assert before is not None
    hub.execute(UpdateWeights("value", "disk", str(tmp_path / "head.safetensors"), partial=True))  # shared by nobody
    assert answer(hub, score(2, "reward", prompt(30)))[0].scores == before
    hub.execute(UpdateWeights("reward", "disk", str(tmp_path / "head.safetensors"), partial=True))
    assert answer(hub, score(3, "reward", prompt(30)))[0].scores == [-before[0]]
    with pytest.raises(Refused, match="shared with value"):
        hub.execute(UpdateWeights("reward", "disk", str(checkpoints / "reward")))
    hub.execute(UpdateWeights("reward", "disk", str(checkpoints / "reward"), also=("value",)))
    assert answer(hub, score(4, "reward", prompt(30)))[0].scores == before
    assert [card.weight_version for card in hub.catalog.models] == [1, 1, 2, 2]
    again = Hub.load(specs, EngineOptions(kv_cache_memory_bytes=16 << 20))
    standing.restore(again, hub.standing)
    assert again.standing == hub.standing and answer(again, score(5, "reward", prompt(30)))[0].scores == before


# After a restart


def restored(checkpoints: Path, state: Standing) -> Hub:
    hub = make_hub(checkpoints / "policy")
    standing.restore(hub, state)
    return hub


def test_a_restart_comes_to_the_last_version(checkpoints: Path, tmp_path: Path) -> None:
    hub = make_hub(checkpoints / "policy")
    asked = generate(1, "policy", prompt(20), max_tokens=20, ignore_eos=True)
    tensors = load_file(checkpoints / "odd" / "model.safetensors")
    save_file(tensors, tmp_path / "whole.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"] * 2}, tmp_path / "norm.safetensors")
    send(hub, checkpoints / "odd")
    send(hub, tmp_path / "norm.safetensors", partial=True)
    assert len(hub.standing.changes) == 2
    send(hub, tmp_path / "whole.safetensors")
    assert len(hub.standing.changes) == 1  # the last of them replaces the others
    send(hub, tmp_path / "norm.safetensors", partial=True, label="v4")
    again = restored(checkpoints, hub.standing)
    card = again.catalog.models[0]
    assert (card.weight_version, card.weight_label) == (4, "v4") and again.standing == hub.standing
    found = again.run([asked])[1]
    assert {output.weight_version for output in found} == {4}
    assert collect(found)[0] == answer(hub, asked)[0]
    save_file({"model.norm.weight": tensors["model.norm.weight"] * 3}, tmp_path / "norm.safetensors")
    with pytest.raises(standing.WeightsLost, match=r"weights lost: version 4 of model policy: .*have changed"):
        restored(checkpoints, hub.standing)


def test_what_cannot_be_read_again_is_lost(checkpoints: Path) -> None:
    from multiprocessing.shared_memory import SharedMemory

    hub = make_hub(checkpoints / "policy")
    whole = (checkpoints / "odd" / "model.safetensors").read_bytes()
    memory = SharedMemory(create=True, size=len(whole))
    memory.buf[:] = whole
    try:
        assert hub.execute(UpdateWeights("policy", "shm", memory.name)).bytes > 0
    finally:
        memory.close()
        memory.unlink()
    asked = generate(1, "policy", prompt(20), max_tokens=20, ignore_eos=True)
    assert {token % 2 for token in answer(hub, asked)[0].token_ids} == {1}
    with pytest.raises(standing.WeightsLost, match="weights lost: version 1 came by shared memory"):
        restored(checkpoints, hub.standing)
    send(hub, checkpoints / "policy")
    assert restored(checkpoints, hub.standing).catalog.models[0].weight_version == 2


def test_handles_of_another_gpu_are_checked() -> None:
    from tandem.model.errors import CheckpointError
    from tandem.server.engine.ipc import from_cuda_ipc

    storage = (0, b"handle", 48, 0, b"counter", 0, b"event", False)
    good = IpcTensor("w", "torch.bfloat16", (4, 6), storage)
    ((name, stored),) = from_cuda_ipc([good], found=1)
    assert (name, stored.shape, stored.dtype) == ("w", (4, 6), "BF16")
    wrong = [
        (replace(good, dtype="uint99"), "uint99"),
        (replace(good, storage=(3, *storage[1:])), "GPU 3; there are 1"),
        (replace(good, storage=(0, b"", *storage[2:])), "empty or longer"),
        (replace(good, offset=1), "exceeds its storage"),
        (replace(good, shape=(-4, 6)), "exceeds its storage"),
    ]
    for tensor, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            from_cuda_ipc([tensor], found=1)
    with pytest.raises(CheckpointError, match="needs a GPU"):
        from_cuda_ipc([good], found=0)


def test_torch_still_shares_storages_by_eight_values() -> None:
    """What `IpcTensor.storage` holds is private to torch; this fails where that changes."""
    assert callable(torch.UntypedStorage._new_shared_cuda) and callable(torch.UntypedStorage._share_cuda_)
