"""The verbs over the memory bus, with the step loop driven by the test."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest
from tests.engine_rig import Rig, make_request

from microserve.engine.core import EngineCore
from microserve.engine.outputs import Output
from microserve.runtime.codec import decode, encode, unpack_tokens
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import (
    Busy,
    Cancelled,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    InternalError,
    InvalidRequest,
    MicroserveError,
    NotFound,
    ProtocolError,
)
from microserve.runtime.ids import Peer
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import (
    Abort,
    Aborted,
    Call,
    Drain,
    EngineInfo,
    Generated,
    Info,
    InfoReply,
    ListModels,
    Ok,
    Resume,
    SamplingParams,
    StartGenerate,
    Stats,
    StatsReply,
    Tokens,
    Usage,
)
from microserve.runtime.rpc import CallStream, RpcClient, connect

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ENGINE, ROUTER, OTHER = Peer("engine", "e", 1), Peer("router", "r", 1), Peer("router", "s", 1)


class Bench:
    """An engine's verbs and loop behind a memory bus, and a client. Nothing moves unless the test says so."""

    def __init__(self, **options: Any) -> None:
        self.rig = Rig(**options)
        self.network = MemoryNetwork(self.rig.clock)
        self.bus = self.network.bus(ENGINE)
        self.changes = 0
        limits = self.rig.scheduler.limits
        config = EngineConfig(
            model="m",
            executor="fake",
            max_running=limits.max_running,
            max_waiting=limits.max_waiting,
            step_tokens=limits.step_tokens,
        )
        self.core = EngineCore(
            config,
            "e",
            1,
            self.rig.executor,
            None,
            self.bus,
            post=lambda function, *arguments: function(*arguments),
            crashed=lambda error: None,
            clock=self.rig.clock,
            draw_seed=lambda: 4711,
        )
        # The rig looks at the parts that serve.
        self.rig.scheduler, self.rig.cache = self.core.scheduler, self.core.cache
        self.verbs = self.core.verbs
        self.verbs.changed = self.changed
        self.loop = self.core.steps

    def info(self) -> EngineInfo:
        return self.core.info

    def changed(self) -> None:
        self.changes += 1

    async def __aenter__(self) -> Self:
        await self.bus.listen("memory://engine", self.verbs.server)
        self.client = await self.dial(ROUTER)
        return self

    async def __aexit__(self, *exc: object) -> None:
        for bus in self.network.buses:
            await bus.close()
        while self.loop.turn():
            pass
        self.rig.assert_empty()
        assert self.verbs.live == 0
        assert self.verbs.server.open_calls == 0

    async def dial(self, peer: Peer) -> RpcClient:
        return await connect(self.network.bus(peer), "memory://engine")

    def stream(
        self, prompt: list[int], *, sub_id: str = "s", budget: float | None = None, **options: Any
    ) -> CallStream:
        return self.client.stream(generate(prompt, sub_id=sub_id, **options), budget=budget)

    async def turn(self, count: int = 1) -> None:
        for _ in range(count):
            await self.network.settle()
            self.loop.turn()
        await self.network.settle()

    async def finish(self, stream: CallStream) -> list[int]:
        """Everything that the stream brings, while the loop turns."""
        while not stream.ended:
            await self.turn()
        return [token for body in stream.take() for token in tokens_of(body)]

    async def refused(self, body: StartGenerate, budget: float | None = None) -> MicroserveError:
        stream = self.client.stream(body, budget=budget)
        await self.network.settle()
        assert stream.ended
        with pytest.raises(MicroserveError) as caught:
            await anext(stream)
        return caught.value


def tokens_of(body: object) -> list[int]:
    assert isinstance(body, Tokens)
    tokens: list[int] = unpack_tokens(body.ids).tolist()
    return tokens


def generate(
    prompt: list[int], *, sub_id: str = "s", begin: int = 0, prior_output: int = 0, **options: Any
) -> StartGenerate:
    budgets = {name: options.pop(name) for name in ("admit_by", "first_token_by") if name in options}
    return StartGenerate(
        request_id="r",
        sub_id=sub_id,
        prompt=np.array(prompt, dtype="<i4").tobytes(),
        begin=begin,
        prior_output=prior_output,
        sampling=SamplingParams(**options),
        **budgets,
    )


def with_bench(work: Callable[[Bench], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        async with Bench(**options) as bench:
            await work(bench)

    asyncio.run(main())


def test_a_generation_streams_and_ends() -> None:
    async def work(bench: Bench) -> None:
        stream = bench.stream([1, 2, 3], max_tokens=4)
        assert await bench.finish(stream) == bench.rig.expected(make_request([1, 2, 3], max_tokens=4), 4)
        usage = Usage(prompt_tokens=3, completion_tokens=4)
        assert stream.reply == Generated(finish_reason="length", usage=usage)
        assert bench.rig.plans == []
        assert bench.changes == 1

    with_bench(work)


def test_a_step_sends_one_message_to_each_router() -> None:
    async def work(bench: Bench) -> None:
        second = await bench.dial(OTHER)
        streams = [bench.stream([n, n], sub_id=f"a{n}", max_tokens=3) for n in range(3)]
        streams.append(second.stream(generate([7], sub_id="b", max_tokens=3)))
        await bench.network.settle()
        before = bench.bus.statistics().sent
        await bench.turn()
        assert [len(stream.take()) for stream in streams] == [1, 1, 1, 1]
        assert bench.bus.statistics().sent == before + 2
        for stream in streams:
            await bench.finish(stream)

    with_bench(work)


def test_a_seed_is_drawn_where_none_is_given() -> None:
    async def work(bench: Bench) -> None:
        streams = [bench.stream([1], sub_id="a", max_tokens=1), bench.stream([2], sub_id="b", max_tokens=1, seed=-5)]
        await bench.network.settle()
        seeds = [request.seed for request in bench.verbs._live]
        assert seeds == [4711, -5]
        for stream in streams:
            await bench.finish(stream)

    with_bench(work)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (generate([]), "prompt", "the prompt is empty"),
        (generate([1, 50]), "prompt", r"token id 50 is not in the vocabulary \(0 to 49\)"),
        (generate([1, -1]), "prompt", "token id -1"),
        (generate([1, 2], begin=3), "begin", "between -2 and 2, not 3"),
        (generate([1, 2], begin=-3), "begin", "not -3"),
        (generate([1, 2], prior_output=3), "prior_output", "prior_output is 3, but the prompt has 2"),
        (generate([1], sub_id=""), "sub_id", "sub_id must not be empty"),
        (generate([1], logit_bias={50: 1.0}), "logit_bias", "token id 50"),
        (generate([1], stop_token_ids=(50,)), "stop_token_ids", "token id 50"),
        (generate([1], min_tokens=9, max_tokens=8), "min_tokens", r"min_tokens \(9\) exceeds max_tokens \(8\)"),
        (generate([1], admit_by=math.inf), "admit_by", "must be a finite number"),
        (generate([1], first_token_by=math.inf), "first_token_by", "must be a finite number"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(body: StartGenerate, param: str, words: str) -> None:
    async def work(bench: Bench) -> None:
        error = await bench.refused(body)
        assert isinstance(error, InvalidRequest)
        assert error.param == param
        with pytest.raises(InvalidRequest, match=words):
            raise error
        assert bench.verbs.live == 0
        assert not bench.loop.turn()

    with_bench(work)


def test_a_budget_without_end_is_refused() -> None:
    async def work(bench: Bench) -> None:
        stream = bench.client.stream(generate([1]))
        stream.cancel()
        await bench.network.settle()
        bench.client.session.send(Call(id=99, body=generate([1]), budget=math.inf))
        await bench.network.settle()
        assert bench.verbs.live == 0

    with_bench(work)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
def test_the_wire_lets_no_other_number_through(name: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        options: dict[str, Any] = {name: value}
        call = Call(id=1, body=generate([1], **options))
        with pytest.raises(ProtocolError, match=name):
            decode(encode(call))


def test_bytes_that_are_no_tokens_are_refused() -> None:
    async def work(bench: Bench) -> None:
        error = await bench.refused(StartGenerate(request_id="r", sub_id="s", prompt=b"\1\2\3"))
        assert isinstance(error, InvalidRequest)

    with_bench(work)


def test_a_prompt_beyond_the_context_is_refused() -> None:
    async def work(bench: Bench) -> None:
        assert isinstance(await bench.refused(generate([1] * 20)), ContextLengthExceeded)
        stream = bench.stream([1] * 19, max_tokens=5)
        assert len(await bench.finish(stream)) == 1

    with_bench(work, max_context=20)


def test_begin_and_prior_output_may_reach_the_end_of_the_prompt() -> None:
    async def work(bench: Bench) -> None:
        stream = bench.stream([1, 2, 3], begin=3, prior_output=3, max_tokens=5)
        assert len(await bench.finish(stream)) == 2
        assert stream.reply == Generated(finish_reason="length", usage=Usage(prompt_tokens=0, completion_tokens=5))

    with_bench(work)


def test_what_was_said_elsewhere_may_fill_the_context() -> None:
    async def work(bench: Bench) -> None:
        stream = bench.stream([1] * 20, prior_output=1, max_tokens=5)
        assert await bench.finish(stream) == []
        assert stream.reply == Generated(finish_reason="length", usage=Usage(prompt_tokens=19, completion_tokens=1))

    with_bench(work, max_context=20)


def test_a_known_sub_id_is_a_conflict_and_a_refused_one_is_free() -> None:
    async def work(bench: Bench) -> None:
        first = bench.stream([1], max_tokens=3)
        await bench.turn()
        for _ in range(2):
            error = await bench.refused(generate([1], max_tokens=3))
            assert isinstance(error, Conflict)
            assert error.param == "sub_id"
            await bench.finish(first)
        refused = generate([1] * 2000, sub_id="again")
        assert isinstance(await bench.refused(refused), ContextLengthExceeded)
        await bench.finish(bench.stream([2], sub_id="again", max_tokens=1))

    with_bench(work)


def test_more_than_can_run_and_wait_is_busy_at_once() -> None:
    async def work(bench: Bench) -> None:
        streams = [bench.stream([n], sub_id=f"{n}", max_tokens=2) for n in range(3)]
        await bench.network.settle()
        error = await bench.refused(generate([9], sub_id="one too many"))
        assert isinstance(error, Busy)
        assert error.retry_after == 1.0
        for stream in streams:
            await bench.finish(stream)

    with_bench(work, max_running=1, max_waiting=2)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_abort_is_answered_at_once_and_frees_at_the_next_boundary(turns: int) -> None:
    async def work(bench: Bench) -> None:
        stream = bench.stream([1, 2], max_tokens=100)
        await bench.turn(turns)
        abort = asyncio.ensure_future(bench.client.call(Abort(sub_id="s")))
        await bench.network.settle()
        assert abort.result() == Aborted(outcome="freed")
        assert stream.ended
        assert len(stream.take()) == turns
        with pytest.raises(Cancelled, match="aborted by its caller"):
            await anext(stream)
        assert await bench.client.call(Abort(sub_id="s")) == Aborted(outcome="unknown")
        assert not bench.loop.turn()
        assert bench.rig.scheduler.idle

    with_bench(work)


def test_outputs_of_an_aborted_call_do_not_reach_another() -> None:
    async def work(bench: Bench) -> None:
        old = bench.stream([1, 2], max_tokens=100)
        await bench.network.settle()
        await bench.client.call(Abort(sub_id="s"))
        new = bench.stream([3, 4], sub_id="t", max_tokens=2)
        assert await bench.finish(new) == bench.rig.expected(make_request([3, 4], max_tokens=2), 2)
        assert old.take() == []

    with_bench(work)


def test_late_outputs_of_a_call_change_nothing() -> None:
    async def work(bench: Bench) -> None:
        bench.stream([1, 2], max_tokens=100)
        await bench.network.settle()
        (old,) = bench.verbs._live
        await bench.client.call(Abort(sub_id="s"))
        new = bench.stream([3, 4], sub_id="t", max_tokens=2)
        await bench.network.settle()
        # What a step had posted before the abort arrives now.
        usage = Usage(prompt_tokens=2, completion_tokens=1)
        token = Output(old, Tokens(ids=b"\1\0\0\0"), False)
        bench.verbs.deliver([token, Output(old, Generated(finish_reason="length", usage=usage), True)])
        await bench.network.settle()
        assert not new.ended
        assert bench.verbs.live == 1
        assert await bench.finish(new) == bench.rig.expected(make_request([3, 4], max_tokens=2), 2)

    with_bench(work)


def test_a_cancelled_call_frees_the_engines_work() -> None:
    async def work(bench: Bench) -> None:
        stream = bench.stream([1, 2], max_tokens=100)
        await bench.turn(2)
        stream.cancel()
        await bench.network.settle()
        assert bench.verbs.live == 0
        assert not bench.loop.turn()
        assert bench.rig.scheduler.idle

    with_bench(work)


def test_a_lost_session_ends_its_generations_and_no_others() -> None:
    async def work(bench: Bench) -> None:
        other = await bench.dial(OTHER)
        bench.stream([1, 2], sub_id="mine", max_tokens=100)
        kept = other.stream(generate([3], sub_id="other", max_tokens=5))
        await bench.turn(2)
        assert bench.verbs.live == 2
        bench.network.kill(ROUTER)
        await bench.network.settle()
        assert bench.verbs.live == 1
        assert len(await bench.finish(kept)) == 5

    with_bench(work)


def test_the_callers_budget_is_the_deadline() -> None:
    async def work(bench: Bench) -> None:
        # The caller's own timer runs in real time; the engine's deadline on the clock of the test.
        stream = bench.stream([1, 2], max_tokens=100, budget=60.0)
        await bench.turn(2)
        bench.rig.clock.advance(60.0)
        await bench.finish(stream)
        with pytest.raises(DeadlineExceeded, match="the request's time is over"):
            await anext(stream)

    with_bench(work)


def test_budgets_count_from_arrival() -> None:
    async def work(bench: Bench) -> None:
        first = bench.stream([1], sub_id="a", max_tokens=3)
        second = bench.stream([2], sub_id="b", admit_by=2.0)
        await bench.turn()
        bench.rig.clock.advance(2.0)
        await bench.turn()
        with pytest.raises(Busy, match="no room in time"):
            await anext(second)
        await bench.finish(first)

    with_bench(work, max_running=1)


def test_drain_refuses_what_is_new_and_finishes_what_runs() -> None:
    async def work(bench: Bench) -> None:
        running = bench.stream([1], sub_id="a", max_tokens=3)
        await bench.turn()
        assert await bench.client.call(Drain()) == Ok()
        assert await bench.client.call(Drain()) == Ok()
        assert bench.changes == 1
        assert bench.verbs.load().state == "draining"
        assert isinstance(await bench.refused(generate([2], sub_id="b")), Draining)
        assert len(await bench.finish(running)) == 3
        assert await bench.client.call(Resume()) == Ok()
        assert bench.verbs.load().state == "ready"
        await bench.finish(bench.stream([2], sub_id="b", max_tokens=1))

    with_bench(work)


def test_info_is_answered_without_a_step() -> None:
    async def work(bench: Bench) -> None:
        reply = await bench.client.call(Info())
        assert reply == InfoReply(info=bench.info(), load=bench.verbs.load())

    with_bench(work)


def test_stats_are_answered_at_a_step_boundary() -> None:
    async def work(bench: Bench) -> None:
        asked = asyncio.ensure_future(bench.client.call(Stats()))
        await bench.network.settle()
        assert not asked.done()
        await bench.turn()
        reply = asked.result()
        assert isinstance(reply, StatsReply)
        assert reply.integrity == "ok"
        assert reply.values["scheduler_live"] == 0

    with_bench(work)


def test_a_routers_verb_is_not_an_engines() -> None:
    async def work(bench: Bench) -> None:
        with pytest.raises(NotFound, match="an engine has no verb ListModels"):
            await bench.client.call(ListModels())

    with_bench(work)


def test_the_end_of_the_engine_answers_every_call() -> None:
    async def work(bench: Bench) -> None:
        streams = [bench.stream([n], sub_id=f"{n}", max_tokens=50) for n in range(3)]
        await bench.turn(2)
        bench.verbs.end_all(InternalError("the step thread died"))
        await bench.network.settle()
        for stream in streams:
            stream.take()
            with pytest.raises(InternalError, match="the step thread died"):
                await anext(stream)

    with_bench(work)
