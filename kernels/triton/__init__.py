"""The operations of `ops.py` as Triton kernels, for CUDA devices: same names, same signatures."""

from .norm import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
