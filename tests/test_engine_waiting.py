from __future__ import annotations

from typing import TYPE_CHECKING

from tests.engine_rig import make_request

from microserve.engine.request import State
from microserve.engine.waiting import Budget, Deadlines, Pace, WaitingLine

if TYPE_CHECKING:
    from microserve.engine.request import Request


def numbered(identity: int, state: State = State.WAITING, **options: float) -> Request:
    request = make_request([1, 2, 3], **options)  # type: ignore[arg-type]
    request.id = identity
    request.state = state
    return request


def test_preempted_requests_stand_before_new_ones_and_all_by_arrival() -> None:
    line = WaitingLine()
    new = [numbered(7), numbered(8)]
    preempted = [numbered(n, State.PREEMPTED) for n in (5, 2, 6)]
    for request in (*new, *preempted):
        line.add(request)
    assert [request.id for request in line.first(10)] == [2, 5, 6, 7, 8]
    assert [request.id for request in line.first(2)] == [2, 5]
    assert (len(line), line.new, line.tokens()) == (5, 2, 15)
    assert new[0] in line
    assert preempted[0] in line


def test_a_late_one_stands_where_it_arrived() -> None:
    line = WaitingLine()
    for identity in (4, 7, 9, 8, 3):
        line.add(numbered(identity))
    assert [request.id for request in line.first(10)] == [3, 4, 7, 8, 9]


def test_leaving_the_line() -> None:
    line = WaitingLine()
    new, preempted, stranger = numbered(3), numbered(2, State.PREEMPTED), numbered(1)
    line.add(new)
    line.add(preempted)
    for request in (stranger, new, preempted, new):
        line.discard(request)
    assert len(line) == 0
    assert line.first(5) == []


def test_deadlines_come_up_in_order() -> None:
    request = numbered(1, admit_by=5.0, first_token_by=7.0, deadline=6.0)
    other = numbered(2, deadline=5.5)
    live = {1: request, 2: other}
    deadlines = Deadlines(live)
    deadlines.watch(request)
    deadlines.watch(other)
    assert deadlines.next() == 5.0
    assert deadlines.expired(4.9) == []
    assert deadlines.expired(5.0) == [(request, Budget.ADMIT)]
    assert deadlines.expired(6.5) == [(other, Budget.WHOLE), (request, Budget.WHOLE)]
    del live[1]
    assert deadlines.next() is None
    assert deadlines.expired(100.0) == []


def test_deadlines_of_ended_requests_do_not_pile_up() -> None:
    live: dict[int, Request] = {}
    deadlines = Deadlines(live)
    for identity in range(1000):
        live[identity] = numbered(identity, deadline=1000.0 + identity)
        deadlines.watch(live[identity])
        if identity % 100:
            del live[identity]
    assert len(deadlines._heap) <= 64 + 4 * 10 + 1
    assert deadlines.next() == 1000.0


def test_the_pace_follows_the_endings() -> None:
    pace = Pace()
    pace.ended(100.0)
    assert pace.seconds == 0.05
    for count in range(1, 200):
        pace.ended(100.0 + 2.0 * count)
    assert round(pace.seconds, 3) == 2.0
