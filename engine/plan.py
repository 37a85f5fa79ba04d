"""What one step is: the scheduler's plan in, the executor's result out. Immutable, and free of torch and sockets.

`Slice` and `Sampled` are msgspec structs because a step makes hundreds: a frozen dataclass costs twelve times as much
to build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from msgspec import Struct

if TYPE_CHECKING:
    from microserve.runtime.messages import SamplingParams, TokenLogprobs

TokenArray = npt.NDArray[np.int32]
PageArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence that the executor sees for the first time, or again after a preemption.

    `history` int32 [n] is everything known so far: prompt, then output; the output begins at
    `prompt_length` (which excludes the request's `prior_output`). The sampler needs it for penalties. `seed` is
    resolved: never None.
    """

    sequence: int
    history: TokenArray
    prompt_length: int
    sampling: SamplingParams
    seed: int
    eos_token_ids: tuple[int, ...]


class Slice(Struct, frozen=True):
    """The part of one sequence that a step computes.

    `tokens` int32 [n] stand at positions `start … start + n`; `pages` int32 covers positions `0 … start + n`.
    `tokens` is None for a decode whose token the previous, uncollected step samples (n is 1): the executor
    takes it from that step's result. `sample`: whether the last position's logits are sampled, as output
    number `output_index` (0 for the first token that this request generates, prior output included in the count).
    """

    sequence: int
    tokens: TokenArray | None
    start: int
    pages: PageArray
    sample: bool
    output_index: int

    @property
    def length(self) -> int:
        """Tokens computed by this slice."""
        return 1 if self.tokens is None else len(self.tokens)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: what to compute, which sequences are new to the executor, and which it may forget.

    `forgotten` apply before `started` (a preempted sequence is forgotten, and started again when it resumes).
    """

    step: int
    slices: tuple[Slice, ...]
    started: tuple[SequenceStart, ...] = ()
    forgotten: tuple[int, ...] = ()
    prompt_tokens: int = 0
    """Tokens of prompts among what it computes."""

    @property
    def tokens(self) -> int:
        """Tokens computed by the step."""
        return sum(part.length for part in self.slices)


class Sampled(Struct, frozen=True):
    """One sampled token, or with `error` the reason why there is none (`token` means nothing then)."""

    sequence: int
    token: int
    logprobs: TokenLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens of one step: one `Sampled` for each slice that asked for one, in the plan's order."""

    step: int
    sampled: tuple[Sampled, ...]
