"""The one decoder: every supported architecture is this program with other switches.

Weights are merged where a step would otherwise run several small products: query, key and value are one matrix, and so
are gate and up. The same module serves the CPU and a GPU; `Kernels` and `Attention` are what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from microserve.engine.model.config import DecoderConfig
    from microserve.engine.model.kernels import Attention, Kernels


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer. Matrices are [out, in], as in `torch.nn.functional.linear`, and packed by `Kernels.pack`."""

    input_norm: Tensor
    qkv: Tensor
    """[(heads + 2 * kv_heads) * head_dim, hidden]: queries, keys, values."""
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    """[2 * intermediate, hidden]: gate, up."""
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The whole model. `head` is the packed `embedding` where the checkpoint ties them."""

    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: Tensor


class Decoder:
    """Token ids and positions in, hidden states out; `logits` for the rows that are sampled."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, kernels: Kernels, *, max_context: int) -> None:
        self.config = config
        self.weights = weights
        self._kernels = kernels
        self.cos, self.sin = _rotary_tables(config, max_context, weights.embedding)
        """The rotary tables [max_context, 1, head_dim], for whoever attends."""
        self._split = [config.heads + config.kv_heads, config.kv_heads]

    def forward(self, tokens: Tensor, attention: Attention, rows: Tensor | None = None) -> Tensor:
        """Hidden states [tokens, hidden], after the last norm, of `tokens` (int64 [tokens]), whose positions
        `attention` knows. With `rows` (int64 [n]), of those tokens alone: the last layer does no more for the others
        than store their KV."""
        config, kernels, layers = self.config, self._kernels, self.weights.layers
        eps, heads, head_dim = config.norm_eps, config.heads, config.head_dim
        hidden = self.weights.embedding[tokens]
        count = tokens.shape[0]
        normed = kernels.rms_norm(hidden, layers[0].input_norm, eps)
        for index, layer in enumerate(layers):
            qkv = kernels.linear(normed, layer.qkv, layer.qkv_bias).view(count, -1, head_dim)
            turning, value = torch.split(qkv, self._split, dim=1)
            if layer.query_norm is not None and layer.key_norm is not None:
                query = kernels.rms_norm(turning[:, :heads], layer.query_norm, eps)
                key = kernels.rms_norm(turning[:, heads:], layer.key_norm, eps)
                turning = torch.cat((query, key), dim=1)
            attended = attention.attend(index, turning, value)
            last = index + 1 == len(layers)
            if last and rows is not None:
                attended, hidden = attended[rows], hidden[rows]
                if rows.shape[0] == 0:
                    return hidden
            normed, hidden = kernels.linear_add_norm(
                attended, layer.output, layer.output_bias, hidden, layer.mlp_norm, eps
            )
            wide = kernels.gated(normed, layer.gate_up, layer.gate_up_bias)
            following = self.weights.norm if last else layers[index + 1].input_norm
            normed, hidden = kernels.linear_add_norm(wide, layer.down, layer.down_bias, hidden, following, eps)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab], in the model's dtype, of hidden states [rows, hidden] that `forward` gave."""
        return self._kernels.linear(hidden, self.weights.head, None)


def _rotary_tables(config: DecoderConfig, max_context: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [max_context, 1, head_dim], in the model's dtype on its device; computed in float32."""
    frequencies = torch.tensor(config.inverse_frequencies(), dtype=torch.float32)
    angles = torch.outer(torch.arange(max_context, dtype=torch.float32), frequencies)
    both = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return both.cos().to(like), both.sin().to(like)
