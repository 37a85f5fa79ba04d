"""Stop strings in a stream of text: found across token boundaries, and no part of one shown before it cannot match."""

from __future__ import annotations

from typing import TYPE_CHECKING

from microserve.runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_STOPS = 16
MAX_STOP_LENGTH = 1000
"""Characters; it bounds the text held back, and the work per piece."""


def checked_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """`stops` without repetitions. Raises `InvalidRequest` for too many, too long, or empty ones."""
    unique = tuple(dict.fromkeys(stops))
    if len(unique) > MAX_STOPS:
        raise InvalidRequest(f"at most {MAX_STOPS} stop strings, not {len(unique)}", param="stop")
    for stop in unique:
        if not stop:
            raise InvalidRequest("a stop string must not be empty", param="stop")
        if len(stop) > MAX_STOP_LENGTH:
            raise InvalidRequest(f"a stop string has at most {MAX_STOP_LENGTH} characters", param="stop")
    return unique


class StopScanner:
    """Looks for the stop string whose occurrence is complete first; of those that end together, the longest wins.

    The outcome does not depend on how the text is cut into pieces.
    """

    __slots__ = ("_held", "_last", "_stops", "matched")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._last = frozenset(character for stop in self._stops for character in stop[:-1])
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, ignore: bool = False) -> str:
        """The text that is certain to precede any stop. After a match, `matched` is set and nothing more comes.

        `ignore`: a stop that `text` completes does not count; one that it begins does.
        """
        if self.matched is not None:
            return ""
        held = len(self._held)
        buffer = self._held + text
        best: tuple[int, int] | None = None
        for stop in () if ignore else self._stops:
            # What is complete within the held text was ignored then.
            at = buffer.find(stop, max(0, held + 1 - len(stop)))
            if at >= 0 and (best is None or (at + len(stop), at) < best):
                best = (at + len(stop), at)
        if best is not None:
            end, start = best
            self.matched = buffer[start:end]
            self._held = ""
            return buffer[:start]
        keep = self._keep(buffer)
        if not keep:
            self._held = ""
            return buffer
        self._held = buffer[-keep:]
        return buffer[:-keep]

    def _keep(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that a stop string begins with."""
        if not buffer or buffer[-1] not in self._last:
            return 0
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def flush(self) -> str:
        """What was held back, when the text has ended without a match."""
        held, self._held = self._held, ""
        return held
