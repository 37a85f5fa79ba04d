"""The pool: one tensor that holds the KV of every page, `pool[page, kv_head, layer, 2, page_size, head_dim]`.

A page is one contiguous run, and so is any range of its heads: what a transfer to another engine wants. Attention reads
the strided views of one layer. The only module of `kv` that knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from microserve.kv.transfer.base import KvMemory


@dataclass(frozen=True, slots=True)
class PageShape:
    """The shape of one page."""

    kv_heads: int
    layers: int
    page_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of `page_size` tokens in every layer."""
        return self.kv_heads * self.layers * 2 * self.page_size * self.head_dim * self.dtype.itemsize

    def pages_in(self, memory: int) -> int:
        """How many pages `memory` bytes hold."""
        return memory // self.page_bytes


class PagePool:
    """The tensor. Pages are numbered from 0; whoever was given a page by the cache may write it, and nobody else."""

    def __init__(self, total_pages: int, shape: PageShape, *, device: torch.device | str = "cpu") -> None:
        if total_pages < 1:
            raise ValueError(f"a pool needs at least one page, not {total_pages}")
        self.total_pages = total_pages
        self.shape = shape
        # Zeroed, so that a page that was never written is finite: padding may read it behind a mask.
        self.tensor = torch.zeros(
            (total_pages, shape.kv_heads, shape.layers, 2, shape.page_size, shape.head_dim),
            dtype=shape.dtype,
            device=device,
        )

    def layer_views(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, each a strided view [page, kv_head, page_size, head_dim]."""
        return self.tensor[:, :, layer, 0], self.tensor[:, :, layer, 1]

    @property
    def memory(self) -> KvMemory:
        """The pool as plain memory, for transfers."""
        return KvMemory(
            address=self.tensor.data_ptr(),
            page_bytes=self.shape.page_bytes,
            total_pages=self.total_pages,
            device=str(self.tensor.device),
            owner=self.tensor,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.tensor.nbytes
