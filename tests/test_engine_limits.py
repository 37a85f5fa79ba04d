"""How large steps are where nobody says it."""

from __future__ import annotations

import pytest
import torch

from microserve.engine import cuda_open
from microserve.engine.core import make_limits
from microserve.engine.daemon import with_sizes
from microserve.engine.limits import sizes
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import ConfigError

GIB = 1 << 30


def config(running: int | None = None, tokens: int | None = None, executor: str = "auto") -> EngineConfig:
    return EngineConfig(model="m", max_running=running, step_tokens=tokens, executor=executor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("memory", "running", "tokens", "expected"),
    [
        (0, None, None, (64, 512)),
        (16 * GIB, None, None, (64, 512)),
        (24 * GIB, None, None, (256, 2048)),
        (60 * GIB, None, None, (256, 2048)),
        (64 * GIB, None, None, (512, 8192)),
        (140 * GIB, 100, 300, (100, 300)),
        # What is said is kept, and the other one fits it.
        (0, 1000, None, (1000, 2000)),
        (140 * GIB, 1000, None, (1000, 8192)),
        (140 * GIB, None, 200, (100, 200)),
        (0, None, 4096, (64, 4096)),
        (0, None, 2, (1, 2)),
    ],
)
def test_steps_are_as_large_as_suits_what_computes(
    memory: int, running: int | None, tokens: int | None, expected: tuple[int, int]
) -> None:
    given = config(running, tokens)
    assert sizes(given, memory) == expected
    if memory == 0:
        limits = make_limits(given, 4096)
        assert (limits.max_running, limits.step_tokens) == expected


def test_what_the_engine_may_take_counts_and_not_what_there_is() -> None:
    shared = EngineConfig(model="m", gpu_memory=0.3)
    assert sizes(shared, 80 * GIB) == (256, 2048)
    assert sizes(shared, 60 * GIB) == (64, 512)


def test_what_was_said_and_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_tokens \(64\) must be larger than max_running \(64\)"):
        make_limits(config(64, 64), 4096)


def test_an_engine_asks_the_gpu_that_it_will_compute_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def device(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cuda:3")

    monkeypatch.setattr(cuda_open, "cuda_device", device)
    monkeypatch.setattr(cuda_open, "gpu_bytes", lambda device: {"cuda:3": 80 * GIB}[str(device)])
    filled = with_sizes(config(executor="cuda"))
    assert (filled.max_running, filled.step_tokens) == (512, 8192)
    monkeypatch.setattr(cuda_open, "cuda_device", lambda name: None)
    assert (with_sizes(config()).max_running, with_sizes(config()).step_tokens) == (64, 512)
    assert with_sizes(config(7, None, "torch")).step_tokens == 512
    assert asked == ["auto"]
