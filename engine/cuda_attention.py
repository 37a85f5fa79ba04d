"""Paged attention on the GPU through FlashInfer: decodes with tensor cores, prompts with FA3 on Hopper.

FlashInfer's `plan` writes its schedule into a pinned buffer and copies it from there when the GPU gets to it. A step
is planned while the one before may still wait for that copy, so there are two pinned buffers, used in turn. What lies
on the GPU needs no such care: everything runs on one stream, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import flashinfer
import torch

from microserve.engine.model.cuda_kernels import rotate_and_store

if TYPE_CHECKING:
    from torch import Tensor

    from microserve.engine.model.decoder import Decoder
    from microserve.kv.pool import PagePool

_FLOAT_WORKSPACE = 256 << 20
_INT_WORKSPACE = 8 << 20
_HOPPER = (9, 0)


class PagedAttention:
    """Makes wrappers that share their workspaces, and holds what every step has in common."""

    def __init__(self, decoder: Decoder, pool: PagePool) -> None:
        config, shape = decoder.config, pool.shape
        device = pool.tensor.device
        self.decoder = decoder
        self.pool = pool
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.page_size = shape.page_size
        self.dtype = shape.dtype
        self.window_left = -1 if config.sliding_window is None else config.sliding_window - 1
        self.views = [pool.layer_views(layer) for layer in range(config.layers)]
        self._floats = torch.zeros(_FLOAT_WORKSPACE, dtype=torch.uint8, device=device)
        self._ints = torch.empty(_INT_WORKSPACE, dtype=torch.uint8, device=device)
        self._pinned = [torch.empty(_INT_WORKSPACE, dtype=torch.uint8, pin_memory=True) for _ in range(4)]
        hopper = torch.cuda.get_device_capability(device) == _HOPPER
        self._prefill_backend = "fa3" if hopper and shape.head_dim in (64, 128, 256) else "fa2"
        self._eager_decode = self._own(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(self._floats, "HND", use_tensor_cores=True)
        )
        prefill_floats = torch.zeros(_FLOAT_WORKSPACE, dtype=torch.uint8, device=device)
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            prefill_floats, "HND", backend=self._prefill_backend
        )
        self._prefill_pinned = [self._prefill._pin_memory_int_workspace_buffer, self._pinned[2]]

    def _own(self, wrapper: Any) -> Any:
        wrapper._int_workspace_buffer = self._ints
        wrapper._pin_memory_int_workspace_buffer = self._pinned[0]
        return wrapper

    def graph_wrapper(self, indptr: Tensor, indices: Tensor, last: Tensor) -> Any:
        """A decode wrapper for one captured batch size, over these device buffers."""
        return self._own(
            flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                self._floats,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=True,
                paged_kv_indptr_buffer=indptr,
                paged_kv_indices_buffer=indices,
                paged_kv_last_page_len_buffer=last,
            )
        )

    def plan_decode(self, wrapper: Any, parity: int, indptr: Tensor, indices: Tensor, last: Tensor) -> Any:
        """Plans a batch of decodes: `indptr`, `last` pinned int32, `indices` on the device. Returns the wrapper."""
        wrapper = self._eager_decode if wrapper is None else wrapper
        wrapper._pin_memory_int_workspace_buffer = self._pinned[parity]
        wrapper.plan(
            indptr,
            indices,
            last,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.page_size,
            window_left=self.window_left,
            q_data_type=self.dtype,
            kv_data_type=self.dtype,
        )
        return wrapper

    def plan_prefill(self, parity: int, tokens: Tensor, indptr: Tensor, indices: Tensor, last: Tensor) -> Any:
        """Plans a batch of prompt chunks: `tokens` is the prefix sum of their lengths. Returns the wrapper."""
        wrapper = self._prefill
        wrapper._pin_memory_int_workspace_buffer = self._prefill_pinned[parity]
        wrapper.plan(
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
        return wrapper


class StepAttention:
    """Implements `Attention` for one planned step: `decodes` rows first, then those of prompts."""

    __slots__ = ("_decode", "_decodes", "_pages", "_parts", "_positions", "_prefill")

    def __init__(
        self, parts: PagedAttention, positions: Tensor, pages: Tensor, decodes: int, decode: Any, prefill: Any
    ) -> None:
        self._parts = parts
        self._positions = positions
        self._pages = pages
        self._decodes = decodes
        self._decode = decode
        self._prefill = prefill

    def attend(self, layer: int, turning: Tensor, value: Tensor) -> Tensor:
        """See `Attention.attend`."""
        parts = self._parts
        rotate_and_store(
            turning,
            value,
            parts.pool.tensor,
            layer,
            parts.heads,
            parts.decoder.cos,
            parts.decoder.sin,
            self._positions,
            self._pages,
        )
        query = turning[:, : parts.heads]
        count, width = query.shape[0], parts.heads * parts.head_dim
        decodes = self._decodes
        if self._prefill is None:
            attended: Tensor = self._decode.run(query, parts.views[layer])
            return attended.view(count, width)
        if decodes == 0:
            attended = self._prefill.run(query, parts.views[layer])
            return attended.view(count, width)
        result = torch.empty(count, parts.heads, parts.head_dim, dtype=query.dtype, device=query.device)
        self._decode.run(query[:decodes], parts.views[layer], out=result[:decodes])
        self._prefill.run(query[decodes:], parts.views[layer], out=result[decodes:])
        return result.view(count, width)
