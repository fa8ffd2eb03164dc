"""LoRA adapters as PEFT writes them, made by hand, and what they make of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_dora": False,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
}


def targets(model: PreTrainedModel, *names: str) -> dict[str, tuple[int, int]]:
    """(ins, outs) of the matrices of the model's layers by place, of those whose place ends with one of the names."""
    found: dict[str, tuple[int, int]] = {}
    for place, module in model.named_modules():
        inside = ".layers." in place or ".h." in place
        if inside and isinstance(module, (torch.nn.Linear, Conv1D)) and (not names or place.endswith(names)):
            outs, ins = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.T.shape
            found[place] = ins, outs
    return found


def make_adapter(
    path: Path, model: PreTrainedModel, *names: str, seed: int = 0, infix: str = "", size: float = 0.15, **config: Any
) -> Path:
    """An adapter with random A and B, for the named matrices or all; ranks as `rank_pattern` has them by last name."""
    settings = {**CONFIG, "target_modules": sorted(names) or "all-linear", **config}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for place, (ins, outs) in targets(model, *names).items():
        rank = settings["rank_pattern"].get(place.rpartition(".")[2], settings["r"])
        for half, shape in (("A", (rank, ins)), ("B", (outs, rank))):
            noise = torch.randn(shape, generator=generator) * (ins**-0.5 if half == "A" else size)
            tensors[f"base_model.model.{place}.lora_{half}{infix}.weight"] = noise
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return path


def merge(model: PreTrainedModel, path: Path) -> PreTrainedModel:
    """The model with W + scale · B A in each place, by PEFT's definition; in place."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = load_file(path / "adapter_model.safetensors")
    modules = dict(model.named_modules())
    for name, down in tensors.items():
        if ".lora_A" not in name:
            continue
        place = name.removeprefix("base_model.model.").partition(".lora_A")[0]
        last = place.rpartition(".")[2]
        rank = config["rank_pattern"].get(last, config["r"])
        alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
        change = (
            alpha / (rank**0.5 if config["use_rslora"] else rank) * (tensors[name.replace("lora_A", "lora_B")] @ down)
        )
        module = modules[place]
        with torch.no_grad():
            module.weight += change.T if isinstance(module, Conv1D) else change
    return model
