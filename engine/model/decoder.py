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
        hidden, turning, value = self.begin(tokens)
        last = len(self.weights.layers) - 1
        for index in range(last):
            attended = attention.attend(index, turning, value)
            hidden, turning, value = self.between(index, attended, hidden)
        return self.end(attention.attend(last, turning, value), hidden, rows)

    # What `forward` is made of: all but attention, whose shapes depend on nothing but the number of tokens. Of `qkv`
    # [tokens, (heads + 2 * kv_heads) * head_dim], where it is given, `turning` and `value` are parts.

    def begin(self, tokens: Tensor, qkv: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, turning, value) before the attention of the first layer."""
        first = self.weights.layers[0]
        hidden = self.weights.embedding[tokens]
        normed = self._kernels.rms_norm(hidden, first.input_norm, self.config.norm_eps)
        return hidden, *self._project(normed, first, qkv)

    def between(
        self, index: int, attended: Tensor, hidden: Tensor, qkv: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden, turning, value) before the attention of the layer behind `index`, whose own gave `attended`."""
        following = self.weights.layers[index + 1]
        normed, hidden = self._finish(index, attended, hidden, following.input_norm)
        return hidden, *self._project(normed, following, qkv)

    def end(self, attended: Tensor, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """What `forward` returns."""
        if rows is not None:
            attended, hidden = attended[rows], hidden[rows]
            if rows.shape[0] == 0:
                return hidden
        return self._finish(len(self.weights.layers) - 1, attended, hidden, self.weights.norm)[0]

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Logits [rows, vocab], in the model's dtype, of hidden states [rows, hidden] that `forward` gave."""
        return self._kernels.linear(hidden, self.weights.head, None, out)

    def _project(self, normed: Tensor, layer: LayerWeights, qkv: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys [tokens, heads + kv_heads, head_dim], not rotated yet, and values."""
        config, kernels, heads = self.config, self._kernels, self.config.heads
        projected = kernels.linear(normed, layer.qkv, layer.qkv_bias, qkv).view(normed.shape[0], -1, config.head_dim)
        turning, value = torch.split(projected, self._split, dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            turning[:, :heads] = kernels.rms_norm(turning[:, :heads], layer.query_norm, config.norm_eps)
            turning[:, heads:] = kernels.rms_norm(turning[:, heads:], layer.key_norm, config.norm_eps)
        return turning, value

    def _finish(self, index: int, attended: Tensor, hidden: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """(normed, hidden) behind a layer: its output product and its MLP."""
        kernels, layer, eps = self._kernels, self.weights.layers[index], self.config.norm_eps
        normed, hidden = kernels.linear_add_norm(attended, layer.output, layer.output_bias, hidden, layer.mlp_norm, eps)
        wide = kernels.gated(normed, layer.gate_up, layer.gate_up_bias)
        return kernels.linear_add_norm(wide, layer.down, layer.down_bias, hidden, norm, eps)


def _rotary_tables(config: DecoderConfig, max_context: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [max_context, 1, head_dim], in the model's dtype on its device; computed in float32."""
    frequencies = torch.tensor(config.inverse_frequencies(), dtype=torch.float32)
    angles = torch.outer(torch.arange(max_context, dtype=torch.float32), frequencies)
    both = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return both.cos().to(like), both.sin().to(like)
