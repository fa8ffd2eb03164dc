"""Reward and value models in a hub: scores and values are the same alone, in a batch and in chunks, on both runners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from hubs import answer, collect, prompt, score
from reward_formats import FORMATS, apply_head, head_tensors, hidden_states, write, write_format

from tandem.model.errors import CheckpointError
from tandem.server.engine.hub import Hub
from tandem.server.engine.options import EngineOptions, ModelSpec, OptionsError
from tandem.server.engine.request import Group, Request, ScorePoolingMode

LENGTHS = (1, 2, 15, 16, 33, 60)
PAD, EOS, MARK = 0, 2, 7
POOLED: dict[ScorePoolingMode, Callable[[list[int]], int | None]] = {
    "last": lambda ids: len(ids) - 1,
    "last_non_pad": lambda ids: len(ids) - 3,
    "first_eos": lambda ids: ids.index(EOS),
    "before_first_pad": lambda ids: len(ids) - 3,
    "mean": lambda ids: None,
    "token_id": lambda ids: len(ids) - 4,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "judge"
    return write_format(folder, "score", pad_token_id=PAD, eos_token_id=EOS, reward_token_id=MARK)


def load(*specs: ModelSpec, **options: object) -> Hub:
    given = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8, "max_num_batched_tokens": 256} | options
    return Hub.load(specs, EngineOptions(**given))  # type: ignore[arg-type]


def value(number: int, model: str, ids: list[int], first: int | None = None) -> Request:
    return Request(number, model, ids, None, frozenset({"values"}), first_needed_row=first)


def close(found: list[float] | None, other: list[float] | None) -> bool:
    """Both ours."""
    assert found and other
    return all(abs(one - two) <= 1e-5 * max(1, abs(two)) for one, two in zip(found, other, strict=True))


def equals(found: list[float] | None, reference: torch.Tensor) -> bool:
    """What transformers computes, whose decoder rounds otherwise."""
    return found == pytest.approx(reference.tolist(), rel=1e-5, abs=3e-5)


def texts() -> list[list[int]]:
    """Of every length, with an end token, the marking token and padding behind them."""
    return [
        [EOS if token == EOS or place == length // 2 else token for place, token in enumerate(prompt(length))]
        + [MARK, 11, PAD, PAD]
        for length in LENGTHS
    ]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pooling", POOLED)
def test_scores_where_each_pooling_reads_them(path: Path, pooling: ScorePoolingMode, ahead: bool) -> None:
    spec = ModelSpec("judge", str(path), pooling=pooling)
    requests = [score(number, "judge", ids) for number, ids in enumerate(texts())]
    together = answer(load(spec, max_num_batched_tokens=11, run_ahead=ahead), *requests)
    hub = load(spec, run_ahead=ahead)
    assert hub.engines[0].card.pooling == pooling
    for request, found in zip(requests, together, strict=True):
        ids, (alone,) = request.token_ids, answer(hub, request)
        place, hidden = POOLED[pooling](ids), hidden_states("score", ids)
        rows = hidden.mean(0, keepdim=True) if place is None else hidden[place : place + 1]
        assert found.pooled_index == alone.pooled_index == place
        assert equals(found.scores, apply_head("score", rows))
        assert close(found.scores, alone.scores)


def test_pages_are_reused_only_before_the_row_that_counts(path: Path) -> None:
    ids = [*prompt(45), MARK]
    for pooling, reused in (("last", 32), ("token_id", 32), ("mean", 0)):
        hub = load(ModelSpec("judge", str(path), pooling=pooling))  # type: ignore[arg-type]
        first, again = answer(hub, score(1, "judge", ids))[0], answer(hub, score(2, "judge", ids))[0]
        assert (first.cached_tokens, again.cached_tokens) == (0, reused)
        assert close(again.scores, first.scores)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["TRL", "score"])
def test_values_of_every_row(name: str, ahead: bool, tmp_path: Path) -> None:
    """Of a critic, and of a reward model as one begins; each row's value is that of the text up to it."""
    path = write_format(tmp_path / "critic", name)
    spec = ModelSpec("critic", str(path), "value")
    requests = [
        value(number, "critic", prompt(length), first=length // 2 or None) for number, length in enumerate(LENGTHS)
    ]
    together = answer(load(spec, max_num_batched_tokens=11, run_ahead=ahead), *requests)
    hub = load(spec, run_ahead=ahead)
    for request, found in zip(requests, together, strict=True):
        first = request.first_needed_row or 0
        expected = apply_head(name, hidden_states(name, request.token_ids))[first:]
        (alone,) = answer(hub, request)
        assert found.scores is None and equals(found.values, expected) and close(alone.values, found.values)


def test_values_behind_a_cached_prefix(tmp_path: Path) -> None:
    hub = load(ModelSpec("critic", str(write_format(tmp_path / "critic", "TRL")), "value"))
    ids = prompt(45)
    whole = answer(hub, value(1, "critic", ids))[0]
    rest = answer(hub, value(2, "critic", ids, first=40))[0]
    assert (whole.cached_tokens, rest.cached_tokens) == (0, 32)
    assert close(rest.values, (whole.values or [])[40:])


def test_members_of_a_group_have_a_value_before_their_first_token(tmp_path: Path) -> None:
    hub = load(ModelSpec("critic", str(write_format(tmp_path / "critic", "TRL")), "value"))
    first, rest = prompt(20), prompt(9)
    hub.open(Group(1, "critic", first, longest=9))
    (outputs,) = hub.run([Request(2, "critic", rest, None, frozenset({"values"}), group=1)]).values()
    hub.close(1)
    expected = apply_head("TRL", hidden_states("TRL", [*first, *rest]))[19:]
    assert equals(collect(outputs)[0].values, expected) and len(expected) == 10


def test_cards_say_what_a_model_is(path: Path, tmp_path: Path) -> None:
    specs = [
        ModelSpec("judge", str(path)),
        ModelSpec("beaver", str(write_format(tmp_path / "b", "Beaver"))),
        ModelSpec("critic", str(path), "value"),
    ]
    judge, beaver, critic = (engine.card for engine in load(*specs).engines)
    assert (judge.role, judge.gives, judge.head, judge.pooling) == ("reward", "scores", "score", "token_id")
    assert (beaver.head, beaver.reward_mean, beaver.reward_std) == ("Beaver score_head", 1.5, 2.0)
    assert (critic.role, critic.gives, critic.labels, critic.pooling) == ("value", "values", 1, "")
    assert not judge.shares and not judge.fingerprint  # there is no tokenizer


def test_scores_are_raw_whatever_the_checkpoint_s_scale(tmp_path: Path) -> None:
    hub, ids = load(ModelSpec("beaver", str(write_format(tmp_path / "b", "Beaver")))), prompt(20)
    expected = apply_head("Beaver", hidden_states("Beaver", ids))[-1:]
    assert equals(answer(hub, score(1, "beaver", ids))[0].scores, expected)


def test_what_a_model_does_not_give_is_refused(path: Path) -> None:
    hub = load(ModelSpec("judge", str(path)), ModelSpec("critic", str(path), "value"))
    for request, message in (
        (score(1, "critic", [5]), "critic is a value model: it gives values, nothing else"),
        (value(2, "judge", [5]), "judge is a reward model: it gives scores, nothing else"),
        (Request(3, "critic", [5], None, frozenset({"values"}), prompt_logprobs=0), "nothing else"),
        (score(4, "judge", [5, 6]), "model judge: the text has no token 7, at which its score is read"),
        (score(5, "judge", [*[5] * 599, MARK]), "600 tokens, the context 512"),
        (score(6, "judge", [5, MARK, 999]), "token id 999"),
    ):
        (output,) = hub.submit(request)
        assert output.error is not None and output.error.kind == "invalid" and message in output.error.message


def test_a_score_or_value_that_is_no_number_is_an_error(path: Path) -> None:
    hub = load(
        ModelSpec("judge", str(path)),
        ModelSpec("mean", str(path), pooling="mean"),
        ModelSpec("critic", str(path), "value"),
    )
    for engine in hub.engines:
        next(engine.runner.model.head.buffers()).fill_(float("nan"))  # type: ignore[attr-defined]
    for request, what in (
        (score(1, "judge", [5, MARK]), "score"),
        (score(2, "mean", [5, 6]), "score"),
        (value(3, "critic", [5, 6]), "value"),
    ):
        error = answer(hub, request)[0].error
        assert error is not None and error.kind == "internal" and f"gave a {what} that is not finite" in error.message


# Weights of another model ---------------------------------------------------------------------------------------------


def test_a_value_head_on_the_reward_model_s_trunk(path: Path, tmp_path: Path) -> None:
    """Loaded from a file of its own, and begun as a copy; the decoder is there once, and so are its bytes."""
    (tmp_path / "head").mkdir()
    write(tmp_path / "head" / "value_head.safetensors", head_tensors(FORMATS["TRL"], seed=8))
    hub = load(
        ModelSpec("copy", "", trunk="judge"),
        ModelSpec("judge", str(path), max_model_len=200),
        ModelSpec("critic", str(tmp_path / "head"), trunk="judge"),
    )
    copied, judge, critic = hub.engines
    assert copied.runner.model.decoder is judge.runner.model.decoder is critic.runner.model.decoder  # type: ignore[attr-defined]
    assert (copied.card.role, copied.card.shares, critic.card.shares, judge.card.shares) == (
        "value",
        "judge",
        "judge",
        "",
    )
    assert copied.card.context == critic.card.context == 200 and critic.card.path == judge.card.path == str(path)
    assert max(copied.weight_bytes, critic.weight_bytes) < 300 < judge.weight_bytes
    assert copied.digest == judge.digest != critic.digest
    ids = prompt(30)
    hidden = hidden_states("score", ids)
    reward, own, other = answer(hub, score(1, "judge", [*ids, MARK]), value(2, "copy", ids), value(3, "critic", ids))
    assert equals(own.values, apply_head("score", hidden))
    assert equals(other.values, apply_head("TRL", hidden, seed=8))
    assert reward.scores is not None


def test_a_reference_that_is_the_policy_s_base(tmp_path: Path) -> None:
    policy = write_checkpoint(tmp_path / "policy", "llama-gqa", tokenizer=True)
    hub = load(ModelSpec("policy", str(policy)), ModelSpec("reference", "", base_of="policy"))
    own, shared = hub.engines
    assert own.runner.model.decoder is shared.runner.model.decoder and shared.weight_bytes == 0  # type: ignore[attr-defined]
    assert (shared.card.role, shared.card.gives, shared.card.shares) == ("reference", "text", "policy")
    assert shared.card.path == own.card.path and shared.card.fingerprint == own.card.fingerprint != ""
    requests = [
        Request(number, name, prompt(20), None, frozenset({"prompt_logprobs"}), prompt_logprobs=0)
        for number, name in enumerate(("policy", "reference"))
    ]
    one, other = answer(hub, *requests)
    assert one.prompt_logprobs == other.prompt_logprobs is not None
    refused = hub.submit(Request(5, "reference", [5], None, frozenset({"prompt_logprobs"}), adapter="a"))[0].error
    assert refused is not None and refused.kind == "not_found"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"trunk": "judged"}, "trunk=judged: no other model of that name is hosted here; there are: judge, shared"),
        ({"trunk": "m"}, "trunk=m: no other model of that name"),
        ({"trunk": "shared"}, "shared has no weights of its own; name judge"),
        ({"base_of": "judge"}, "a score head with 1 outputs, so its role cannot be reference"),
        ({"trunk": "judge", "role": "reward"}, "trunk=judge: its role is value, not reward"),
        ({"trunk": "judge", "dtype": "bfloat16"}, "dtype is bfloat16, but the weights are judge's: auto"),
        ({"trunk": "judge", "max_model_len": 300}, "max_model_len 300 exceeds judge's context of 200"),
        ({"trunk": "judge", "pooling": "last"}, "pooling=last is for roles embedding and reward, not value"),
    ],
)
def test_sharing_that_cannot_be(path: Path, spec: dict[str, Any], message: str) -> None:
    specs = [
        ModelSpec("judge", str(path), max_model_len=200),
        ModelSpec("shared", "", trunk="judge"),
        ModelSpec("m", "", **spec),
    ]
    with pytest.raises(OptionsError, match=f"model m: .*{message}"):
        load(*specs)


def test_heads_that_cannot_be_loaded_name_the_model(path: Path, tmp_path: Path) -> None:
    policy = write_checkpoint(tmp_path / "policy", "llama-gqa", tokenizer=False)
    for spec, message in (
        (ModelSpec("critic", str(policy), "value"), "model critic: .*no head that gives a score or a value"),
        (ModelSpec("critic", str(policy), trunk="judge"), "model critic: .*no head that gives a score or a value"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(ModelSpec("judge", str(path)), spec)
    with pytest.raises(OptionsError, match="null model has no weights to share"):
        load(ModelSpec("null", "null"), ModelSpec("critic", "", trunk="null"))
