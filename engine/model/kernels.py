"""The operations that differ between machines, behind one protocol; here in plain torch, which runs anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor


class Kernels(Protocol):
    """What the decoder computes with, apart from attention. `x` is [tokens, width]."""

    def pack(self, weight: Tensor) -> Tensor:
        """A matrix [out, in] in the form that `linear` is fastest with: `weight` itself, or a tensor of its own."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias, of a packed matrix; in `out` where it is given."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor: ...

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(the norm of linear(x) + residual, that sum). `residual` may be overwritten."""
        ...

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """silu(left half) * right half of linear(x)."""
        ...


class Attention(Protocol):
    """Attention of one step over the paged pool, prepared for that step's slices and their positions."""

    def attend(self, layer: int, turning: Tensor, value: Tensor) -> Tensor:
        """Rotates queries and keys, stores keys and values of `layer` in their pages, and attends.

        `turning` [tokens, heads + kv_heads, head_dim]: queries, then keys, not rotated yet; it may be overwritten.
        `value` [tokens, kv_heads, head_dim]. Returns [tokens, heads * head_dim].
        """
        ...


class TorchKernels:
    """Plain torch."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        product = functional.linear(x, weight, bias)
        return product if out is None else out.copy_(product)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype == torch.float32:
            return functional.rms_norm(x, weight.shape, weight, eps)
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = residual + self.linear(x, weight, bias)
        return self.rms_norm(total, norm, eps), total

    def gated(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gate, up = self.linear(x, weight, bias).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on `heads` [tokens, heads, head_dim]; `cos`, `sin` [tokens, 1, head_dim]."""
    left, right = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos, torch.cat((-right, left), dim=-1), sin)


class PackedKernels(TorchKernels):
    """Plain torch, but for matrices in the blocked layout of oneDNN, which is part of torch.

    Products with the few rows of a decode step are up to twice as fast as with a plain matrix (`perf.cpu_engine`),
    because nothing is rearranged at each call; those of a prompt gain too.
    """

    def pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
        return packed

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product if out is None else out.copy_(product)


def cpu_kernels(dtype: torch.dtype) -> Kernels:
    """The fastest kernels that this machine's torch has for `dtype` on the CPU.

    The two operators of `PackedKernels` are torch's own but not promised, and each processor packs what it can
    compute with; so they are tried out.
    """
    kernels = PackedKernels()
    x, weight, bias = (torch.arange(n * 8.0).view(n, 8).to(dtype) for n in (2, 16, 2))
    try:
        product = kernels.linear(x, kernels.pack(weight), bias.flatten())
    except (AttributeError, RuntimeError):
        return TorchKernels()
    expected = functional.linear(x, weight, bias.flatten())
    return kernels if torch.allclose(product, expected, rtol=1e-2) else TorchKernels()
