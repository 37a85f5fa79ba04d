"""Attention of decodes over the paged pool, in Triton: one launch rotates, stores the new token's KV, and attends.

One program takes one row, one KV head with all query heads that share it, and one part of what the row has seen. What
the page of the new token holds is never read back: its key and value are at hand. A row of one part is finished by its
program; of several, the last to finish adds their parts up.

FlashInfer's kernel for the same, which it builds from its prompt kernel, needs a plan that the CPU makes in each step,
and two launches more. Not counting rotation and storing, it takes up to a quarter longer at contexts of a few hundred
tokens, and about as long at thousands (perf/RESULTS.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from torch import Tensor

    from microserve.kv.pool import PagePool

_BLOCK = 64
_WARPS = 4
_STAGES = 3
"""The numbers of the next pages are fetched while keys and values of the one before are waited for."""
_LEAST_PARTS = {64: 64, 256: 256}
"""{most rows times KV heads: the smallest part, in tokens}: small batches are cut finer, since most of the GPU would
idle."""
_LEAST_PART = 512
"""The same, for more."""
_PROGRAMS = 528
"""About what an H200 runs at once: more parts than that would only wait."""
_MOST_PARTS = 64
_AT_ONCE = 2048
"""Values (float32) of parts that are added up at once: 16 a thread, four parts of 4 heads of 128."""
_LOWEST = tl.constexpr(-1e30)
"""For what is not there: finite, so that it differs from itself by zero."""


class DecodeAttention:
    """The kernel, and what its launches share. Launches must be in order on one stream."""

    def __init__(
        self, pool: PagePool, heads: int, window: int | None, cos: Tensor, sin: Tensor, most_rows: int
    ) -> None:
        shape, device = pool.shape, pool.tensor.device
        self._pool = pool
        self._heads = heads
        self._window = window or 0
        self._cos, self._sin = cos, sin
        self._overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        cells = max(rows * self.parts(rows) for rows in range(1, most_rows + 1)) * shape.kv_heads
        group = triton.next_power_of_2(max(16, heads // shape.kv_heads))
        columns = triton.next_power_of_2(shape.head_dim)
        self._sums = torch.empty(cells * group * columns, dtype=torch.float32, device=device)
        self._scales = torch.empty(2 * cells * group, dtype=torch.float32, device=device)
        self._arrived = torch.zeros(most_rows * shape.kv_heads, dtype=torch.int32, device=device)

    def parts(self, rows: int) -> int:
        """Parts that the longest rows are cut into."""
        return max(2, min(_MOST_PARTS, _PROGRAMS // (rows * self._pool.shape.kv_heads)))

    def least_part(self, rows: int) -> int:
        """Tokens that are not cut any further."""
        programs = rows * self._pool.shape.kv_heads
        return next((tokens for most, tokens in _LEAST_PARTS.items() if programs <= most), _LEAST_PART)

    def attend(
        self, layer: int, turning: Tensor, value: Tensor, positions: Tensor, indptr: Tensor, pages: Tensor, out: Tensor
    ) -> None:
        """Stores and attends one token a row.

        `turning` [rows, heads + kv_heads, head_dim], not rotated; `value` [rows, kv_heads, head_dim]; `positions` int32
        [rows]; `pages[indptr[row] :]` int32 are the row's pages, the one for the new token included. Writes `out`
        [rows, heads, head_dim], contiguous.
        """
        pool, shape = self._pool.tensor, self._pool.shape
        rows = turning.shape[0]
        group = self._heads // shape.kv_heads
        parts = self.parts(rows)
        lanes, columns = triton.next_power_of_2(group), triton.next_power_of_2(shape.head_dim)
        _decode[(rows, shape.kv_heads, parts)](
            turning,
            value,
            pool,
            self._cos,
            self._sin,
            positions,
            indptr,
            pages,
            out,
            self._sums,
            self._scales,
            self._arrived,
            layer,
            self.least_part(rows),
            shape.head_dim**-0.5 * 1.4426950408889634,
            turning.stride(0),
            turning.stride(1),
            value.stride(0),
            value.stride(1),
            pool.stride(0),
            pool.stride(1),
            pool.stride(2),
            pool.stride(3),
            KV_HEADS=shape.kv_heads,
            GROUP=group,
            ROWS=triton.next_power_of_2(max(16, group)),
            LANES=lanes,
            TILE=max(1, _AT_ONCE // (lanes * columns)),
            HEAD_DIM=shape.head_dim,
            COLUMNS=columns,
            PAGE=shape.page_size,
            WINDOW=self._window,
            BLOCK=_BLOCK,
            STAGES=_STAGES,
            OVERLAP=self._overlap,
            num_warps=_WARPS,
            launch_pdl=self._overlap,
        )


# Triton reads the function's own source, and takes annotations for values: only constants have one. What changes from
# call to call is not specialized for: that would compile while requests wait.
@triton.jit(  # type: ignore[untyped-decorator, unused-ignore]
    do_not_specialize=["layer", "least_part"], do_not_specialize_on_alignment=["positions", "indptr", "pages"]
)
def _decode(  # type: ignore[no-untyped-def]
    turning,
    value,
    pool,
    cos,
    sin,
    positions,
    indptr,
    pages,
    out,
    sums,
    scales,
    arrived,
    layer,
    least_part,
    scale,
    turning_row,
    turning_head,
    value_row,
    value_head,
    pool_page,
    pool_head,
    pool_layer,
    pool_side,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_launch_dependents()
    row, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, position - WINDOW + 1)
    size = tl.maximum(tl.cdiv(tl.cdiv(position - first, tl.num_programs(2)), BLOCK) * BLOCK, least_part)
    count = tl.maximum(1, tl.cdiv(position - first, size))
    if part >= count:
        if OVERLAP:
            gdc_wait()
        return
    table = pages + tl.load(indptr + row)
    heads = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = columns < HEAD_DIM
    known = (heads < GROUP)[:, None] & inside[None, :]

    # Rotation: each column with its partner half a head away.
    partner = (columns + HEAD_DIM // 2) % HEAD_DIM
    sign = tl.where(columns < HEAD_DIM // 2, -1.0, 1.0)
    angle = position.to(tl.int64) * HEAD_DIM + columns
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32) * sign
    at = turning + row.to(tl.int64) * turning_row
    # Up to here nothing was read that the kernel before computes.
    if OVERLAP:
        gdc_wait()
    query_at = at + (kv_head * GROUP + heads)[:, None] * turning_head
    query = tl.load(query_at + columns[None, :], mask=known, other=0.0).to(tl.float32) * c[None, :]
    query += tl.load(query_at + partner[None, :], mask=known, other=0.0).to(tl.float32) * s[None, :]
    query = query.to(pool.dtype.element_ty)

    base = pool + kv_head * pool_head + layer * pool_layer
    if part == 0:
        key_at = at + (KV_HEADS * GROUP + kv_head) * turning_head
        key = tl.load(key_at + columns, mask=inside, other=0.0).to(tl.float32) * c
        key += tl.load(key_at + partner, mask=inside, other=0.0).to(tl.float32) * s
        key = key.to(pool.dtype.element_ty)
        value_at = value + row.to(tl.int64) * value_row + kv_head * value_head
        new = tl.load(value_at + columns, mask=inside, other=0.0)
        page = tl.load(table + position // PAGE).to(tl.int64)
        target = base + page * pool_page + (position % PAGE) * HEAD_DIM + columns
        tl.store(target, key, mask=inside)
        tl.store(target + pool_side, new, mask=inside)
        best = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], axis=1) * scale
        total = tl.full((ROWS,), 1.0, tl.float32)
        sum_ = tl.zeros((ROWS, COLUMNS), tl.float32) + new.to(tl.float32)[None, :]
    else:
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sum_ = tl.zeros((ROWS, COLUMNS), tl.float32)

    begin = first + part * size
    end = tl.minimum(position, begin + size)
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        places = start + tl.arange(0, BLOCK)
        there = places < end
        page = tl.load(table + places // PAGE, mask=there, other=0).to(tl.int64)
        source = base + page * pool_page + (places % PAGE) * HEAD_DIM
        wanted = there[:, None] & inside[None, :]
        keys = tl.load(source[:, None] + columns[None, :], mask=wanted, other=0.0)
        values = tl.load(source[:, None] + pool_side + columns[None, :], mask=wanted, other=0.0)
        scores = tl.dot(query, tl.trans(keys)) * scale
        scores = tl.where(there[None, :], scores, float("-inf"))
        better = tl.maximum(best, tl.max(scores, axis=1))
        fade = tl.exp2(best - better)
        weights = tl.exp2(scores - better[:, None])
        total = total * fade + tl.sum(weights, axis=1)
        sum_ = sum_ * fade[:, None]
        sum_ = tl.dot(weights.to(values.dtype), values, sum_)
        best = better

    target = (
        out + (row.to(tl.int64) * KV_HEADS * GROUP + kv_head * GROUP + heads)[:, None] * HEAD_DIM + columns[None, :]
    )
    if count == 1:
        tl.store(target, sum_ / total[:, None], mask=known)
        return
    cell = (row * KV_HEADS + kv_head) * tl.num_programs(2)
    ours = sums + (cell + part).to(tl.int64) * ROWS * COLUMNS
    tl.store(ours + heads[:, None] * COLUMNS + columns[None, :], sum_, mask=known)
    tl.store(scales + (cell + part) * 2 * ROWS + heads, best)
    tl.store(scales + (cell + part) * 2 * ROWS + ROWS + heads, total)
    # Every thread's part is written before the one that counts says so; whoever counts last sees them all.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + row * KV_HEADS + kv_head, 1, sem="acq_rel", scope="gpu")
    if before == count - 1:
        tl.debug_barrier()
        # Some parts at a time: one after the other, each would wait for the L2 cache. Heads come first, so that each
        # warp gets heads of its own where there are four and more, and sums do not pass between warps.
        lanes = tl.arange(0, LANES)
        top = tl.full((LANES,), _LOWEST, tl.float32)
        whole = tl.zeros((LANES,), tl.float32)
        merged = tl.zeros((LANES, COLUMNS), tl.float32)
        for some in range(0, count, TILE):
            others = some + tl.arange(0, TILE)[None, :]
            wanted = (others < count) & (lanes < GROUP)[:, None]
            theirs = (cell + others) * 2 * ROWS + lanes[:, None]
            their_best = tl.load(scales + theirs, mask=wanted, other=_LOWEST, cache_modifier=".cg")
            their_total = tl.load(scales + theirs + ROWS, mask=wanted, other=0.0, cache_modifier=".cg")
            their_sum = tl.load(
                (sums + ((cell + others).to(tl.int64) * ROWS + lanes[:, None]) * COLUMNS)[:, :, None]
                + columns[None, None, :],
                mask=wanted[:, :, None] & inside[None, None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            higher = tl.maximum(top, tl.max(their_best, axis=1))
            our_fade, their_fade = tl.exp2(top - higher), tl.exp2(their_best - higher[:, None])
            whole = whole * our_fade + tl.sum(their_total * their_fade, axis=1)
            merged = merged * our_fade[:, None] + tl.sum(their_sum * their_fade[:, :, None], axis=1)
            top = higher
        place = out + (row.to(tl.int64) * KV_HEADS * GROUP + kv_head * GROUP + lanes)[:, None] * HEAD_DIM
        result = merged / whole[:, None]
        tl.store(place + columns[None, :], result, mask=(lanes < GROUP)[:, None] & inside[None, :])
        tl.store(arrived + row * KV_HEADS + kv_head, 0)
