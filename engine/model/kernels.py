"""The operations that differ between machines, behind one protocol; here in plain torch, which runs anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class Kernels(Protocol):
    """Elementwise work of the decoder. `x` is [tokens, width]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """silu(left half) * right half, along the last dimension."""
        ...

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions on `heads` [tokens, heads, head_dim]; `cos`, `sin` [tokens, 1, head_dim]."""
        ...


class Attention(Protocol):
    """Attention of one step over the paged pool, prepared for that step's slices."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores key and value [tokens, kv_heads, head_dim] of `layer` in their pages, and attends.

        `query` [tokens, heads, head_dim]; returns [tokens, heads * head_dim].
        """
        ...


class TorchKernels:
    """Plain torch."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype == torch.float32:
            return functional.rms_norm(x, weight.shape, weight, eps)
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def rotate(self, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        left, right = heads.chunk(2, dim=-1)
        return torch.addcmul(heads * cos, torch.cat((-right, left), dim=-1), sin)
