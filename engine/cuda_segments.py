"""Steps with prompts, but for their attention, in CUDA graphs: one for what lies between two layers' attention.

To launch the kernels of such a step one by one takes the CPU longer than the GPU needs to run them, up to many hundreds
of tokens. All that the shapes between two layers' attention depend on is the number of tokens, so a graph of each layer
is captured for a ladder of sizes. Attention is launched as it ever is, for as many tokens as there are; the rows behind
them compute with what an earlier step left there, and nobody reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from microserve.engine.cuda_attention import StepAttention
    from microserve.engine.model.decoder import Decoder

_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768)
"""Beyond, the GPU takes longer than a CPU that is not the fastest."""


def segment_sizes(step_tokens: int) -> tuple[int, ...]:
    """Tokens for which a step's graphs are captured: as large tiles of a product are cut, from 128 on."""
    return tuple(size for size in _SIZES if size <= max(step_tokens, _SIZES[0]))


@dataclass(frozen=True, slots=True)
class _Segments:
    """The graphs of steps of one size: up to the first layer's attention, then between two, layer by layer."""

    graphs: Sequence[Any]
    hidden: Tensor
    turning: Tensor
    value: Tensor


class SegmentGraphs:
    """The graphs, and the memory that they share. Replays must be in order on one stream."""

    def __init__(self, decoder: Decoder, source: Tensor, ids: Callable[[Tensor], Tensor], most: int) -> None:
        """For steps of up to `most` tokens. `ids` gives token ids of `source` int32, which begins with the step's and
        has harmless values up to the size of its graphs."""
        config = decoder.config
        like = decoder.weights.embedding
        self._decoder = decoder
        self._source = source
        self._ids = ids
        self.sizes = segment_sizes(most)
        rows = self.sizes[-1]
        self._qkv = torch.zeros(
            rows, (config.heads + 2 * config.kv_heads) * config.head_dim, dtype=like.dtype, device=like.device
        )
        self._attended = torch.zeros(rows, config.heads * config.head_dim, dtype=like.dtype, device=like.device)
        self._captured: dict[int, _Segments] = {}

    def size(self, tokens: int) -> int | None:
        """The size that a step of `tokens` tokens is padded to; None where it is too large."""
        return next((size for size in self.sizes if size >= tokens), None)

    def forward(self, tokens: int, size: int, attention: StepAttention, rows: Tensor) -> Tensor:
        """As `Decoder.forward`, of the first `tokens` tokens of the source."""
        segments, attended = self._captured[size], self._attended[:tokens]
        turning, value = segments.turning[:tokens], segments.value[:tokens]
        for layer, graph in enumerate(segments.graphs):
            graph.replay()
            attention.attend(layer, turning, value, attended)
        return self._decoder.end(attended, segments.hidden[:tokens], rows)

    def capture(self, memory: Any, progress: Callable[[int], None]) -> None:
        """Captures all sizes on the current stream, into the memory of other graphs (`CUDAGraph.pool()`) that never run
        at the same time. `progress` is told after each size how many there are. The garbage collector must be off."""
        for done, size in enumerate(reversed(self.sizes)):
            self._captured[size] = self._capture(size, memory)
            progress(done + 1)

    def clear(self) -> None:
        """Lets go of the graphs."""
        self._captured.clear()

    def _capture(self, size: int, memory: Any) -> _Segments:
        decoder, qkv, attended = self._decoder, self._qkv[:size], self._attended[:size]
        layers = len(decoder.weights.layers)
        # Once without a graph: whatever must be compiled or loaded cannot be while capturing.
        hidden, _, _ = decoder.begin(self._ids(self._source[:size]), qkv)
        if layers > 1:
            decoder.between(0, attended, hidden, qkv)
        torch.cuda.current_stream().synchronize()
        graphs = []
        for layer in range(layers):
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=memory)
            try:
                if layer == 0:
                    hidden, turning, value = decoder.begin(self._ids(self._source[:size]), qkv)
                else:
                    hidden, turning, value = decoder.between(layer - 1, attended, hidden, qkv)
            finally:
                graph.capture_end()
            graphs.append(graph)
        return _Segments(tuple(graphs), hidden, turning, value)
