"""Products of a few rows with a large matrix, in Triton: what a decode step of a few requests is made of.

Such a product is the reading of its matrix. A program takes a few of the matrix's rows, or a part of them; what follows
the product (gate and activation, residual and norm) happens where its result is at hand. Kernels that follow each other
overlap (programmatic dependent launch): one fetches its first weights while the one before still runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from torch import Tensor

MOST_ROWS = 64
"""Rows of x that these kernels take. Beyond, products are no longer the reading of a matrix."""


class Tiling(NamedTuple):
    """How a product is cut: matrix rows and columns of a step of a program, programs along the columns, stages.

    `ahead`: columns behind those of the first step that the L2 cache is asked for before x is there, a power of two
    from 64 on.
    """

    rows: int
    columns: int
    parts: int = 1
    stages: int = 4
    warps: int = 4
    ahead: int = 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling, out: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; `x` [rows, in], `weight` [out, in]. `out`, where it is given, is contiguous."""
    if out is None:
        out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, out, weight.shape[0], tiling._replace(parts=1), gated=False)
    return out


def gated(x: Tensor, weight: Tensor, tiling: Tiling) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T); `weight` [2 * out, in] is gate, then up."""
    out = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight, None, out, weight.shape[0] // 2, tiling._replace(parts=1), gated=True)
    return out


def linear_add_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm: Tensor, eps: float, tiling: Tiling
) -> tuple[Tensor, Tensor]:
    """(the norm of x @ weight.T + residual, that sum); the sum takes the place of `residual`."""
    rows, out = x.shape[0], weight.shape[0]
    parts = torch.empty(tiling.parts, rows, out, dtype=torch.float32, device=x.device)
    _launch(x, weight, None, parts, out, tiling, gated=False)
    normed = torch.empty_like(residual)
    _add_norm[(rows,)](
        parts,
        residual,
        norm,
        normed,
        eps,
        rows,
        OUT=out,
        COLUMNS=triton.next_power_of_2(out),
        PARTS=tiling.parts,
        num_warps=8,
        launch_pdl=True,
    )
    return normed, residual


def fits(weight: Tensor, tiling: Tiling, *, gated: bool = False) -> bool:
    """Whether `tiling` cuts `weight` without a rest."""
    out, width = weight.shape
    return (out // 2 if gated else out) % tiling.rows == 0 and width % (tiling.columns * tiling.parts) == 0


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, count: int, tiling: Tiling, *, gated: bool
) -> None:
    rows, width = x.shape
    ahead = tiling.ahead if tiling.columns + tiling.ahead <= width // tiling.parts else 0
    _product[(count // tiling.rows, tiling.parts)](
        x,
        weight,
        out if bias is None else bias,
        out,
        rows,
        x.stride(0),
        count,
        WIDTH=width,
        BIASED=bias is not None,
        GATED=gated,
        PARTS=tiling.parts,
        ROWS=tiling.rows,
        COLUMNS=tiling.columns,
        X_ROWS=triton.next_power_of_2(max(16, rows)),
        STAGES=tiling.stages,
        AHEAD=ahead,
        num_warps=tiling.warps,
        launch_pdl=True,
    )


# Triton reads the functions' own source, and takes annotations for values: only constants have one.
@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _fetch(lines):  # type: ignore[no-untyped-def]
    """Asks the L2 cache for the 128 bytes at each of these addresses; waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["x_rows"])  # type: ignore[untyped-decorator, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    x_rows,
    x_stride,
    count,
    WIDTH: tl.constexpr,
    BIASED: tl.constexpr,
    GATED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    X_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    part = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    each = tl.arange(0, X_ROWS)
    wanted = (each < x_rows)[None, :]
    length: tl.constexpr = WIDTH // PARTS
    weight_at = weight + rows.to(tl.int64)[:, None] * WIDTH + part * length + columns[None, :]
    up_at = weight_at + count.to(tl.int64) * WIDTH
    x_at = x + each[None, :] * x_stride + part * length + columns[:, None]
    gdc_launch_dependents()
    # The weights are nobody's result: the first are fetched before x is there.
    first = tl.load(weight_at)
    if GATED:
        first_up = tl.load(up_at)
    if AHEAD > 0:
        line: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth * 8
        lines = COLUMNS + line * tl.arange(0, AHEAD // line)
        ahead_at = weight + rows.to(tl.int64)[:, None] * WIDTH + part * length + lines[None, :]
        _fetch(ahead_at)
        if GATED:
            _fetch(ahead_at + count.to(tl.int64) * WIDTH)
    gdc_wait()
    here = tl.load(x_at, mask=wanted, other=0.0)
    sum_ = tl.dot(first, here)
    if GATED:
        sum_up = tl.dot(first_up, here)
    for column in tl.range(COLUMNS, length, COLUMNS, num_stages=STAGES):
        here = tl.load(x_at + column, mask=wanted, other=0.0)
        sum_ = tl.dot(tl.load(weight_at + column), here, sum_)
        if GATED:
            sum_up = tl.dot(tl.load(up_at + column), here, sum_up)
    if GATED:
        # Rounded where a program of separate products would round.
        gate = sum_.to(out.dtype.element_ty).to(tl.float32)
        up = sum_up.to(out.dtype.element_ty).to(tl.float32)
        sum_ = gate / (1.0 + tl.exp(-gate)) * up
    if BIASED:
        sum_ += tl.load(bias + rows).to(tl.float32)[:, None]
    target = out + (part * x_rows + each)[None, :] * count + rows[:, None]
    tl.store(target, sum_, mask=wanted)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
def _add_norm(  # type: ignore[no-untyped-def]
    parts,
    residual,
    norm,
    normed,
    eps,
    rows,
    OUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < OUT
    factor = tl.load(norm + columns, mask=inside, other=0.0).to(tl.float32)
    gdc_launch_dependents()
    gdc_wait()
    sum_ = tl.load(residual + row * OUT + columns, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        sum_ += tl.load(parts + (part * rows + row) * OUT + columns, mask=inside, other=0.0)
    tl.store(residual + row * OUT + columns, sum_, mask=inside)
    scale = tl.rsqrt(tl.sum(sum_ * sum_, axis=0) / OUT + eps)
    tl.store(normed + row * OUT + columns, sum_ * scale * factor, mask=inside)
