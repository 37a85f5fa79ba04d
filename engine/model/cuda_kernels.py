"""What the decoder computes with on an NVIDIA GPU: FlashInfer's fused kernels, and one of ours in Triton.

Imported on a GPU machine alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flashinfer
import triton
import triton.language as tl
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class CudaKernels:
    """Implements `Kernels`."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        normed: Tensor = flashinfer.norm.rmsnorm(flat, weight, eps)
        return normed.view(x.shape)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        flashinfer.norm.fused_add_rmsnorm(x, residual, weight, eps)
        return x, residual

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        product: Tensor = flashinfer.activation.silu_and_mul(gate_up)
        return product


def rotate_and_store(
    turning: Tensor,
    value: Tensor,
    pool: Tensor,
    layer: int,
    heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    pages: Tensor,
) -> None:
    """Rotates queries and keys in place, and stores keys and values in their pages: one launch.

    `turning` [tokens, heads + kv_heads, head_dim]; `value` [tokens, kv_heads, head_dim]; `pool` is
    [page, kv_head, layer, 2, page_size, head_dim]; `cos`, `sin` [max_context, 1, head_dim]; `positions` and `pages`,
    int32 [tokens], say where each token stands and which page it goes to.
    """
    tokens, rows, head_dim = turning.shape
    kv_heads = value.shape[1]
    page_size = pool.shape[4]
    _rotate_and_store[(tokens, triton.cdiv(rows, 8))](
        turning,
        value,
        pool,
        cos,
        sin,
        positions,
        pages,
        layer,
        turning.stride(0),
        turning.stride(1),
        value.stride(0),
        value.stride(1),
        pool.stride(0),
        pool.stride(1),
        pool.stride(2),
        pool.stride(3),
        heads,
        kv_heads,
        page_size,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        ROWS=8,
        num_warps=4,
    )


# Triton reads the function's own source, and takes annotations for values: only constants have one.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate_and_store(  # type: ignore[no-untyped-def]
    turning,
    value,
    pool,
    cos,
    sin,
    positions,
    pages,
    layer,
    turning_token,
    turning_head,
    value_token,
    value_head,
    pool_page,
    pool_head,
    pool_layer,
    pool_side,
    heads,
    kv_heads,
    page_size,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0)
    position = tl.load(positions + token)
    page = tl.load(pages + token).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, HALF)
    inside = columns < HEAD_DIM // 2
    mask = (rows < heads + kv_heads)[:, None] & inside[None, :]
    table = position.to(tl.int64) * HEAD_DIM
    c = tl.load(cos + table + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + table + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = turning + token.to(tl.int64) * turning_token + rows[:, None] * turning_head + columns[None, :]
    left = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    right = tl.load(at + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    new_left = left * c - right * s
    new_right = right * c + left * s
    queries = mask & (rows < heads)[:, None]
    tl.store(at, new_left, mask=queries)
    tl.store(at + HEAD_DIM // 2, new_right, mask=queries)
    keys = mask & (rows >= heads)[:, None]
    head = rows - heads
    offset = position % page_size
    target = (
        pool + page * pool_page + head[:, None] * pool_head + layer * pool_layer + offset * HEAD_DIM + columns[None, :]
    )
    tl.store(target, new_left, mask=keys)
    tl.store(target + HEAD_DIM // 2, new_right, mask=keys)
    source = value + token.to(tl.int64) * value_token + head[:, None] * value_head + columns[None, :]
    low = tl.load(source, mask=keys, other=0.0)
    high = tl.load(source + HEAD_DIM // 2, mask=keys, other=0.0)
    tl.store(target + pool_side, low, mask=keys)
    tl.store(target + pool_side + HEAD_DIM // 2, high, mask=keys)
