"""Models in int8 compute what the numbers they keep stand for, and keep what they are said to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB, make_model, write_checkpoint
from lora import make_adapter
from paging import PagedRun
from quantized import meant
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.kernels.ops import quantize_rows
from tandem.model.checkpoint import read_checkpoint
from tandem.model.errors import CheckpointError
from tandem.model.incoming import from_disk
from tandem.model.linear import linears
from tandem.model.load import load_model, random_model
from tandem.model.lora import read_adapter
from tandem.model.matrix import Int8Matrix
from tandem.model.model import Model
from tandem.model.quantization import dequantized
from tandem.model.update import Update

# Plain, transposed, of which rows are put in order, with changed norms, with norms in attention, projected, rewards.
FAMILIES = ["llama-bias", "gpt2", "bloom-6", "neox", "gemma3", "qwen3", "gptj-tied", "phi3", "qwen2-reward"]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in (1, 9, 40)]


def outputs(model: Model) -> list[Tensor]:
    """Logits of every row of each prompt, or its score."""
    hidden = PagedRun(model, 3, 64).step(dict(enumerate(prompts())))
    rows = [hidden[number] for number in range(3)]
    return [model.scores(one[-1:]) if model.config.labels else model.logits(one).float() for one in rows]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_against_transformers(variant: str, scheme: Any, tmp_path: Path) -> None:
    """With w8a8 a row that lies between two steps of its scale may be rounded to the other one."""
    make_model(variant).save_pretrained(tmp_path)
    model, reference = load_model(tmp_path, quantization=scheme), meant(make_model(variant), rows=scheme == "w8a8")
    exact = make_model(variant).double()
    for ids, found in zip(prompts(), outputs(model), strict=True):
        with torch.no_grad():
            expected, plain = (
                one(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for one in (reference, exact)
            )
        assert relative(found, expected.view_as(found)) < (1e-5 if scheme == "int8" else 4e-3)
        assert 0.003 < relative(found, plain.view_as(found)) < 0.2  # it is quantized, and still the same model


def test_what_is_quantized_and_what_is_not(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-tied", tokenizer=False)
    stored = load_file(path / "model.safetensors")
    model = load_model(path, quantization="int8")
    matrices = dict(linears(model.decoder)) | dict(linears(model.head))
    assert all(linear.quantized for linear in matrices.values())
    embedding = stored["model.embed_tokens.weight"]
    assert torch.equal(model.decoder.embed_tokens.weight, embedding)  # type: ignore[union-attr]
    expected = quantize_rows(embedding)
    head = matrices["lm_head"].matrix
    assert isinstance(head, Int8Matrix)
    assert torch.equal(head.int8.values, expected.values) and torch.equal(head.int8.scale, expected.scale)
    q, k, v = (quantize_rows(stored[f"model.layers.0.self_attn.{name}_proj.weight"]) for name in "qkv")
    fused = matrices["layers.0.self_attn.qkv_proj"].matrix
    assert isinstance(fused, Int8Matrix)
    assert torch.equal(fused.int8.values, torch.cat((q.values, k.values, v.values)))
    assert torch.equal(fused.weight, torch.cat([dequantized(one) for one in (q, k, v)]))
    plain = load_model(path, quantization="int8", lm_head="fp16")
    assert not any(linear.quantized for _, linear in linears(plain.head))
    assert all(linear.quantized for _, linear in linears(plain.decoder))
    only = load_model(path, lm_head="int8")
    assert [linear.quantized for _, linear in linears(only.head)] == [True]
    assert not any(linear.quantized for _, linear in linears(only.decoder))


def test_bytes_are_half_of_those_in_16_bits(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", tokenizer=False, hidden_size=256, intermediate_size=512)
    wide, narrow = load_model(path, dtype="bfloat16"), load_model(path, dtype="bfloat16", quantization="int8")
    matrices = sum(linear.weight.numel() for part in (wide.decoder, wide.head) for _, linear in linears(part))
    outs = sum(len(linear.weight) for part in (wide.decoder, wide.head) for _, linear in linears(part))
    assert wide.weight_bytes - narrow.weight_bytes == matrices - 4 * outs  # a byte less each, four more per output
    assert (matrices + 4 * outs) / (2 * matrices) <= 0.51


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_keep_their_bits_in_any_company(dtype: Any, scheme: Any, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-gqa", tokenizer=False)
    model = load_model(path, dtype=dtype, quantization=scheme, deterministic=True)
    together = PagedRun(model, 3, 64).step(dict(enumerate(prompts())))
    for number, ids in enumerate(prompts()):
        run = PagedRun(model, 1, 64)
        apart = torch.cat([run.step({0: [token]})[0] for token in ids])
        assert torch.equal(apart, together[number])
        assert torch.equal(model.logits(apart), model.logits(together[number]))


@pytest.mark.parametrize("deterministic", [False, True])
def test_logprobs_are_those_of_the_logits(deterministic: bool, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "gemma2", tokenizer=False)
    model = load_model(path, quantization="int8", deterministic=deterministic)
    hidden = PagedRun(model, 1, 64).step({0: prompts()[2]})[0]
    targets = torch.tensor(prompts()[2]).roll(-1)
    found = model.logprobs_of(hidden, targets, top=2)
    expected = model.logits(hidden).float().log_softmax(-1)
    torch.testing.assert_close(found.values, expected.gather(1, targets.unsqueeze(1)).squeeze(1), atol=1e-5, rtol=1e-5)
    assert torch.equal(found.top_ids, expected.topk(2).indices)


def test_random_models_are_quantized_from_the_same_numbers(tmp_path: Path) -> None:
    config = read_checkpoint(write_checkpoint(tmp_path, "llama-tied", tokenizer=False)).config
    plain, narrow = (random_model(config, dtype="float32", quantization=scheme) for scheme in ("none", "int8"))
    for (place, one), (_, other) in zip(linears(plain.decoder), linears(narrow.decoder), strict=True):
        assert torch.equal(dequantized(quantize_rows(one.weight)), other.weight), place
    assert narrow.weight_bytes < plain.weight_bytes / 2


# Updates and adapters


def test_an_update_in_part_is_not_rounded_twice(tmp_path: Path) -> None:
    """Of a fused matrix one part comes, the others keep their bits; a tied head follows the embedding."""
    old, new = (write_checkpoint(tmp_path / str(seed), "llama-tied", seed=seed, tokenizer=False) for seed in (1, 2))
    given = ["model.layers.0.self_attn.k_proj.weight", "model.embed_tokens.weight"]
    model, update = load_model(old, quantization="int8"), None
    before = {place: linear.weight for place, linear in linears(model.decoder)}
    update = Update(model)
    stored = dict(from_disk(str(new)).tensors)
    update.stage([(name, stored[name]) for name in given])
    update.complete(partial=True)
    assert all(torch.equal(linear.weight, before[place]) for place, linear in linears(model.decoder))
    update.commit()
    fresh = load_model(new, quantization="int8")
    changed, expected = (dict(linears(one.decoder)) for one in (model, fresh))
    place = "layers.0.self_attn.qkv_proj"
    q, k, v = changed[place].weight.split_with_sizes(changed[place].outs)
    old_q, _, old_v = before[place].split_with_sizes(changed[place].outs)
    _, new_k, _ = expected[place].weight.split_with_sizes(changed[place].outs)
    assert torch.equal(q, old_q) and torch.equal(k, new_k) and torch.equal(v, old_v)
    heads = [dict(linears(one.head))["lm_head"].weight for one in (model, fresh)]
    assert torch.equal(*heads)


def test_the_bias_of_a_tied_head_comes_alone(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "old", "gptj-tied", tokenizer=False)
    model = load_model(path, quantization="int8")
    head = dict(linears(model.head))["lm_head"]
    weight, bias = head.weight, torch.randn(VOCAB)
    save_file({"lm_head.bias": bias}, tmp_path / "bias.safetensors")
    update = Update(model)
    update.stage(from_disk(str(tmp_path / "bias.safetensors")).tensors)
    update.complete(partial=True)
    update.commit()
    assert torch.equal(head.weight, weight) and head.bias is not None and torch.equal(head.bias, bias)


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_adapters_stay_in_the_model_s_dtype(scheme: Any, tmp_path: Path) -> None:
    """What an adapter adds to a quantized matrix is what it adds to the same numbers in float32."""
    make_model("llama-gqa").save_pretrained(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", make_model("llama-gqa"))
    model = load_model(tmp_path / "base", quantization=scheme)
    model.make_room(1, 8)
    assert model.adapters is not None
    model.adapters.write(1, read_adapter(adapter, model.decoder, model.adapters))
    ids = prompts()[1]
    for slot, rows in ((0, None), (1, {0: 1})):
        found = PagedRun(model, 1, 64).step({0: ids}, rows)[0]
        reference = PagedRun(dense(model), 1, 64).step({0: ids}, rows)[0]
        if scheme == "int8":
            torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)
        else:
            assert relative(found, reference.double()) < 0.1
        assert slot or not torch.equal(found, PagedRun(model, 1, 64).step({0: ids}, {0: 1})[0])


def dense(model: Model) -> Model:
    """The same numbers in float32, and the same adapters."""
    twin = random_model(model.config, dtype="float32")
    twin.make_room(1, 8)
    for (_, one), (_, other) in zip(linears(model.decoder), linears(twin.decoder), strict=True):
        other.keep_plain(twin.place)
        other.weight.copy_(one.weight)
        assert one.adapters is not None and other.adapters is not None
        other.adapters.a.copy_(one.adapters.a)
        other.adapters.b.copy_(one.adapters.b)
        other.adapters._held.add(1)
    copied = dict(model.decoder.named_buffers())
    for name, buffer in twin.decoder.named_buffers():
        if "matrix" not in name:
            buffer.copy_(copied[name])
    return twin


# What is refused


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_numbers_that_are_none_are_named(name: str, value: float, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", tokenizer=False)
    tensors = load_file(path / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, path / "model.safetensors")
    short = name.removeprefix("model.")
    with pytest.raises(CheckpointError, match=f"model.safetensors: {short} has values that are not finite"):
        load_model(path, quantization="int8")


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-reward", tokenizer=False)
    for given, message in (
        ({"quantization": "int4"}, "quantization is int4; there are none, int8, w8a8"),
        ({"lm_head": "int8"}, "lm_head is int8, but it has no language model's head: leave that out"),
        ({"lm_head": "bf16"}, "lm_head is bf16; there are int8 and fp16"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(path, **given)  # type: ignore[arg-type]


# Memory

LOAD = """
import torch
from tandem.kernels import ops
from tandem.model.load import load_model

def status(name):
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(name))) * 1024

torch.set_num_threads(1)
x = torch.randn(64, 64)
ops.linear(x.bfloat16(), x.bfloat16())  # what libraries take for themselves
ops.quantize_rows(x)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # VmHWM begins anew
model = load_model({path!r}, dtype="bfloat16", quantization={scheme!r})
print(before, status("VmHWM"), status("VmRSS"), model.weight_bytes)
"""


@pytest.fixture(scope="module")
def checkpoint_of_125m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA's, in bfloat16: what the numbers are does not matter."""
    path, inner = tmp_path_factory.mktemp("125m"), 2048
    fields = {"hidden_size": 768, "intermediate_size": inner, "num_hidden_layers": 12, "num_attention_heads": 12}
    fields |= {"vocab_size": 32000, "max_position_embeddings": 128}
    about = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(about | fields))
    noise = torch.randn(32000, 768).bfloat16()
    tensors = {"model.norm.weight": noise[0], "model.embed_tokens.weight": noise, "lm_head.weight": noise * 2}
    for layer in (f"model.layers.{number}" for number in range(12)):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{layer}.self_attn.{name}.weight"] = noise[:768]
        for name in ("gate_proj", "up_proj"):
            tensors[f"{layer}.mlp.{name}.weight"] = noise[:inner]
        tensors[f"{layer}.mlp.down_proj.weight"] = noise[:inner].view(768, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}.{name}.weight"] = noise[1]
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("scheme", ["int8", "w8a8"])
def test_loading_holds_little_more_than_the_result(checkpoint_of_125m: Path, scheme: str) -> None:
    """Bytes of a process of its own beside what it has before: the most while it loads (VmHWM, in which pages of mapped
    files count) and what is held afterwards (VmRSS)."""
    program = LOAD.format(path=str(checkpoint_of_125m), scheme=scheme)
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, most, after, weights = (int(number) for number in told.stdout.split())
    print(f"{weights >> 20} MiB of weights, {(after - before) >> 20} held, at most {(most - before) >> 20}")
    assert weights < 0.65 * (checkpoint_of_125m / "model.safetensors").stat().st_size
    assert most - before < 1.15 * weights
    assert 0.98 * weights < after - before
