"""The operations of `ops.py` as Triton kernels, for CUDA devices: same names, same signatures."""

from .activation import gelu, gelu_tanh, silu_and_mul
from .attention import paged_attention
from .attention_work import attention_work
from .int8 import quantize_rows
from .linear import linear
from .linear_int8 import linear_int8, linear_w8a8
from .logprobs import token_logprobs
from .lora import lora
from .norm import layer_norm, layer_norm_int8, rms_norm, rms_norm_int8
from .pages import copy_pages
from .rotary import qk_norm_rotary_and_write_kv
from .sampling import sample
from .write import write_kv

__all__ = [
    "attention_work",
    "copy_pages",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "layer_norm_int8",
    "linear",
    "linear_int8",
    "linear_w8a8",
    "lora",
    "paged_attention",
    "qk_norm_rotary_and_write_kv",
    "quantize_rows",
    "rms_norm",
    "rms_norm_int8",
    "sample",
    "silu_and_mul",
    "token_logprobs",
    "write_kv",
]
