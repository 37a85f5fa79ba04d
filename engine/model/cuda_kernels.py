"""What the decoder computes with on an NVIDIA GPU: cuBLAS, FlashInfer's fused kernels, and our own.

Imported on a GPU machine alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flashinfer
import torch
import triton
import triton.language as tl
from torch.nn import functional

from microserve.engine.model import cuda_skinny as skinny
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from torch import Tensor

_log = get_logger(__name__)

# The fastest of the tilings tried on an H200, at 1, 8 and 16 rows, and at 32 and 64.
_FEW = 16
_LINEAR = skinny.Tiling(64, 128, ahead=128)
_GATED_FEW, _GATED = skinny.Tiling(32, 128, stages=5, ahead=128), skinny.Tiling(64, 64, stages=5, ahead=128)
_ADDED_FEW, _ADDED = skinny.Tiling(64, 128, parts=4, ahead=128), skinny.Tiling(64, 128, parts=2, ahead=128)
_LARGE, _FEWEST = 32768, 2
"""Matrix rows from which a product by itself is worth our kernel: below, cuBLAS is faster, but for one or two rows."""
_MANY = 1024
"""Rows from which gate, up and activation are one kernel: at 512, its tiles do not come out even, and it is slower."""


class CudaKernels:
    """Implements `Kernels`: cuBLAS and FlashInfer, but kernels of our own for the few rows of small decode steps, and
    for gate and up of many."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        # What their launches need began with Hopper.
        self._overlap = torch.cuda.get_device_capability(device) >= (9, 0)
        self._many = _gated_of_many(dtype, device)

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        ours = len(x) <= (_FEW if weight.shape[0] >= _LARGE else _FEWEST)
        if self._overlap and ours and skinny.fits(weight, _LINEAR):
            return skinny.linear(x, weight, bias, _LINEAR, out)
        if out is None:
            return functional.linear(x, weight, bias)
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        normed: Tensor = flashinfer.norm.rmsnorm(flat, weight, eps)
        return normed.view(x.shape)

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        tiling = _ADDED_FEW if len(x) <= _FEW else _ADDED
        if self._is_skinny(x) and bias is None and skinny.fits(weight, tiling):
            return skinny.linear_add_norm(x, weight, residual, norm, eps, tiling)
        added = functional.linear(x, weight, bias)
        flashinfer.norm.fused_add_rmsnorm(added, residual, norm, eps)
        return added, residual

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        tiling = _GATED_FEW if len(x) <= _FEW else _GATED
        if self._is_skinny(x) and bias is None and skinny.fits(weight, tiling, gated=True):
            return skinny.gated(x, weight, tiling)
        if self._many is not None and len(x) >= _MANY and bias is None and self._many.fits(x, weight):
            fused: Tensor = self._many.gated(x, weight)
            return fused
        product: Tensor = flashinfer.activation.silu_and_mul(functional.linear(x, weight, bias))
        return product

    def _is_skinny(self, x: Tensor) -> bool:
        return self._overlap and x.shape[0] <= skinny.MOST_ROWS


def _gated_of_many(dtype: torch.dtype, device: torch.device) -> Any:
    """`cuda_gated`, where it works: what it is written in is not a part of Triton for good, and is for Hopper."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from microserve.engine.model import cuda_gated

        # Every model's sizes are multiples of sixteen, so this compiles what they will use.
        x, weight = (torch.ones(rows, 64, dtype=dtype, device=device) for rows in (16, 32))
        cuda_gated.gated(x, weight)
    except Exception as error:  # it cannot be imported, compiled or launched: two kernels do
        _log.warning("gate and up are computed in two kernels", reason=repr(error))
        return None
    # Not above: after a fault in it, this process can use the GPU no more.
    torch.cuda.synchronize(device)
    return cuda_gated


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
    keep_keys: bool,
) -> None:
    """Rotates queries in place, and stores rotated keys, and values, in their pages: one launch. With `keep_keys`,
    keys are rotated in place too.

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
        KEEP_KEYS=keep_keys,
        HEAD_DIM=head_dim,
        HALF=triton.next_power_of_2(head_dim // 2),
        ROWS=8,
        num_warps=4,
    )


# Triton reads the function's own source, and takes annotations for values: only constants have one.
# What changes from call to call is not specialized for: that would compile while requests wait.
@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["layer"], do_not_specialize_on_alignment=["positions", "pages"]
)
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
    KEEP_KEYS: tl.constexpr,
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
    kept = mask
    if not KEEP_KEYS:
        kept = mask & (rows < heads)[:, None]
    tl.store(at, new_left, mask=kept)
    tl.store(at + HEAD_DIM // 2, new_right, mask=kept)
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
