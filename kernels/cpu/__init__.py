"""Operations of `ops.py` and `sampling.py` in C++, for x86-64 CPUs with AVX2 or AVX-512: same names, same signatures.

A row's bits depend on nothing but that row in all of them.
"""

from .activations import gelu, gelu_tanh, silu_and_mul
from .attention import paged_attention
from .int8 import pack_int8, packed_linear_int8, quantize_rows
from .low_rank import lora
from .product import pack, packed_linear
from .rows import layer_norm, qk_norm_rotary_and_write_kv, rms_norm, write_kv
from .sampling import draw, greedy, token_logprobs

__all__ = [
    "draw",
    "gelu",
    "gelu_tanh",
    "greedy",
    "layer_norm",
    "lora",
    "pack",
    "pack_int8",
    "packed_linear",
    "packed_linear_int8",
    "paged_attention",
    "qk_norm_rotary_and_write_kv",
    "quantize_rows",
    "rms_norm",
    "silu_and_mul",
    "token_logprobs",
    "write_kv",
]
