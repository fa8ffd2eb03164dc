"""New weights for a loaded model are those that a start would have loaded, and wrong ones change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from tandem.model.errors import CheckpointError
from tandem.model.incoming import digest_of, from_disk, from_shared_memory, read_safetensors
from tandem.model.linear import linears
from tandem.model.load import load_model
from tandem.model.model import Model
from tandem.model.update import Update
from tandem.model.weights import slots_of

# Fused, tied, transposed, reordered and changed tensors, heads, norms without weights.
VARIANTS = ["gpt2", "llama-tied", "llama-bias", "neox", "opt-plain", "gemma3", "phi3-short", "falcon-new", "gptj-tied"]
VARIANTS += ["qwen2-reward", "olmo2-reward"]
QUANTIZED = ["gpt2", "llama-tied", "neox", "gemma3", "qwen2-reward"]


def checkpoint(directory: Path, variant: str, seed: int) -> Path:
    path = directory / f"{variant}-{seed}"
    return path if path.exists() else write_checkpoint(path, variant, seed=seed, tokenizer=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def llama(directory: Path) -> tuple[Path, Path]:
    return checkpoint(directory, "llama-gqa", 1), checkpoint(directory, "llama-gqa", 2)


def contents(model: Model) -> dict[str, Tensor]:
    parts = (model.decoder, model.head)
    found = {slot.name: slot.into.clone() for part in parts for slot in slots_of(part)}
    found |= {name: tensor.clone() for part in parts for name, tensor in part.named_buffers()}
    scales = {f"{slot.name} scale": slot.scale for part in parts for slot in slots_of(part) if slot.scale is not None}
    packed = {place: linear.packed for part in parts for place, linear in linears(part)}
    return found | {f"{place} packed": kept.data.clone() for place, kept in packed.items() if kept is not None} | scales


def assert_same(model: Model, other: Model) -> None:
    ours, theirs = contents(model), contents(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def update(model: Model, path: Path) -> Update:
    new = Update(model)
    new.stage(from_disk(str(path)).tensors, complete=True)
    new.complete(partial=False)
    return new


@pytest.mark.parametrize(
    ("variant", "scheme"),
    [
        *((variant, "none") for variant in VARIANTS),
        *((variant, "int8") for variant in QUANTIZED),
        ("llama-bias", "w8a8"),
    ],
)
def test_an_update_gives_what_a_start_gives(variant: str, scheme: Any, directory: Path) -> None:
    before, after = checkpoint(directory, variant, 1), checkpoint(directory, variant, 2)
    model = load_model(before, quantization=scheme)
    new = update(model, after)
    assert_same(model, load_model(before, quantization=scheme))  # staged, and nothing has changed
    places = {name: buffer.data_ptr() for name, buffer in model.decoder.named_buffers()}
    new.commit()
    assert_same(model, load_model(after, quantization=scheme))
    assert places == {name: buffer.data_ptr() for name, buffer in model.decoder.named_buffers()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tensors_come_in_another_dtype(dtype: str, llama: tuple[Path, Path]) -> None:
    model = load_model(llama[0], dtype=dtype)
    new = update(model, llama[1])
    new.commit()
    assert_same(model, load_model(llama[1], dtype=dtype))
    assert new.tensors == len(load_file(llama[1] / "model.safetensors"))
    assert new.bytes == sum(tensor.nbytes for tensor in load_file(llama[1] / "model.safetensors").values())


def test_a_packed_matrix_may_change_its_dtype(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """What bfloat16 holds exactly is kept so beside float32: with the weights that may change."""
    tensors = load_file(llama[1] / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "short.safetensors")
    save_file({name: tensor.bfloat16().float() for name, tensor in tensors.items()}, tmp_path / "long.safetensors")
    model, other = load_model(llama[0]), load_model(llama[0])
    update(model, tmp_path / "short.safetensors").commit()
    update(other, tmp_path / "long.safetensors").commit()
    assert_same(model, other)
    update(model, llama[0]).commit()
    assert_same(model, load_model(llama[0]))


def test_some_tensors_alone_in_several_rounds(llama: tuple[Path, Path]) -> None:
    tensors, old = (load_file(path / "model.safetensors") for path in reversed(llama))
    given = ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"]
    model, new = load_model(llama[0]), None
    stored = dict(from_disk(str(llama[1])).tensors)
    new = Update(model)
    for name in given:
        new.stage([(name, stored[name])])
    new.complete(partial=True)
    new.commit()
    found = contents(model)
    for name, tensor in tensors.items():
        expected = tensor if name in given else old[name]
        assert torch.equal(found[name.removeprefix("model.")], expected), name


def test_a_tied_matrix_follows_the_one_tensor_that_comes(directory: Path) -> None:
    before, after = (checkpoint(directory, "llama-tied", seed) for seed in (1, 2))
    tensors = dict(from_disk(str(after)).tensors)
    assert "lm_head.weight" not in tensors
    model = load_model(before)
    new = Update(model)
    new.stage([("model.embed_tokens.weight", tensors["model.embed_tokens.weight"])])
    new.complete(partial=True)
    new.commit()
    found, expected = contents(model), contents(load_model(after))
    assert torch.equal(found["lm_head.weight"], expected["embed_tokens.weight"])


def test_what_is_wrong_is_named_and_changes_nothing(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(llama[0])
    tensors = load_file(llama[1] / "model.safetensors")
    broken = tensors["model.norm.weight"].clone()
    broken[3] = float("nan")
    cases = [
        ({"model.norm.weight": broken}, "model.norm.weight has values that are not finite|norm.weight has values"),
        ({"model.norm.weight": torch.zeros(3)}, r"model.norm.weight is \[3\], must be \[64\]"),
        ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, "norm.weight is I8"),
        ({"model.extra.weight": torch.zeros(3)}, "not part of this architecture: model.extra.weight"),
    ]
    for changed, message in cases:
        save_file(tensors | changed, tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match=message):
            update(model, tmp_path / "wrong.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match=r"1 missing: layers.1.mlp.up_proj.weight"):
        update(model, tmp_path / "wrong.safetensors")
    new = Update(model)
    stored = from_disk(str(tmp_path / "wrong.safetensors")).tensors
    new.stage(stored)
    with pytest.raises(CheckpointError, match=r"given twice: model.norm.weight"):
        new.stage([("model.norm.weight", dict(stored)["model.norm.weight"])])
    new = Update(model)
    new.stage(stored)
    with pytest.raises(CheckpointError, match=r"1 missing: layers.1.mlp.up_proj.weight"):
        new.complete(partial=False)
    with pytest.raises(CheckpointError, match=r"float16 cannot hold"):
        save_file({"model.norm.weight": torch.full((64,), 1e6)}, tmp_path / "large.safetensors")
        Update(load_model(llama[0], dtype="float16")).stage(from_disk(str(tmp_path / "large.safetensors")).tensors)
    assert_same(model, load_model(llama[0]))


# Files and shared memory


def test_sharded_and_pickled_checkpoints(llama: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(llama[1] / "model.safetensors")
    halves = dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])
    names: dict[str, str] = {}
    for number, half in enumerate(halves):
        save_file(half, tmp_path / f"part-{number}.safetensors")
        names |= dict.fromkeys(half, f"part-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "pickled").mkdir()
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pickled", tmp_path / "pickled" / "pytorch_model.bin"):
        model = load_model(llama[0])
        update(model, path).commit()
        assert_same(model, load_model(llama[1]))
    assert digest_of(str(tmp_path)) == from_disk(str(tmp_path)).digest != digest_of(str(tmp_path / "pickled"))


def test_damaged_files_are_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    whole, file = (llama[1] / "model.safetensors").read_bytes(), tmp_path / "x.safetensors"
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])

    def write(head: object, data: bytes = whole[8 + length :]) -> None:
        text = json.dumps(head).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data)

    name = "model.norm.weight"
    first, last = header[name]["data_offsets"]
    damaged = [
        {name: header[name] | {"data_offsets": [first, last + 4]}},
        {name: header[name] | {"data_offsets": [last, first]}},
        {name: header[name] | {"data_offsets": [first + (1 << 40), last + (1 << 40)]}},
        {name: header[name] | {"shape": [-64]}},
        {name: header[name] | {"shape": [32]}},
        {name: header[name] | {"shape": [float("inf")]}},
        {name: {"dtype": "F32"}},
        {name: [1, 2]},
        [1, 2],
    ]
    for head in damaged:
        write(head)
        with pytest.raises(CheckpointError, match=r"x.safetensors"):
            read_safetensors(file)
    for cut in (0, 5, 100, length - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"truncated|damaged"):
            read_safetensors(file)
    for length_of_header in (len(whole) + 1, 2**64 - 1):
        file.write_bytes(length_of_header.to_bytes(8, "little") + whole[8:])
        with pytest.raises(CheckpointError, match="its header would end"):
            from_disk(str(file))
        assert digest_of(str(file))
    nested = b"[" * 100_000
    file.write_bytes(len(nested).to_bytes(8, "little") + nested)
    with pytest.raises(CheckpointError, match="header is damaged"):
        read_safetensors(file)
    write(header)
    stored = read_safetensors(file)
    file.write_bytes(whole[: length + 100])
    with pytest.raises(CheckpointError, match="became shorter"):
        stored["model.norm.weight"].read()
    with pytest.raises(CheckpointError, match=r"gone.safetensors does not exist"):
        from_disk(str(tmp_path / "gone.safetensors"))
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"x.txt is neither a .safetensors nor a .bin"):
        from_disk(str(tmp_path / "x.txt"))


def test_shared_memory_is_read_by_name(llama: tuple[Path, Path]) -> None:
    from multiprocessing.shared_memory import SharedMemory

    whole = (llama[1] / "model.safetensors").read_bytes()
    memory = SharedMemory(create=True, size=len(whole) + 4096)
    try:
        memory.buf[: len(whole)] = whole
        model = load_model(llama[0])
        new = Update(model)
        new.stage(from_shared_memory(memory.name, len(whole)).tensors, complete=True)
        new.complete(partial=False)
        new.commit()
        assert_same(model, load_model(llama[1]))
        with pytest.raises(CheckpointError, match=f"has {len(whole) + 4096} bytes, not {len(whole) + 4097}"):
            from_shared_memory(memory.name, len(whole) + 4097)
        with pytest.raises(CheckpointError, match="does not lie at its bytes"):
            from_shared_memory(memory.name, len(whole) - 4)
    finally:
        memory.close()
        memory.unlink()
    for wrong in ("../passwd", "a/b", "", "..", "a\0b"):
        with pytest.raises(CheckpointError, match="is no name of a POSIX shared memory"):
            from_shared_memory(wrong)
    with pytest.raises(CheckpointError, match="No such file"):
        from_shared_memory("not-there-at-all")
