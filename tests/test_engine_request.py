from __future__ import annotations

import itertools

import numpy as np
import pytest
from tests.engine_rig import make_request

from microserve.engine.request import ADMITTED, FINAL, TRANSITIONS, State
from microserve.runtime.errors import InternalError

ALLOWED = {
    ("waiting", "prefill"),
    ("waiting", "receiving"),
    ("waiting", "sending"),
    ("waiting", "finished"),
    ("waiting", "failed"),
    ("waiting", "aborted"),
    ("receiving", "waiting"),
    ("receiving", "finished"),
    ("receiving", "failed"),
    ("receiving", "aborted"),
    ("prefill", "decode"),
    ("prefill", "sending"),
    ("prefill", "preempted"),
    ("prefill", "finished"),
    ("prefill", "failed"),
    ("prefill", "aborted"),
    ("sending", "finished"),
    ("sending", "failed"),
    ("sending", "aborted"),
    ("decode", "preempted"),
    ("decode", "finished"),
    ("decode", "failed"),
    ("decode", "aborted"),
    ("preempted", "prefill"),
    ("preempted", "finished"),
    ("preempted", "failed"),
    ("preempted", "aborted"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_moves_are_those_of_the_table(before: State, after: State) -> None:
    request = make_request([1, 2, 3], sub_id="s")
    request.state = before
    if (before.value, after.value) in ALLOWED:
        request.move(after)
        assert request.state is after
    else:
        with pytest.raises(InternalError, match=f"request s: {before.value} cannot become {after.value}"):
            request.move(after)
        assert request.state is before


def test_final_states_have_no_way_out_and_every_state_has_a_row() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {State.FINISHED, State.FAILED, State.ABORTED} == FINAL
    assert {state for state, ways in TRANSITIONS.items() if not ways} == FINAL
    assert not FINAL & ADMITTED


def test_history_grows_without_touching_views_that_were_handed_out() -> None:
    request = make_request([1, 2, 3], max_tokens=1000)
    view = request.history[:3]
    for token in range(200):
        request.append(token)
    assert request.known == 203
    assert request.generated == 200
    assert request.history[:203].tolist() == [1, 2, 3, *range(200)]
    assert view.tolist() == [1, 2, 3]
    assert request.history.dtype == np.int32


def test_prior_output_belongs_to_the_prompt_but_not_to_its_length() -> None:
    request = make_request([1, 2, 3, 4, 5], prior_output=2, min_tokens=4)
    assert request.prompt_total == 5
    assert request.prompt_length == 3
    assert request.min_known == 7
    assert request.generated == 0
