"""Heads of reward and value models in every format that tools write, against transformers' decoder and a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB, make_model, write_checkpoint
from paging import PagedRun
from reward_formats import FORMATS, D, apply_head, head_tensors, hidden_states, write, write_format
from safetensors.torch import load_file, save_file

from tandem.model.checkpoint import read_checkpoint
from tandem.model.config import HeadKind
from tandem.model.errors import CheckpointError
from tandem.model.load import load_model
from tandem.model.model import Model
from tandem.model.pooling import ScorePooling
from tandem.model.trunk import value_model

IDS = [(7 * place) % VOCAB for place in range(3, 40)]
SHOWN = {  # how each is shown, read for scores, and scaled by its checkpoint
    "score": ("score", "last", 0.0, 1.0),
    "score with bias": ("score", "last", 0.0, 1.0),
    "Qwen2.5-Math-RM": ("score", "last", 0.0, 1.0),
    "INF-ORM": ("score", "last", 0.0, 1.0),
    "TRL": ("TRL v_head", "last", 0.0, 1.0),
    "TRL, tied": ("TRL v_head", "last", 0.0, 1.0),
    "LLaMA-Factory": ("TRL v_head", "last", 0.0, 1.0),
    "LLaMA-Factory, .bin": ("TRL v_head", "last", 0.0, 1.0),
    "GRM": ("TRL v_head", "last", 0.0, 1.0),
    "DeepSpeed-Chat": ("v_head", "before_first_pad", 0.0, 1.0),
    "trlx": ("v_head", "last", 0.0, 1.0),
    "Starling": ("v_head", "before_first_pad", 0.0, 1.0),
    "OpenRLHF": ("OpenRLHF value_head", "last", 0.5, 2.0),
    "OpenRLHF critic": ("OpenRLHF score", "last", 0.0, 1.0),
    "UltraRM": ("regression_head", "last", 0.0, 1.0),
    "Eurus": ("regression_head", "last", 0.0, 1.0),
    "Beaver": ("Beaver score_head", "last", 1.5, 2.0),
    "OpenAssistant": ("OpenAssistant out_proj", "mean", 0.0, 1.0),
    "reward_head": ("reward_head", "last", 0.0, 1.0),
}


def load(path: Path, head: HeadKind | None = None, **options: Any) -> Model:
    return load_model(read_checkpoint(path, head=head), **options)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_computes_what_its_own_class_does(name: str, tmp_path: Path) -> None:
    path = write_format(tmp_path, name)
    expected = apply_head(name, hidden_states(name, IDS))
    for head in ("score", "value"):
        model = load(path, head)
        assert model.config.kind == head
        hidden = PagedRun(model, 1, 64).step({0: IDS})[0]
        found = model.values(hidden)
        assert found.shape == (len(IDS),) and found.dtype == torch.float32
        torch.testing.assert_close(found, apply_head(name, hidden), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=3e-5)  # the decoder's rounding
    score = model.config.score
    assert (score.format, score.pooling.mode, score.mean, score.std) == SHOWN[name]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("score", "score"),
        ("Starling", "score"),
        ("OpenRLHF", "score"),
        ("OpenRLHF critic", "value"),
        ("Beaver", "score"),
    ],
)
def test_what_a_head_is_for_unless_told(name: str, kind: HeadKind, tmp_path: Path) -> None:
    assert read_checkpoint(write_format(tmp_path, name)).config.kind == kind


@pytest.mark.parametrize("name", ["TRL", "TRL, tied", "LLaMA-Factory"])
def test_beside_a_language_model_s_head_the_role_must_be_said(name: str, tmp_path: Path) -> None:
    path = write_format(tmp_path, name)
    with pytest.raises(CheckpointError, match=r"v_head\.summary: say which to serve, role=policy, role=reward or"):
        read_checkpoint(path)
    policy = load(path, "lm")
    logits = policy.logits(PagedRun(policy, 1, 64).step({0: IDS})[0])
    with torch.inference_mode():
        torch.testing.assert_close(
            logits, make_model(FORMATS[name].variant)(torch.tensor([IDS])).logits[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("name", ["score", "Qwen2.5-Math-RM"])
def test_heads_are_float32_in_half_precision(name: str, tmp_path: Path) -> None:
    model = load(write_format(tmp_path, name), dtype="bfloat16")
    hidden = PagedRun(model, 1, 64).step({0: IDS})[0]
    assert hidden.dtype == torch.bfloat16
    torch.testing.assert_close(model.values(hidden), apply_head(name, hidden.float()), rtol=1e-5, atol=1e-5)


def edit(path: Path, **changes: torch.Tensor | None) -> Path:
    file = path / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    return path


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("score", {"score.weight": None}, r"no head that gives a score or a value: none of score\.weight, v_head\."),
        ("score", {"score.weight": torch.ones(2, D)}, r"wrong shape: score\.weight is \[2, 64\], must be \[1, 64\]"),
        ("score", {"v_head.weight": torch.ones(1, D)}, "several heads, score and v_head: name the one .*value_head_p"),
        ("TRL", {"v_head.summary.bias": None}, r"1 missing: v_head\.summary\.bias"),
        ("Qwen2.5-Math-RM", {"score.2.weight": torch.ones(1, 40)}, r"score\.2\.weight is \[1, 40\], must be \[1, 48\]"),
        ("Qwen2.5-Math-RM", {"score.2.weight": None, "score.3.weight": torch.ones(1, 48)}, r"matrices at \[0, 3\]"),
        ("OpenRLHF", {"value_head.weight": None, "score.weight": torch.ones(1, D)}, r"none of value_head\.weight is"),
        ("Beaver", {"normalizer.var": torch.zeros(1)}, "deviation 0.0: no numbers"),
        ("Beaver", {"normalizer.mean": torch.zeros(2)}, r"normalizer\.mean is \[2\], must be one number"),
    ],
)
def test_a_head_that_cannot_be_served_is_named(
    name: str, changes: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    path = edit(write_format(tmp_path, name), **changes)
    with pytest.raises(CheckpointError, match=message):
        load(path, "score")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("OpenAssistant", {"pooling": "max"}, 'pooling is "max"'),
        ("OpenRLHF", {"value_head_prefix": 3}, "value_head_prefix is 3"),
        ("OpenRLHF", {"std": 0}, "no numbers"),
        ("OpenRLHF", {"model_type": "internlm2"}, 'model_type is "internlm2"'),
        ("score", {"architectures": ["InternLM2ForRewardModel"]}, "InternLM2ForRewardModel.*supported: .*RewardModel"),
    ],
)
def test_fields_of_heads_that_are_refused(name: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(write_format(tmp_path, name, **fields))


def test_a_head_with_several_outputs_gives_no_values(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "qwen2-reward", tokenizer=False)
    assert load(path).scores(torch.ones(2, D)).shape == (2, 3)
    with pytest.raises(CheckpointError, match="score has 3 outputs, and a value is one"):
        load(path, "value")


# Where a score is read ------------------------------------------------------------------------------------------------

TEXT = [0, 0, 5, 2, 6, 9, 2, 7, 0, 0]


@pytest.mark.parametrize(
    ("pooling", "text", "place"),
    [
        (ScorePooling("last"), TEXT, 9),
        (ScorePooling("mean"), TEXT, None),
        (ScorePooling("last_non_pad", (0,)), TEXT, 7),
        (ScorePooling("last_non_pad", (0,)), [5, 6], 1),
        (ScorePooling("last_non_pad", (0,)), [0, 0], 0),
        (ScorePooling("first_eos", (2, 9)), TEXT, 3),
        (ScorePooling("first_eos", (8,)), TEXT, 9),
        (ScorePooling("before_first_pad", (0,)), TEXT, 7),
        (ScorePooling("before_first_pad", (0,)), [5, 6, 0, 7, 0], 1),
        (ScorePooling("before_first_pad", (0,)), [0, 5, 6], 2),
        (ScorePooling("before_first_pad", (0,)), [0, 0], 1),
        (ScorePooling("token_id", (2,)), TEXT, 6),
    ],
)
def test_positions(pooling: ScorePooling, text: list[int], place: int | None) -> None:
    assert pooling.position(text) == place


def test_a_text_without_the_token_has_no_position() -> None:
    with pytest.raises(LookupError, match="no token 8"):
        ScorePooling("token_id", (8,)).position(TEXT)


def test_the_pooling_that_is_asked_for_and_what_it_looks_for(tmp_path: Path) -> None:
    path = write_format(tmp_path, "score", pad_token_id=0, eos_token_id=[2, 5], reward_token_id=9)

    def pooling(*, fields: dict[str, Any] | None = None, wanted: Any = None) -> ScorePooling:
        config = json.loads((path / "config.json").read_text()) | (fields or {})
        (path / "config.json").write_text(json.dumps(config))
        return read_checkpoint(path, pooling=wanted).config.score.pooling

    assert pooling() == ScorePooling("token_id", (9,))
    assert pooling(wanted="first_eos") == ScorePooling("first_eos", (2, 5))
    assert pooling(wanted="before_first_pad") == ScorePooling("before_first_pad", (0,))
    assert pooling(fields={"reward_token_id": None}) == ScorePooling("last_non_pad", (0,))
    assert pooling(fields={"pad_token_id": -1}) == ScorePooling("last")
    for wanted, name in (("token_id", "reward_token_id"), ("last_non_pad", "pad_token_id")):
        with pytest.raises(CheckpointError, match=f"{name} is missing, but pooling={wanted}"):
            pooling(wanted=wanted)
    with pytest.raises(CheckpointError, match="pooling=cls is not for scores"):
        pooling(wanted="cls")
    with pytest.raises(CheckpointError, match="pooling=first_eos is not for embeddings"):
        read_checkpoint(write_checkpoint(tmp_path / "lm", "llama", tokenizer=False), head="embed", pooling="first_eos")


def test_transformers_reads_a_score_where_the_default_does(tmp_path: Path) -> None:
    reference = make_model("llama-reward", pad_token_id=0)
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    place = model.config.score.pooling.position([*IDS, 0, 0])
    assert place == len(IDS) - 1
    hidden = PagedRun(model, 1, 64).step({0: IDS})[0]
    with torch.inference_mode():
        expected = reference(torch.tensor([[*IDS, 0, 0]])).logits[0]
    torch.testing.assert_close(model.scores(hidden[place : place + 1])[0], expected, rtol=1e-4, atol=1e-4)


# On another model's decoder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a file", "a checkpoint", "none"])
def test_a_value_head_on_a_trunk(kind: str, tmp_path: Path) -> None:
    """The same tensors below; the head is what is read, not the trunk's."""
    trunk = load(write_format(tmp_path / "trunk", "score"))
    path, name, seed = None, "score", 7
    if kind == "a file":
        path, name, seed = tmp_path / "head", "TRL", 8
        path.mkdir()
        write(path / "value_head.safetensors", head_tensors(FORMATS[name], seed))
    elif kind == "a checkpoint":
        path, name, seed = write_format(tmp_path / "other", "TRL", seed=9), "TRL", 9
    model = value_model(trunk, path)
    assert model.decoder is trunk.decoder and model.config.kind == "value" and trunk.config.kind == "score"
    assert model.weight_bytes == sum(tensor.numel() * 4 for tensor in head_tensors(FORMATS[name]).values()) + (
        4 if name == "score" else 0  # the bias that the checkpoint lacks
    )
    assert (model.digest == trunk.digest) == (path is None)
    hidden = PagedRun(model, 1, 64).step({0: IDS})[0]
    torch.testing.assert_close(model.values(hidden), apply_head(name, hidden, seed), rtol=1e-5, atol=1e-5)
    if path is None:
        assert next(model.head.buffers()).data_ptr() != next(trunk.head.buffers()).data_ptr()


def test_trunks_that_do_not_fit_are_told_apart(tmp_path: Path) -> None:
    trunk = load(write_format(tmp_path / "trunk", "score"))
    deep = write_checkpoint(tmp_path / "deep", "llama-reward", tokenizer=False, num_hidden_layers=3)
    critic, windows = (write_format(tmp_path / name, name) for name in ("OpenRLHF critic", "Eurus"))
    for path, message in (
        (critic, "it is a GPTNeoXForSequenceClassification, not a LlamaForSequenceClassification"),
        (deep, "its layers is 3, not 2"),
        (windows, r"its windows is \(24, 24\), not \(None, None\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            value_model(trunk, path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no head: neither config\.json nor value_head\.safetensors or"):
        value_model(trunk, tmp_path / "empty")
    write(tmp_path / "empty" / "value_head.safetensors", {"v_head.summary.weight": torch.ones(1, 32)})
    with pytest.raises(CheckpointError, match=r"summary\.weight is \[1, 32\], must be \[1, 64\]"):
        value_model(trunk, tmp_path / "empty")
    policy = load(write_checkpoint(tmp_path / "lm", "llama-gqa", tokenizer=False))
    with pytest.raises(CheckpointError, match="no head with one score to start from"):
        value_model(policy, None)
