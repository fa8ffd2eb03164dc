"""Copies of whole pages: a page that two sequences share becomes two when one of them writes to it.

pages[dst[i]] = pages[src[i]]. A program per copy and 8 KiB: a page is read once and written once.

Letters: C copies, P pages.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import options

BYTES = 8192  # of a program: four 16-byte loads per thread of 4 warps


@triton.jit(do_not_specialize=["src_stride", "dst_stride"], do_not_specialize_on_alignment=["src", "dst"])
def _copy_pages_kernel(pages, src, dst, src_stride, dst_stride, stride, count, BLOCK: tl.constexpr):
    copy = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(pages + tl.load(src + copy * src_stride) * stride + place, mask=inside)
    tl.store(pages + tl.load(dst + copy * dst_stride) * stride + place, value, mask=inside)


def copy_pages(pages: Tensor, src: Tensor, dst: Tensor) -> None:
    """`ops.copy_pages`. pages [P, ...] may have any stride between pages; src and dst may be columns of a table."""
    copies, page = src.shape[0], pages[0]
    assert src.shape == dst.shape == (copies,) and src.dtype == dst.dtype == torch.int64
    assert page.is_contiguous() and page.numel() < 2**31
    if copies:
        block = BYTES // pages.element_size()
        strides = src.stride(0), dst.stride(0), pages.stride(0)
        _copy_pages_kernel[(copies, triton.cdiv(page.numel(), block))](
            pages, src, dst, *strides, page.numel(), block, **options(num_warps=4)
        )
