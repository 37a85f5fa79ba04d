"""Calls that a caller may repeat: a retry joins the work that is under way, or gets the answer of what has ended.

Lives on the asyncio thread. The work of a call ends when nobody waits for it any more.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from microserve.runtime.clock import monotonic
from microserve.runtime.errors import CallerError, Cancelled, Conflict, InvalidRequest, MicroserveError, Unavailable
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from microserve.runtime.bus import Session
    from microserve.runtime.clock import Clock
    from microserve.runtime.messages import ReplyBody
    from microserve.runtime.rpc import IncomingCall

_KEPT = 1024
"""Ended calls whose answers are remembered."""

_REFUSALS = (Unavailable, InvalidRequest)
"""Errors that changed nothing."""

_log = get_logger(__name__)


def tell_failed(verb: str, request: str, sub: str, caller: Session, error: MicroserveError) -> None:
    """A line about a sub-request that failed: what was cancelled or found no room is for those who look closely."""
    tell = _log.debug if isinstance(error, Cancelled | Unavailable) else _log.warning
    if isinstance(error, CallerError):
        tell = _log.info
    who = caller.peer
    tell(
        "sub-request failed",
        every=10.0,
        burst=20,
        verb=verb,
        request=request,
        sub=sub,
        caller=who,
        code=error.code,
        error=error.message,
    )


class SubCall:
    """The work of one sub-request, and everybody who waits for its answer."""

    __slots__ = ("_book", "began", "callers", "ended", "key", "request_id", "session", "stop", "sub_id", "verb")

    def __init__(self, book: CallBook, call: IncomingCall, sub_id: str, key: Hashable) -> None:
        self._book = book
        self.sub_id = sub_id
        self.key = key
        self.session = call.session
        """Whose call began it."""
        self.verb = type(call.body).__name__
        self.request_id: str = getattr(call.body, "request_id", "")
        self.callers = [call]
        self.began = book.clock()
        self.ended = False
        self.stop: Callable[[MicroserveError], None] = lambda error: None
        """Called at most once, when the work is to end because nobody wants its answer. The call has ended by then."""

    def reply(self, answer: ReplyBody) -> None:
        """The work is done. No effect after the end."""
        self._book.end(self, answer)

    def fail(self, error: MicroserveError) -> None:
        """The work has failed. No effect after the end."""
        self._book.end(self, error)


class CallBook:
    """Every open sub-request by its `sub_id`, and the answers of the latest that ended.

    `len` counts the open ones that may be joined.
    """

    def __init__(self, kept: int = _KEPT, *, clock: Clock = monotonic) -> None:
        self.clock = clock
        self._kept = kept
        self._open: dict[str, SubCall] = {}
        self._streams: set[str] = set()
        """Calls that cannot be joined, by `sub_id`."""
        self._ended: OrderedDict[str, tuple[Hashable, ReplyBody | MicroserveError | None, Session | None]] = (
            OrderedDict()
        )
        self.emptied: Callable[[], None] = lambda: None
        """Called when the last open call has ended."""
        self.told: Callable[[str, str, float], None] = lambda verb, outcome, seconds: None
        """Told of every call that has ended: its verb, "ok" or the code of an error, and how long it took."""

    def __len__(self) -> int:
        return len(self._open)

    def joined(self, call: IncomingCall, sub_id: str, key: Hashable) -> bool:
        """Whether `call` repeats a known one and is taken care of. `key` says what is asked, budgets aside.

        Raises `Conflict` when the known one asked for something else, and `InvalidRequest` for an empty `sub_id`.
        """
        if not sub_id:
            raise InvalidRequest("sub_id must not be empty", param="sub_id")
        known = self._open.get(sub_id)
        if known is not None:
            if known.key != key:
                raise Conflict(f"sub-request {sub_id!r} is under way and asks for something else", param="sub_id")
            known.callers.append(call)
            self._follow(known, call)
            return True
        if sub_id in self._streams:
            raise Conflict(f"sub-request {sub_id!r} is under way and asks for something else", param="sub_id")
        if sub_id not in self._ended:
            return False
        ended, answer, _ = self._ended[sub_id]
        if answer is None or ended != key:
            raise Conflict(f"sub-request {sub_id!r} has ended already", param="sub_id")
        if isinstance(answer, MicroserveError):
            call.fail(answer)
        else:
            call.reply(answer)
        return True

    def open(self, call: IncomingCall, sub_id: str, key: Hashable) -> SubCall:
        """Work begins for `call`, which `joined` did not know."""
        sub = SubCall(self, call, sub_id, key)
        self._open[sub_id] = sub
        self._follow(sub, call)
        return sub

    def begin_stream(self, sub_id: str) -> None:
        """A call begins that streams, so that it can neither be joined nor repeated.

        Raises `Conflict` for a `sub_id` that is known, and `InvalidRequest` for an empty one.
        """
        if not sub_id:
            raise InvalidRequest("sub_id must not be empty", param="sub_id")
        if sub_id in self._streams or sub_id in self._open:
            raise Conflict(f"sub-request {sub_id!r} is running already", param="sub_id")
        if sub_id in self._ended:
            raise Conflict(f"sub-request {sub_id!r} has ended already", param="sub_id")
        self._streams.add(sub_id)

    def end_stream(self, sub_id: str, error: MicroserveError | None = None) -> None:
        """It has ended. After a refusal its name is free again."""
        self._streams.discard(sub_id)
        if not isinstance(error, _REFUSALS):
            self._keep(sub_id, (None, None, None))

    def abort(self, sub_id: str, error: MicroserveError) -> bool:
        """Ends an open call with `error`. Whether there was one."""
        sub = self._open.get(sub_id)
        if sub is None:
            return False
        self._stop(sub, error)
        return True

    def abort_all(self, error: MicroserveError) -> None:
        """Ends every open call with `error`."""
        for sub in list(self._open.values()):
            self._stop(sub, error)

    def forget(self, session: Session) -> None:
        """What `session` began is void: the answers of its calls are not given again."""
        for sub_id in [sub_id for sub_id, (_, _, owner) in self._ended.items() if owner is session]:
            del self._ended[sub_id]

    def end(self, sub: SubCall, answer: ReplyBody | MicroserveError) -> None:
        """See `SubCall.reply` and `SubCall.fail`."""
        if sub.ended:
            return
        sub.ended = True
        del self._open[sub.sub_id]
        # A refusal changed nothing, so that a retry may be taken.
        if not isinstance(answer, _REFUSALS):
            self._keep(sub.sub_id, (sub.key, answer, sub.session))
        if isinstance(answer, MicroserveError):
            tell_failed(sub.verb, sub.request_id, sub.sub_id, sub.session, answer)
        outcome = answer.code if isinstance(answer, MicroserveError) else "ok"
        self.told(sub.verb, outcome, self.clock() - sub.began)
        for call in sub.callers:
            if isinstance(answer, MicroserveError):
                call.fail(answer)
            else:
                call.reply(answer)
            call.on_cancel = None
        if not self._open:
            self.emptied()

    def _keep(self, sub_id: str, entry: tuple[Hashable, ReplyBody | MicroserveError | None, Session | None]) -> None:
        self._ended[sub_id] = entry
        self._ended.move_to_end(sub_id)
        if len(self._ended) > self._kept:
            self._ended.popitem(last=False)

    def _follow(self, sub: SubCall, call: IncomingCall) -> None:
        call.on_cancel = lambda reason: self._left(sub, call, reason)

    def _left(self, sub: SubCall, call: IncomingCall, reason: MicroserveError) -> None:
        """One of those who wait has gone: its call was cancelled, or its session is lost."""
        if sub.ended:
            return
        if sub.callers == [call]:
            self._stop(sub, reason)
            return
        sub.callers.remove(call)
        call.fail(reason if isinstance(reason, Cancelled) else Cancelled(reason.message))

    def _stop(self, sub: SubCall, error: MicroserveError) -> None:
        self.end(sub, error)
        sub.stop(error)
