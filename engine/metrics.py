"""What an engine counts as it goes. Counting is cheap: a step is counted once, a generation at its first token and at
its end, and nothing for each token. Scrapes are in `exposition`.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from microserve.runtime.series import FAST, SLOW, Series

_BATCHES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)
_TOKENS = (1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


class EngineMetrics:
    """Counts what happens. `call_ended`, `refused`, `first_token` and `event` are for the event loop, the rest for the
    step thread; each figure has one writer."""

    def __init__(self) -> None:
        self.calls: dict[str, Series] = {}
        """Seconds of sub-requests, by verb."""
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.ttft = Series(SLOW)
        self.events: Counter[str] = Counter()
        self.allocation: dict[str, Series] = {"prep_recv": Series(SLOW), "start_generate": Series(SLOW)}
        """Seconds that calls waited for pages and a place."""
        self.step_seconds = Series(FAST)
        self.step_sequences = Series(_BATCHES)
        self.step_prompt_tokens = Series(_TOKENS)

    def refused(self, message: str, outcome: str) -> None:
        """A sub-request was refused before it began: it has no duration, and would hide that of those that have."""
        self.outcomes[_snake(message), outcome] += 1

    def call_ended(self, message: str, outcome: str, seconds: float) -> None:
        """A sub-request has got its terminal answer. `message` is the name of its class, as in `StartGenerate`."""
        verb = _snake(message)
        series = self.calls.get(verb)
        if series is None:
            series = self.calls.setdefault(verb, Series(SLOW))
        series.observe(seconds)
        self.outcomes[verb, outcome] += 1
        if verb == "prep_recv" and outcome == "ok":
            # Nothing else takes time in it.
            self.allocation[verb].observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A generation has its first token."""
        self.ttft.observe(seconds)

    def event(self, kind: str) -> None:
        """Something happened that operators are told."""
        self.events[kind] += 1

    def admitted(self, seconds: float) -> None:
        """A generation has pages and a place for the first time."""
        self.allocation["start_generate"].observe(seconds)

    def step(self, sequences: int, prompt_tokens: int) -> None:
        """A step is launched."""
        self.step_sequences.observe(sequences)
        if prompt_tokens:
            self.step_prompt_tokens.observe(prompt_tokens)

    def step_ended(self, seconds: float) -> None:
        """A step is done. With two under way, this is the time from one to the next while there are more."""
        self.step_seconds.observe(seconds)


@cache
def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
