"""Gate and up products of many rows, and their activation, in one kernel: Gluon, for Hopper.

cuBLAS writes a product of twice the MLP's width to memory and another kernel reads it again, which takes time, and
power that products want (figures: perf/RESULTS.md). Here, each program is three parts, which wait for each other at
barriers in shared memory alone. One warp asks the copy engine (TMA) for tiles of x and of both matrices. Two groups of
four warps multiply 64 rows each with as many columns of gate as of up, so that a thread has what the activation needs.
A program takes one tile after the other: what the next one needs is on its way while the last one is finished.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if TYPE_CHECKING:
    from torch import Tensor

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64
"""Of a tile of the result; and how much of the products' inner dimension a stage holds, 128 bytes."""
_STAGES = 4
_NEIGHBOURS = 16
"""Tiles of rows that are taken together, so that programs which run at once read the same parts of the matrix."""
_REGISTERS = (240, 40)
"""A thread's, of the second group that multiplies, and of the warp that copies; the first group has what is left."""
_GL_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can read them and write the result: rows that begin at multiples of 16 bytes."""
    two_bytes = x.dtype in _GL_DTYPES and weight.dtype == x.dtype
    whole = weight.is_contiguous() and x.stride() == (weight.shape[1], 1)
    multiples = weight.shape[0] % 16 == 0 == weight.shape[1] % 8
    return two_bytes and whole and multiples and x.data_ptr() % 16 == 0 == weight.data_ptr() % 16


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) [rows, out]; `x` [rows, in], `weight` [2 * out, in] is gate, then up."""
    rows, width = x.shape
    count = weight.shape[0] // 2
    out = torch.empty(rows, count, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(count, _COLUMNS)
    _gated[(min(_multiprocessors(x.device), tiles),)](
        _descriptor(x, [_ROWS, _DEPTH]),
        _descriptor(weight, [_COLUMNS, _DEPTH]),
        _descriptor(out, [_ROWS // 2, _COLUMNS]),
        rows,
        count,
        width,
        STAGES=_STAGES,
        NEIGHBOURS=_NEIGHBOURS,
        REGISTERS=_REGISTERS,
        num_warps=4,
    )
    return out


@cache
def _multiprocessors(device: torch.device) -> int:
    found: int = torch.cuda.get_device_properties(device).multi_processor_count
    return found


def _descriptor(tensor: Tensor, block: list[int]) -> Any:
    layout = gl.NVMMASharedLayout.get_default_for(block, _GL_DTYPES[tensor.dtype])
    return TensorDescriptor.from_tensor(tensor, block, layout)


# Gluon reads the functions' own source, and takes annotations for values: only constants have one. How many rows there
# are is not specialized for: that would compile while requests wait.
@gluon.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator, unused-ignore]
def _gated(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    rows,
    count,
    width,
    STAGES: gl.constexpr,
    NEIGHBOURS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    ROWS: gl.constexpr = x.block_shape[0]
    COLUMNS: gl.constexpr = weight.block_shape[0]
    DEPTH: gl.constexpr = weight.block_shape[1]
    both: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * COLUMNS, DEPTH], weight.dtype)
    xs = gl.allocate_shared_memory(x.dtype, [STAGES, ROWS, DEPTH], x.layout)
    weights = gl.allocate_shared_memory(weight.dtype, [STAGES, 2 * COLUMNS, DEPTH], both)
    results = gl.allocate_shared_memory(out.dtype, [2, ROWS // 2, COLUMNS], out.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(read.index(stage), count=2)
    high, wide = gl.cdiv(rows, ROWS), gl.cdiv(count, COLUMNS)
    gl.warp_specialize(
        [
            (_multiply, (out, xs, weights, results, filled, read, high, wide, width, NEIGHBOURS, 0)),
            (_multiply, (out, xs, weights, results, filled, read, high, wide, width, NEIGHBOURS, 1)),
            (_copy, (x, weight, xs, weights, filled, read, high, wide, count, width, NEIGHBOURS)),
        ],
        [4, 1],
        REGISTERS,
    )


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _place(tile, high, wide, NEIGHBOURS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Which tile of rows, and which of columns."""
    first = tile // (NEIGHBOURS * wide) * NEIGHBOURS
    size = gl.minimum(high - first, NEIGHBOURS)
    inside = tile % (NEIGHBOURS * wide)
    return first + inside % size, inside // size


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _copy(  # type: ignore[no-untyped-def]
    x, weight, xs, weights, filled, read, high, wide, count, width, NEIGHBOURS: gl.constexpr
):
    STAGES: gl.constexpr = xs.shape[0]
    ROWS: gl.constexpr = xs.shape[1]
    COLUMNS: gl.constexpr = weights.shape[1] // 2
    DEPTH: gl.constexpr = xs.shape[2]
    done = 0
    for tile in range(gl.program_id(0), high * wide, gl.num_programs(0)):
        row, column = _place(tile, high, wide, NEIGHBOURS)
        for k in range(0, width, DEPTH):
            stage = done % STAGES
            barrier = filled.index(stage)
            mbarrier.wait(read.index(stage), ((done // STAGES) & 1) ^ 1)
            # Whole tiles, also at an edge: what lies beyond is filled with zeros, or belongs to columns that are not
            # stored.
            mbarrier.expect(barrier, (ROWS + 2 * COLUMNS) * DEPTH * 2)
            tma.async_copy_global_to_shared(x, [row * ROWS, k], barrier, xs.index(stage))
            gate, up = weights.index(stage).slice(0, COLUMNS, 0), weights.index(stage).slice(COLUMNS, COLUMNS, 0)
            tma.async_copy_global_to_shared(weight, [column * COLUMNS, k], barrier, gate)
            tma.async_copy_global_to_shared(weight, [count + column * COLUMNS, k], barrier, up)
            done += 1


@gluon.jit  # type: ignore[untyped-decorator, unused-ignore]
def _multiply(  # type: ignore[no-untyped-def]
    out, xs, weights, results, filled, read, high, wide, width, NEIGHBOURS: gl.constexpr, HALF: gl.constexpr
):
    STAGES: gl.constexpr = xs.shape[0]
    ROWS: gl.constexpr = xs.shape[1] // 2
    COLUMNS: gl.constexpr = weights.shape[1] // 2
    DEPTH: gl.constexpr = xs.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * COLUMNS, 16])
    result = results.index(HALF)
    done = 0
    for tile in range(gl.program_id(0), high * wide, gl.num_programs(0)):
        row, column = _place(tile, high, wide, NEIGHBOURS)
        sums = gl.zeros([ROWS, 2 * COLUMNS], gl.float32, layout)
        for k in range(0, width, DEPTH):
            stage = done % STAGES
            mbarrier.wait(filled.index(stage), (done // STAGES) & 1)
            here = xs.index(stage).slice(HALF * ROWS, ROWS, 0)
            sums = warpgroup_mma(here, weights.index(stage).permute((1, 0)), sums, is_async=True)
            # One product is always under way: the one before it has read its stage.
            sums = warpgroup_mma_wait(1, deps=(sums,))
            mbarrier.arrive(read.index((done + STAGES - 1) % STAGES), count=1, pred=k > 0)
            done += 1
        sums = warpgroup_mma_wait(0, deps=(sums,))
        mbarrier.arrive(read.index((done + STAGES - 1) % STAGES), count=1)
        gate, up = sums.reshape([ROWS, 2, COLUMNS]).permute((0, 2, 1)).split()
        # Rounded where a program of separate products would round.
        gate = gate.to(out.dtype).to(gl.float32)
        up = up.to(out.dtype).to(gl.float32)
        tma.store_wait(0)
        result.store((gate / (1.0 + gl.exp(-gate)) * up).to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [(2 * row + HALF) * ROWS, column * COLUMNS], result)
    tma.store_wait(0)
