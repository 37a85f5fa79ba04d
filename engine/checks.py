"""Arguments of verbs: what may be said, and what is said about it when it may not.

Everything raises `InvalidRequest` that names the argument; what msgspec has checked is not checked again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from microserve.engine.plan import TokenArray
    from microserve.runtime.messages import ModelInfo, SamplingParams, StartGenerate


class Range(NamedTuple):
    """Positions `[begin, end)` of a prompt, both counted from its start."""

    begin: int
    end: int

    @property
    def length(self) -> int:
        return max(0, self.end - self.begin)


def check_prompt(data: bytes, model: ModelInfo) -> TokenArray:
    """The prompt, int32 [n], n >= 1, every token in the vocabulary."""
    prompt = unpack_tokens(data)
    if not len(prompt):
        raise InvalidRequest("the prompt is empty", param="prompt")
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= model.vocab_size:
        wrong = low if low < 0 else high
        raise InvalidRequest(f"token id {wrong} is not in the vocabulary (0 to {model.vocab_size - 1})", param="prompt")
    return prompt


def check_position(value: int | None, length: int, name: str) -> int:
    """A position of a prompt of `length` tokens as slices write it: None is its end, negative counts from there."""
    if value is None:
        return length
    position = value + length if value < 0 else value
    if not 0 <= position <= length:
        raise InvalidRequest(f"{name} must lie between {-length} and {length}, not {value}", param=name)
    return position


def check_range(begin: int, end: int | None, length: int) -> Range:
    """A range of a prompt; one that ends before it begins is empty."""
    return Range(check_position(begin, length, "begin"), check_position(end, length, "end"))


def check_generate(body: StartGenerate, model: ModelInfo) -> TokenArray:
    """The prompt of a generation, int32 [n]."""
    prompt = check_prompt(body.prompt, model)
    check_position(body.begin, len(prompt), "begin")
    if body.prior_output > len(prompt):
        raise InvalidRequest(
            f"prior_output is {body.prior_output}, but the prompt has {len(prompt)} tokens", param="prior_output"
        )
    _check_sampling(body.sampling, model.vocab_size)
    return prompt


def _check_sampling(sampling: SamplingParams, vocabulary: int) -> None:
    for token in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(f"token id {token} is not in the vocabulary", param="logit_bias")
    for token in sampling.stop_token_ids:
        if not 0 <= token < vocabulary:
            raise InvalidRequest(f"token id {token} is not in the vocabulary", param="stop_token_ids")
    if sampling.min_tokens > sampling.max_tokens:
        raise InvalidRequest(
            f"min_tokens ({sampling.min_tokens}) exceeds max_tokens ({sampling.max_tokens})", param="min_tokens"
        )


def check_finite(value: float | None, name: str) -> float | None:
    # The wire's limits keep NaN out, and infinity only where they have an upper end.
    if value is not None and not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a finite number", param=name)
    return value


def check_budget(now: float, budget: float | None, name: str) -> float | None:
    """The instant at which `budget` seconds from `now` are over."""
    finite = check_finite(budget, name)
    return None if finite is None else now + finite
