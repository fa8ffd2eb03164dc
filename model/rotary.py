"""Rotary position embedding: the angles by position, with the ways of stretching them to longer contexts.

Each method gives inverse frequencies w [R / 2]; row p of the tables is cos(p w) and sin(p w), times `attention_factor`.

Dynamic NTK makes the base depend on the sequence's length. transformers computes it from the current length whenever
that exceeds `max_position_embeddings`, and leaves what is already in its cache as it was rotated. Here position p is
rotated with the frequencies for length max(p + 1, max_position_embeddings): the same as transformers token by token,
and a function of the position alone, so that pages can be shared, recomputed and filled in chunks. Only a prompt that
by itself is longer than `max_position_embeddings` is rotated differently (transformers then uses the whole prompt's
length for every row).

LongRoPE has two sets of frequencies. transformers takes the long one for a whole sequence once that is longer than
`original_max_position_embeddings`, and computes everything before it again. Here, as in other servers, all sequences of
a model have the same set: the long one if the model is served with a context beyond the original one, which equals
transformers for every sequence beyond it; else (`--max-model-len`) the short one, which equals transformers always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from .fields import Fields

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


# What each type reads from the config beside rope_type (formerly type), rope_theta and partial_rotary_factor.
READS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"factor", "long_factor", "short_factor", "attention_factor"}),
}
COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"})


@dataclass(frozen=True)
class Rope:
    """The rope fields of a config; which of them count depends on `type`."""

    type: RopeType = "default"
    theta: float = 10000.0
    rotary_size: int = 0  # R, the rotated part of a head
    factor: float = 1.0
    original_context: int = 0  # what the model was trained on: llama3, yarn, dynamic, longrope
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # yarn, longrope
    truncate: bool = True
    factors: tuple[float, ...] = ()  # longrope: of each pair
    short_factors: tuple[float, ...] = ()  # those for sequences up to original_context

    def within(self, context: int) -> Rope:
        """The rotation of a model that is given sequences of at most `context` tokens."""
        short = self.type == "longrope" and context <= self.original_context
        return replace(self, factors=self.short_factors) if short else self


def tables(rope: Rope, context: int) -> tuple[Tensor, Tensor]:
    """cos, sin [context, R / 2] float32."""
    positions = torch.arange(context, dtype=torch.float32)
    if rope.type == "dynamic":
        angles = positions.unsqueeze(-1) * _dynamic(rope, context)
    else:
        angles = torch.outer(positions, inverse_frequencies(rope))
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def inverse_frequencies(rope: Rope) -> Tensor:
    """w [R / 2] float32 of every type whose frequencies do not depend on the position."""
    plain = 1.0 / rope.theta ** _exponents(rope)
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, plain)
    if rope.type == "yarn":
        return _yarn(rope, plain)
    if rope.type == "longrope":
        return plain / torch.tensor(rope.factors)
    return plain


def _exponents(rope: Rope) -> Tensor:
    return torch.arange(0, rope.rotary_size, 2, dtype=torch.float32) / rope.rotary_size


def _dynamic(rope: Rope, context: int) -> Tensor:
    """[context, R / 2] of base theta · (factor · n / original - (factor - 1)) ^ (R / (R - 2)), n as the header says."""
    lengths = torch.arange(1, context + 1, dtype=torch.float64).clamp_(min=rope.original_context)
    growth = rope.factor * lengths / rope.original_context - (rope.factor - 1)
    base = rope.theta * growth ** (rope.rotary_size / (rope.rotary_size - 2))
    return 1.0 / base.float().unsqueeze(-1) ** _exponents(rope)


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    """Long wavelengths divided by `factor`, short ones kept, a linear passage in between (Llama 3.1)."""
    wavelength = 2 * math.pi / plain
    share = (rope.original_context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    share = share.clamp(0, 1)
    return (1 - share) * plain / rope.factor + share * plain


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    """Between interpolated and plain frequencies by the number of turns within the original context (YaRN)."""

    def dimension(turns: float) -> float:
        """The (fractional) pair that turns so many times within the original context."""
        turned = rope.original_context / (turns * 2 * math.pi)
        return rope.rotary_size * math.log(turned) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_size - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.rotary_size // 2, dtype=torch.float32) - low) / (high - low)).clamp_(0, 1)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def read_rope(
    fields: Fields,
    head_size: int,
    context: int,
    *,
    given: Fields | None = None,
    theta: float | None = None,
    share: float | None = None,
) -> tuple[Rope, int]:
    """The rotary embedding of a config whose max_position_embeddings is `context`, and the context it reaches.

    Reads `given`, by default `rope_parameters` or its older form, `rope_scaling`, whose `rope_theta` and
    `partial_rotary_factor` count before `theta` and `share`: by default the config's `rope_theta` and a whole head,
    the only one then allowed. Types that say by what factor they stretch the context have it stretched here; for llama3
    and longrope, max_position_embeddings is the stretched one already.
    """
    given = fields.object("rope_parameters", "rope_scaling") if given is None else given
    kind = rope_type(given)
    for name in given.values:
        if name not in READS[kind] | COMMON:
            raise given.error(name, f"leaving it out (rope_type {kind!r} does not read it)")
    if share is None:
        given.only("partial_rotary_factor", 1.0)
        fields.only("partial_rotary_factor", 1.0)
    share = given.number("partial_rotary_factor", 1.0 if share is None else share)
    size = int(head_size * share)
    if not 0 < share <= 1 or size % 2 or not size:
        raise given.error("partial_rotary_factor", f"a share of a head of {head_size} that gives an even number")
    theta = given.number("rope_theta", fields.number("rope_theta", 10000.0) if theta is None else theta)
    if kind == "default":
        return Rope("default", theta, size), context
    outside = fields if fields.get("original_max_position_embeddings") is not None else given
    original = outside.integer("original_max_position_embeddings", default=context)
    if kind == "longrope":
        return _longrope(given, theta, size, original, context), context
    factor = given.number("factor")
    rope = Rope(kind, theta, size, factor, original)
    if kind == "llama3":
        low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
        return replace(rope, low_freq_factor=low, high_freq_factor=high), context
    if kind == "yarn":
        rope = replace(
            rope,
            beta_fast=given.number("beta_fast", 32.0) or 32.0,
            beta_slow=given.number("beta_slow", 1.0) or 1.0,
            attention_factor=_yarn_attention_factor(given, factor),
            truncate=given.flag("truncate", True),
        )
        return rope, max(context, int(original * factor))
    if kind == "dynamic":
        rope = replace(rope, original_context=context)
    return rope, int(context * factor)


def rope_type(given: Fields) -> RopeType:
    """What `rope_type`, formerly `type`, says; "su" is what Phi-3 called LongRoPE at first."""
    name = "rope_type" if given.get("rope_type") is not None else "type"
    kind = given.choice(name, allowed=(*READS, "su"), default="default")
    return "longrope" if kind == "su" else kind  # pyright: ignore[reportReturnType]  (checked by choice)


def _longrope(given: Fields, theta: float, size: int, original: int, context: int) -> Rope:
    """cos and sin are scaled by `attention_factor`, by default √(1 + ln(factor) / ln(original))."""
    factor = given.number("factor", context / original)
    scale = 1.0 if factor <= 1 or original < 2 else math.sqrt(1 + math.log(factor) / math.log(original))
    rope = Rope(
        "longrope",
        theta,
        size,
        factor,
        original,
        attention_factor=given.number("attention_factor", scale),
        factors=given.numbers("long_factor", size // 2),
        short_factors=given.numbers("short_factor", size // 2),
    )
    return rope.within(context)


def _yarn_attention_factor(given: Fields, factor: float) -> float:
    """YaRN scales cos and sin by 1 + 0.1 ln(factor), or as `attention_factor` or the two mscale fields say."""
    explicit = given.get("attention_factor")
    if explicit is not None:
        return given.number("attention_factor")

    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    top, bottom = given.number("mscale", 0.0), given.number("mscale_all_dim", 0.0)
    return grown(top) / grown(bottom) if top and bottom else grown(1.0)


class Rotary(nn.Module):
    """The tables on the model's device."""

    def __init__(self, rope: Rope, context: int, device: torch.device) -> None:
        super().__init__()
        cos, sin = tables(rope, context)
        self.cos, self.sin = nn.Buffer(cos.to(device)), nn.Buffer(sin.to(device))
