"""Sampling and generation."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from microserve.runtime.messages.base import Int64, LeaseId, Message, Name, NonNegative, Seconds, TokenBytes


class SamplingParams(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """How tokens are chosen. Defaults are plain sampling at temperature 1.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `min_p` 0 switch those filters off. `logprobs` None returns
    none, k returns the chosen token's and the k most likely. The random stream is Philox(seed, output index);
    without a seed the engine draws one.
    """

    max_tokens: Annotated[int, Meta(ge=1, le=2**63 - 1)] = 16
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_k: NonNegative = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: dict[Int64, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Int64 | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    ignore_eos: bool = False
    min_tokens: NonNegative = 0
    stop_token_ids: Annotated[tuple[Int64, ...], Meta(max_length=256)] = ()


class StartGenerate(Message, tag="start_generate", frozen=True):
    """Match the prompt, prefill from `begin`, and stream tokens. Replies: `Part(Tokens)…`, then `Reply(Generated)`.

    `prior_output` = k: the last k prompt tokens were generated earlier; penalties, `min_tokens`, `max_tokens`, the
    random stream and usage continue from there. Budgets are seconds that remain when the message is sent:
    `admit_by` until it starts to run, `first_token_by` until its first token.

    With `lease`: wait, at most `kv_wait`, until the KV of `[matched, begin)` has arrived, then prefill `[begin, len)`.
    What does not arrive is computed here. Negative `begin` counts from the end.
    """

    request_id: Name
    sub_id: Name
    prompt: TokenBytes
    begin: Int64 = 0
    sampling: SamplingParams = SamplingParams()
    prior_output: NonNegative = 0
    admit_by: Seconds | None = None
    first_token_by: Seconds | None = None
    lease: LeaseId | None = None
    kv_wait: Seconds | None = None


class TokenLogprobs(Struct, array_like=True, frozen=True):
    """Natural-log probabilities of one output position, before penalties and temperature are applied.

    `top_ids` and `top_logprobs` are the n most likely tokens, most likely first.
    """

    logprob: float
    top_ids: list[int] = []
    top_logprobs: list[float] = []


class Tokens(Message, tag="tokens", frozen=True):
    """Tokens that one step added to one call (usually one)."""

    ids: TokenBytes
    logprobs: list[TokenLogprobs] | None = None
    cached: NonNegative | None = None
    """Prompt tokens that the engine's prefix tree held; said once, with the first tokens."""


class Usage(Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What a call cost. `cached_tokens` are prompt tokens whose KV nobody computed for this request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Generated(Message, tag="generated", frozen=True):
    """The terminal reply of `StartGenerate`: `finish_reason` is "stop" (by `stop_token`) or "length"."""

    finish_reason: str
    usage: Usage
    stop_token: int | None = None
    received_tokens: NonNegative = 0
    """Prompt tokens whose KV came from other engines."""
    recomputed_tokens: NonNegative = 0
    """Prompt tokens whose KV should have come from other engines, did not, and was computed here."""


class Abort(Message, tag="abort", frozen=True):
    """End the named call. Idempotent. Reply: `Aborted` ("freed" or "unknown")."""

    sub_id: Name


class Aborted(Message, tag="aborted", frozen=True):
    outcome: str
