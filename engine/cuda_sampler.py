"""Sampling on the GPU without waiting for it: greedy, temperature, top-k, top-p and min-p.

Penalties, biases, `min_tokens` and log probabilities need what a sequence said so far: those rows are sampled by the
CPU's `Sampler`, and the step after them waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from microserve.engine.sampler import COLDEST, uniforms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from microserve.runtime.messages import SamplingParams


_GREEDY_PARTS = 64
_GREEDY_MOST = 4096
_DRAWN = 128
"""Rows that are drawn at once: sorting takes forty bytes for each of their logits."""


def on_device(sampling: SamplingParams) -> bool:
    """Whether rows of these settings can be sampled without the CPU."""
    return (
        sampling.logprobs is None
        and not sampling.logit_bias
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


def draw(logits: Tensor, settings: Sequence[SamplingParams], seeds: Sequence[int], indices: Sequence[int]) -> Tensor:
    """A token int64 [rows] for each row of `logits` [rows, vocab], none of them greedy; nothing waits for the GPU.

    The random number of a row is Philox(seed, output index), as on the CPU. Top-k, then top-p of what is left, then
    min-p, each over the distribution at the row's temperature.
    """
    groups = [slice(at, at + _DRAWN) for at in range(0, len(settings), _DRAWN)]
    return torch.cat([_draw(logits[each], settings[each], seeds[each], indices[each]) for each in groups])


def _draw(logits: Tensor, settings: Sequence[SamplingParams], seeds: Sequence[int], indices: Sequence[int]) -> Tensor:
    device, vocab = logits.device, logits.shape[1]
    numbers = uniforms(list(seeds), list(indices))
    columns = np.stack(
        [
            np.array([max(each.temperature, COLDEST) for each in settings], dtype=np.float64),
            np.array([each.top_k if 0 < each.top_k < vocab else vocab for each in settings], dtype=np.float64),
            np.array([each.top_p for each in settings], dtype=np.float64),
            np.array([each.min_p for each in settings], dtype=np.float64),
            numbers,
        ]
    )
    temperature, top_k, top_p, min_p, number = (
        torch.from_numpy(columns).pin_memory().to(device, non_blocking=True).unsqueeze(2).unbind(0)
    )
    wide = logits.float()
    probabilities = torch.softmax((wide - wide.amax(dim=-1, keepdim=True)) / temperature.float(), dim=-1)
    if any(0 < each.top_k < vocab or each.top_p < 1.0 for each in settings):
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(vocab, device=device)
        ordered = torch.where(rank < top_k, ordered, 0.0)
        before = ordered.cumsum(dim=-1, dtype=torch.float64) - ordered
        ordered = torch.where(before < top_p * ordered.sum(dim=-1, keepdim=True, dtype=torch.float64), ordered, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ordered)
    if any(each.min_p > 0.0 for each in settings):
        best = probabilities.amax(dim=-1, keepdim=True)
        probabilities = torch.where(probabilities >= min_p.float() * best, probabilities, 0.0)
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.minimum(number * total, torch.nextafter(total, torch.zeros_like(total)))
    # Within the vocabulary also where the logits are no numbers: the next step looks it up before anybody is told.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=vocab - 1)
