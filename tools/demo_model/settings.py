"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the result follows from, but for the rounding of the hardware."""

    seed: int = 1
    steps: int = 15_000
    rows: int = 16  # conversations are packed into so many rows of `length` tokens for a step
    length: int = 4096
    rate: float = 2e-3  # peak of the learning rate
    warmup: int = 300  # steps
    decay: float = 0.1  # weight decay of the matrices
    layers: int = 8
    long_from: float = 0.35  # share of the steps after which documents may have `longest` sentences; before, 50
    longest: int = 320
