"""Arrays of floats in an answer: JSON lists, or with `encoding: b64_f32` in the same place a string that holds their
little-endian float32 numbers in base64."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Literal

Encoding = Literal["json", "b64_f32"]
Shown = list[float] | str


def as_list(values: Sequence[float]) -> Shown:
    return list(values)


def as_base64(values: Sequence[float]) -> Shown:
    return b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


ENCODERS: dict[Encoding, Callable[[Sequence[float]], Shown]] = {"json": as_list, "b64_f32": as_base64}
