"""LoRA adapters in PEFT's format: what they compute, what is refused, and that nobody else's bits change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB, make_model
from lora import make_adapter, merge
from paging import PagedRun
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.model.errors import CheckpointError
from tandem.model.load import load_model
from tandem.model.lora import read_adapter
from tandem.model.model import Model

TOLERANCE = 1e-4
# Of each way in which matrices lie in a checkpoint: side by side, transposed, head by head, one for q, k and v.
FAMILIES = ["llama-gqa", "gpt2", "bloom-6", "neox", "falcon-new", "phi3", "opt"]


def with_room(variant: str, path: Path, count: int = 3, rank: int = 8, **options: Any) -> Model:
    make_model(variant).save_pretrained(path / "base")
    model = load_model(path / "base", **options)
    model.make_room(count, rank)
    return model


def put(model: Model, slot: int, path: Path) -> None:
    assert model.adapters is not None
    model.adapters.write(slot, read_adapter(path, model.decoder, model.adapters))


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def logits(model: Model, ids: list[list[int]], slots: list[int]) -> list[Tensor]:
    """Of every position of each text, all in one step."""
    run = PagedRun(model, len(ids), max(map(len, ids)))
    found = run.step(dict(enumerate(ids)), dict(enumerate(slots)))
    return [model.logits(found[index]) for index in range(len(ids))]


@pytest.mark.parametrize("variant", FAMILIES)
def test_a_mixed_step_computes_what_merged_weights_do(variant: str, tmp_path: Path) -> None:
    """Base and three adapters of different ranks, targets and scales, against transformers; each row has the bits it
    has alone."""
    model = with_room(variant, tmp_path)
    base = make_model(variant)
    last = {"gpt2": "c_attn", "bloom-6": "dense", "neox": "query_key_value"}.get(variant, "")
    adapters = [
        make_adapter(tmp_path / "a", base, seed=1),
        make_adapter(tmp_path / "b", base, *filter(None, [last]), seed=2, r=8, lora_alpha=16, use_rslora=True),
        make_adapter(tmp_path / "c", base, seed=3, r=2, infix=".default", fan_in_fan_out=variant == "gpt2"),
    ]
    for slot, path in enumerate(adapters, 1):
        put(model, slot, path)
    ids, slots = texts(1, 9, 1, 7, 1, 30, 5), [2, 0, 0, 1, 3, 3, 2]
    mixed = logits(model, ids, slots)
    for text, slot, found in zip(ids, slots, mixed, strict=True):
        reference = make_model(variant) if not slot else merge(make_model(variant), adapters[slot - 1])
        with torch.no_grad():
            expected = reference(input_ids=torch.tensor([text]), use_cache=False).logits[0]
        assert float((found - expected).abs().max()) < TOLERANCE
        (alone,) = logits(model, [text], [slot])
        assert torch.equal(found, alone)
    plain = load_model(tmp_path / "base")
    for text, slot, found in zip(ids, slots, mixed, strict=True):
        (without,) = logits(plain, [text], [0])
        assert torch.equal(found, without) == (slot == 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_deterministic_steps_in_half_precision(dtype: str, tmp_path: Path) -> None:
    model = with_room("llama-gqa", tmp_path, dtype=dtype, deterministic=True)
    put(model, 1, make_adapter(tmp_path / "a", make_model("llama-gqa")))
    ids, slots = texts(1, 40, 1, 9), [1, 1, 0, 0]
    for text, slot, found in zip(ids, slots, logits(model, ids, slots), strict=True):
        (alone,) = logits(model, [text], [slot])
        assert torch.equal(found, alone)


def test_ranks_and_scales_by_pattern(tmp_path: Path) -> None:
    model, base = with_room("llama-gqa", tmp_path), make_model("llama-gqa")
    patterns = {"rank_pattern": {"q_proj": 6, "down_proj": 1}, "alpha_pattern": {"q_proj": 3, "v_proj": 40}}
    path = make_adapter(tmp_path / "a", base, "q_proj", "v_proj", "down_proj", **patterns)
    put(model, 2, path)
    with torch.no_grad():
        expected = merge(base, path)(input_ids=torch.tensor(texts(12))).logits[0]
    assert float((logits(model, texts(12), [2])[0] - expected).abs().max()) < TOLERANCE


def test_targets_by_expression(tmp_path: Path) -> None:
    model, base = with_room("llama-gqa", tmp_path), make_model("llama-gqa")
    path = make_adapter(tmp_path / "a", base, "q_proj", "o_proj", target_modules=r".*\.self_attn\.(q|o)_proj")
    put(model, 1, path)
    assert not torch.equal(logits(model, texts(9), [1])[0], logits(model, texts(9), [0])[0])
    rewrite(path, lambda config, _: config.update(target_modules=r".*\.1\.self_attn\..*"))
    with pytest.raises(CheckpointError, match="4 not among target_modules"):
        put(model, 1, path)


def test_a_slot_that_is_written_again_holds_nothing_of_before(tmp_path: Path) -> None:
    model, base = with_room("llama-gqa", tmp_path), make_model("llama-gqa")
    everywhere = make_adapter(tmp_path / "a", base, r=8)
    queries = make_adapter(tmp_path / "b", base, "q_proj", seed=7, r=2)
    put(model, 1, everywhere)
    put(model, 1, queries)
    put(model, 2, queries)
    first, second = logits(model, texts(9) * 2, [1, 2])
    assert torch.equal(first, second)


def test_room_counts_as_weights(tmp_path: Path) -> None:
    make_model("llama-gqa").save_pretrained(tmp_path)
    model = load_model(tmp_path)
    before = model.weight_bytes
    model.make_room(3, 8)
    # qkv, o, gate and up, down: r lines of A per matrix, r of B per output, in float32, in each of two layers
    values = 3 * (3 * 64 + 64 + 2 * 64 + 96) * 8 + 3 * 8 * (128 + 64 + 192 + 64)
    assert model.weight_bytes - before == 2 * 4 * values


# Refusals -------------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")


def rewrite(path: Path, change: Change) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    change(config, tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")


def field(name: str, value: object) -> Change:
    return lambda config, _: config.update({name: value})


def tensor(name: str, *shape: int, value: float = 1.0, dtype: torch.dtype = torch.float32) -> Change:
    return lambda _, tensors: tensors.update({name: torch.full(shape, value, dtype=dtype)})


REFUSED: list[tuple[Change, str]] = [
    (field("peft_type", "IA3"), 'peft_type is "IA3"'),
    (field("use_dora", True), "use_dora is true"),
    (field("modules_to_save", ["lm_head"]), r'modules_to_save is \["lm_head"\]'),
    (field("bias", "all"), 'bias is "all"'),
    (field("lora_bias", True), "lora_bias is true"),
    (field("init_lora_weights", "pissa"), 'init_lora_weights is "pissa"'),
    (field("target_parameters", ["mlp.experts"]), "target_parameters is"),
    (field("r", 0), "r is 0"),
    (field("target_modules", "(q"), "target_modules is .*regular expression"),
    (field("rank_pattern", {"(q": 4}), r"rank_pattern is .*regular expressions.*'\(q'"),
    (field("alpha_pattern", {"q)": 4}), r"alpha_pattern is .*regular expressions.*'q\)'"),
    (field("target_modules", ["q_proj", "wq"]), "1 missing though target_modules has them: wq"),
    (field("target_modules", ["v_proj"]), "4 not among target_modules"),
    (field("r", 5), r"4 of the wrong shape: .*lora_A.weight is \[4, 64\], must be \[5, 64\]"),
    (tensor(A, 4, 63), r"is \[4, 63\], must be \[4, 64\]"),
    (tensor(B, 63, 4), r"is \[63, 4\], must be \[64, 4\]"),
    (tensor(A, 4, 64, dtype=torch.int8), "1 of a dtype other than"),
    (tensor(A, 4, 64, value=float("inf")), "not finite in torch.float32"),
    (tensor("base_model.model.lm_head.lora_A.weight", 4, 64), "1 no A or B .*lm_head"),
    (tensor("base_model.model.model.embed_tokens.lora_embedding_A", 4, 320), "1 no A or B .*lora_embedding_A"),
    (tensor(A.replace("lora_A.weight", "lora_magnitude_vector"), 64), "1 no A or B .*magnitude"),
    (lambda _, tensors: tensors.pop(B), "1 without their other half: .*q_proj.lora_A"),
    (lambda config, tensors: (tensors.clear(), config.update(target_modules="all-linear")), "there are none"),
]


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    path = tmp_path_factory.mktemp("refusing")
    return with_room("llama-gqa", path), make_adapter(path / "a", make_model("llama-gqa"), "q_proj")


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(change: Change, message: str, refusing: tuple[Model, Path], tmp_path: Path) -> None:
    model, adapter = refusing
    path = shutil.copytree(adapter, tmp_path / "a")
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        put(model, 1, path)


def test_no_room_for_the_rank(refusing: tuple[Model, Path], tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "a", make_model("llama-gqa"), "q_proj", r=9)
    with pytest.raises(CheckpointError, match="has rank 9; there is room for 8: raise --max-lora-rank"):
        put(refusing[0], 1, path)


def test_directories_without_an_adapter(refusing: tuple[Model, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no LoRA adapter: it has no adapter_config\.json"):
        put(refusing[0], 1, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        CheckpointError, match=r"has no weights: none of adapter_model\.safetensors, adapter_model\.bin"
    ):
        put(refusing[0], 1, tmp_path)


def test_pickled_tensors_without_code(refusing: tuple[Model, Path], tmp_path: Path) -> None:
    model, adapter = refusing
    path = shutil.copytree(adapter, tmp_path / "a")
    file = path / "adapter_model.safetensors"
    torch.save(load_file(file), path / "adapter_model.bin")
    put(model, 1, path)
    expected = logits(model, texts(9), [1])[0]
    file.unlink()
    put(model, 2, path)
    assert torch.equal(logits(model, texts(9), [2])[0], expected)
