"""Checkpoints in compressed-tensors' int8 layouts, made here by hand, are the model that their numbers stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from paging import PagedRun
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.kernels.ops import quantize_rows
from tandem.model.errors import CheckpointError
from tandem.model.incoming import from_disk
from tandem.model.linear import linears
from tandem.model.load import load_model
from tandem.model.model import Model
from tandem.model.update import Update

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
IDS = list(range(5, 45))


def said(layout: str = "int-quantized", rows: bool = False, **weights: Any) -> dict[str, Any]:
    """A quantization_config, `rows`: that quantizes activations, too."""
    group = {
        "targets": ["Linear"],
        "weights": INT8 | {"strategy": "channel", "dynamic": False} | weights,
        "input_activations": INT8 | {"strategy": "token", "dynamic": True} if rows else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def packed(values: Tensor) -> Tensor:
    """[O, D] int8 -> [O, D / 4] int32, as numbers."""
    filled = torch.nn.functional.pad(values.long() + 128, (0, -values.shape[1] % 4)).view(len(values), -1, 4)
    words = (filled << torch.tensor([0, 8, 16, 24])).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def quantized(path: Path, config: dict[str, Any], chosen: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The checkpoint's matrices in int8 from now on; what they stand for, and the other tensors, is returned.

    `chosen`: by name. GPT-2's lie [D, O] there and in int-quantized.
    """
    before = load_file(path / "model.safetensors")
    layout, transposed = config["format"], "wte.weight" in "".join(before)
    after, meaning = dict(before), dict(before)
    for name, tensor in before.items():
        inside = ".layers." in name or ".h." in name
        if tensor.dim() != 2 or not (chosen(name) if chosen else inside):
            continue
        rows = quantize_rows(tensor.T if transposed else tensor)
        scale = rows.scale.unsqueeze(1)
        if config["config_groups"]["group_0"]["weights"]["strategy"] == "tensor":
            scale = rows.scale.amax().view(1)
        base = name.removesuffix(".weight")
        after[f"{base}.weight_scale"] = scale
        if layout == "pack-quantized":
            del after[name]
            after[f"{base}.weight_packed"] = packed(rows.values)
            after[f"{base}.weight_shape"] = torch.tensor(rows.values.shape)
        else:
            after[name] = (rows.values.T if transposed else rows.values).contiguous()
        meant = rows.values.float() * scale
        meaning[name] = (meant.T if transposed else meant).contiguous()
    save_file(after, path / "model.safetensors")
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return meaning


def output(model: Model) -> Tensor:
    hidden = PagedRun(model, 1, 64).step({0: IDS})[0]
    return model.scores(hidden[-1:]) if model.config.labels else model.logits(hidden)


def twin(path: Path, tensors: dict[str, Tensor]) -> Path:
    """The checkpoint at `path` with these tensors, not quantized."""
    other = path.with_name(path.name + "-plain")
    other.mkdir()
    fields = json.loads((path / "config.json").read_text())
    del fields["quantization_config"]
    (other / "config.json").write_text(json.dumps(fields))
    save_file(tensors, other / "model.safetensors")
    return other


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("llama-bias", "int-quantized"),
        ("gpt2", "int-quantized"),
        ("gpt2", "pack-quantized"),
        ("neox", "pack-quantized"),
        ("gemma3", "naive-quantized"),
        ("qwen3-reward", "pack-quantized"),
    ],
)
def test_a_quantized_checkpoint_is_what_its_numbers_say(variant: str, layout: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", variant, tokenizer=False)
    meant = twin(path, quantized(path, said(layout)))
    model, plain = load_model(path), load_model(meant)
    assert all(linear.quantized for _, linear in linears(model.decoder))
    assert not any(linear.quantized for _, linear in linears(model.head))  # the checkpoint's own head stays
    torch.testing.assert_close(output(model), output(plain), atol=1e-4, rtol=1e-4)
    for (place, linear), (_, other) in zip(linears(model.decoder), linears(plain.decoder), strict=True):
        assert torch.equal(linear.weight, other.weight), place  # not quantized twice


def test_one_scale_for_a_whole_matrix(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model", "llama", tokenizer=False)
    meant = twin(path, quantized(path, said(strategy="tensor")))
    torch.testing.assert_close(output(load_model(path)), output(load_model(meant)), atol=1e-4, rtol=1e-4)


def test_matrices_that_are_not_quantized_stay(tmp_path: Path) -> None:
    """As `ignore` has it for a layer that suffers; the head may be quantized in its stead."""
    path = write_checkpoint(tmp_path / "model", "llama", tokenizer=False)

    def chosen(name: str) -> bool:
        return ("proj" in name and "layers.1.mlp" not in name) or name == "lm_head.weight"

    meant = twin(path, quantized(path, said(), chosen))
    model = load_model(path)
    found = {place: linear.quantized for place, linear in (*linears(model.decoder), *linears(model.head))}
    assert {place for place, is_int8 in found.items() if not is_int8} == {
        "layers.1.mlp.gate_up_proj",
        "layers.1.mlp.down_proj",
    }
    torch.testing.assert_close(output(model), output(load_model(meant)), atol=1e-4, rtol=1e-4)


def test_the_scheme_is_the_checkpoint_s(tmp_path: Path) -> None:
    """What is asked for must be that, or nothing; a head that is not quantized may become so."""
    path = write_checkpoint(tmp_path / "model", "llama", tokenizer=False)
    quantized(path, said(rows=True))
    model = load_model(path)
    assert (model.place.quantization.matrices, model.place.quantization.head) == ("w8a8", "none")
    assert torch.equal(output(load_model(path, quantization="w8a8")), output(model))
    assert load_model(path, lm_head="int8").place.quantization.head == "int8"
    for other in ("int8", "none"):
        with pytest.raises(CheckpointError, match=f"quantization is {other}, but .* already, as w8a8: leave that out"):
            load_model(path, quantization=other)  # type: ignore[arg-type]
    quantized(path, said(rows=True), lambda name: name == "lm_head.weight")
    with pytest.raises(CheckpointError, match="lm_head is fp16, but the checkpoint has its head in int8"):
        load_model(path, lm_head="fp16")


def test_an_update_may_be_quantized(tmp_path: Path) -> None:
    old = write_checkpoint(tmp_path / "old", "llama", seed=1, tokenizer=False)
    new = write_checkpoint(tmp_path / "new", "llama", seed=2, tokenizer=False)
    model = load_model(old, quantization="int8", lm_head="fp16")
    quantized(new, said("pack-quantized"))
    update = Update(model)
    update.stage(from_disk(str(new)).tensors, complete=True)
    update.complete(partial=False)
    update.commit()
    assert torch.equal(output(model), output(load_model(new)))
    with pytest.raises(CheckpointError, match=r"\d+ of a dtype other than F32, BF16, F16: "):
        Update(load_model(old)).stage(from_disk(str(new)).tensors)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, 'quantization_config.quant_method is "gptq"; supported: .* quantization=int8'),
        ({"quant_method": "bitsandbytes"}, 'quant_method is "bitsandbytes"'),
        ({"quant_method": "fp8"}, 'quant_method is "fp8"'),
        ({"format": "float-quantized"}, "format is \"float-quantized\"; supported: 'int-quantized' or"),
        ({"format": "marlin-24"}, 'format is "marlin-24"'),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        ({"transform_config": {"config_groups": {}}}, "transform_config is"),
        ({"sparsity_config": {"format": "dense"}}, "sparsity_config is"),
        ({"config_groups": {}}, "config_groups is {}; supported: groups that are all"),
    ],
)
def test_other_ways_are_refused_by_name(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", tokenizer=False)
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": said() | changes}))
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("weights", {"num_bits": 4}, "weights.num_bits is 4; supported: 8"),
        ("weights", {"type": "float"}, 'weights.type is "float"; supported: "int"'),
        ("weights", {"symmetric": False}, "weights.symmetric is false; supported: true"),
        ("weights", {"strategy": "group", "group_size": 128}, "weights.group_size is 128"),
        ("weights", {"strategy": "block"}, "weights.strategy is \"block\"; supported: 'channel' or 'tensor'"),
        ("weights", {"actorder": "group"}, 'weights.actorder is "group"'),
        ("input_activations", {"dynamic": False, "strategy": "tensor"}, 'input_activations.strategy is "tensor"'),
        ("input_activations", {"dynamic": False}, "input_activations.dynamic is false"),
        ("input_activations", {"num_bits": 4}, "input_activations.num_bits is 4"),
        ("output_activations", INT8, "group_0.output_activations is"),
    ],
)
def test_other_numbers_are_refused_by_name(part: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", tokenizer=False)
    config = said(rows=True)
    group = config["config_groups"]["group_0"]
    group[part] = (group[part] or {}) | changes
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama", tokenizer=False)
    place = "model.layers.1.mlp.down_proj"
    whole, again = (path / "model.safetensors").read_bytes(), (path / "config.json").read_bytes()

    def load(layout: str, change: Callable[[dict[str, Tensor]], object]) -> None:
        (path / "model.safetensors").write_bytes(whole)
        (path / "config.json").write_bytes(again)
        quantized(path, said(layout))
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
        load_model(path)

    cases: list[tuple[str, Callable[[dict[str, Tensor]], object], str]] = [
        ("int-quantized", lambda t: t.pop(f"{place}.weight_scale"), f"F16: {place}.weight is I8"),
        ("int-quantized", lambda t: t.pop(f"{place}.weight"), f"{place}.weight_scale without a matrix in int8"),
        (
            "int-quantized",
            lambda t: t.update({f"{place}.weight_scale": torch.ones(3)}),
            r"weight_scale is \[3\], must be",
        ),
        ("int-quantized", lambda t: t[f"{place}.weight_scale"].fill_(torch.nan), "weight_scale has values that are no"),
        ("int-quantized", lambda t: t.update({f"{place}.weight_zero_point": torch.ones(64)}), "weight_zero_point"),
        ("pack-quantized", lambda t: t.pop(f"{place}.weight_shape"), r"weight_packed without .*weight_shape"),
        (
            "pack-quantized",
            lambda t: t.update({f"{place}.weight_packed": t[f"{place}.weight_packed"][:, :12]}),
            r"weight_packed is I32 \[64, 12\] for a matrix \[64, 96\]; supported: four values of 8 bits",
        ),
        ("int-quantized", lambda t: t.update(plain("q_proj", t)), "q_proj.*k_proj.*v_proj, which are computed as one"),
    ]
    for layout, change, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load(layout, change)


def plain(matrix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """That matrix of the first layer is not quantized after all."""
    name = f"model.layers.0.self_attn.{matrix}.weight"
    del tensors[f"{name}_scale"]
    return {name: tensors[name].float()}
