"""Checkpoint layouts that load to the same model, and damaged ones whose error names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_model, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.kernels import ops
from tandem.kernels.cpu.native import native
from tandem.model.errors import CheckpointError
from tandem.model.linear import linears
from tandem.model.load import choose_dtype, load_model
from tandem.model.model import Model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "llama", "llama-gqa", tokenizer=False)


def rewrite(path: Path, edit: Callable[[dict[str, Tensor]], object], **fields: Any) -> Path:
    """Change the tensors of a single-file checkpoint, and fields of its config."""
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return configure(path, **fields)


def configure(path: Path, **fields: Any) -> Path:
    config = json.loads((path / "config.json").read_text()) | fields
    (path / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))
    return path


def change(name: str, tensor: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor

    return apply


def keep(tensors: dict[str, Tensor]) -> None:
    pass


def weights_of(model: Model) -> dict[str, Tensor]:
    found = dict(model.decoder.named_buffers()) | dict(model.head.named_buffers())
    for part in (model.decoder, model.head):
        found |= {f"{path}.weight": linear.weight for path, linear in linears(part)}
    return found


def assert_equal(one: Model, other: Model) -> None:
    theirs = weights_of(other)
    assert len(theirs) > 16
    for name, tensor in weights_of(one).items():
        assert torch.equal(tensor, theirs[name]), name


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama-gqa", "gpt2", "bloom"])
def test_sharded_and_pickled_layouts(variant: str, tmp_path: Path) -> None:
    reference = make_model(variant)
    reference.save_pretrained(tmp_path / "single")
    single = load_model(tmp_path / "single")

    reference.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    assert_equal(single, load_model(tmp_path / "sharded"))

    tensors = load_file(tmp_path / "single" / "model.safetensors")
    pickled = tmp_path / "pickled"
    reference.config.save_pretrained(pickled)
    torch.save(tensors, pickled / "pytorch_model.bin")
    assert_equal(single, load_model(pickled))

    (pickled / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    parts = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, held in parts.items():
        torch.save(
            {name: tensors[name] for name in held}, pickled / file, _use_new_zipfile_serialization=file == "a.bin"
        )
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_equal(single, load_model(pickled))


@pytest.mark.parametrize(
    ("variant", "prefix"), [("gpt2", "transformer."), ("bloom", "transformer."), ("llama-gqa", "model.")]
)
def test_the_prefix_is_optional(variant: str, prefix: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, variant, tokenizer=False)
    before = load_model(path)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    rewrite(path, strip)
    assert_equal(before, load_model(path))


@pytest.mark.parametrize("variant", ["gpt2", "bloom", "llama-tied"])
def test_tied_weights_under_either_name_or_both(variant: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, variant, tokenizer=False)
    before, narrow = load_model(path), load_model(path, dtype="float16")  # which no device packs
    assert narrow.head.lm_head.weight.data_ptr() == narrow.decoder.embedding.data_ptr()
    name = next(
        n
        for n in load_file(path / "model.safetensors")
        if n.split(".")[-2] in ("wte", "word_embeddings", "embed_tokens")
    )

    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors[name].clone()}))
    assert_equal(before, load_model(path))
    rewrite(path, change(name, None))
    assert_equal(before, load_model(path))
    rewrite(path, lambda tensors: tensors.update({name: tensors["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*set tie_word_embeddings to false"):
        load_model(path)
    configure(path, tie_word_embeddings=False)
    untied = load_model(path)
    assert torch.equal(untied.decoder.embedding, untied.head.lm_head.weight + 1)


def test_what_old_versions_saved_is_passed_over(tmp_path: Path) -> None:
    gpt2 = write_checkpoint(tmp_path / "gpt2", "gpt2", tokenizer=False)
    before = load_model(gpt2)

    def add_masks(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.h.1.attn.bias"] = torch.ones(1, 1, 512, 512, dtype=torch.uint8)
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(gpt2, add_masks)
    assert_equal(before, load_model(gpt2))
    llama = write_checkpoint(tmp_path / "llama", "llama", tokenizer=False)
    before = load_model(llama)
    rewrite(llama, lambda tensors: tensors.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert_equal(before, load_model(llama))


def test_fused_weights_lie_below_one_another(llama: Path) -> None:
    tensors, attention = load_file(llama / "model.safetensors"), load_model(llama).decoder.layers[1].self_attn
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(attention.qkv_proj.weight, torch.cat(parts))


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_either_name_of_a_head(name: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "neox", tokenizer=False)
    (saved,) = [name for name in load_file(path / "model.safetensors") if not name.startswith("gpt_neox")]
    rewrite(path, lambda tensors: tensors.update({f"{name}.weight": tensors.pop(saved)}))
    expected = load_file(path / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(weights_of(load_model(path))["lm_head.weight"], expected)


def test_rows_of_a_fused_matrix_are_put_in_order(tmp_path: Path) -> None:
    """The checkpoint has q, k and v head by head, with their bias."""
    path = write_checkpoint(tmp_path, "neox", tokenizer=False)
    place = "layers.0.attention.query_key_value"
    stored, loaded = load_file(path / "model.safetensors"), weights_of(load_model(path))
    for kind in ("weight", "bias"):
        heads = stored[f"gpt_neox.{place}.{kind}"].unflatten(0, (4, 3, 16))
        assert torch.equal(loaded[f"{place}.{kind}"], heads.transpose(0, 1).flatten(0, 2))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_what_reads_images_is_left_out(prefix: str, tmp_path: Path) -> None:
    """Under the names of both generations of transformers; any other tensor is still refused."""
    path = write_checkpoint(tmp_path, "gemma3-images", tokenizer=False)
    expected = weights_of(load_model(path))

    def rename(tensors: dict[str, Tensor]) -> None:
        assert any("vision_tower" in name for name in tensors)
        for name in list(tensors):
            inner = name.removeprefix("model.").removeprefix("language_model.model.").removeprefix("language_model.")
            part = "" if "vision" in name or "projector" in name else prefix
            tensors[(part or "model." * (prefix[0] == "m")) + inner] = tensors.pop(name)

    rewrite(path, rename)
    found = weights_of(load_model(path))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert load_model(path).config.end_ids == (2, 5)
    with pytest.raises(CheckpointError, match=r"1 not part of this architecture: audio_tower\.weight"):
        load_model(rewrite(path, change("audio_tower.weight", torch.zeros(1))))


def test_norm_weights_that_are_stored_less_one(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "gemma2", tokenizer=False)
    stored = load_file(path / "model.safetensors")["model.norm.weight"]
    weight = weights_of(load_model(path, dtype="bfloat16"))["norm.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, 1 + stored)


def test_a_served_context_within_the_original_one_takes_the_short_factors(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "phi3-long", tokenizer=False, original_max_position_embeddings=64)
    long, short = load_model(path, context=65).decoder.rotary.cos, load_model(path, context=64).decoder.rotary.cos
    reference = write_checkpoint(tmp_path / "short", "phi3-long", tokenizer=False, original_max_position_embeddings=512)
    assert torch.equal(short, load_model(reference).decoder.rotary.cos)
    assert not torch.equal(short, long)


def test_score_head_with_bias(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-reward", tokenizer=False)
    hidden = torch.randn(3, 64)
    plain = load_model(path).scores(hidden)
    rewrite(path, lambda tensors: tensors.update({"score.bias": torch.tensor([2.5])}))
    torch.testing.assert_close(load_model(path).scores(hidden), plain + 2.5)


def test_dtypes(llama: Path) -> None:
    for name in ("float32", "bfloat16", "float16"):
        model = load_model(llama, dtype=name)  # type: ignore[arg-type]
        assert model.dtype == model.decoder.embedding.dtype == getattr(torch, name)
        assert model.decoder.rotary.cos.dtype == torch.float32
    rewrite(llama, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}), dtype="bfloat16")
    half = load_model(llama)
    assert half.config.dtype == "bfloat16"
    assert choose_dtype("auto", half.config, torch.device("cuda")) == torch.bfloat16
    assert load_model(configure(llama, dtype=..., torch_dtype="float16")).config.dtype == "float16"


def test_auto_takes_bfloat16_where_the_cpu_has_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for has, stored, chosen in [
        (True, "bfloat16", "bfloat16"),
        (True, "float32", "float32"),
        (False, "float16", "float32"),
    ]:
        monkeypatch.setattr("tandem.model.load.cpu_has_bfloat16", lambda has=has: has)
        assert load_model(configure(llama, dtype=stored)).dtype == getattr(torch, chosen)


def test_progress_and_digest(llama: Path) -> None:
    seen: list[tuple[int, int]] = []
    model = load_model(llama, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    rope = model.decoder.rotary
    assert model.weight_bytes == seen[-1][1] + rope.cos.nbytes + rope.sin.nbytes
    assert load_model(llama).digest == model.digest
    rewrite(llama, keep)  # the same bytes, but a file of another time
    assert load_model(llama).digest != model.digest


def test_end_ids_of_both_files(llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert load_model(llama).config.end_ids == (2, 7)
    configure(llama, eos_token_id=None)
    (llama / "generation_config.json").unlink()
    assert load_model(llama).config.end_ids == ()


# Copies ---------------------------------------------------------------------------------------------------------------


def test_only_the_order_that_is_read_is_kept(llama: Path) -> None:
    if native() is None:
        pytest.skip("the C++ kernels were not built, or this CPU lacks AVX2")
    for dtype in ("float32", "bfloat16"):
        model = load_model(llama, dtype=dtype)  # type: ignore[arg-type]
        for path, linear in (*linears(model.decoder), *linears(model.head)):
            rows = torch.randn(5, linear.ins, dtype=model.dtype)
            assert linear.packed is not None and not list(linear.matrix.buffers()), path
            expected = ops.activate((rows.double() @ linear.weight.double().T).to(model.dtype), linear.activation)
            torch.testing.assert_close(linear(rows), expected)


def test_what_bfloat16_holds_is_kept_in_it(llama: Path) -> None:
    """A checkpoint in bfloat16 computed in float32 takes half the memory, and no number changes."""
    if native() is None:
        pytest.skip("the C++ kernels were not built, or this CPU lacks AVX2")
    whole = load_model(llama, dtype="float32")
    rewrite(llama, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    configure(llama, dtype="bfloat16")
    half = load_model(llama, dtype="float32")
    for (_, linear), (_, full) in zip(linears(half.decoder), linears(whole.decoder), strict=True):
        assert linear.packed is not None and linear.packed.data.dtype == torch.bfloat16
        assert torch.equal(linear.weight, full.weight.bfloat16().float())
    assert half.weight_bytes < 0.8 * whole.weight_bytes


# Damage ---------------------------------------------------------------------------------------------------------------


NORM = "model.layers.0.input_layernorm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change(NORM, None), r"1 missing: layers\.0\.input_layernorm\.weight"),
        (change("lm_head.weight", None), r"1 missing: lm_head\.weight"),
        (
            change("model.layers.2.mlp.up_proj.weight", torch.ones(96, 64)),
            r"not part .*: model\.layers\.2\.mlp\.up_proj",
        ),
        (
            change(QUERY, torch.ones(64, 63)),
            r"wrong shape: model\.layers\.1.*q_proj\.weight is \[64, 63\], must be \[64, 64\]",
        ),
        (change(NORM, torch.ones(64, dtype=torch.int8)), r"dtype other than .*input_layernorm\.weight is I8"),
        (change(NORM, torch.ones(64, dtype=torch.float8_e4m3fn)), r"input_layernorm\.weight is F8_E4M3"),
        (
            change("layers.0.input_layernorm.weight", torch.ones(64)),
            r"given twice: .*layers\.0\.input_layernorm\.weight",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    llama: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(rewrite(llama, damage))


def test_everything_wrong_is_listed_at_once(llama: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[NORM]
        tensors["extra"] = torch.ones(1)
        tensors[QUERY] = torch.ones(1)

    with pytest.raises(CheckpointError, match=r"(?s)extra.*q_proj.*input_layernorm"):
        load_model(rewrite(llama, damage))


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_safetensors_file_is_named(llama: Path, kept: int) -> None:
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or no safetensors file"):
        load_model(llama)


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names .* missing: {shards[1].name}"):
        load_model(tmp_path)


def test_an_index_that_lists_what_no_file_holds(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = sorted(tmp_path.glob("*.safetensors"))[0].name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"do not hold: model\.ghost\.weight"):
        load_model(tmp_path)
    content["weight_map"] = {"a": "../outside.safetensors"}
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside"):
        load_model(tmp_path)


class Gadget:
    """Pickles to a call, as an attack would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


@pytest.mark.parametrize("content", [{"a": Gadget()}, [1, 2], {"a": 1}, b"", b"no pickle at all"])
def test_a_bin_file_with_more_than_tensors_is_refused(
    llama: Path, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (llama / "model.safetensors").unlink()
    file = llama / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load_model(llama)
    assert "must not run" not in capsys.readouterr().out


def test_paths_that_are_no_model(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is a file"):
        load_model(llama / "config.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"folder is not a model: it has no config\.json"):
        load_model(tmp_path / "folder")
    (llama / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"llama has no weights: none of model\.safetensors"):
        load_model(llama)
