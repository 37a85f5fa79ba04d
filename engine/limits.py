"""How much one engine takes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from microserve.runtime.errors import ConfigError

if TYPE_CHECKING:
    from microserve.runtime.settings import EngineConfig


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine takes on. `prefill_chunk` bounds one request's share of a step; None leaves it to the budget."""

    max_running: int
    max_waiting: int
    step_tokens: int
    max_context: int
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        if self.step_tokens <= self.max_running:
            raise ConfigError(
                f"step_tokens ({self.step_tokens}) must be larger than max_running ({self.max_running}): "
                "every running request gets a token in every step, and prompts need the rest"
            )
        if self.prefill_chunk is not None and self.prefill_chunk < 1:
            raise ConfigError(f"prefill_chunk must be at least 1, not {self.prefill_chunk}")


class Sizes(NamedTuple):
    """Of a step: sequences that run, and tokens that it computes."""

    max_running: int
    step_tokens: int


_SIZES = ((56 << 30, Sizes(512, 8192)), (20 << 30, Sizes(256, 2048)), (0, Sizes(64, 512)))
"""From so many bytes on that the engine may take of a GPU's memory. A large step keeps a GPU busy and delays the
decodes in it: 8,192 tokens of an 8B take an H200 0.2 s. Of that memory such a step takes 2 GiB."""


def sizes(config: EngineConfig, gpu_bytes: int = 0) -> Sizes:
    """What `config` says, and where it does not, what suits a GPU of `gpu_bytes`, or a CPU, and fits the rest."""
    usual = next(found for least, found in _SIZES if gpu_bytes * config.gpu_memory >= least)
    running, tokens = config.max_running, config.step_tokens
    if tokens is None:
        tokens = usual.step_tokens if running is None else max(usual.step_tokens, 2 * running)
    if running is None:
        running = min(usual.max_running, max(1, tokens // 2))
    return Sizes(running, tokens)
