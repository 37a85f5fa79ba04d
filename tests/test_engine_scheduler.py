from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.engine_rig import EOS, Rig, make_request

from microserve.engine.plan import Sampled, StepResult
from microserve.engine.request import State
from microserve.engine.scheduler import Limits
from microserve.runtime.errors import Busy, ConfigError, ContextLengthExceeded, DeadlineExceeded, InternalError
from microserve.runtime.messages import Generated, TokenLogprobs, Tokens, Usage

if TYPE_CHECKING:
    from microserve.engine.plan import PageArray

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def shape(rig: Rig) -> list[tuple[int, int, int, bool]]:
    """The last plan: (request, start, tokens, sampled) of each slice."""
    return [(part.sequence, part.start, part.length, part.sample) for part in rig.plans[-1].slices]


# --- one request ---------------------------------------------------------------------------------------------------


@DEPTHS
def test_a_request_is_served(depth: int) -> None:
    rig = Rig(depth=depth)
    request = rig.submit(make_request([1, 2, 3, 4, 5], max_tokens=6))
    assert rig.run() == 6 + (depth == 2)
    assert rig.seen[request].tokens == rig.expected(request, 6)
    usage = Usage(prompt_tokens=5, completion_tokens=6, cached_tokens=0)
    assert rig.generated(request) == Generated(finish_reason="length", usage=usage, stop_token=None)
    assert request.state is State.FINISHED
    rig.assert_empty()


def test_the_plans_of_depth_1() -> None:
    rig = Rig(step_tokens=10, prefill_chunk=4)
    request = rig.submit(make_request([1, 2, 3, 4, 5, 6], max_tokens=3))
    rig.run()
    first, second, third, fourth = rig.plans
    assert [s.sequence for s in first.started] == [request.id]
    assert first.started[0].history.tolist() == [1, 2, 3, 4, 5, 6]
    assert first.started[0].prompt_length == 6
    assert first.started[0].eos_token_ids == (EOS,)
    assert [plan.started for plan in (second, third, fourth)] == [(), (), ()]
    assert [part.tokens.tolist() for plan in rig.plans for part in plan.slices if part.tokens is not None] == [
        [1, 2, 3, 4],
        [5, 6],
        rig.seen[request].tokens[:1],
        rig.seen[request].tokens[1:2],
    ]
    got = [(part.start, len(part.pages), part.sample, part.output_index) for p in rig.plans for part in p.slices]
    assert got == [(0, 1, False, 0), (4, 2, True, 0), (6, 2, True, 1), (7, 2, True, 2)]


def test_at_depth_2_a_decode_refers_to_the_token_in_flight() -> None:
    rig = Rig(depth=2)
    rig.submit(make_request([1, 2, 3], max_tokens=4))
    rig.run()
    assert [(part.tokens is None, part.start) for plan in rig.plans for part in plan.slices] == [
        (False, 0),
        (True, 3),
        (True, 4),
        (True, 5),
    ]


@DEPTHS
def test_eos_ends_it_is_counted_and_is_not_streamed(depth: int) -> None:
    rig = Rig(depth=depth, eos_after=3)
    request = rig.submit(make_request([1, 2, 3], max_tokens=50))
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 3)
    end = rig.generated(request)
    assert (end.finish_reason, end.stop_token, end.usage.completion_tokens) == ("stop", EOS, 4)
    # At depth 2 the end shows when one more step is under way: its token is dropped.
    assert len(rig.plans) == 4 + (depth == 2)
    rig.assert_empty()


@DEPTHS
def test_a_first_token_that_stops_leaves_no_text(depth: int) -> None:
    rig = Rig(depth=depth, eos_after=0)
    request = rig.submit(make_request([1, 2, 3]))
    rig.run()
    assert rig.seen[request].tokens == []
    usage = Usage(prompt_tokens=3, completion_tokens=1)
    assert rig.generated(request) == Generated(finish_reason="stop", usage=usage, stop_token=EOS)


@DEPTHS
def test_stop_token_ids_end_it(depth: int) -> None:
    rig = Rig(depth=depth)
    reference = rig.expected(make_request([7, 8, 9], max_tokens=9), 9)
    stop = reference[4]
    request = rig.submit(make_request([7, 8, 9], max_tokens=9, stop_token_ids=(stop,)))
    rig.run()
    assert rig.seen[request].tokens == reference[: reference.index(stop)]
    assert rig.generated(request).stop_token == stop


def test_ignore_eos_streams_it() -> None:
    rig = Rig()
    request = rig.submit(make_request([1, 2, 3], max_tokens=2, ignore_eos=True))
    rig.launch()
    _answer(rig, EOS)
    _answer_next(rig, EOS)
    assert rig.seen[request].tokens == [EOS, EOS]
    assert rig.generated(request).finish_reason == "length"


def test_min_tokens_holds_a_stop_back() -> None:
    rig = Rig()
    request = rig.submit(make_request([1, 2, 3], max_tokens=9, min_tokens=2))
    rig.launch()
    _answer(rig, EOS)
    _answer_next(rig, EOS)
    _answer_next(rig, EOS)
    assert rig.seen[request].tokens == [EOS, EOS]
    assert rig.generated(request).usage.completion_tokens == 3


def test_logprobs_travel_with_their_token() -> None:
    rig = Rig()
    request = rig.submit(make_request([1, 2, 3], max_tokens=2, logprobs=1))
    bodies = []
    while not request.final:
        plan = rig.scheduler.schedule(0.0)
        assert plan is not None
        rig.executor.launch(plan)
        rig.scheduler.complete(rig.executor.collect(), 0.0)
        bodies += [output.body for output in rig.scheduler.take_outputs()]
    first, second = rig.expected(request, 2)
    assert [body.logprobs for body in bodies if isinstance(body, Tokens)] == [
        [TokenLogprobs(-0.5, [first], [-0.5])],
        [TokenLogprobs(-0.5, [second], [-0.5])],
    ]


def _answer(rig: Rig, token: int) -> None:
    """The launched step sampled `token` for every slice."""
    plan = rig.plans[-1]
    sampled = tuple(Sampled(part.sequence, token) for part in plan.slices if part.sample)
    rig.scheduler.complete(StepResult(plan.step, sampled), rig.clock())
    rig.read()


def _answer_next(rig: Rig, token: int) -> None:
    plan = rig.scheduler.schedule(rig.clock())
    assert plan is not None
    rig.plans.append(plan)
    _answer(rig, token)


# --- prior output --------------------------------------------------------------------------------------------------


@DEPTHS
def test_a_replay_continues_where_it_was(depth: int) -> None:
    rig = Rig(depth=depth, eos_after=7)
    whole = rig.submit(make_request([1, 2, 3, 4], max_tokens=20))
    rig.run()
    tokens = rig.seen[whole].tokens
    rest = rig.submit(make_request([1, 2, 3, 4, *tokens[:3]], max_tokens=20, prior_output=3))
    rig.run()
    assert rig.seen[rest].tokens == tokens[3:]
    assert rig.generated(rest).usage.prompt_tokens == 4
    assert rig.generated(rest).usage.completion_tokens == rig.generated(whole).usage.completion_tokens == 8
    assert rig.plans[-1 - (depth == 2)].slices[0].output_index == 7


def test_a_replay_that_has_all_its_tokens_ends_at_once() -> None:
    rig = Rig()
    request = rig.submit(make_request([1, 2, 3, 4], max_tokens=2, prior_output=2))
    usage = Usage(prompt_tokens=2, completion_tokens=2)
    assert rig.generated(request) == Generated(finish_reason="length", usage=usage, stop_token=None)
    assert rig.scheduler.schedule(0.0) is None
    rig.assert_empty()


def test_a_replay_that_has_all_that_fits_ends_at_once() -> None:
    rig = Rig(pages=4)
    prompt = list(range(16))
    with pytest.raises(ContextLengthExceeded):
        rig.submit(make_request([*prompt, 1]))
    request = rig.submit(make_request([*prompt, 1], max_tokens=5, prior_output=1))
    assert rig.generated(request).finish_reason == "length"
    rig.assert_empty()


# --- the prefix cache ----------------------------------------------------------------------------------------------


@DEPTHS
def test_a_known_prefix_is_not_computed_again(depth: int) -> None:
    rig = Rig(depth=depth)
    prompt = list(range(13))
    rig.submit(make_request(prompt, max_tokens=1))
    rig.run()
    request = rig.submit(make_request(prompt, max_tokens=3))
    rig.step()
    assert shape(rig) == [(request.id, 12, 1, True)]
    rig.run()
    assert rig.generated(request).usage.cached_tokens == 12
    assert rig.seen[request].tokens == rig.expected(request, 3)


def test_the_last_token_is_computed_even_when_all_is_cached() -> None:
    rig = Rig()
    prompt = list(range(8))
    rig.submit(make_request(prompt, max_tokens=5))
    rig.run()
    request = rig.submit(make_request(prompt, max_tokens=1))
    rig.step()
    assert shape(rig) == [(request.id, 4, 4, True)]
    rig.run()
    assert rig.generated(request).usage.cached_tokens == 4


def test_output_is_cached_for_the_next_turn() -> None:
    rig = Rig()
    first = rig.submit(make_request([1, 2, 3], max_tokens=10))
    rig.run()
    # 12 positions were computed: the prompt and all of the output but its last token.
    longer = [1, 2, 3, *rig.seen[first].tokens, 5, 6]
    second = rig.submit(make_request(longer, max_tokens=1))
    rig.run()
    assert rig.generated(second).usage.cached_tokens == 12


@DEPTHS
def test_a_prompt_can_be_shared_as_soon_as_it_is_computed(depth: int) -> None:
    rig = Rig(depth=depth)
    prompt = list(range(20))
    first = rig.submit(make_request(prompt, max_tokens=40))
    for _ in range(4):
        rig.step()
    second = rig.submit(make_request(prompt, max_tokens=2))
    rig.run()
    assert first.final
    assert rig.generated(second).usage.cached_tokens == 16
    rig.assert_empty()


@DEPTHS
def test_choices_of_one_prompt_compute_it_once(depth: int) -> None:
    rig = Rig(depth=depth, step_tokens=30)
    prompt = list(range(40))
    requests = [rig.submit(make_request(prompt, max_tokens=3)) for _ in range(4)]
    rig.run()
    assert [rig.generated(request).usage.cached_tokens for request in requests] == [0, 36, 36, 36]
    assert rig.scheduler.load().prefilled_tokens == 40 + 3 * 4
    assert all(rig.seen[request].tokens == rig.expected(request, 3) for request in requests)
    rig.assert_empty()


def test_who_shares_a_beginning_waits_only_for_that() -> None:
    rig = Rig(step_tokens=12)
    common = list(range(16))
    long = rig.submit(make_request(common + [49] * 60, max_tokens=1))
    short = rig.submit(make_request([*common, 1, 2, 3], max_tokens=1))
    while not short.final:
        rig.step()
    assert not long.final
    assert rig.generated(short).usage.cached_tokens == 16
    rig.run()
    rig.assert_empty()


def test_who_waits_for_a_prefix_goes_on_when_its_owner_is_gone() -> None:
    rig = Rig(step_tokens=12)
    first = rig.submit(make_request(list(range(40)), max_tokens=1))
    second = rig.submit(make_request(list(range(40)), max_tokens=1))
    rig.step()
    assert (first.state, second.state) == (State.PREFILL, State.WAITING)
    rig.abort(first)
    rig.run()
    assert rig.generated(second).usage.completion_tokens == 1
    rig.assert_empty()


# --- batching and fairness -----------------------------------------------------------------------------------------


def test_decodes_come_first_and_prompts_get_the_rest_of_the_budget() -> None:
    rig = Rig(step_tokens=10)
    first = rig.submit(make_request([1, 2, 3], max_tokens=50))
    rig.step()
    second = rig.submit(make_request([9] * 20, max_tokens=50))
    rig.step()
    assert shape(rig) == [(first.id, 3, 1, True), (second.id, 0, 9, False)]
    rig.step()
    assert shape(rig) == [(first.id, 4, 1, True), (second.id, 9, 9, False)]
    rig.step()
    assert shape(rig) == [(first.id, 5, 1, True), (second.id, 18, 2, True)]
    rig.step()
    assert shape(rig) == [(first.id, 6, 1, True), (second.id, 20, 1, True)]


@DEPTHS
def test_short_prompts_do_not_wait_for_a_long_one(depth: int) -> None:
    rig = Rig(depth=depth, pages=300, step_tokens=16)
    long = rig.submit(make_request([1] * 800, max_tokens=1))
    rig.step()
    short = rig.submit(make_request([2] * 6, max_tokens=1))
    for _ in range(2 + depth):
        rig.step()
    assert short.final
    assert not long.final


@DEPTHS
def test_nobody_starves_under_a_stream_of_short_prompts(depth: int) -> None:
    """Adversarial arrivals: new short prompts in every step, more than the budget can take."""
    rig = Rig(depth=depth, pages=200, max_running=6, max_waiting=10, step_tokens=12, check=False)
    long = [rig.submit(make_request([tag] * 60, max_tokens=8)) for tag in (1, 2)]
    progress = {request: 0 for request in long}
    longest = 0
    for step in itertools.count():
        for tag in range(3):
            if rig.scheduler.load().waiting < 10:
                rig.submit(make_request([(step + tag) % 40, *[tag] * 5], max_tokens=1))
        before = {request: (request.scheduled, request.known) for request in long}
        rig.step()
        for request in long:
            moved = before[request] != (request.scheduled, request.known) or request.final
            progress[request] = 0 if moved else progress[request] + 1
            longest = max(longest, progress[request])
        if all(request.final for request in long):
            break
        assert step < 200
    # PATIENCE steps, and one for every other prompt that may be as patient.
    assert longest <= 8 + 6
    for request in long:
        assert rig.seen[request].tokens == rig.expected(request, 8)


def test_requests_start_in_order_of_arrival() -> None:
    rig = Rig(max_running=2, step_tokens=8)
    requests = [rig.submit(make_request([n] * 5, max_tokens=3)) for n in range(6)]
    started: list[int] = []
    for _ in range(100):
        if not rig.step():
            break
        started += [start.sequence for start in rig.plans[-1].started if start.sequence not in started]
    assert started == [request.id for request in requests]


def test_no_more_run_than_allowed() -> None:
    rig = Rig(max_running=3)
    for n in range(10):
        rig.submit(make_request([n, n], max_tokens=4))
    while rig.step():
        assert len(rig.plans[-1].slices) <= 3
        assert rig.scheduler.running <= 3


# --- preemption ----------------------------------------------------------------------------------------------------


@DEPTHS
def test_the_latest_is_preempted_and_resumes_without_losing_or_repeating_a_token(depth: int) -> None:
    rig = Rig(pages=8, depth=depth)
    first = rig.submit(make_request([1] * 8, max_tokens=20))
    second = rig.submit(make_request([2] * 8, max_tokens=16))
    while second.state is not State.PREEMPTED:
        assert rig.step()
    assert first.state is State.DECODE
    streamed = len(rig.seen[second].tokens)
    assert streamed > 0
    rig.run()
    assert rig.scheduler.load().preemptions >= 1
    assert rig.seen[first].tokens == rig.expected(first, 20)
    assert rig.seen[second].tokens == rig.expected(second, 16)
    assert rig.generated(second).usage == Usage(prompt_tokens=8, completion_tokens=16)
    starts = [start for plan in rig.plans for start in plan.started if start.sequence == second.id]
    assert len(starts) >= 2
    assert starts[-1].prompt_length == 8
    assert len(starts[-1].history) > 8
    rig.assert_empty()


@DEPTHS
def test_no_more_are_preempted_than_is_needed(depth: int) -> None:
    """At depth 2 the victim's pages come back a step later; that is no reason to take another's."""
    rig = Rig(pages=12, depth=depth)
    requests = [rig.submit(make_request([n] * 12, max_tokens=8)) for n in range(3)]
    rig.run()
    assert rig.scheduler.load().preemptions == 1
    assert all(rig.seen[request].tokens == rig.expected(request, 8) for request in requests)
    rig.assert_empty()


def test_a_sequence_is_forgotten_before_it_is_started_again() -> None:
    rig = Rig(pages=8)
    rig.submit(make_request([1] * 8, max_tokens=20))
    second = rig.submit(make_request([2] * 8, max_tokens=16))
    rig.run()
    known = False
    for plan in rig.plans:
        if second.id in plan.forgotten:
            assert known
            known = False
        if any(start.sequence == second.id for start in plan.started):
            assert not known
            known = True


def test_what_a_preempted_request_computed_is_found_again_if_nobody_needed_it() -> None:
    rig = Rig(pages=8)
    first = rig.submit(make_request([1] * 8, max_tokens=10))
    second = rig.submit(make_request([2] * 8, max_tokens=10))
    rig.run()
    load = rig.scheduler.load()
    assert load.preemptions == 1
    # The older one needed one page: three of the four that were given up are still there, so 5 of 17 tokens are redone.
    assert load.prefilled_tokens == 16 + 5
    assert rig.seen[first].tokens == rig.expected(first, 10)
    assert rig.seen[second].tokens == rig.expected(second, 10)


@DEPTHS
def test_a_request_that_outgrows_the_pool_alone_ends_with_length(depth: int) -> None:
    rig = Rig(pages=4, depth=depth)
    request = rig.submit(make_request([1, 2, 3], max_tokens=500))
    rig.run()
    # 16 positions hold the inputs; the token that the last of them gives needs no place.
    assert rig.seen[request].tokens == rig.expected(request, 14)
    assert rig.generated(request).finish_reason == "length"
    rig.assert_empty()


@DEPTHS
def test_the_context_ends_a_request_with_length(depth: int) -> None:
    rig = Rig(max_context=10, depth=depth)
    request = rig.submit(make_request([1, 2, 3], max_tokens=500))
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 7)
    assert rig.generated(request).finish_reason == "length"


@DEPTHS
def test_pinned_pages_that_nobody_frees_end_a_request_instead_of_a_livelock(depth: int) -> None:
    rig = Rig(pages=6, depth=depth)
    rig.submit(make_request([5] * 16, max_tokens=1))
    rig.run()
    assert rig.cache.pin(np.array([5] * 16, dtype=np.int32), ttl=1e9) == 16
    request = rig.submit(make_request([1, 2, 3], max_tokens=100))
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 6)
    assert rig.generated(request).finish_reason == "length"


# --- admission -----------------------------------------------------------------------------------------------------


def test_a_prompt_that_can_never_fit_is_refused() -> None:
    rig = Rig(pages=4, max_context=1000)
    rig.submit(make_request([1] * 16, max_tokens=5))
    with pytest.raises(ContextLengthExceeded, match="17 tokens; at most 16") as caught:
        rig.submit(make_request([1] * 17))
    assert caught.value.param == "prompt"
    rig = Rig(max_context=10)
    rig.submit(make_request([1] * 9))
    with pytest.raises(ContextLengthExceeded, match="10 tokens; at most 9"):
        rig.submit(make_request([1] * 10))


def test_the_line_is_bounded() -> None:
    rig = Rig(max_running=2, max_waiting=3)
    for _ in range(2 + 3):
        rig.submit(make_request([1, 2], max_tokens=50))
    with pytest.raises(Busy) as caught:
        rig.submit(make_request([1, 2]))
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 0.1
    rig.step()
    assert rig.scheduler.load().waiting == 3
    with pytest.raises(Busy):
        rig.submit(make_request([1, 2]))


def test_without_a_line_whoever_finds_a_place_is_taken() -> None:
    rig = Rig(max_running=2, max_waiting=0)
    rig.submit(make_request([1], max_tokens=5))
    rig.submit(make_request([2], max_tokens=5))
    with pytest.raises(Busy):
        rig.submit(make_request([3]))
    rig.run()
    rig.submit(make_request([3]))


def test_a_prompt_that_waits_for_pages_is_not_passed() -> None:
    rig = Rig(pages=10)
    rig.submit(make_request([1] * 8, max_tokens=12))
    rig.step()
    big = rig.submit(make_request([2] * 32, max_tokens=1))
    small = rig.submit(make_request([3], max_tokens=1))
    while not big.final:
        rig.step()
        assert big.state is not State.WAITING or small.state is State.WAITING
    rig.run()
    assert rig.scheduler.load().preemptions == 0


def test_a_newcomer_leaves_a_page_for_each_of_those_that_run() -> None:
    rig = Rig(pages=10)
    rig.submit(make_request([1] * 9, max_tokens=9))
    rig.step()
    # It needs the seven pages that are free now, and the one that runs will need two of them.
    rig.submit(make_request([2] * 28, max_tokens=8))
    rig.run()
    assert rig.scheduler.load().preemptions == 0


def test_limits_that_would_starve_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"step_tokens \(8\) must be larger than max_running \(8\)"):
        Limits(8, 0, 8, 100)
    with pytest.raises(ConfigError, match="prefill_chunk must be at least 1, not 0"):
        Limits(1, 0, 8, 100, 0)


# --- deadlines -----------------------------------------------------------------------------------------------------


def test_not_admitted_in_time_is_busy() -> None:
    rig = Rig(max_running=1)
    rig.submit(make_request([1], max_tokens=50))
    request = rig.submit(make_request([2], admit_by=rig.clock() + 5))
    rig.step()
    assert rig.scheduler.next_deadline() == rig.clock() + 5
    rig.clock.advance(4.9)
    rig.step()
    assert request.state is State.WAITING
    rig.clock.advance(0.1)
    rig.step()
    error = rig.error(request)
    assert isinstance(error, Busy)
    assert error.param == "admit_by"
    assert rig.scheduler.next_deadline() is None


def test_admitted_in_time_is_not_disturbed() -> None:
    rig = Rig()
    request = rig.submit(make_request([2], max_tokens=5, admit_by=rig.clock() + 5, first_token_by=rig.clock() + 6))
    rig.step()
    rig.clock.advance(100)
    rig.run()
    assert rig.seen[request].tokens == rig.expected(request, 5)


@pytest.mark.parametrize("running", [True, False])
def test_no_first_token_in_time(running: bool) -> None:
    rig = Rig(max_running=1, step_tokens=4)
    if not running:
        rig.submit(make_request([1], max_tokens=50))
    request = rig.submit(make_request([2] * 20, first_token_by=rig.clock() + 5))
    rig.step()
    assert request.state is (State.PREFILL if running else State.WAITING)
    rig.clock.advance(5)
    rig.step()
    error = rig.error(request)
    assert isinstance(error, DeadlineExceeded)
    assert error.param == "first_token_by"
    rig.run()
    rig.assert_empty()


@DEPTHS
def test_the_overall_deadline_ends_a_running_request(depth: int) -> None:
    rig = Rig(depth=depth)
    request = rig.submit(make_request([2], max_tokens=100, deadline=rig.clock() + 5))
    for _ in range(4):
        rig.step()
    rig.clock.advance(5)
    rig.run()
    assert isinstance(rig.error(request), DeadlineExceeded)
    streamed = rig.seen[request].tokens
    assert 0 < len(streamed) < 100
    assert streamed == rig.expected(request, len(streamed))
    rig.assert_empty()


# --- abort ---------------------------------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize("state", [State.WAITING, State.PREFILL, State.DECODE, State.PREEMPTED])
def test_abort_in_every_state(state: State, depth: int) -> None:
    rig = Rig(pages=8, depth=depth, max_running=2, step_tokens=3, check=True)
    other = rig.submit(make_request([1] * 8, max_tokens=20))
    request = rig.submit(make_request([2] * 8, max_tokens=16))
    while request.state is not state:
        assert rig.step()
    assert rig.abort(request)
    assert not rig.abort(request)
    assert request.state is State.ABORTED
    streamed = list(rig.seen[request].tokens)
    rig.run()
    assert rig.seen[request].tokens == streamed
    assert rig.seen[request].end is None
    assert rig.seen[other].tokens == rig.expected(other, 20)
    rig.assert_empty()


def test_pages_come_back_when_the_last_step_that_names_them_has_retired() -> None:
    rig = Rig(depth=2)
    request = rig.submit(make_request([1] * 6, max_tokens=50))
    rig.launch()
    rig.launch()
    rig.abort(request)
    assert rig.cache.statistics().owned == 2
    rig.collect()
    assert rig.cache.statistics().owned == 2
    rig.collect()
    rig.assert_empty()


# --- failures ------------------------------------------------------------------------------------------------------


@DEPTHS
def test_a_failed_step_fails_its_requests_and_nobody_else(depth: int) -> None:
    rig = Rig(depth=depth, max_running=2)
    lost = [rig.submit(make_request([n] * 6, max_tokens=5)) for n in range(2)]
    spared = rig.submit(make_request([7] * 6, max_tokens=5))
    plan = rig.scheduler.schedule(rig.clock())
    assert plan is not None
    rig.scheduler.fail(plan.step, InternalError("out of memory"))
    rig.read()
    for request in lost:
        assert rig.error(request).message == "out of memory"
        assert rig.seen[request].tokens == []
    # Nothing of what the step wrote is kept.
    assert rig.cache.statistics().cached == 0
    rig.run()
    assert rig.seen[spared].tokens == rig.expected(spared, 5)
    rig.assert_empty()


def test_only_pages_of_earlier_steps_survive_a_failure() -> None:
    rig = Rig(prefill_chunk=8)
    request = rig.submit(make_request(list(range(20)), max_tokens=5))
    rig.step()
    plan = rig.scheduler.schedule(rig.clock())
    assert plan is not None
    rig.scheduler.fail(plan.step, InternalError("out of memory"))
    rig.read()
    assert request.state is State.FAILED
    assert rig.cache.match(np.arange(20, dtype=np.int32)).length == 8
    rig.assert_empty()


def test_the_older_of_two_steps_fails() -> None:
    rig = Rig(depth=2, max_running=1)
    lost = rig.submit(make_request([1] * 6, max_tokens=9))
    spared = rig.submit(make_request([7] * 6, max_tokens=5))
    rig.launch()
    rig.launch()
    rig.executor.collect()
    rig.scheduler.fail(rig.launched.popleft(), InternalError("gone"))
    rig.read()
    assert rig.error(lost).message == "gone"
    assert rig.cache.statistics().owned == 2
    rig.run()
    assert rig.seen[lost].tokens == []
    assert rig.seen[spared].tokens == rig.expected(spared, 5)
    rig.assert_empty()


def test_an_answer_to_another_step_fails_the_step() -> None:
    rig = Rig()
    request = rig.submit(make_request([1, 2]))
    plan = rig.scheduler.schedule(0.0)
    assert plan is not None
    rig.scheduler.complete(StepResult(plan.step + 1, (Sampled(request.id, 3),)), 0.0)
    rig.read()
    assert isinstance(rig.error(request), InternalError)
    rig.assert_empty()


def test_an_answer_for_another_sequence_fails_the_request() -> None:
    rig = Rig()
    request = rig.submit(make_request([1, 2]))
    plan = rig.scheduler.schedule(0.0)
    assert plan is not None
    rig.scheduler.complete(StepResult(plan.step, (Sampled(request.id + 1, 3),)), 0.0)
    rig.read()
    assert isinstance(rig.error(request), InternalError)
    rig.assert_empty()


@pytest.mark.parametrize("first", [True, False])
def test_a_sequence_that_the_executor_gives_up_fails_alone(first: bool) -> None:
    rig = Rig()
    lost, spared = rig.submit(make_request([1] * 8, max_tokens=5)), rig.submit(make_request([2] * 8, max_tokens=5))
    if not first:
        rig.step()
    cached = rig.cache.statistics().cached
    plan = rig.scheduler.schedule(0.0)
    assert plan is not None
    rig.executor.launch(plan)
    good = rig.executor.collect()
    sampled = (Sampled(lost.id, 0, error="the logits are not numbers"), good.sampled[1])
    rig.scheduler.complete(StepResult(plan.step, sampled), 0.0)
    rig.read()
    assert rig.error(lost).message == "the logits are not numbers"
    # Nothing that the step wrote for it is kept; the other's prompt is.
    assert rig.cache.statistics().cached == cached + 2 * first
    rig.run()
    assert rig.seen[spared].tokens == rig.expected(spared, 5)
    rig.assert_empty()


def test_no_more_than_two_steps_are_in_flight() -> None:
    rig = Rig()
    rig.submit(make_request([1, 2], max_tokens=9))
    assert rig.scheduler.schedule(0.0) is not None
    assert rig.scheduler.schedule(0.0) is not None
    with pytest.raises(InternalError, match="2 steps are in flight already"):
        rig.scheduler.schedule(0.0)


# --- seen from outside ---------------------------------------------------------------------------------------------


def test_load_counts() -> None:
    rig = Rig(max_running=1, pages=20, step_tokens=6)
    rig.submit(make_request([1] * 8, max_tokens=4))
    rig.submit(make_request([2] * 9, max_tokens=4))
    rig.step()
    load = rig.scheduler.load()
    assert (load.running, load.waiting, load.queued_tokens) == (1, 1, 2 + 9)
    assert (load.free_pages, load.owned_pages, load.cached_pages, load.total_pages) == (18, 2, 0, 20)
    rig.run()
    load = rig.scheduler.load()
    assert (load.running, load.waiting, load.queued_tokens) == (0, 0, 0)
    assert (load.generated_tokens, load.prefilled_tokens, load.preemptions) == (8, 17, 0)
    assert load.steps == len(rig.plans)
    assert load.free_pages + load.cached_pages == load.total_pages
    values = rig.scheduler.statistics()
    assert (values["scheduler_finished"], values["scheduler_live"]) == (2, 0)


def test_plans_that_were_handed_out_do_not_change() -> None:
    """Two requests compute the same first page at once; the second one's is then replaced by the first one's."""
    rig = Rig(depth=2, step_tokens=64)
    rig.submit(make_request([3] * 4 + [1] * 20, max_tokens=12))
    second = rig.submit(make_request([3] * 4 + [2] * 20, max_tokens=12))
    views: list[tuple[PageArray, list[int]]] = []
    while rig.step():
        views.extend((part.pages, part.pages.tolist()) for part in rig.plans[-1].slices if part.sequence == second.id)
    assert views[0][1][0] != views[-1][1][0]
    assert all(view.tolist() == pages for view, pages in views)
    rig.assert_empty()
