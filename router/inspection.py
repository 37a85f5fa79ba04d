"""Requests as operators see them: what runs, what waits, and the last that ended, with what was asked of engines."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from microserve.router.dispatch import Generation, State
from microserve.runtime.errors import CallerError, Cancelled, Unavailable
from microserve.runtime.log import get_logger
from microserve.runtime.messages import RequestInfo, Requests, SubRequestInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from microserve.router.pending import SubRecord
    from microserve.runtime.clock import Clock
    from microserve.runtime.errors import MicroserveError

MOST_RECENT = 256
"""Requests that have ended and are remembered."""

_log = get_logger(__name__)


class Inspection:
    """Remembers requests that have ended, and describes those that have not."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._recent: deque[RequestInfo] = deque(maxlen=MOST_RECENT)

    def ended(self, generation: Generation) -> None:
        """Called once for each, when nothing of it is left."""
        described = self._describe(generation)
        self._recent.append(described)
        error = generation.error
        if error is not None or _log.wants_debug:
            _tell(described, generation, error)

    def requests(self, open_ones: Iterable[Generation], *, request_id: str | None, recent: int, limit: int) -> Requests:
        """`open_ones` oldest first and the last `recent`, newest first; or those of one id alone."""
        found = sorted(open_ones, key=lambda each: each.created_at)
        active = len(found)
        if request_id is not None:
            found = [each for each in found if each.request_id == request_id]
            past = [each for each in reversed(self._recent) if each.request_id == request_id]
        else:
            past = [self._recent[-index] for index in range(1, min(recent, len(self._recent)) + 1)]
        return Requests(requests=[self._describe(each) for each in found[:limit]], active=active, recent=past)

    def _describe(self, generation: Generation) -> RequestInfo:
        created = generation.created_at
        first, ended, error = generation.first_token_at, generation.ended_at, generation.error
        state = generation.state.value
        if generation.state is State.ENDED:
            state = "ok" if error is None else error.code
        return RequestInfo(
            request_id=generation.request_id,
            model=generation.request.model,
            strategy=generation.strategy_version,
            state=state,
            age=self._clock() - created,
            prompt_tokens=len(generation.request.prompt),
            output_tokens=generation.completion_tokens,
            cached_tokens=generation.cached_tokens,
            engines=_engines(generation),
            first_token=None if first is None else first - created,
            ended=None if ended is None else ended - created,
            error="" if error is None else error.message,
            sub_requests=[_sub_request(record, created) for record in generation.sub_requests],
        )


def _engines(generation: Generation) -> list[str]:
    """Those that only helped, and those that generate, each in the order in which they were asked."""
    generating = generation.engine_ids
    helped = dict.fromkeys(record.engine for record in generation.sub_requests)
    return [*(each for each in helped if each not in generating), *generating]


def _tell(ended: RequestInfo, generation: Generation, error: MicroserveError | None) -> None:
    """One line for a request that has ended: those that went well are for whoever looks closely."""
    tell = _log.warning
    if error is None:
        tell = _log.debug
    elif isinstance(error, CallerError | Cancelled | Unavailable):
        tell = _log.info
    tell(
        "request ended",
        every=None if error is None else 10.0,
        burst=20,
        request=ended.request_id,
        model=ended.model,
        strategy=ended.strategy,
        engines=",".join(generation.engine_ids),
        engine_epochs=",".join(f"{each:x}" for each in generation.engine_epochs),
        outcome=ended.state,
        prompt_tokens=ended.prompt_tokens,
        output_tokens=ended.output_tokens,
        seconds=round(ended.ended or 0.0, 3),
        error=ended.error,
    )


def _sub_request(record: SubRecord, created: float) -> SubRequestInfo:
    return SubRequestInfo(
        verb=record.verb,
        engine=record.engine,
        begin=record.begin,
        end=record.end,
        started=record.started - created,
        ended=None if record.ended is None else record.ended - created,
        outcome=record.outcome,
        matched=record.matched,
        computed=record.computed,
        reused=record.reused,
        bytes=record.nbytes,
    )
