"""Sampling on the GPU without waiting for it: the greedy choice, what `cuda_draw` draws by, and log probabilities.

Penalties, biases and `min_tokens` are in `cuda_adjust`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from microserve.engine.sampler import COLDEST, uniform_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import Tensor

    from microserve.engine.cuda_inputs import IntArray
    from microserve.runtime.messages import SamplingParams


_GREEDY_PARTS = 64
_GREEDY_MOST = 4096
ROWS_AT_ONCE = 64
"""Whose logits are adjusted, or whose log probabilities are computed, together."""
MOST_LOGPROBS = 20
"""Tokens beside the chosen one, as messages allow."""


def plain(sampling: SamplingParams) -> bool:
    """Whether logits are sampled as they are."""
    return (
        not sampling.logit_bias
        and sampling.min_tokens == 0
        and sampling.repetition_penalty == 1.0
        and sampling.presence_penalty == 0.0
        and sampling.frequency_penalty == 0.0
    )


def greedy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row [rows, vocab], and the first place where it stands (int64); NaN counts as largest.

    In two steps where there are few rows: one would keep a handful of multiprocessors busy, and the others idle.
    """
    rows, vocab = logits.shape
    parts = _GREEDY_PARTS
    if rows * parts > _GREEDY_MOST or vocab % parts:
        best, ids = logits.max(dim=-1)
        return best, ids
    values, places = logits.view(rows, parts, vocab // parts).max(dim=-1)
    best, part = values.max(dim=-1)
    return best, places.gather(1, part.unsqueeze(1)).squeeze(1) + part * (vocab // parts)


def log_probabilities(logits: Tensor, tokens: Tensor, rows: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of some `rows` (int64 [n]) of `logits` [rows, vocab], before any setting: float32 [n, 1 + most], the one of its
    token in `tokens` int32 [rows] (whichever, where that is -1) and the `most` largest, and whose those are, int32
    [n, most]."""
    values, ids = [], []
    for begin in range(0, rows.shape[0], ROWS_AT_ONCE):
        part = rows[begin : begin + ROWS_AT_ONCE]
        wide = torch.log_softmax(logits.index_select(0, part), dim=-1, dtype=torch.float32)
        chosen = tokens.index_select(0, part).long().clamp_(min=0)
        best, places = wide.topk(most, dim=-1)
        values.append(torch.cat((wide.gather(1, chosen.unsqueeze(1)), best), dim=1))
        ids.append(places.int())
    return torch.cat(values), torch.cat(ids)


class Draws:
    """What sequences draw by that are sampled on the GPU and are not greedy. By slot."""

    def __init__(self, slots: int) -> None:
        self._settings = np.zeros((4, slots))
        """Temperature, 0 where nothing is drawn, top_k, top_p and min_p."""
        self._seeds = np.zeros(slots, dtype=np.uint64)

    def __len__(self) -> int:
        """How many slots draw."""
        return int(np.count_nonzero(self._settings[0]))

    def start(self, slot: int, sampling: SamplingParams, seed: int) -> None:
        """A sequence that draws has this slot now."""
        temperature = max(sampling.temperature, COLDEST)
        self._settings[:, slot] = (temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        self._seeds[slot] = seed & 0xFFFFFFFFFFFFFFFF

    def forget(self, slot: int) -> None:
        """The slot's sequence draws no more. Idempotent."""
        self._settings[0, slot] = 0.0

    def columns(self, slots: IntArray, indices: Sequence[int]) -> npt.NDArray[np.float64]:
        """What `cuda_draw.draw` needs to know of a step's samples: float64 [7, drawn].

        `slots` int32 [samples] are theirs, and `indices` their output indices. The random number of each is
        Philox(seed, output index), as on the CPU.
        """
        rows = np.flatnonzero(self._settings[0, slots])
        drawn = slots[rows]
        numbers = uniform_array(self._seeds[drawn], np.asarray(indices, dtype=np.uint64)[rows])
        columns = np.concatenate((rows[None], drawn[None], self._settings[:, drawn], numbers[None]))
        # Choosing columns may have laid them one behind the other.
        return np.ascontiguousarray(columns)
