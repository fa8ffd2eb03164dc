"""SmoothQuant: which norms are found, that folding changes nothing, and that outliers cost less behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.kernels.ops import linear_w8a8, quantize_rows
from tandem.model.errors import CheckpointError
from tandem.model.linear import linears
from tandem.model.load import load_model
from tandem.model.model import Model
from tandem.model.quantize import Source
from tandem.model.reading import read_texts
from tandem.model.smoothing import find_fed, smooth

TEXTS = [list(range(5, 45)), list(range(60, 90))]


def quiet(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize(
    ("variant", "found"),
    [
        ("llama", {"input_layernorm": 3, "post_attention_layernorm": 2}),
        ("gpt2", {"ln_1": 1, "ln_2": 1}),
        ("gptj", {"ln_1": 4}),  # attention and MLP read the same
        ("gemma2", {"input_layernorm": 3, "pre_feedforward_layernorm": 2}),
        ("falcon-new", {"ln_attn": 1, "ln_mlp": 1}),
        ("bloom", {"input_layernorm": 1, "post_attention_layernorm": 1}),
        ("bloom-post", {}),  # residuals start from the norm's result
        ("opt-post", {"final_layer_norm": 1}),  # of the last layer alone, in front of project_out
        ("olmo2", {}),  # norms stand behind the matrices
    ],
)
def test_norms_are_found_that_only_matrices_read(tmp_path: Path, variant: str, found: dict[str, int]) -> None:
    model = load_model(write_checkpoint(tmp_path, variant, tokenizer=False))
    fed = find_fed(model, TEXTS[0])
    named = {(one.slots[0].name.split(".")[-2], len(one.matrices)) for one in fed}
    assert named == set(found.items())
    layers = 1 if variant == "opt-post" else model.config.layers
    assert len(fed) == layers * len(found)


def folded(source: Path, target: Path, alpha: float, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint with the factors folded in and nothing quantized."""
    given = Source(source)
    changes = smooth(load_model(source), given, TEXTS, alpha, quiet)
    tensors = {
        name: changes[name](one.read()) if name in changes else one.read() for name, one in given.tensors.items()
    }
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gptj", "gemma3", "falcon-new", "opt", "neox", "phi3"])
def test_folding_changes_nothing_but_rounding(tmp_path: Path, variant: str) -> None:
    source = write_checkpoint(tmp_path / "source", variant, tokenizer=False)
    other = folded(source, tmp_path / "folded", 0.5)
    before, after = (read_texts(load_model(path), TEXTS)[0] for path in (source, other))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    names = load_file(source / "model.safetensors"), load_file(other / "model.safetensors")
    assert sum(not torch.equal(names[0][name], names[1][name]) for name in names[0]) >= 6


def quantized(model: Model) -> Model:
    """Its matrices in int8 for rows in int8, as the definitions compute."""
    for _, linear in linears(model.decoder):

        def product(x: Tensor, linear=linear, weight=quantize_rows(linear.weight)) -> Tensor:  # noqa: B008
            return linear_w8a8(*quantize_rows(x), weight, linear.bias, linear.activation, x.dtype)

        linear.forward = product
    return model


def test_channels_that_stand_out_cost_less(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", tokenizer=False)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[5] *= 60
    save_file(tensors, source / "model.safetensors")
    exact, plain = (read_texts(model, TEXTS)[0] for model in (load_model(source), quantized(load_model(source))))
    other = quantized(load_model(folded(source, tmp_path / "folded", 0.5)))
    smoothed = read_texts(other, TEXTS)[0]
    assert float((smoothed - exact).norm()) < 0.5 * float((plain - exact).norm())


def test_a_family_without_such_norms_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "olmo2", tokenizer=False)
    with pytest.raises(CheckpointError, match="Olmo2ForCausalLM has none; leave --smooth-quant out"):
        smooth(load_model(source), Source(source), TEXTS, 0.5, quiet)
