"""Transformers' models as int8 schemes mean them: weights that int8 can hold, and for w8a8 rows, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tandem.kernels.ops import quantize_rows


def rounded(rows: Tensor) -> Tensor:
    """What int8 rows with a scale each stand for, in float64. rows [R, D]."""
    values, scale = quantize_rows(rows.float())
    return values.double() * scale.double().unsqueeze(-1)


def meant(model: PreTrainedModel, rows: bool = False) -> PreTrainedModel:
    """The model in float64, in place: the matrices of its layers and its language model's head in int8, which a tied
    embedding is not. `rows`: what is multiplied by the layers' matrices is rounded to int8, too."""
    model.double()
    head = model.get_output_embeddings()
    if head is not None:
        bias = getattr(head, "bias", None)
        apart = nn.Linear(head.in_features, head.out_features, bias is not None, dtype=torch.float64)
        with torch.no_grad():
            apart.weight.copy_(rounded(head.weight))
            if bias is not None:
                apart.bias.copy_(bias)
        model.set_output_embeddings(apart)
    for name, part in model.named_modules():
        inside = isinstance(part, (nn.Linear, Conv1D)) and not name.endswith(("lm_head", "embed_out", "score"))
        if inside and isinstance(part, (nn.Linear, Conv1D)):
            with torch.no_grad():
                weight = rounded(part.weight.T).T if isinstance(part, Conv1D) else rounded(part.weight)
                part.weight.copy_(weight)
            if rows:
                part.register_forward_pre_hook(lambda _, given: (rounded(given[0].flatten(0, -2)).view_as(given[0]),))
    return model
