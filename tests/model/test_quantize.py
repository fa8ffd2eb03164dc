"""Checkpoints that are written in int8, read back with safetensors and unpacked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.kernels.ops import quantize_rows
from tandem.model.errors import CheckpointError
from tandem.model.load import load_model
from tandem.model.quantize import Source, WrittenScheme, quantize
from tandem.model.reading import read_texts


def written(source: Path, target: Path, scheme: WrittenScheme, **given: Any) -> dict[str, Tensor]:
    """The tensors of all files."""
    files = quantize(Source(source), target, scheme, **given).files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def values_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    """int8 values of a matrix, rows as the checkpoint had them, or outputs where they are packed."""
    if name in tensors:
        return tensors[name]
    words, (outs, ins) = tensors[f"{name}_packed"], tensors[f"{name}_shape"].tolist()
    assert words.dtype == torch.int32 and words.shape == (outs, -(-ins // 4))
    unpacked = torch.stack([(words >> shift & 255) - 128 for shift in (0, 8, 16, 24)], -1).flatten(1)
    return unpacked[:, :ins].to(torch.int8)


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
@pytest.mark.parametrize(
    ("variant", "count"),
    [("gpt2", 8), ("llama-bias", 14), ("neox", 8), ("opt-post", 8), ("gemma3-images", 21), ("phi3", 8)],
)
def test_every_matrix_is_quantized_and_nothing_else(
    tmp_path: Path, variant: str, count: int, scheme: WrittenScheme
) -> None:
    source = write_checkpoint(tmp_path / "source", variant, tokenizer=False)
    before, after = load_file(source / "model.safetensors"), written(source, tmp_path / "out", scheme)
    quantized = [name for name in before if f"{name}_scale" in after]
    assert len(quantized) == count
    assert not any(part in name for name in quantized for part in ("head", "emb", "wte", "norm", "vision"))
    for name in before.keys() - quantized:
        assert torch.equal(after[name], before[name]), name
    for name in quantized:
        stored_transposed = variant == "gpt2"
        expected = quantize_rows(before[name].T if stored_transposed else before[name])
        found = values_of(after, name)
        assert torch.equal(found.T if stored_transposed and scheme == "w8a8" else found, expected.values), name
        assert torch.equal(after[f"{name}_scale"], expected.scale.unsqueeze(1)), name


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
@pytest.mark.parametrize(
    "variant", ["gpt2", "llama-tied", "neox", "opt-post", "gemma3", "falcon-new", "phi3", "gptj-reward"]
)
def test_it_serves_as_what_is_quantized_while_it_is_loaded(tmp_path: Path, variant: str, scheme: WrittenScheme) -> None:
    source = write_checkpoint(tmp_path / "source", variant, tokenizer=False)
    quantize(Source(source), tmp_path / "out", scheme)
    models = [load_model(source, quantization=scheme), load_model(tmp_path / "out")]
    found = [read_texts(model, [list(range(3, 30))])[0] for model in models]
    assert torch.equal(*found)
    if variant != "gptj-reward":
        models[1] = load_model(tmp_path / "out", lm_head="int8")  # the file has it in high precision
        assert torch.equal(*(model.logits(hidden) for model, hidden in zip(models, found, strict=True)))


def test_rows_that_do_not_fill_an_integer_are_padded(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", tokenizer=False, intermediate_size=35)
    name = "model.layers.0.mlp.down_proj.weight"
    after = written(source, tmp_path / "out", "int8")
    expected = quantize_rows(load_file(source / "model.safetensors")[name])
    assert after[f"{name}_packed"].shape == (64, 9)
    assert torch.equal(values_of(after, name), expected.values)


@pytest.mark.parametrize(("scheme", "layout"), [("int8", "pack-quantized"), ("w8a8", "int-quantized")])
def test_config_says_what_was_done(tmp_path: Path, scheme: WrittenScheme, layout: str) -> None:
    source = write_checkpoint(tmp_path / "source", "neox")
    quantize(Source(source), tmp_path / "out", scheme)
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    said = after.pop("quantization_config")
    assert after == before
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", layout)
    assert said["ignore"] == ["embed_out", "lm_head"]
    group = said["config_groups"]["group_0"]
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    assert group["targets"] == ["Linear"] and group["weights"] == {**int8, "strategy": "channel", "dynamic": False}
    assert group["input_activations"] == ({**int8, "strategy": "token", "dynamic": True} if scheme == "w8a8" else None)


def test_heads_stay_and_are_named(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "qwen2-reward", tokenizer=False)
    after = written(source, tmp_path / "out", "int8")
    assert torch.equal(after["score.weight"], load_file(source / "model.safetensors")["score.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"] == ["score"]


def test_large_ones_are_divided_among_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", tokenizer=False)
    one, progress = written(source, tmp_path / "one", "int8"), []
    many = written(source, tmp_path / "many", "int8", most=50_000, on_progress=lambda *now: progress.append(now))
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys() and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in many.values()) == progress[-1][1]
    assert progress == sorted(progress) and progress[-1][0] == progress[-1][1]


def test_other_files_come_along_and_weights_do_not(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "value_head.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:8])
    for name in (".git", "original"):
        (source / name).mkdir()
    (source / ".git" / "HEAD").write_text("ref")
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "model.gguf"):
        (source / name).write_bytes(b"weights")
    quantize(Source(source), tmp_path / "out", "int8")
    copied = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {"tokenizer.json", "generation_config.json", "1_Pooling/config.json", "value_head.safetensors"} <= copied
    assert not {name for name in copied if name.endswith((".bin", ".pth", ".gguf", "HEAD"))}
    assert [name for name in copied if name.endswith(".safetensors")].count("model.safetensors") == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(tmp_path: Path, name: str, value: float) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", tokenizer=False)
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} has values that are not finite"):
        quantize(Source(source), tmp_path / "out", "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", tokenizer=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="full exists and is not an empty directory"):
        quantize(Source(source), tmp_path / "full", "int8")
    (tmp_path / "empty").mkdir()
    quantize(Source(source), tmp_path / "empty", "int8")
    with pytest.raises(CheckpointError, match="quantized already"):
        Source(tmp_path / "empty")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 matrices are missing: layers\.0\.self_attn\.k_proj\.weight"):
        Source(source)
