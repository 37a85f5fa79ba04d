"""Repeated calls: who joins, who is answered again, who is in conflict."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from microserve.engine.calls import CallBook
from microserve.runtime.errors import Busy, Cancelled, Conflict, InvalidRequest, MicroserveError, PeerLost
from microserve.runtime.messages import Commit, Committed, Ok

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.runtime.messages import ReplyBody


class Caller:
    """An `IncomingCall` that keeps its answer."""

    def __init__(self, session: object) -> None:
        self.session = session
        self.body = Commit(request_id="q", sub_id="s", lease=1)
        self.answers: list[ReplyBody | MicroserveError] = []
        self.on_cancel: Callable[[MicroserveError], None] | None = None

    def reply(self, body: ReplyBody) -> None:
        self.answers.append(body)

    def fail(self, error: MicroserveError) -> None:
        self.answers.append(error)

    def leave(self, error: MicroserveError) -> None:
        assert self.on_cancel is not None
        self.on_cancel(error)


def session() -> Any:
    return SimpleNamespace(peer="router:r:1")


def caller(of: object = None) -> Any:
    return Caller(of if of is not None else session())


GONE = Cancelled("gone")


def test_a_retry_of_open_work_joins_it() -> None:
    book, first, second = CallBook(), caller(), caller()
    assert not book.joined(first, "s", 1)
    sub = book.open(first, "s", 1)
    assert book.joined(second, "s", 1)
    sub.reply(Ok())
    assert first.answers == second.answers == [Ok()]
    assert first.on_cancel is None
    assert len(book) == 0


def test_a_retry_of_ended_work_has_the_same_answer() -> None:
    book = CallBook()
    for name, answer in (("s", Committed(committed_until=5)), ("t", PeerLost("the receiver"))):
        sub = book.open(caller(), name, 1)
        if isinstance(answer, MicroserveError):
            sub.fail(answer)
        else:
            sub.reply(answer)
        sub.reply(Ok())
        again = caller()
        assert book.joined(again, name, 1)
        assert again.answers == [answer]


def test_a_name_that_stands_for_something_else_is_a_conflict() -> None:
    book = CallBook()
    sub = book.open(caller(), "s", 1)
    with pytest.raises(Conflict, match="is under way and asks for something else"):
        book.joined(caller(), "s", 2)
    with pytest.raises(Conflict, match="is running already"):
        book.begin_stream("s")
    sub.reply(Ok())
    with pytest.raises(Conflict, match="has ended already"):
        book.joined(caller(), "s", 2)
    with pytest.raises(Conflict, match="has ended already"):
        book.begin_stream("s")


def test_streams_are_never_joined() -> None:
    book = CallBook()
    book.begin_stream("s")
    with pytest.raises(Conflict, match="is running already"):
        book.begin_stream("s")
    with pytest.raises(Conflict, match="is under way"):
        book.joined(caller(), "s", 1)
    book.end_stream("s")
    with pytest.raises(Conflict, match="has ended already"):
        book.begin_stream("s")
    with pytest.raises(Conflict, match="has ended already"):
        book.joined(caller(), "s", 1)
    assert len(book) == 0


def test_a_refusal_leaves_the_name_free() -> None:
    book = CallBook()
    book.open(caller(), "s", 1).fail(Busy("no room"))
    assert not book.joined(caller(), "s", 1)
    book.begin_stream("t")
    book.end_stream("t", InvalidRequest("no"))
    book.begin_stream("t")


def test_an_empty_name_is_refused() -> None:
    book = CallBook()
    with pytest.raises(InvalidRequest):
        book.joined(caller(), "", 1)
    with pytest.raises(InvalidRequest):
        book.begin_stream("")


def test_work_stops_when_the_last_caller_has_gone() -> None:
    book, first, second = CallBook(), caller(), caller()
    stopped: list[MicroserveError] = []
    emptied: list[bool] = []
    book.emptied = lambda: emptied.append(True)
    sub = book.open(first, "s", 1)
    sub.stop = stopped.append
    book.joined(second, "s", 1)
    first.leave(GONE)
    assert first.answers == [GONE]
    assert (stopped, emptied) == ([], [])
    second.leave(PeerLost("the session"))
    assert [type(error) for error in stopped] == [PeerLost]
    assert emptied == [True]
    sub.reply(Ok())
    assert [type(answer) for answer in second.answers] == [PeerLost]


def test_an_abort_ends_it_for_everybody() -> None:
    book, first, second = CallBook(), caller(), caller()
    stopped: list[MicroserveError] = []
    sub = book.open(first, "s", 1)
    sub.stop = stopped.append
    book.joined(second, "s", 1)
    assert book.abort("s", GONE)
    assert not book.abort("s", GONE)
    assert first.answers == second.answers == stopped == [GONE]
    other = book.open(caller(), "t", 1)
    book.abort_all(GONE)
    assert other.ended


def test_what_a_lost_session_began_is_forgotten() -> None:
    book, lost = CallBook(), session()
    book.open(caller(lost), "s", 1).reply(Ok())
    book.open(caller(), "t", 1).reply(Ok())
    book.forget(lost)
    assert not book.joined(caller(), "s", 1)
    assert book.joined(caller(), "t", 1)


def test_the_oldest_answers_are_forgotten_first() -> None:
    book = CallBook(kept=2)
    for name in "abc":
        book.open(caller(), name, 1).reply(Ok())
    assert not book.joined(caller(), "a", 1)
    assert book.joined(caller(), "b", 1)
