"""How much one engine takes on."""

from __future__ import annotations

from dataclasses import dataclass

from microserve.runtime.errors import ConfigError


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
