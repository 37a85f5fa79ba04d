"""Penalties, biases and `min_tokens` on the device that samples, so that no step waits for what a sequence said before.

The device keeps, for each sequence that asks for such, how often it has said each token, and which were in its prompt.
What a step samples is counted there in the same step, and the CPU never learns of it here. In plain torch: what it
computes is what `Sampler` computes on a CPU, in the same order and in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from microserve.runtime.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import Tensor

    from microserve.engine.plan import SequenceStart

_COUNT = 0x3FFF
"""Of a sequence's number for a token: how often it was output, or so often and more."""
_PROMPTED = 0x4000
"""The same: that it was in the prompt."""


@dataclass(frozen=True, slots=True)
class _Adjusted:
    """What is asked for a sequence."""

    row: int
    """Its place among those that are counted."""
    repetition: float
    presence: float
    frequency: float
    biased: npt.NDArray[np.int64]
    biases: npt.NDArray[np.float32]
    ends: npt.NDArray[np.int64]
    """Tokens that `min_tokens` keeps away."""
    min_tokens: int


class Adjustments:
    """Of all sequences that ask for some. Calls must be in order on one stream."""

    def __init__(self, most: int, vocab: int, device: torch.device) -> None:
        """Room for `most` sequences at once: `bytes_of(most, vocab)` on the device."""
        self._device = device
        self._vocab = vocab
        self._seen = torch.zeros(most, vocab, dtype=torch.int16, device=device)
        self._free = list(range(most))
        self._known: dict[int, _Adjusted] = {}

    @staticmethod
    def bytes_of(most: int, vocab: int) -> int:
        return 2 * most * vocab

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._known

    def start(self, start: SequenceStart) -> None:
        """A sequence begins, or resumes with its output so far in its history."""
        self.forget(start.sequence)
        if not self._free:
            raise InternalError("more sequences with penalties than can run")
        sampling, row = start.sampling, self._free[-1]
        prompt = np.unique(start.history[: start.prompt_length])
        output, counts = np.unique(start.history[start.prompt_length :], return_counts=True)
        known = [(token, bias) for token, bias in sampling.logit_bias.items() if 0 <= token < self._vocab]
        ends = [token for token in (*start.eos_token_ids, *sampling.stop_token_ids) if 0 <= token < self._vocab]
        adjusted = _Adjusted(
            row,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
            np.array([token for token, _ in known], dtype=np.int64),
            np.array([bias for _, bias in known], dtype=np.float32),
            np.array(ends, dtype=np.int64),
            sampling.min_tokens,
        )
        self._seen[row].zero_()
        if len(prompt):
            self._seen[row].index_fill_(0, self._sent(prompt), _PROMPTED)
        if len(output):
            # A token of both has the sum of both.
            numbers = np.minimum(counts, _COUNT).astype(np.int16)
            self._seen[row].index_add_(0, self._sent(output), self._sent(numbers, np.int16))
        # Last: whatever fails before, the place is free.
        self._free.pop()
        self._known[start.sequence] = adjusted

    def forget(self, sequence: int) -> None:
        """The sequence is over, or preempted. Idempotent."""
        if (known := self._known.pop(sequence, None)) is not None:
            self._free.append(known.row)

    def columns(self, sequences: Sequence[int]) -> npt.NDArray[np.float64]:
        """What `adjusted` needs to know of some sequences: float64 [4, n]."""
        asked = [self._known[sequence] for sequence in sequences]
        found = [(each.row, each.repetition, each.presence, each.frequency) for each in asked]
        return np.array(found, dtype=np.float64).T

    def adjusted(self, logits: Tensor, columns: Tensor, samples: Sequence[tuple[int, int]]) -> Tensor:
        """Logits float32 [n, vocab] as they are sampled, of `logits` [n, vocab], which stay as they are. `columns` are
        on the device; `samples` are the sequences and their output indices.

        Repetition divides positive and multiplies negative logits of tokens in prompt or output (Keskar et al., CTRL);
        presence and frequency subtract for tokens of the output, as OpenAI defines them.
        """
        wide = logits.float()
        seen = self._seen.index_select(0, columns[0].long())
        repetition, presence, frequency = columns[1:].float().unsqueeze(2)
        wide = torch.where(seen == 0, wide, torch.where(wide > 0, wide / repetition, wide * repetition))
        counts = (seen & _COUNT).float()
        wide -= torch.where(counts > 0, presence + frequency * counts, 0.0)
        asked = [(place, self._known[sequence], index) for place, (sequence, index) in enumerate(samples)]
        # All rows' in one launch.
        if biased := [place * self._vocab + each.biased for place, each, _ in asked if len(each.biased)]:
            biases = np.concatenate([each.biases for _, each, _ in asked])
            wide.view(-1).index_add_(0, self._sent(np.concatenate(biased)), self._sent(biases, np.float32))
        if kept := [place * self._vocab + each.ends for place, each, index in asked if index < each.min_tokens]:
            wide.view(-1).index_fill_(0, self._sent(np.concatenate(kept)), -torch.inf)
        return wide

    def count(self, columns: Tensor, tokens: Tensor) -> None:
        """These sequences, whose `columns` are on the device, have said `tokens` int32 [n]; -1 is none."""
        rows, said = columns[0].long(), tokens.long()
        places = said.clamp(min=0)
        before = self._seen[rows, places]
        more = (said >= 0) & ((before & _COUNT) < _COUNT)
        self._seen[rows, places] = before + more

    def _sent(self, values: npt.NDArray[np.generic], dtype: npt.DTypeLike = np.int64) -> Tensor:
        """The values on the device. Nobody waits for them."""
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
