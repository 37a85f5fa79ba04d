from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine_rig import make_request

from microserve.engine.sharing import PATIENCE, share

if TYPE_CHECKING:
    from microserve.engine.request import Request


def prefilling(identity: int, remaining: int, progressed: int = 0) -> Request:
    request = make_request([1] * remaining)
    request.id = identity
    request.progressed = progressed
    return request


def test_a_request_alone_gets_everything() -> None:
    assert share([prefilling(1, 100)], 30, 0) == {1: 30}
    assert share([prefilling(1, 10)], 30, 0) == {1: 10}
    assert share([prefilling(1, 100)], 30, 0, chunk=7) == {1: 7}
    assert share([prefilling(1, 100)], 0, 0) == {}
    assert share([], 30, 0) == {}


def test_the_oldest_gets_half_and_the_shortest_the_rest() -> None:
    requests = [prefilling(1, 100), prefilling(2, 50), prefilling(3, 6), prefilling(4, 6)]
    assert share(requests, 20, 0) == {1: 10, 3: 6, 4: 4}


def test_what_the_others_do_not_need_goes_to_the_oldest() -> None:
    assert share([prefilling(1, 100), prefilling(2, 3)], 20, 0) == {1: 17, 2: 3}
    assert share([prefilling(1, 100), prefilling(2, 3)], 20, 0, chunk=12) == {1: 12, 2: 3}


def test_whoever_waited_longest_is_served_first() -> None:
    requests = [prefilling(1, 100, 9), prefilling(2, 50, 1), prefilling(3, 50, 0), prefilling(4, 8, 9)]
    assert share(requests, 20, PATIENCE) == {3: 5, 1: 7, 4: 8}
    assert share(requests, 20, PATIENCE - 1) == {1: 10, 4: 8, 2: 2}


def test_a_budget_of_one_is_given_to_somebody() -> None:
    assert share([prefilling(2, 5), prefilling(1, 5)], 1, 0) == {1: 1}


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    budget=st.integers(1, 40),
    chunk=st.none() | st.integers(1, 10),
)
@settings(max_examples=200, deadline=None)
def test_everybody_is_served_within_bounds(sizes: list[int], budget: int, chunk: int | None) -> None:
    """New short prompts arrive in every step; still nobody stands still for longer than the documented bound."""
    requests = {n: prefilling(n, size) for n, size in enumerate(sizes, start=1)}
    watched = set(requests)
    for step in range(400):
        if not watched & requests.keys():
            return
        if len(requests) < 8:
            newcomer = 100 + step
            requests[newcomer] = prefilling(newcomer, 1, step)
        shares = share(requests.values(), budget, step, chunk)
        assert 0 < sum(shares.values()) <= budget
        for identity, tokens in shares.items():
            request = requests[identity]
            assert 0 < tokens <= min(request.remaining, chunk or budget)
            request.scheduled += tokens
            request.progressed = step
            if not request.remaining:
                del requests[identity]
        assert all(step - request.progressed <= PATIENCE + 8 for request in requests.values())
