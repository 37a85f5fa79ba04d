"""The step loop, driven turn by turn in the test's thread; and, where that is the subject, in its own."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest
from tests.engine_rig import Rig, make_request
from tests.receiving_rig import KvRig

from microserve.engine.executor import DeviceLost
from microserve.engine.loop import StepLoop
from microserve.engine.request import State
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.errors import Busy, InternalError, MicroserveError
from microserve.runtime.messages import Generated, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from microserve.engine.outputs import Output
    from microserve.engine.plan import StepPlan, StepResult
    from microserve.engine.request import Request

LIMIT = 10.0
"""Seconds after which a thread counts as stuck."""


class FailingExecutor:
    """Passes everything on to the rig's executor, except for the calls that are to fail."""

    def __init__(self, rig: Rig) -> None:
        self._inner = rig.executor
        self.fail_launch = self.fail_collect = False
        self.closed = 0
        self.looks = 0
        """How often somebody asked whether the step has ended."""
        self.busy_looks = 0
        """How often it will not have."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def launch(self, plan: StepPlan) -> None:
        if self.fail_launch:
            self.fail_launch = False
            raise RuntimeError("out of memory")
        self._inner.launch(plan)

    def ended(self) -> bool:
        self.looks += 1
        return self.looks > self.busy_looks

    def collect(self) -> StepResult:
        result = self._inner.collect()
        if self.fail_collect:
            self.fail_collect = False
            raise ValueError("not a number")
        return result

    def close(self) -> None:
        self.closed += 1


class Bench:
    """A loop over a rig; what it posts is done at once, or kept by `mailbox`."""

    def __init__(self, rig: Rig | None = None, **options: Any) -> None:
        self.rig = rig if rig is not None else Rig(**options)
        self.executor = FailingExecutor(self.rig)
        self.delivered: list[list[Output]] = []
        self.crashes: list[BaseException] = []
        self.loop = StepLoop(
            self.rig.scheduler,
            self.executor,
            post=self.post,
            deliver=self.delivered.append,
            crashed=self.crashes.append,
            receiving=self.rig.receiving if isinstance(self.rig, KvRig) else None,
            clock=self.rig.clock,
        )

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        function(*arguments)

    def turns(self) -> int:
        count = 0
        while self.loop.turn():
            count += 1
        return count

    def bodies(self, request: Request) -> list[Tokens | Generated | MicroserveError]:
        bodies = [output.body for outputs in self.delivered for output in outputs if output.request is request]
        return [body for body in bodies if isinstance(body, Tokens | Generated | MicroserveError)]

    def end(self, request: Request) -> Generated | MicroserveError:
        last = self.bodies(request)[-1]
        assert not isinstance(last, Tokens)
        return last


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_are_served_with_one_delivery_a_step(depth: int) -> None:
    bench = Bench(depth=depth)
    requests = [make_request([n, n], max_tokens=5) for n in range(3)]
    for request in requests:
        bench.loop.submit(request)
    bench.turns()
    assert [len(outputs) for outputs in bench.delivered] == [3, 3, 3, 3, 6]
    for request in requests:
        assert isinstance(bench.end(request), Generated)
        assert len(bench.bodies(request)) == 6
    bench.rig.assert_empty()


def test_depth_2_launches_the_next_step_before_it_reads_the_last() -> None:
    bench = Bench(depth=2)
    bench.loop.submit(make_request([1, 2], max_tokens=3))
    bench.loop.turn()
    assert bench.rig.scheduler.in_flight == 1
    assert bench.delivered == []
    bench.loop.turn()
    assert bench.rig.scheduler.in_flight == 1
    assert len(bench.delivered) == 1
    bench.turns()
    bench.rig.assert_empty()


def test_a_refusal_is_delivered() -> None:
    bench = Bench(max_running=1, max_waiting=0)
    first, second = make_request([1], max_tokens=3), make_request([2])
    bench.loop.submit(first)
    bench.loop.submit(second)
    bench.turns()
    assert isinstance(bench.end(first), Generated)
    assert [type(body) for body in bench.bodies(second)] == [Busy]
    assert second.state is State.FAILED
    bench.rig.assert_empty()


def test_an_abort_takes_effect_at_the_next_boundary() -> None:
    bench = Bench()
    request = make_request([1, 2], max_tokens=50)
    bench.loop.submit(request)
    bench.loop.turn()
    bench.loop.abort(request)
    assert not request.final
    assert not bench.loop.turn()
    assert request.state is State.ABORTED
    assert len(bench.bodies(request)) == 1
    bench.rig.assert_empty()


def test_an_abort_that_overtakes_nothing_is_harmless() -> None:
    bench = Bench()
    request = make_request([1, 2], max_tokens=1)
    bench.loop.submit(request)
    bench.loop.abort(request)
    bench.turns()
    bench.loop.abort(request)
    bench.turns()
    assert request.state is State.ABORTED
    assert bench.delivered == []


@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_failing_executor_fails_its_step_and_the_loop_goes_on(
    depth: int, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(depth=depth, max_running=1)
    lost, spared = make_request([1, 2], max_tokens=5), make_request([3, 4], max_tokens=4)
    bench.loop.submit(lost)
    bench.loop.submit(spared)
    setattr(bench.executor, f"fail_{where}", True)
    with caplog.at_level(logging.ERROR):
        bench.turns()
    error = bench.end(lost)
    assert isinstance(error, InternalError)
    assert error.message.startswith("the engine could not compute a step: ")
    assert "step failed" in caplog.text
    assert isinstance(bench.end(spared), Generated)
    assert [body for body in bench.bodies(spared) if isinstance(body, Tokens)] == [
        Tokens(ids=token.to_bytes(4, "little"), cached=None if index else 0)
        for index, token in enumerate(bench.rig.expected(spared, 4))
    ]
    bench.rig.assert_empty()


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_a_device_that_is_lost_ends_the_loop(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    lost = DeviceLost("an illegal memory access")

    def fails(*arguments: Any) -> None:
        raise lost

    monkeypatch.setattr(bench.executor, where, fails)
    bench.loop.submit(make_request([1, 2], max_tokens=5))
    with pytest.raises(DeviceLost) as raised:
        bench.turns()
    assert raised.value is lost


def test_questions_are_answered_at_a_step_boundary() -> None:
    bench = Bench()
    answers: list[int] = []
    bench.loop.ask(lambda: bench.rig.scheduler.in_flight, answers.append)
    assert answers == []
    bench.loop.turn()
    assert answers == [0]


def test_the_load_is_a_snapshot() -> None:
    bench = Bench(max_running=1)
    bench.loop.submit(make_request([1], max_tokens=3))
    bench.loop.submit(make_request([2], max_tokens=3))
    bench.loop.turn()
    assert (bench.loop.load.running, bench.loop.load.waiting) == (0, 0)
    bench.rig.clock.advance(0.06)
    bench.loop.turn()
    assert (bench.loop.load.running, bench.loop.load.waiting) == (1, 1)
    bench.turns()
    assert (bench.loop.load.running, bench.loop.load.waiting, bench.loop.load.steps) == (0, 0, 6)


def test_the_load_is_as_of_the_outputs_and_not_of_before_them() -> None:
    bench = Bench(max_running=1)
    bench.loop.submit(make_request([1], max_tokens=1))
    bench.rig.clock.advance(0.06)
    bench.loop.turn()
    assert len(bench.delivered) == 1
    assert (bench.loop.load.running, bench.loop.load.waiting) == (0, 0)


# --- commands while a long step is waited for ----------------------------------------------------------------------

LONG: dict[str, Any] = {"pages": 150, "step_tokens": 512, "max_context": 600}


class Interrupted:
    """Stands in for the wake-up: what is given happens while the loop waits, one thing for each time."""

    def __init__(self, *happens: Callable[[], object]) -> None:
        self._happens = list(happens)
        self.waits: list[float | None] = []

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        if self._happens:
            self._happens.pop(0)()
            return True
        return False


@pytest.mark.parametrize("depth", [1, 2])
def test_commands_run_while_a_prompt_is_computed(depth: int) -> None:
    bench = Bench(depth=depth, max_running=1, max_waiting=0, **LONG)
    prompt, refused = make_request([1] * 256, max_tokens=3), make_request([2])
    bench.loop.submit(prompt)
    seen: list[object] = []
    event = Interrupted(
        lambda: bench.loop.ask(lambda: bench.rig.scheduler.in_flight, seen.append),
        lambda: seen.append(len(bench.delivered)),
        lambda: bench.loop.submit(refused),
        lambda: seen.append([type(body) for body in bench.bodies(refused)]),
    )
    bench.loop._wake = event  # type: ignore[assignment]
    bench.executor.busy_looks = 5
    bench.turns()
    assert seen == [depth, 0, [Busy]]
    assert event.waits == [0.0001] * 5
    assert [
        token for body in bench.bodies(prompt) if isinstance(body, Tokens) for token in unpack_tokens(body.ids)
    ] == (bench.rig.expected(prompt, 3))
    bench.rig.assert_empty()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prompt_is_given_up_while_it_is_computed(depth: int) -> None:
    bench = Bench(depth=depth, **LONG)
    prompt, other = make_request([1] * 256, max_tokens=3), make_request([2] * 256, max_tokens=3)
    bench.loop.submit(prompt)
    event = Interrupted(lambda: bench.loop.abort(prompt), lambda: bench.loop.submit(other))
    bench.loop._wake = event  # type: ignore[assignment]
    bench.executor.busy_looks = 3
    bench.turns()
    assert prompt.state is State.ABORTED
    assert bench.bodies(prompt) == []
    assert isinstance(bench.end(other), Generated)
    bench.rig.assert_empty()


def test_the_load_is_known_while_a_prompt_is_computed() -> None:
    bench = Bench(max_running=1, **LONG)
    bench.loop.submit(make_request([1] * 256, max_tokens=1))
    loads: list[int] = []

    def later() -> None:
        bench.rig.clock.advance(0.06)
        bench.loop.submit(make_request([2]))

    event = Interrupted(later, lambda: loads.append(bench.loop.load.waiting))
    bench.loop._wake = event  # type: ignore[assignment]
    bench.executor.busy_looks = 2
    bench.turns()
    assert loads == [1]


def test_short_steps_are_waited_for_at_once() -> None:
    bench = Bench(depth=2, **LONG)
    request = make_request([1] * 255, max_tokens=5)
    bench.loop.submit(request)
    bench.turns()
    assert bench.executor.looks == 0
    assert isinstance(bench.end(request), Generated)


# --- waiting -------------------------------------------------------------------------------------------------------


class FakeEvent:
    """Stands in for the wake-up: notes how long the loop would have waited."""

    def __init__(self) -> None:
        self.waits: list[float | None] = []

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return False


def _wait(bench: Bench) -> float | None:
    event = FakeEvent()
    bench.loop._wake = event  # type: ignore[assignment]
    assert not bench.loop.turn()
    bench.loop._wait()
    (timeout,) = event.waits
    return timeout


def test_an_idle_loop_waits_for_a_command_alone() -> None:
    bench = Bench()
    assert _wait(bench) is None
    bench.loop.submit(make_request([1], max_tokens=2, deadline=bench.rig.clock() + 60))
    bench.turns()
    assert _wait(bench) is None


def test_a_loop_that_waits_for_pages_looks_again_and_at_the_nearest_deadline() -> None:
    bench = Bench(pages=4)
    # Somebody else holds the pool, as leases will.
    pages = bench.rig.cache.allocate(4)
    assert pages is not None
    request = make_request([1] * 6, admit_by=bench.rig.clock() + 0.07)
    bench.loop.submit(request)
    assert _wait(bench) == 0.05
    bench.rig.clock.advance(0.05)
    assert _wait(bench) == pytest.approx(0.02)
    bench.rig.clock.advance(0.03)
    assert _wait(bench) is None
    assert isinstance(bench.end(request), Busy)
    bench.rig.cache.free(pages)
    bench.rig.assert_empty()


def test_an_idle_engine_wakes_up_for_what_ends_by_time() -> None:
    rig = KvRig(term=30.0)
    bench = Bench(rig)
    assert _wait(bench) is None
    lease = rig.lease([1] * 6)
    assert _wait(bench) == 30.0
    waiting = rig.prepare([2] * 125, admit_by=rig.clock() + 50.0)
    assert _wait(bench) == pytest.approx(0.05)
    rig.receiving.abort_prepare(waiting)
    rig.claim(lease, 0, 6)
    rig.clock.advance(31.0)
    assert _wait(bench) == 60.0  # until the quarantine is old
    assert len(rig.leases) == 0
    assert bench.loop.load.state == "ready"
    rig.clock.advance(60.0)
    assert _wait(bench) is None
    assert bench.loop.load.state == "degraded"
    rig.receiving.sender_dead("a", 1, rig.clock())
    assert _wait(bench) is None
    assert bench.loop.load.state == "ready"
    rig.assert_empty()


def test_an_idle_engine_ends_pins() -> None:
    rig = KvRig()
    bench = Bench(rig)
    bench.loop.submit(make_request([1] * 6, max_tokens=1))
    bench.turns()
    rig.cache.pin([1] * 6, 5.0)
    assert _wait(bench) == 5.0
    rig.clock.advance(5.0)
    assert _wait(bench) is None
    rig.assert_empty()


def test_kv_that_is_awaited_costs_no_turns() -> None:
    """Arrivals are commands: they wake the loop up."""
    rig = KvRig()
    bench = Bench(rig)
    lease = rig.lease([1] * 6)
    request = make_request([1] * 6, max_tokens=1)
    bench.loop.command(lambda: rig.receiving.start(request, lease.id, 6, rig.clock() + 7.0, rig.clock()))
    assert _wait(bench) == 7.0
    send = make_request([3] * 6, max_tokens=1)
    send.sends = True
    bench.loop.command(lambda: rig.scheduler.submit_send(send, rig.clock()))
    bench.turns()
    assert _wait(bench) == 7.0
    rig.scheduler.finish_send(send)
    rig.clock.advance(7.0)
    bench.turns()
    generated = bench.end(request)
    assert isinstance(generated, Generated)
    assert generated.recomputed_tokens == 6
    rig.assert_empty()


# --- the thread ----------------------------------------------------------------------------------------------------


class Threaded(Bench):
    """Started; `ended` is set when every request of `watched` has its terminal output."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.ended = threading.Event()
        self.crashed = threading.Event()
        self.waiting_for = 0

    def post(self, function: Callable[..., object], *arguments: Any) -> None:
        super().post(function, *arguments)
        finals = sum(output.final for outputs in self.delivered for output in outputs)
        if finals == self.waiting_for:
            self.ended.set()
        if self.crashes:
            self.crashed.set()


def test_the_thread_serves_and_stops() -> None:
    bench = Threaded(depth=2)
    bench.waiting_for = 3
    bench.loop.start()
    try:
        for n in range(3):
            bench.loop.submit(make_request([n], max_tokens=5))
        assert bench.ended.wait(LIMIT)
    finally:
        bench.loop.stop()
    bench.loop.stop()
    assert bench.executor.closed == 1
    assert bench.crashes == []
    assert "engine-step" not in [thread.name for thread in threading.enumerate()]


def test_a_bug_in_the_loop_is_told_and_ends_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    bench = Threaded()
    bug = AssertionError("a bug")

    def broken() -> None:
        raise bug

    bench.loop.start()
    with caplog.at_level(logging.ERROR):
        bench.loop.ask(broken, lambda _: None)
        assert bench.crashed.wait(LIMIT)
        bench.loop.stop()
    assert bench.crashes == [bug]
    assert "the step thread died" in caplog.text
    assert bench.executor.closed == 1
