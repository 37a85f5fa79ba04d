"""An executor that makes tokens up: deterministic, with a latency model and a pool that notices wrong pages.

The KV of a position is a 64-bit hash of every token up to it, computed from the hash in the pool before it. So the
next token depends on all that came before, and on nothing else: the same history gives the same token however it was
cut into steps, shared, preempted or resumed, as long as the scheduler names the right pages.
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from microserve.engine.plan import Sampled, SequenceStart, Slice, StepPlan, StepResult
from microserve.kv.transfer.base import KvMemory
from microserve.runtime.clock import monotonic
from microserve.runtime.errors import ConfigError, InternalError
from microserve.runtime.messages import Layout, ModelInfo, TokenLogprobs
from microserve.runtime.models import resolve_model

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from microserve.runtime.clock import Clock
    from microserve.runtime.settings import EngineConfig, FakeConfig

_MASK: Final = (1 << 64) - 1
_MULTIPLIER: Final = 0x5851F42D4C957F2D  # odd, so that it has an inverse modulo 2**64
_INVERSE: Final = pow(_MULTIPLIER, -1, 1 << 64)
_EMPTY: Final = 0x9E3779B97F4A7C15
"""The hash of no tokens."""

Hashes = npt.NDArray[np.uint64]


class FakeExecutor:
    """Implements `Executor` without a model.

    A step takes `decode_base_us`, `prefill_us_per_token` for each prompt token and `decode_us_per_sequence` for each
    decode; steps follow one another, and `collect` waits for its own with `sleep`. `depth` 2 behaves like a device
    with a queue. With `verify`, every slice checks that all the pages it names hold its own history: for tests, its
    cost grows with length.
    """

    def __init__(
        self,
        config: FakeConfig,
        model: ModelInfo,
        *,
        page_size: int = 16,
        total_pages: int | None = None,
        depth: int = 1,
        verify: bool = False,
        clock: Clock = monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._model = model
        self._page_size = page_size
        self._depth = depth
        self._clock = clock
        self._sleep = sleep
        self.pool: Hashes = np.zeros((total_pages or config.total_pages, page_size), dtype=np.uint64)
        self._hasher = _Hasher()
        self._sequences: dict[int, SequenceStart] = {}
        self._histories: dict[int, list[int]] | None = {} if verify else None
        self._last: dict[int, int] = {}
        """The token that each sequence sampled last."""
        self._launched: deque[tuple[float, StepResult]] = deque()
        self._busy_until = 0.0

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def layout(self) -> Layout:
        return Layout(
            model_revision=self._model.revision,
            dtype="fake",
            page_size=self._page_size,
            layers=1,
            kv_heads=1,
            head_dim=1,
        )

    @property
    def total_pages(self) -> int:
        return len(self.pool)

    @property
    def memory(self) -> KvMemory:
        return KvMemory(
            address=self.pool.ctypes.data,
            page_bytes=self.pool.strides[0],
            total_pages=len(self.pool),
            owner=self.pool,
        )

    @property
    def depth(self) -> int:
        return self._depth

    @property
    def sequences(self) -> int:
        """Sequences that it has been told of and may not forget."""
        return len(self._sequences)

    def launch(self, plan: StepPlan) -> None:
        """Raises `InternalError` for a plan that the protocol forbids."""
        if len(self._launched) >= self._depth:
            raise InternalError(f"{len(self._launched)} steps are launched already; depth is {self._depth}")
        for sequence in plan.forgotten:
            self._sequences.pop(sequence, None)
            self._last.pop(sequence, None)
            if self._histories is not None:
                self._histories.pop(sequence, None)
        for start in plan.started:
            if start.sequence in self._sequences:
                raise InternalError(f"sequence {start.sequence} was started twice")
            self._sequences[start.sequence] = start
            if self._histories is not None:
                self._histories[start.sequence] = start.history.tolist()
        sampled = tuple(token for part in plan.slices if (token := self._compute(part)) is not None)
        begin = max(self._clock(), self._busy_until)
        self._busy_until = begin + self._seconds(plan)
        self._launched.append((self._busy_until, StepResult(plan.step, sampled)))

    def ended(self) -> bool:
        return not self._launched or self._launched[0][0] <= self._clock()

    def collect(self) -> StepResult:
        if not self._launched:
            raise InternalError("no step is launched")
        ready_at, result = self._launched.popleft()
        if (wait := ready_at - self._clock()) > 0:
            self._sleep(wait)
        return result

    def close(self) -> None:
        self._launched.clear()
        self._sequences.clear()

    def _seconds(self, plan: StepPlan) -> float:
        config = self._config
        decodes = sum(part.length == 1 and part.output_index > 0 for part in plan.slices)
        prefill = config.prefill_us_per_token * (plan.tokens - decodes)
        return (config.decode_base_us + config.decode_us_per_sequence * decodes + prefill) * 1e-6

    def _compute(self, part: Slice) -> Sampled | None:
        start = self._sequences.get(part.sequence)
        if start is None:
            raise InternalError(f"sequence {part.sequence} was not started")
        size, end = self._page_size, part.start + part.length
        if len(part.pages) * size < end:
            raise InternalError(f"sequence {part.sequence}: {len(part.pages)} pages do not cover {end} positions")
        tokens = [self._last[part.sequence]] if part.tokens is None else part.tokens
        if self._histories is not None:
            self._verify(part, tokens, self._histories[part.sequence])
        before = _EMPTY
        if part.start:
            before = int(self.pool[part.pages[(part.start - 1) // size], (part.start - 1) % size])
        hashes = self._hasher.extend(before, tokens)
        positions = np.arange(part.start, end)
        self.pool[part.pages[positions // size], positions % size] = hashes
        if not part.sample:
            return None
        token = _next_token(int(hashes[-1]), part.output_index, start, self._model, self._config.eos_after)
        self._last[part.sequence] = token
        if self._histories is not None:
            self._histories[part.sequence].append(token)
        return Sampled(part.sequence, token, _logprobs(token, start.sampling.logprobs, self._model.vocab_size))

    def _verify(self, part: Slice, tokens: Sequence[int] | npt.NDArray[np.int32], history: list[int]) -> None:
        end = part.start + part.length
        if list(tokens) != history[part.start : end]:
            raise InternalError(f"sequence {part.sequence}: tokens {part.start}…{end} are not its history")
        if len(set(part.pages.tolist())) != len(part.pages):
            raise InternalError(f"sequence {part.sequence} names a page twice")
        positions = np.arange(part.start)
        held = self.pool[part.pages[positions // self._page_size], positions % self._page_size]
        wrong = np.flatnonzero(held != self._hasher.extend(_EMPTY, history[: part.start]))
        if len(wrong):
            raise InternalError(f"sequence {part.sequence}: position {wrong[0]} holds KV of another history")


def fake_tokens(
    prompt: Sequence[int] | npt.NDArray[np.int32],
    start: SequenceStart,
    model: ModelInfo,
    *,
    count: int,
    eos_after: int | None = None,
) -> list[int]:
    """The reference: the next `count` tokens after `prompt`, one by one, without pages, steps or batches."""
    hasher = _Hasher()
    state = _EMPTY
    if len(prompt):
        state = int(hasher.extend(_EMPTY, prompt)[-1])
    output: list[int] = []
    for index in range(len(prompt) - start.prompt_length, len(prompt) - start.prompt_length + count):
        token = _next_token(state, index, start, model, eos_after)
        output.append(token)
        state = int(hasher.extend(state, [token])[-1])
    return output


def fake_model(config: EngineConfig) -> ModelInfo:
    """What an engine with this executor says that it serves: the checkpoint's name and tokenizer, if there is one."""
    fake = config.fake
    try:
        folder: Path | None = resolve_model(config.model)
    except ConfigError:
        folder = None
    vocabulary, eos = fake.vocab_size, (fake.vocab_size - 1,)
    if folder is not None:
        described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # Only tokens that the checkpoint's tokenizer can turn into text.
        vocabulary = min(vocabulary, int(described.get("vocab_size", vocabulary)))
        stated = described.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        eos = tuple(token for token in ids if token < vocabulary) or (vocabulary - 1,)
    return ModelInfo(
        name=config.model_name or (folder.name if folder is not None else config.model),
        revision=f"fake-{vocabulary}",
        architecture="fake",
        vocab_size=vocabulary,
        max_context=min(config.max_context or fake.max_context, fake.max_context),
        eos_token_ids=eos,
        path=str(folder) if folder is not None else "",
    )


class _Hasher:
    """hash(p) = hash(p - 1) · m + token(p) + 1 modulo 2**64, for many positions at once.

    Divided by m**p the recurrence is a running sum: hash(p) = m**p · (hash(0) + Σ (token(i) + 1) · m**-i).
    """

    def __init__(self) -> None:
        self._powers: Hashes = np.ones(1, dtype=np.uint64)
        self._inverses: Hashes = np.ones(1, dtype=np.uint64)

    def extend(self, before: int, tokens: Sequence[int] | npt.NDArray[np.int32]) -> Hashes:
        """Hashes after each of `tokens`, uint64 [n], where `before` is the hash in front of them."""
        count = len(tokens)
        if count == 1:
            return np.array([(before * _MULTIPLIER + int(tokens[0]) + 1) & _MASK], dtype=np.uint64)
        if count >= len(self._powers):
            self._powers = _geometric(_MULTIPLIER, 2 * count)
            self._inverses = _geometric(_INVERSE, 2 * count)
        scaled = (np.asarray(tokens).astype(np.uint64) + np.uint64(1)) * self._inverses[1 : count + 1]
        sums = np.cumsum(scaled, dtype=np.uint64) + np.full(count, before, dtype=np.uint64)
        return sums * self._powers[1 : count + 1]


def _geometric(factor: int, count: int) -> Hashes:
    factors = np.full(count, factor, dtype=np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _next_token(state: int, index: int, start: SequenceStart, model: ModelInfo, eos_after: int | None) -> int:
    sampling = start.sampling
    eos = model.eos_token_ids
    if eos_after is not None and eos and not sampling.ignore_eos and index >= max(eos_after, sampling.min_tokens):
        return eos[0]
    # The finaliser of splitmix64: neighbouring hashes give unrelated tokens.
    mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _MASK
    token = (mixed ^ (mixed >> 31)) % model.vocab_size
    for _ in range(model.vocab_size):
        banned = token in eos or (index < sampling.min_tokens and token in sampling.stop_token_ids)
        if not banned:
            break
        token = (token + 1) % model.vocab_size
    return token


def _logprobs(token: int, count: int | None, vocabulary: int) -> TokenLogprobs | None:
    if count is None:
        return None
    top = [(token + offset) % vocabulary for offset in range(min(count, vocabulary))]
    return TokenLogprobs(-0.5, top, [-0.5 - offset for offset in range(len(top))])
