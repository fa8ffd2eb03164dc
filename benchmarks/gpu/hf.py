"""transformers on the same shapes and the same random weights: the peer that is found on most machines."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import torch

from ...model.model import Model
from .engines import named_tensors
from .rows import Absent
from .setting import Setting
from .shapes import Shape


def library() -> Any:
    """The package; raises Absent where it is not installed."""
    if find_spec("transformers") is None:
        raise Absent("transformers is not installed")
    return importlib.import_module("transformers")


def make(setting: Setting, shape: Shape, like: Model) -> Any:
    """transformers' model of that shape in eval mode, with the weights of `like`, in its dtype and on its device."""
    transformers = library()
    fields = {name: value for name, value in shape.items() if name not in ("architectures", "dtype")}
    fields["pad_token_id"] = 0  # prompts have none; a batch of texts to score must name one
    model_class = getattr(transformers, shape["architectures"][0])
    config = model_class.config_class(**fields)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.set_default_dtype(like.dtype)
    try:
        with torch.device(setting.device):
            model = model_class(config).eval()
    finally:
        torch.set_default_dtype(before)
    into = dict(model.named_parameters())
    with torch.inference_mode():
        for name, tensor in named_tensors(like):
            into.pop(name).copy_(tensor)
    left = [name for name in into if not name.endswith("lm_head.weight")]
    if left:
        raise RuntimeError(f"no weights for {', '.join(left[:4])}")
    return model
