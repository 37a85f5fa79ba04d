"""Paged attention on the GPU: decodes by a kernel of ours, prompts by FlashInfer, with FA3 on Hopper.

A prompt from its first token on attends to what the step computes, as it lies: faster than through pages. With a past,
it attends to its pages.

FlashInfer's `plan` writes its schedule into a pinned buffer and copies it from there when the GPU gets to it. A step
is planned while the one before may still wait for that copy, so there are two pinned buffers, used in turn. What lies
on the GPU needs no such care: everything runs on one stream, in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flashinfer
import torch

from microserve.engine.cuda_decode import DecodeAttention
from microserve.engine.model.cuda_kernels import rotate_and_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from microserve.engine.model.decoder import Decoder
    from microserve.kv.pool import PagePool

_FLOAT_WORKSPACE = 256 << 20
_HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class Prefill:
    """The planned part of a step that attends as prompts. `fresh`: none of them has a past."""

    wrapper: Any
    fresh: bool


class PagedAttention:
    """What the attention of every step has in common."""

    def __init__(self, decoder: Decoder, pool: PagePool, *, most_decodes: int) -> None:
        config, shape = decoder.config, pool.shape
        device = pool.tensor.device
        self.decoder = decoder
        self.pool = pool
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.page_size = shape.page_size
        self.dtype = shape.dtype
        self.window_left = -1 if config.sliding_window is None else config.sliding_window - 1
        self.views = [pool.layer_views(layer) for layer in range(config.layers)]
        self.decode = DecodeAttention(pool, config.heads, config.sliding_window, decoder.cos, decoder.sin, most_decodes)
        hopper = torch.cuda.get_device_capability(device) == _HOPPER
        backend = "fa3" if hopper and shape.head_dim in (64, 128, 256) else "fa2"
        floats = torch.zeros(_FLOAT_WORKSPACE, dtype=torch.uint8, device=device)
        self._paged: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(floats, "HND", backend=backend)
        self._fresh: Any = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(floats, "NHD", backend=backend)
        self._pinned = {
            id(wrapper): (first, torch.empty_like(first, pin_memory=True))
            for wrapper in (self._paged, self._fresh)
            if (first := wrapper._pin_memory_int_workspace_buffer) is not None
        }

    def plan_paged(self, parity: int, tokens: Tensor, indptr: Tensor, indices: Tensor, last: Tensor) -> Prefill:
        """Plans a batch of prompt chunks: `tokens` is the prefix sum of their lengths, `indptr` that of their pages.

        All int32, `indices` on the device, the others pinned.
        """
        self._paged._pin_memory_int_workspace_buffer = self._pinned[id(self._paged)][parity]
        self._paged.plan(
            tokens,
            indptr,
            indices,
            last,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.page_size,
            causal=True,
            window_left=self.window_left,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )
        return Prefill(self._paged, False)

    def plan_fresh(self, parity: int, tokens: Tensor) -> Prefill:
        """Plans a batch of prompt chunks without a past: `tokens` pinned int32 is the prefix sum of their lengths."""
        self._fresh._pin_memory_int_workspace_buffer = self._pinned[id(self._fresh)][parity]
        self._fresh.plan(
            tokens,
            tokens,
            self.heads,
            self.kv_heads,
            self.head_dim,
            causal=True,
            window_left=self.window_left,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )
        return Prefill(self._fresh, True)


@dataclass(slots=True)
class StepAttention:
    """Implements `Attention` for one step: `decodes` rows first, then those of a prefill.

    `positions` int32 [tokens]. `indptr` and `table` int32: the pages of the decodes. `pages` int32 [tokens - decodes]:
    the page that each token of a prompt goes to. `plan` gives the prefill, if there is one; it is asked when the first
    layer attends, so that the GPU has work while the CPU plans.
    """

    parts: PagedAttention
    positions: Tensor
    decodes: int
    indptr: Tensor
    table: Tensor
    pages: Tensor
    plan: Callable[[], Prefill] | None
    _prefill: Prefill | None = None

    def attend(self, layer: int, turning: Tensor, value: Tensor, out: Tensor | None = None) -> Tensor:
        """See `Attention.attend`; in `out` where it is given."""
        parts, decodes = self.parts, self.decodes
        count, heads = turning.shape[0], parts.heads
        if out is None:
            out = torch.empty(count, heads * parts.head_dim, dtype=turning.dtype, device=turning.device)
        result = out.view(count, heads, parts.head_dim)
        if decodes:
            parts.decode.attend(
                layer, turning[:decodes], value[:decodes], self.positions, self.indptr, self.table, result[:decodes]
            )
        if self.plan is not None:
            prefill = self._prefill = self._prefill or self.plan()
            turning, value = turning[decodes:], value[decodes:]
            rotate_and_store(
                turning,
                value,
                parts.pool.tensor,
                layer,
                heads,
                parts.decoder.cos,
                parts.decoder.sin,
                self.positions[decodes:],
                self.pages,
                prefill.fresh,
            )
            query, attended = turning[:, :heads], result[decodes:]
            if prefill.fresh:
                prefill.wrapper.run(query, turning[:, heads:], value, out=attended)
            else:
                prefill.wrapper.run(query, parts.views[layer], out=attended)
        return out
