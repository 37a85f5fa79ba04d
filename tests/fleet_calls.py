"""Calls of a fleet's engines, prompts for them, and what every engine answers."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from tests.engine_rig import model

from microserve.engine.fake_executor import fake_tokens
from microserve.engine.plan import SequenceStart
from microserve.runtime.codec import pack_tokens
from microserve.runtime.messages import KvAddress, RemoteSend, SamplingParams, StartGenerate

if TYPE_CHECKING:
    from collections.abc import Sequence

PAGE = 4

_SUB_IDS = itertools.count(1)


def next_sub_id() -> str:
    return f"sub-{next(_SUB_IDS)}"


def send_body(
    prompt: Sequence[int],
    address: KvAddress,
    *,
    begin: int | None = None,
    end: int | None = None,
    sub_id: str | None = None,
) -> RemoteSend:
    return RemoteSend(
        request_id="q",
        sub_id=sub_id or next_sub_id(),
        prompt=pack_tokens(prompt),
        address=address,
        begin=address.matched if begin is None else begin,
        end=address.end if end is None else end,
    )


def generate_body(prompt: Sequence[int], count: int, **options: Any) -> StartGenerate:
    address: KvAddress | None = options.pop("kv", None)
    begin = options.pop("begin", None)
    if begin is None:
        begin = 0 if address is None else address.end
    return StartGenerate(
        request_id="q",
        sub_id=options.pop("sub_id", None) or next_sub_id(),
        prompt=pack_tokens(prompt),
        begin=begin,
        sampling=SamplingParams(max_tokens=count, temperature=0),
        lease=None if address is None else address.lease,
        **options,
    )


def expected(prompt: Sequence[int], count: int = 4) -> list[int]:
    """What every engine answers to `prompt`, wherever the KV comes from."""
    tokens = np.array(prompt, dtype=np.int32)
    served = model()
    sampling = SamplingParams(max_tokens=count, temperature=0)
    start = SequenceStart(0, tokens, len(tokens), sampling, 0, served.eos_token_ids)
    return fake_tokens(tokens, start, served, count=count)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """A prompt that has no page in common with one of another seed."""
    return [(seed * 31 + index * 7 + index // PAGE) % 49 for index in range(length)]
