"""How the heads of reward and value models lie on disk: the one list of their names, and finding which one it is."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from .config import ScoreConfig
from .errors import CheckpointError
from .fields import Fields
from .pooling import ScorePoolingMode, score_pooling, token_ids_of
from .stored import Stored

FILES = ("value_head.safetensors", "value_head.bin")  # LLaMA-Factory's, beside the decoder's


class HeadFormat(NamedTuple):
    """Where a head's tensors are: `key.weight` of one matrix, `key.0.weight`, `key.2.weight`, … of an MLP."""

    name: str  # as it is shown
    key: str
    pooling: ScorePoolingMode = "last"  # where config.json does not say otherwise
    pooling_field: str | None = None  # in which it may say so: "last" or "mean"
    bias: bool = False  # is part of it; elsewhere it may be there
    counted: bool = False  # config.json says how many outputs it has; elsewhere that is one
    beside: bool = False  # it may stand beside a language model's head, so that the role must be said
    scale: bool = False  # config.json has `mean` and `std`
    normalizer: str | None = None  # prefix of the buffers `mean` and `var`


FORMATS = (
    HeadFormat("score", "score", "last_non_pad", counted=True),  # transformers; as an MLP Qwen2.5-Math-RM, INF-ORM
    HeadFormat("TRL v_head", "v_head.summary", bias=True, beside=True),  # also LLaMA-Factory; as an MLP GRM
    HeadFormat("v_head", "v_head", "before_first_pad"),  # DeepSpeed-Chat, trlx, Starling
    HeadFormat("value_head", "value_head"),
    HeadFormat("reward_head", "reward_head"),
    HeadFormat("regression_head", "regression_head"),  # UltraRM, Eurus
    HeadFormat("Beaver score_head", "score_head", normalizer="normalizer."),
    HeadFormat("OpenAssistant out_proj", "out_proj", pooling_field="pooling", bias=True),
)


class FoundHead(NamedTuple):
    format: HeadFormat
    layers: tuple[str, ...]  # names of its matrices without `.weight`, in order


def formats(fields: Fields) -> tuple[HeadFormat, ...]:
    """Those that may be in a checkpoint: all, or the one that OpenRLHF names in config.json."""
    prefix = fields.get("value_head_prefix")
    if prefix is None:
        return FORMATS
    if not isinstance(prefix, str) or not prefix:
        raise fields.error("value_head_prefix", "the name of the head")
    return (HeadFormat(f"OpenRLHF {prefix}", prefix, scale=True),)


def find_head(directory: Path, fields: Fields, names: Collection[str]) -> FoundHead | None:
    """The head among tensors of these names; None: there is none. Raises CheckpointError where there are several."""
    found = [FoundHead(one, layers) for one in formats(fields) if (layers := _layers(directory, one.key, names))]
    if len(found) > 1:
        several = " and ".join(head.layers[0] for head in found)
        raise CheckpointError(
            f"{directory} has several heads, {several}: name the one to serve as value_head_prefix in config.json"
        )
    return found[0] if found else None


def _layers(directory: Path, key: str, names: Collection[str]) -> tuple[str, ...]:
    if f"{key}.weight" in names:
        return (key,)
    inner = re.compile(rf"{re.escape(key)}\.(\d+)\.weight")
    places = sorted(int(match[1]) for name in names if (match := inner.fullmatch(name)))
    if places != list(range(0, 2 * len(places), 2)):
        raise CheckpointError(
            f"{directory}: {key} has matrices at {places}; supported: 0, 2, … with a ReLU between two"
        )
    return tuple(f"{key}.{place}" for place in places)


def no_head(directory: Path, fields: Fields) -> CheckpointError:
    """What is said where one is needed."""
    looked = ", ".join(f"{one.key}.weight" for one in formats(fields))
    return CheckpointError(f"{directory} has no head that gives a score or a value: none of {looked} is in its files")


def read_head(
    fields: Fields,
    head: FoundHead,
    tensors: Mapping[str, Stored],
    end_ids: tuple[int, ...],
    pooling: ScorePoolingMode | None,
) -> ScoreConfig:
    """What the checkpoint says of its head; `pooling` instead of what it says of that. Raises CheckpointError."""
    mean, std = _scale(fields, head.format, tensors)
    return ScoreConfig(
        format=head.format.name,
        layers=head.layers,
        inner=tuple(tensors[f"{layer}.weight"].shape[0] for layer in head.layers[:-1]),
        bias=head.format.bias,
        pooling=score_pooling(pooling or _pooling(fields, head.format), fields, end_ids),
        mean=mean,
        std=std,
    )


def _pooling(fields: Fields, head: HeadFormat) -> ScorePoolingMode:
    if fields.get("reward_token_id") is not None:
        return "token_id"
    if head.pooling_field is not None:
        given = fields.choice(head.pooling_field, allowed=("last", "mean"), default="last")
        return "mean" if given == "mean" else "last"
    if head.pooling in ("last_non_pad", "before_first_pad") and not token_ids_of(fields, "pad_token_id"):
        return "last"
    return head.pooling


def _scale(fields: Fields, head: HeadFormat, tensors: Mapping[str, Stored]) -> tuple[float, float]:
    """(mean, standard deviation) that the checkpoint divides its scores by."""
    mean, std = 0.0, 1.0
    if head.scale:
        mean, std = fields.number("mean", 0.0), fields.number("std", 1.0)
    elif head.normalizer is not None and fields.flag("do_normalize", True):
        names = [f"{head.normalizer}{name}" for name in ("mean", "var")]
        if all(name in tensors for name in names):
            mean, variance = (_number(name, tensors[name]) for name in names)
            std = math.sqrt(max(variance, 0.0))
        if fields.get("score_type") == "cost":  # which Beaver only scales
            mean = 0.0
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise CheckpointError(f"{fields.path.parent} scales its scores by mean {mean} and deviation {std}: no numbers")
    return mean, std


def _number(name: str, stored: Stored) -> float:
    if math.prod(stored.shape) != 1:
        raise CheckpointError(f"{stored.file}: {name} is {list(stored.shape)}, must be one number")
    return float(stored.read())
