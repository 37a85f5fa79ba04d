"""Drawing tokens on an NVIDIA GPU, in Triton: a program for each row, and no sorting.

Top-k and top-p keep what stands above a threshold. It is searched among the values that logits can have at all (bf16
has 65,536), four ways at a time: each look reads the row once, from the cache. Of equal logits at the threshold, the
first ones in order of token ids are kept. A row's token depends on nothing else in its batch.

Imported on a GPU machine alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 8192
"""Logits that a program looks at together: sixteen bytes of them for each of its threads."""
_WARPS = 32
_ZEROS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits of a float32 that are zero when it was one of these."""

COLUMNS = ("row", "slot", "temperature", "top_k", "top_p", "min_p", "number")


def draw(logits: Tensor, columns: Tensor, tokens: Tensor, last: Tensor) -> None:
    """Draws from rows of `logits` [rows, vocab] into `tokens` int32 [rows] and `last` int64 [slots].

    `columns` float64 [7, drawn] says for each draw, in this order: its row, its slot, temperature (above 0), top_k (0:
    all), top_p, min_p, and its random number in [0, 1), which is looked up in the distribution in order of token ids.
    `tokens` holds the greedy choices; a row where it is negative is left alone.
    """
    count, vocab = columns.shape[1], logits.shape[1]
    _draw[(count,)](
        logits,
        logits.stride(0),
        columns,
        count,
        tokens,
        last,
        vocab,
        SHIFT=_ZEROS[logits.dtype],
        BLOCK=_BLOCK,
        CHUNKS=triton.next_power_of_2(triton.cdiv(vocab, _BLOCK)),
        num_warps=_WARPS,
    )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load(row, at, vocab, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = at + tl.arange(0, BLOCK)
    # Behind the vocabulary stands what has no probability. Zeros of both signs are one value.
    return tl.load(row + places, mask=places < vocab, other=float("-inf")).to(tl.float32) + 0.0


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _keys(values, SHIFT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Integers in the order of `values` float32, whose lowest SHIFT bits are zero."""
    bits = values.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _search(  # type: ignore[no-untyped-def]
    row, vocab, best, scale, low, high, need, WEIGHED: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key in [low, high], both int64, for which everything from there on makes up `need`: by probability,
    relative to the best's, if WEIGHED, else in tokens. `low` does."""
    while high > low:
        step = (high - low + 4) // 4
        first, second, third = low + step, low + 2 * step, low + 3 * step
        one = tl.zeros([BLOCK], tl.float32)
        two = tl.zeros([BLOCK], tl.float32)
        three = tl.zeros([BLOCK], tl.float32)
        for at in range(0, vocab, BLOCK):
            values = _load(row, at, vocab, BLOCK)
            keys = _keys(values, SHIFT)
            weights = tl.exp((values - best) * scale) if WEIGHED else 1.0
            if SHIFT == 0:
                # A threshold may lie behind the last int32.
                wide = keys.to(tl.int64)
                one += tl.where(wide >= first, weights, 0.0)
                two += tl.where(wide >= second, weights, 0.0)
                three += tl.where(wide >= third, weights, 0.0)
            else:
                one += tl.where(keys >= first.to(tl.int32), weights, 0.0)
                two += tl.where(keys >= second.to(tl.int32), weights, 0.0)
                three += tl.where(keys >= third.to(tl.int32), weights, 0.0)
        if (third <= high) & (tl.sum(three) >= need):
            low = third
        elif (second <= high) & (tl.sum(two) >= need):
            low = second
            high = tl.minimum(high, third - 1)
        elif (first <= high) & (tl.sum(one) >= need):
            low = first
            high = tl.minimum(high, second - 1)
        else:
            high = tl.minimum(high, first - 1)
    return low


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _weigh(row, vocab, best, scale, key, SHIFT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the tokens above `key`, how many there are and their weight; the weight of one at `key`."""
    count = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    equal = tl.zeros([BLOCK], tl.float32)
    for at in range(0, vocab, BLOCK):
        values = _load(row, at, vocab, BLOCK)
        keys = _keys(values, SHIFT)
        weights = tl.exp((values - best) * scale)
        count += tl.where(keys > key, 1.0, 0.0)
        weight += tl.where(keys > key, weights, 0.0)
        equal = tl.maximum(equal, tl.where(keys == key, weights, 0.0))
    return tl.sum(count), tl.sum(weight), tl.max(equal)


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator, unused-ignore]
def _draw(  # type: ignore[no-untyped-def]
    logits, stride, columns, count, tokens, last, vocab, SHIFT: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    column = columns + tl.program_id(0)
    place = tl.load(column).to(tl.int64)
    likeliest = tl.load(tokens + place)
    if likeliest >= 0:
        slot = tl.load(column + count).to(tl.int64)
        scale = (1.0 / tl.load(column + 2 * count)).to(tl.float32)
        top_k = tl.load(column + 3 * count).to(tl.float32)
        top_p = tl.load(column + 4 * count).to(tl.float32)
        min_p = tl.load(column + 5 * count).to(tl.float32)
        number = tl.load(column + 6 * count)
        row = logits + place * stride
        best = tl.load(row + likeliest).to(tl.float32) + 0.0
        highest = _keys(best, SHIFT).to(tl.int64)
        lowest = _keys(best * 0.0 + float("-inf"), SHIFT).to(tl.int64)
        # Kept is what stands above `key`, and the first `equals` of what stands there: `equal` is what one weighs.
        key = lowest - 1
        equals = top_p * 0.0
        equal = top_p * 0.0
        whole = top_p * 0.0
        if (top_k > 0) & (top_k < vocab):
            key = _search(row, vocab, best, scale, lowest, highest, top_k, False, SHIFT, BLOCK)
            above, weight, equal = _weigh(row, vocab, best, scale, key, SHIFT, BLOCK)
            equals = top_k - above
            whole = weight + equals * equal
        if top_p < 1.0:
            if key < lowest:
                above, whole, equal = _weigh(row, vocab, best, scale, key, SHIFT, BLOCK)
            need = top_p * whole
            # What is less likely than this makes up less than what may be left out, all together.
            floor = best + tl.log((1.0 - top_p) * 0.5 / vocab) / scale
            low = tl.maximum(tl.maximum(key, lowest), tl.minimum(_keys(floor, SHIFT).to(tl.int64), highest))
            found = _search(row, vocab, best, scale, low, highest, need, True, SHIFT, BLOCK)
            # Where top-k has not taken some of the equals away already.
            most = tl.where(found > key, vocab, equals)
            key = found
            above, weight, equal = _weigh(row, vocab, best, scale, key, SHIFT, BLOCK)
            equals = tl.minimum(most, tl.maximum(1.0, tl.ceil((need - weight) / equal)))
        equal = tl.where(equal >= min_p, equal, 0.0)
        # The weight of what is kept, chunk by chunk, and how many equals came before each.
        chunks = tl.arange(0, CHUNKS)
        kept = tl.zeros([CHUNKS], tl.float64)
        passed = tl.zeros([CHUNKS], tl.float32)
        seen = 0.0
        for at in range(0, vocab, BLOCK):
            values = _load(row, at, vocab, BLOCK)
            keys = _keys(values, SHIFT)
            weights = tl.exp((values - best) * scale)
            above = tl.sum(tl.where((keys > key) & (weights >= min_p), weights, 0.0))
            here = tl.minimum(tl.sum(tl.where(keys == key, 1.0, 0.0)), equals - seen)
            kept = tl.where(chunks == at // BLOCK, (above + here * equal).to(tl.float64), kept)
            passed = tl.where(chunks == at // BLOCK, seen, passed)
            seen += here
        ends = tl.cumsum(kept, 0)
        whole = tl.max(ends)
        target = number * whole
        # The last chunk that has anything, where rounding leaves none.
        last_one = tl.max(tl.where(kept > 0, chunks, 0))
        chunk = tl.min(tl.where((ends > target) & (kept > 0), chunks, last_one))
        before = tl.sum(tl.where(chunks < chunk, kept, 0.0))
        seen = tl.sum(tl.where(chunks == chunk, passed, 0.0))
        at = chunk * BLOCK
        values = _load(row, at, vocab, BLOCK)
        keys = _keys(values, SHIFT)
        weights = tl.exp((values - best) * scale)
        same = (keys == key).to(tl.int32)
        first_ones = (tl.cumsum(same, 0) - same).to(tl.float32) < equals - seen
        keeps = ((keys > key) | ((keys == key) & first_ones)) & (weights >= min_p) & (weights > 0.0)
        reached = tl.cumsum(tl.where(keeps, weights, 0.0), 0).to(tl.float64) + before
        ids = tl.arange(0, BLOCK)
        final = tl.max(tl.where(keeps, ids, 0))
        token = at + tl.min(tl.where(keeps & (reached > target), ids, final))
        tl.store(tokens + place, token.to(tl.int32))
        tl.store(last + slot, token.to(tl.int64))
