"""The shared library with the C++ kernels of this directory, and calls of it.

Setuptools builds it when Tandem is installed (pyproject.toml). Where it cannot be built (no C++ compiler, a processor
that is no x86-64), and where the processor lacks AVX2, the definitions compute instead. It has threads of its own
(crew.h), as many as torch is set to use.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..ops import KVLayer

SETS = ("none", "AVX2", "AVX-512", "AVX-512 with bfloat16 products")  # by number, see library.cpp
NUMBERS: Mapping[torch.dtype, int] = MappingProxyType({torch.float32: 0, torch.bfloat16: 1})  # of dtypes in calls.h
WIDEST_HEAD = 1024
MOST_INNER = 4096  # matrices · rank of `lora`

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


def _call(**fields: Any) -> type[ctypes.Structure]:
    """One structure of calls.h."""
    return type("Call", (ctypes.Structure,), {"_fields_": [(name, kind) for name, kind in fields.items()]})


def _fields(names: str, kind: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), kind)


Pack = _call(**_fields("w into", _POINTER), **_fields("outs ins type", _LONG))
Linear = _call(**_fields("x w bias y wide_x", _POINTER), **_fields("rows ins outs activation type w_type", _LONG))
LinearInt8 = _call(
    **_fields("x w scale totals bias y room", _POINTER), **_fields("rows ins outs activation type depth", _LONG)
)
Quantize = _call(**_fields("x values scale", _POINTER), **_fields("rows size type", _LONG))
Lora = _call(**_fields("x a b slots outs y", _POINTER), **_fields("rows ins parts rank type", _LONG))
Activate = _call(**_fields("x y", _POINTER), **_fields("rows outs activation type", _LONG))
Norm = _call(**_fields("x residual weight bias y", _POINTER), **_fields("rows size type", _LONG), eps=_FLOAT)
Pages = _call(**_fields("k v k_scale v_scale", _POINTER), **_fields("kv_heads page size step scale_step", _LONG))
Rotary = _call(
    **_fields("qkv q_norm k_norm positions cos sin slots q", _POINTER),
    pages=Pages,
    **_fields("rows heads half interleaved type", _LONG),
    eps=_FLOAT,
)
Write = _call(**_fields("k v slots", _POINTER), pages=Pages, **_fields("rows k_step v_step type", _LONG))
Attention = _call(
    **_fields("q out starts lengths table alibi", _POINTER),
    pages=Pages,
    **_fields("sequences table_width heads window type", _LONG),
    **_fields("scale softcap", _FLOAT),
)
Greedy = _call(**_fields("logits tokens", _POINTER), **_fields("rows size type", _LONG))
Draw = _call(
    **_fields("logits temperature seeds choices positions top_k top_p log_min_p tokens lowest", _POINTER),
    **_fields("rows size type", _LONG),
)
Logprobs = _call(
    **_fields("logits targets factors values ranks top_values top_tokens", _POINTER),
    **_fields("rows size top type", _LONG),
)
ReplayStep = _call(**_fields("function arguments", _POINTER))
Replay = _call(steps=_POINTER, count=_LONG)

# Told of every call of this thread's, while one is set. See recording.py.
RECORDER: ContextVar[Callable[[str, ctypes.Structure], None] | None] = ContextVar("recorder", default=None)


@dataclass(frozen=True)
class Native:
    """`set`: the number of the instruction set that is used."""

    library: ctypes.CDLL
    set: int

    @property
    def multiplies_bfloat16(self) -> bool:
        """Else products need such rows as float32."""
        return SETS[self.set] == SETS[-1]

    def run(self, name: str, call: ctypes.Structure) -> None:
        threads = torch.get_num_threads()
        getattr(self.library, name)(self.set, threads, ctypes.byref(call))
        recorder = RECORDER.get()
        if recorder is not None:
            recorder(name, call)


@cache
def native() -> Native | None:
    """The library with the best instruction set of this processor; None where there is none."""
    built = sorted(Path(__file__).parent.glob("_native*.so"))
    if not built:
        return None
    library = ctypes.CDLL(str(built[0]))
    number = library.tandem_best_set()
    return Native(library, number) if number else None


def described() -> str:
    """What computes on this CPU, for people."""
    found = native()
    return "PyTorch (the C++ kernels were not built or need AVX2)" if found is None else f"C++, {SETS[found.set]}"


def number(dtype: torch.dtype) -> int | None:
    """Of a dtype in calls.h; None: not one that is computed there."""
    return NUMBERS.get(dtype)


def pages_of(cache: KVLayer, dtype: torch.dtype) -> ctypes.Structure | None:
    """The pages for kernels that compute in `dtype`; None: they hold something else than that or int8."""
    kv_heads, page, size = cache.k.shape[1:]
    if size > WIDEST_HEAD or cache.k.dtype not in (dtype, torch.int8):
        return None
    step = _step(cache.k, cache.v)
    if cache.k_scale is None or cache.v_scale is None:
        assert cache.k.dtype == dtype, "int8 pages have scales"
        return Pages(at(cache.k), at(cache.v), None, None, kv_heads, page, size, step, 0)
    if cache.k_scale.dtype != torch.float16:
        return None
    scale_step = _step(cache.k_scale, cache.v_scale)
    scales = at(cache.k_scale), at(cache.v_scale)
    return Pages(at(cache.k), at(cache.v), *scales, kv_heads, page, size, step, scale_step)


def _step(k: Tensor, v: Tensor) -> int:
    """Elements from one page of K, and of V, [P, K, S, …] to the next; the page itself is contiguous."""
    step, *within = k.stride()
    lengths = k.shape[2:]
    contiguous = [prod(lengths[i:]) for i in range(len(lengths) + 1)]
    assert k.stride() == v.stride() and within == contiguous, "pages of other strides"
    return step


def at(tensor: Tensor | None) -> int | None:
    """Where it lies."""
    return None if tensor is None else tensor.data_ptr()
