"""`microserve drain` and `resume`: nothing that runs is cut off, and what is left is seen."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import FAKE, Cluster, daemon_environ, state_of
from tests.command_support import PROGRAM, Terminal, command, usage_error
from tests.router_support import World
from tests.virtual_time import run_virtual

from microserve.router.bus_api import RouterApi
from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import Conflict
from microserve.runtime.ids import Peer
from microserve.runtime.messages import Drain, Info, InfoReply, Load, Ok, Stats, StatsReply
from microserve.tools.drain import Left, Shown, drain, question

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from tests.router_support import ScriptedEngine

    from microserve.runtime.rpc import IncomingCall

ADDRESS = "memory://router"


# --- real processes ------------------------------------------------------------------------------------------------


def test_an_engine_is_drained_under_load_without_a_failed_request() -> None:
    async def serve(cluster: Cluster, drained: Callable[[], None]) -> list[tuple[str, int]]:
        """One stream after the other on eight lines, until what `drained` does is over; (engine, tokens) of each."""
        served: list[tuple[str, int]] = []
        one_more = asyncio.Event()
        going = True

        async def line(client: AsyncClient, number: int) -> None:
            while going:
                completion = await client.generate([number, *range(1, 40)], max_tokens=50, ignore_eos=True)
                served.append((completion.engine, len(completion.token_ids)))
                one_more.set()

        async def until(enough: Callable[[], bool]) -> None:
            while not enough():
                one_more.clear()
                await one_more.wait()

        async with AsyncClient(cluster.router) as client, asyncio.TaskGroup() as lines:
            for number in range(8):
                lines.create_task(line(client, number))
            await until(lambda: {engine for engine, _ in served} == {"e0", "e1"})
            await asyncio.to_thread(drained)
            count = len(served)
            await until(lambda: len(served) >= count + 20)
            going = False
        # Of each line one may have been under way when it was drained.
        return served[count + 8 :]

    with Cluster(engines=2, engine_args=FAKE) as cluster:
        shown = {}

        def act() -> None:
            shown["drain"] = command_in_a_process(cluster, "drain", "e0", "--yes", "--wait", "30")

        after = asyncio.run(serve(cluster, act))
        code, out = shown["drain"]
        assert code == 0
        assert out.splitlines()[-1] == "e0: drained"
        # What began afterwards was served by the other one, in full.
        assert set(after) == {("e1", 50)}
        [left] = command(cluster, "drain", "e0", "--yes", "--json").json
        assert left == {"engine": "e0", "state": "draining", "requests": 0, "leases": 0, "drained": True}
        shown_back = command(cluster, "resume", "e0", "e0")
        assert (shown_back.code, shown_back.out, shown_back.err) == (0, "e0: ready\n", "")
        cluster.wait_ready(2)
        assert command(cluster, "resume", "e0", "e1", "--json").json == [
            {"engine": "e0", "state": "ready"},
            {"engine": "e1", "state": "ready"},
        ]


def command_in_a_process(cluster: Cluster, *arguments: str) -> tuple[int, str]:
    """Exit code and output: standard output cannot be taken from two threads."""
    done = subprocess.run(
        [*PROGRAM, *arguments, "--router", cluster.router],
        capture_output=True,
        text=True,
        timeout=60,
        env=daemon_environ(),
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_what_is_late_is_told_and_goes_on() -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        client = cluster.client()
        with client.stream([1, 2, 3], max_tokens=30_000, ignore_eos=True) as stream:
            next(stream)
            shown = command(cluster, "drain", "e0", "--yes", "--wait", "0.3")
            assert (shown.code, shown.out) == (1, "e0: draining, 1 request left\n")
            assert shown.err == "microserve drain: not done within 0.3 s: e0 (1 request)\n"
            shown = command(cluster, "drain", "e0", "--yes", "--wait", "0", "--json")
            assert shown.code == 1
            shown = command(cluster, "drain", "e0", "--yes")
            assert (shown.code, shown.out, shown.err) == (0, "e0: draining, 1 request left\n", "")
            next(stream)
        shown = command(cluster, "drain", "e0", "--yes", "--wait")
        assert (shown.code, shown.out.splitlines()[-1]) == (0, "e0: drained")


def test_on_a_terminal_it_asks_and_shows_how_far_it_is() -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        asked = "Nobody would be left to serve tokens-only. [y/N] "
        for keys, code in (("n\n", 1), ("\x03", 130)):
            with Terminal(cluster, "drain", "e0") as terminal:
                terminal.until(asked)
                terminal.type(keys)
                assert terminal.end() == code
                assert "Traceback" not in terminal.shown
        assert state_of(cluster.status(), "e0") == "ready"
        with cluster.client().stream([1, 2, 3], max_tokens=30_000, ignore_eos=True) as stream:
            next(stream)
            with Terminal(cluster, "drain", "e0", "--wait") as terminal:
                terminal.until("Drain e0? What runs there (1 request) is finished. " + asked)
                terminal.type("y\n")
                terminal.until("e0: draining, 1 request left")
                stream.close()
                assert terminal.end() == 0
                assert "e0: drained" in terminal.shown
        # Ctrl-C ends the wait alone.
        assert command(cluster, "resume", "e0").code == 0
        cluster.wait_ready(1)
        with cluster.client().stream([1, 2, 3], max_tokens=30_000, ignore_eos=True) as stream:
            next(stream)
            with Terminal(cluster, "drain", "e0", "--wait", "--yes") as terminal:
                terminal.until("1 request left")
                terminal.type("\x03")
                assert terminal.end() == 130
                assert "Traceback" not in terminal.shown
            next(stream)
        cluster.wait_for(lambda status: state_of(status, "e0") == "draining", "the engine to be draining")


def test_what_is_not_there_and_wrong_usage() -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        for name in ("drain", "resume"):
            more = ("--yes",) if name == "drain" else ()
            shown = command(cluster, name, "e0", "e7", *more)
            assert (shown.code, shown.out) == (1, "")
            assert shown.err == f"microserve {name}: there is no engine 'e7'; there are: e0\n"
            assert usage_error(cluster, name) == "the following arguments are required: ENGINE"
            shown = command("tcp://127.0.0.1:1", name, "e0", *more)
            assert (shown.code, shown.out, len(shown.err.splitlines())) == (1, "", 1)
        # Nothing was changed by half a command.
        assert command(cluster, "engines", "e0", "--json").json["load"]["state"] == "ready"
        assert usage_error(cluster, "drain", "e0") == "there is nobody to ask: say --yes"
        told = "argument --wait: 'e0' is not a number of seconds (engines are named before --wait)"
        assert usage_error(cluster, "drain", "--wait", "e0") == told
        assert usage_error(cluster, "drain", "e0", "--wait=-1").startswith("argument --wait: '-1' is not a number")


# --- a real router core, scripted engines, virtual time --------------------------------------------------------------


class Scripted:
    """An engine that says of itself what a test sets."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.state = "ready"
        self.values: dict[str, float] = {}
        self._info = engine.info
        engine.answers |= {Drain: self._drain, Info: self._say_info, Stats: self._say_stats}

    def _drain(self, call: IncomingCall) -> None:
        self.state = "draining"
        call.reply(Ok())

    def _say_info(self, call: IncomingCall) -> None:
        call.reply(InfoReply(info=self._info, load=Load(state=self.state)))

    def _say_stats(self, call: IncomingCall) -> None:
        call.reply(StatsReply(values=dict(self.values)))


def with_two(work: Callable[[AsyncClient, Scripted, Scripted], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with World() as world:
            api = RouterApi(world.core, clock=world.network.clock)
            await world.bus.listen(ADDRESS, api.server)
            bus = world.network.bus(Peer("client", "c", 1))
            client = AsyncClient(ADDRESS, bus=bus)
            try:
                first, second = Scripted(await world.add("a")), Scripted(await world.add("b"))
                await work(client, first, second)
            finally:
                await client.close()
                await api.close()
                await bus.close()

    run_virtual(main())


class Seen(Shown):
    """Keeps what it was told, and lets a test go on from there."""

    def __init__(self, then: Callable[[int], None] = lambda count: None) -> None:
        super().__init__(on=False)
        self.told: list[list[str]] = []
        self._then = then

    def __call__(self, left: Sequence[Left]) -> None:
        self.told.append([each.words() for each in left])
        self._then(len(self.told))


def test_requests_leases_and_prepared_receives_are_waited_for() -> None:
    async def work(client: AsyncClient, first: Scripted, second: Scripted) -> None:
        first.values = {"scheduler_live": 2, "lease_open": 1, "lease_preparing": 1}
        second.values = {"scheduler_live": 0, "lease_open": 0}
        steps: list[dict[str, float]] = [{"scheduler_live": 1, "lease_open": 1}, {"lease_open": 1}, {}]

        def then(_count: int) -> None:
            if steps:
                first.values = steps.pop(0)

        seen = Seen(then)
        began = asyncio.get_running_loop().time()
        left = await drain(client, ["a", "b"], 60.0, seen)
        assert left == [Left("a", "draining", 0, 0), Left("b", "draining", 0, 0)]
        assert [each[0] for each in seen.told] == [
            "draining, 2 requests and 2 leases left",
            "draining, 1 request and 1 lease left",
            "draining, 0 requests and 1 lease left",
            "drained",
        ]
        assert {each[1] for each in seen.told} == {"drained"}
        assert asyncio.get_running_loop().time() - began == 0.75

    with_two(work)


def test_the_time_limit_holds_to_the_second() -> None:
    async def work(client: AsyncClient, first: Scripted, second: Scripted) -> None:
        first.values = {"scheduler_live": 2}
        began = asyncio.get_running_loop().time()
        left = await drain(client, ["a", "b"], 10.0, Seen())
        assert asyncio.get_running_loop().time() - began == 10.0
        assert [each.drained for each in left] == [False, True]

    with_two(work)


def test_somebody_resumes_it_meanwhile() -> None:
    async def work(client: AsyncClient, first: Scripted, second: Scripted) -> None:
        first.values = {"scheduler_live": 2}

        def then(_count: int) -> None:
            first.state = "ready"

        with pytest.raises(Conflict, match="somebody resumed a: it is ready"):
            await drain(client, ["a", "b"], 60.0, Seen(then))

    with_two(work)


def test_the_question_says_when_nobody_would_be_left() -> None:
    async def work(client: AsyncClient, first: Scripted, second: Scripted) -> None:
        status = await client.status()
        assert question(status, ["a"]) == "Drain a? What runs there (0 requests) is finished."
        assert question(status, ["a", "b"]) == (
            "Drain a, b? What runs there (0 requests) is finished. Nobody would be left to serve m."
        )

    with_two(work)
