"""Chooses tokens from logits. What a sequence draws depends on its own logits, settings, seed and output index, and
on nothing else in the batch.

Randomness is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the seed as
key and the output index as counter; its first two words make one uniform number in [0, 1), which is looked up in the
cumulative distribution of the filtered probabilities, in the order of token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from microserve.engine.plan import Sampled
from microserve.runtime.messages import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from microserve.engine.plan import SequenceStart

_ROUND_A, _ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_A, _WEYL_B = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)

COLDEST = 1e-5
"""A temperature below it is taken for it: logits divided by less could be no numbers any more."""
_CANDIDATES = 256
"""Top-k and top-p look at so many of the best tokens before they sort all."""

WordArray = npt.NDArray[np.uint64]


def philox4x32(counter: WordArray, key: WordArray) -> WordArray:
    """Ten rounds of Philox4x32. `counter` uint64 [n, 4] and `key` [n, 2] hold 32-bit words, as does the result."""
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key[:, 0], key[:, 1]
    for _ in range(10):
        product_a, product_b = _ROUND_A * c0, _ROUND_B * c2
        c0, c1, c2, c3 = (
            (product_b >> _WORD) ^ c1 ^ k0,
            product_b & _LOW,
            (product_a >> _WORD) ^ c3 ^ k1,
            product_a & _LOW,
        )
        k0, k1 = (k0 + _WEYL_A) & _LOW, (k1 + _WEYL_B) & _LOW
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, output index), with 53 random bits."""
    words = [value & 0xFFFFFFFFFFFFFFFF for value in seeds]
    return uniform_array(np.array(words, dtype=np.uint64), np.array(indices, dtype=np.uint64))


def uniform_array(seed: WordArray, index: WordArray) -> npt.NDArray[np.float64]:
    """`uniforms` of arrays uint64 [n]."""
    zero = np.zeros_like(index)
    words = philox4x32(
        np.stack((index & _LOW, index >> _WORD, zero, zero), axis=1), np.stack((seed & _LOW, seed >> _WORD), axis=1)
    )
    bits = ((words[:, 0] << _WORD) | words[:, 1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


@dataclass(slots=True)
class _State:
    """What the sampler remembers of one sequence."""

    sampling: SamplingParams
    seed: int
    ends: tuple[int, ...]
    """Tokens that `min_tokens` keeps away."""
    penalised: bool
    prompt: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    counts: dict[int, int] = field(default_factory=dict)
    """How often each token was output."""

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0.0

    def plain(self, output_index: int) -> bool:
        """Whether the logits are used as they are."""
        sampling = self.sampling
        return not (self.penalised or sampling.logit_bias or output_index < sampling.min_tokens)


class Sampler:
    """Samples a step's rows. State is per sequence, from `start` until `forget`."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._states: dict[int, _State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def start(self, start: SequenceStart) -> None:
        """A sequence begins, or resumes with its output so far in its history."""
        sampling = start.sampling
        penalised = (
            sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0
        )
        state = _State(sampling, start.seed, (*start.eos_token_ids, *sampling.stop_token_ids), penalised)
        if penalised:
            state.prompt = np.unique(start.history[: start.prompt_length]).astype(np.int64)
            output, counts = np.unique(start.history[start.prompt_length :], return_counts=True)
            state.counts = dict(zip(output.tolist(), counts.tolist(), strict=True))
        self._states[start.sequence] = state

    def forget(self, sequence: int) -> None:
        """The sequence is over, or preempted."""
        self._states.pop(sequence, None)

    def sample(self, logits: Tensor, rows: Sequence[tuple[int, int]]) -> list[Sampled]:
        """One token for each row of `logits` float32 [rows, vocab], which may be changed.

        `rows` holds (sequence, output index). Returns what was sampled in that order; a sequence whose logits are not
        finite numbers gets an error instead of a token.
        """
        states = [self._states[sequence] for sequence, _ in rows]
        indices = [index for _, index in rows]
        raw = self._raw_logprobs(logits, states)
        for row, (state, index) in enumerate(zip(states, indices, strict=True)):
            if not state.plain(index):
                self._adjust(logits[row], state, index)
        best, greedy = logits.max(dim=-1)
        tokens: list[int] = greedy.tolist()
        finite = torch.isfinite(best).tolist()
        drawn = [row for row, state in enumerate(states) if not state.greedy and finite[row]]
        if drawn:
            numbers = uniforms([states[row].seed for row in drawn], [indices[row] for row in drawn])
            chosen = _draw(logits[drawn], [states[row].sampling for row in drawn], numbers)
            for row, token in zip(drawn, chosen, strict=True):
                tokens[row] = token
        sampled: list[Sampled] = []
        for row, (sequence, _) in enumerate(rows):
            if not finite[row]:
                sampled.append(Sampled(sequence, 0, error="the model's logits are not finite numbers"))
                continue
            state, token = states[row], tokens[row]
            if state.penalised:
                state.counts[token] = state.counts.get(token, 0) + 1
            sampled.append(Sampled(sequence, token, _logprobs(raw, row, state, token)))
        return sampled

    @staticmethod
    def _raw_logprobs(logits: Tensor, states: Sequence[_State]) -> dict[int, Tensor]:
        """Log probabilities of the model itself, before any setting, of the rows that return them."""
        return {
            row: torch.log_softmax(logits[row], dim=-1)
            for row, state in enumerate(states)
            if state.sampling.logprobs is not None
        }

    def _adjust(self, row: Tensor, state: _State, index: int) -> None:
        """Penalties, bias and `min_tokens`, in place.

        Repetition divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al., CTRL);
        presence and frequency subtract for tokens of the output, as OpenAI defines them.
        """
        sampling = state.sampling
        if state.penalised:
            output = np.fromiter(state.counts, dtype=np.int64, count=len(state.counts))
            if sampling.repetition_penalty != 1.0:
                seen = torch.from_numpy(np.union1d(state.prompt, output))
                values = row[seen]
                scale = sampling.repetition_penalty
                row[seen] = torch.where(values > 0, values / scale, values * scale)
            if len(output) and (sampling.presence_penalty or sampling.frequency_penalty):
                counts = torch.tensor(list(state.counts.values()), dtype=row.dtype)
                row[torch.from_numpy(output)] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        for token, bias in sampling.logit_bias.items():
            if 0 <= token < self._vocab_size:
                row[token] += bias
        if index < sampling.min_tokens:
            ends = [token for token in state.ends if 0 <= token < self._vocab_size]
            row[ends] = -torch.inf


def _draw(logits: Tensor, settings: Sequence[SamplingParams], numbers: npt.NDArray[np.float64]) -> list[int]:
    """A token for each row [rows, vocab] by its settings and its number in [0, 1)."""
    vocab = logits.shape[1]
    temperature = torch.tensor([max(s.temperature, COLDEST) for s in settings], dtype=logits.dtype).unsqueeze(1)
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    cut = [row for row, s in enumerate(settings) if 0 < s.top_k < vocab or s.top_p < 1.0]
    if cut:
        best = probabilities[cut].topk(min(_CANDIDATES, vocab)).values
        for row, values in zip(cut, best, strict=True):
            _truncate(probabilities[row], values, settings[row])
    if any(s.min_p > 0.0 for s in settings):
        shares = torch.tensor([s.min_p for s in settings], dtype=logits.dtype).unsqueeze(1)
        probabilities[probabilities < shares * probabilities.amax(dim=-1, keepdim=True)] = 0.0
    # float64, so that small probabilities late in a large vocabulary still count; row by row the same for any batch.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total, so that rounding cannot lead past the last token that has a probability.
    targets = torch.minimum(torch.from_numpy(numbers).unsqueeze(1) * total, torch.nextafter(total, torch.zeros(())))
    # Within the vocabulary whatever the row: a step of others must not fail of one.
    chosen: list[int] = torch.searchsorted(cumulative, targets, right=True).squeeze(1).clamp_(max=vocab - 1).tolist()
    return chosen


def _truncate(row: Tensor, best: Tensor, sampling: SamplingParams) -> None:
    """Keeps the top k of `row` [vocab], then of those the fewest that reach `top_p`; the others become 0, in place.

    `best` holds the row's largest values, in descending order: sorting a large vocabulary for every token would cost
    more than the model. Of equal values, those with lower ids are kept.
    """
    vocab = row.shape[0]
    keep = top_k = sampling.top_k if 0 < sampling.top_k < vocab else vocab
    if top_k < vocab and top_k > len(best):
        best = row.sort(descending=True).values
    if sampling.top_p < 1.0:
        before = best.cumsum(dim=0, dtype=torch.float64) - best
        whole = 1.0 if top_k == vocab else float(best[:top_k].sum(dtype=torch.float64))
        keep = max(1, int((before[:top_k] < sampling.top_p * whole).sum()))
        if keep == len(best) < top_k:
            return _truncate(row, row.sort(descending=True).values, sampling)
    if keep == vocab:
        return None
    last = best[keep - 1]
    equals = keep - int((best[:keep] > last).sum())
    row[row < last] = 0.0
    row[(row == last).nonzero()[equals:]] = 0.0
    return None


def _logprobs(raw: dict[int, Tensor], row: int, state: _State, token: int) -> TokenLogprobs | None:
    wanted = state.sampling.logprobs
    if wanted is None:
        return None
    values = raw[row]
    if wanted == 0:
        return TokenLogprobs(float(values[token]))
    top, ids = values.topk(min(wanted, values.shape[0]))
    return TokenLogprobs(float(values[token]), ids.tolist(), top.tolist())
