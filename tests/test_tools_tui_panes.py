"""The panes of `microserve top` in front of a router that says what a test wants it to say."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any, cast

from msgspec.structs import replace
from tests.test_tools_status import ENGINE, STATUS
from textual.widgets import RichLog, Static

from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import PeerLost, Unauthorized
from microserve.runtime.messages import (
    ActiveStrategy,
    Events,
    FleetEvent,
    PrefixEntry,
    RequestInfo,
    Requests,
    SettingInfo,
    Strategies,
    StrategyChange,
    StrategyInfo,
)
from microserve.tools.tui import app as app_module
from microserve.tools.tui.app import TopApp
from microserve.tools.tui.live_table import LiveTable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest
    from textual.pilot import Pilot

    from microserve.runtime.async_client import AsyncClient


class Router:
    """What a client gives, as far as panes ask it, and an engine behind it."""

    def __init__(self) -> None:
        self.state = STATUS
        self.running: list[str] = []
        self.ended: list[str] = []
        """Newest first."""
        self.more = 0
        self.happened: list[FleetEvent] = []
        self.prefixes: list[PrefixEntry] = []
        self.trouble: Exception | None = None
        self.refuses: Exception | None = None
        """What it says of a look at the fleet."""
        self.hangs = False
        self.settings: list[SettingInfo] = []
        self.done: list[str] = []

    async def status(self) -> Any:
        if self.refuses is not None:
            raise self.refuses
        return self.state

    async def requests(self, **_limits: int) -> Requests:
        running = [_request(name, "running") for name in self.running]
        recent = [replace(_request(name, "ok"), ended=1.0) for name in self.ended]
        return Requests(requests=running, active=len(running) + self.more, recent=recent)

    async def events(self, *, after: int, limit: int) -> Events:
        found = [event for event in self.happened if event.seq > after]
        return Events(events=found[-limit:], last=len(self.happened))

    async def strategies(self) -> Strategies:
        names = ("data_parallel", "balanced")
        active = [
            ActiveStrategy(model="", version=f"{name}@1", name=name, settings={}, share=0.5, since=0.0)
            for name in names
        ]
        return Strategies(
            strategies=[StrategyInfo(name=name, summary="", source="", settings=self.settings) for name in names],
            active=active,
            problems=[],
            history=[
                StrategyChange(number=number, at=0.0, model="", active=[each], reason="set")
                for number, each in enumerate(active)
            ],
        )

    async def set_strategy(self, name: str, settings: dict[str, str], *, dry_run: bool, **_where: object) -> Any:
        values = " ".join(f"{key}={value}" for key, value in settings.items())
        self.done.append(f"{name} {values}" + (" dry run" if dry_run else ""))
        return await self.strategies()

    async def detokenize(self, ids: list[int], *, model: str) -> str:
        return f"{model}:{ids[0]}"

    def engine(self, _name: str) -> Router:
        return self

    async def info(self) -> Any:
        if self.hangs:
            await asyncio.Event().wait()
        raise self.trouble or PeerLost("engine gpu-a is not connected")

    async def cache_prefixes(self, _count: int) -> list[PrefixEntry]:
        if self.trouble is not None:
            raise self.trouble
        return self.prefixes

    async def resume(self) -> None:
        self.done.append("resume")

    async def cache_pin(self, ids: list[int], seconds: float) -> int:
        self.done.append(f"pin {len(ids)} for {seconds:g}")
        return len(ids)


def _request(name: str, state: str) -> RequestInfo:
    return RequestInfo(
        request_id=name,
        model="m",
        strategy="s@1",
        state=state,
        age=1.0,
        prompt_tokens=3,
        output_tokens=1,
        cached_tokens=0,
        engines=["gpu-a"],
        first_token=None,
        ended=None,
        error="",
        sub_requests=[],
    )


def event(seq: int, detail: str) -> FleetEvent:
    return FleetEvent(seq=seq, at=0.0, kind="joined", engine="", epoch=0, detail=detail)


class Panes:
    """The application, which looks when it is told to."""

    def __init__(self, app: TopApp, pilot: Pilot[None], router: Router) -> None:
        self.app = app
        self.pilot = pilot
        self.router = router

    async def look(self) -> None:
        await self.app._look()
        await self.pilot.pause()

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    def table(self, name: str) -> LiveTable:
        return self.app.query_one(f"#{name}", LiveTable)

    def text(self, name: str) -> str:
        found = self.app.query_one(f"#{name}", Static)
        return str(found.render()) if found.display else ""

    def screen(self) -> str:
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in lines)


def run(work: Callable[[Panes], Awaitable[None]], *, size: tuple[int, int] = (80, 24)) -> None:
    async def main() -> None:
        router = Router()
        # Long enough that it looks when it begins, when a pane is chosen, and when the test says so.
        app = TopApp(cast("AsyncClient", router), "tcp://router:1", interval=3600.0)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await work(Panes(app, pilot, router))

    asyncio.run(main())


def test_the_cursor_stays_with_a_request_whatever_becomes_of_others_and_of_it() -> None:
    async def work(it: Panes) -> None:
        table = it.table("requests")
        it.router.running, it.router.ended = ["a", "b", "c"], ["z"]
        await it.press("2")
        await it.look()
        assert it.text("timeline").startswith("a · running · m · s@1")
        # Until somebody moves it, it is where the oldest is.
        it.router.running, it.router.ended = ["b", "c", "d"], ["a", "z"]
        await it.look()
        assert it.text("timeline").startswith("b · running")
        await it.press("down")
        assert it.text("timeline").startswith("c · running")
        it.router.running, it.router.ended = ["c", "d"], ["b", "a", "z"]
        await it.look()
        assert it.text("timeline").startswith("c · running")
        it.router.running, it.router.ended = ["d"], ["c", "b", "a", "z"]
        await it.look()
        assert it.text("timeline").startswith("c · ok")
        it.router.running, it.router.ended = [], ["d", "c", "b", "a", "z"]
        await it.look()
        assert it.text("timeline").startswith("c · ok")
        assert table.row_count == 5

    run(work)


def test_requests_of_one_name_are_told_apart_and_those_that_are_not_shown_are_counted() -> None:
    async def work(it: Panes) -> None:
        it.router.running, it.router.ended = ["same", "same"], ["same", "other"]
        await it.press("2")
        await it.look()
        assert it.table("requests").row_count == 4
        assert it.text("more") == ""
        it.router.more = 1234
        await it.look()
        assert it.text("more") == "the oldest 2; 1,234 more run or wait, which no filter finds"

    run(work)


def test_events_of_another_router_are_shown_from_its_first() -> None:
    async def work(it: Panes) -> None:
        log = it.app.query_one(RichLog)
        it.router.happened = [event(1, "before")]
        await it.press("5")
        await it.look()
        # It has had more to tell by now than the first one had: numbers alone say nothing.
        it.router.state = replace(STATUS, epoch=STATUS.epoch + 1)
        it.router.happened = [event(1, "one"), event(2, "two")]
        await it.look()
        await it.look()
        assert [line.text.split()[-1] for line in log.lines] == ["before", "one", "two"]

    run(work)


def test_who_reads_older_events_is_not_pulled_away_by_new_ones() -> None:
    async def work(it: Panes) -> None:
        log = it.app.query_one(RichLog)
        it.router.happened = [event(number, f"n{number}") for number in range(1, 61)]
        await it.press("5")
        await it.look()
        assert "n60" in it.screen()
        it.router.happened += [event(number, f"n{number}") for number in range(61, 64)]
        await it.look()
        assert "n63" in it.screen()
        log.scroll_home(animate=False)
        await it.pilot.pause()
        it.router.happened.append(event(64, "n64"))
        await it.look()
        assert (log.scroll_offset.y, len(log.lines)) == (0, 64)
        assert "n64" not in it.screen()
        log.scroll_end(animate=False)
        await it.pilot.pause()
        assert "n64" in it.screen()

    run(work)


def test_a_filter_is_for_every_table_of_strategies() -> None:
    async def work(it: Panes) -> None:
        await it.press("3")
        await it.look()
        names = ("versions", "choices", "history")
        assert [it.table(name).row_count for name in names] == [2, 2, 2]
        await it.press("slash", *"balanced")
        assert [it.table(name).row_count for name in names] == [1, 1, 1]
        await it.press("enter", "escape")
        assert [it.table(name).row_count for name in names] == [2, 2, 2]

    run(work)


def test_a_setting_may_have_any_name_that_python_allows() -> None:
    async def work(it: Panes) -> None:
        it.router.settings = [SettingInfo(name="größe", type="float", default=0.5)]
        await it.press("3")
        await it.look()
        await it.press("enter")
        assert "größe (float)" in it.screen()
        await it.press("ctrl+s")
        assert it.router.done == ["data_parallel größe=0.5 dry run", "data_parallel größe=0.5"]

    run(work)


def test_an_engine_that_does_not_answer_is_no_lost_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "PATIENCE", 0.01)

    async def work(it: Panes) -> None:
        it.router.hangs = True
        await it.look()
        assert it.text("banner") == "Fleet: no answer within 0.01 s"
        assert not it.app.query_one("#panes").has_class("stale")
        it.router.hangs = False
        await it.look()
        assert it.text("banner") == ""
        assert "engine gpu-a is not connected" in it.text("engine")

    run(work)


def test_the_cache_says_why_it_knows_nothing_and_its_cursor_stays() -> None:
    def prefix(first: int) -> PrefixEntry:
        return PrefixEntry(prompt=first.to_bytes(4, "little") * 4, pages=1, references=0, pinned=False)

    async def work(it: Panes) -> None:
        pane, table = it.app.panes["cache"], it.table("prefixes")
        it.router.trouble = PeerLost("engine gpu-a is [silent]")
        await it.press("4")
        await it.look()
        assert "engine gpu-a is [silent]" in it.text("which")
        # Between two looks, too.
        await it.look()
        assert (it.text("banner"), "engine gpu-a is [silent]" in it.text("which")) == ("", True)
        it.router.trouble = None
        it.router.prefixes = [prefix(1), prefix(2)]
        await pane.refresh_data(float("inf"))
        assert "silent" not in it.text("which")
        await it.press("down")
        assert table.get_row_at(1)[-1] == table.get_row_at(table._cursor)[-1] == "llama:2"
        it.router.prefixes = [prefix(3), prefix(1), prefix(2)]
        pane._looked = 0.0  # type: ignore[attr-defined]
        await pane.refresh_data(float("inf"))
        assert table.get_row_at(table._cursor)[-1] == "llama:2"

    run(work)


def test_resume_asks() -> None:
    async def work(it: Panes) -> None:
        await it.look()
        await it.press("u")
        assert "Resume gpu-a? It takes work again." in it.screen()
        await it.press("n")
        assert it.router.done == []
        await it.press("u", "y")
        assert it.router.done == ["resume"]

    run(work)


def test_long_names_leave_room_for_figures_and_a_short_screen_for_rows() -> None:
    async def work(it: Panes) -> None:
        name = f"gpu-node.{'x' * 44}.example.com"
        engines = [replace(ENGINE, info=replace(ENGINE.info, engine_id=f"{name[:-1]}{index}")) for index in range(8)]
        it.router.state = replace(STATUS, engines=engines)
        await it.look()
        line = it.screen().splitlines()[4]
        assert line.split()[0].startswith("gpu-no")
        assert line.split()[0].endswith("0")
        # The last column is seen, and the details have the name.
        assert it.screen().splitlines()[3].endswith("hits")
        assert it.text("engine").startswith(f"{name[:-1]}0 ")
        await it.pilot.resize_terminal(40, 10)
        await it.pilot.pause()
        assert len([line for line in it.screen().splitlines() if "gpu-no" in line]) == 4

    run(work)


def test_what_is_old_is_told_and_looks_old(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(it: Panes) -> None:
        banner, panes = it.app.query_one("#banner"), it.app.query_one("#panes")
        await it.look()
        assert (banner.display, panes.has_class("stale")) == (False, False)
        for trouble, said in (
            (PeerLost("no router answers at tcp://router:1"), "no router answers at tcp://router:1 for 0 s"),
            (Unauthorized("your key was revoked"), "your key was revoked"),
        ):
            it.router.refuses = trouble
            await it.look()
            assert (banner.display, panes.has_class("stale")) == (True, True)
            assert it.text("banner").startswith(said)
            assert it.screen().splitlines()[3].strip() == it.text("banner")
        it.router.refuses = None
        await it.look()
        assert (banner.display, panes.has_class("stale")) == (False, False)

    run(work)


def test_a_small_screen_has_every_key_of_a_pane_and_the_way_out() -> None:
    async def work(it: Panes) -> None:
        for pane in "12345":
            await it.press(pane)
            await it.look()
            assert it.screen().splitlines()[23].endswith("? help q quit"), pane
        await it.press("4")
        foot = " ".join(it.screen().splitlines()[23].split())
        assert foot == "/ filter [] engine p pin u unpin e evict E evict all m migrate ? help q quit"

    run(work)


def test_the_head_has_the_rate_whatever_engines_do() -> None:
    async def work(it: Panes) -> None:
        for states, said in (
            (("ready",), "1 ready   requests: 5 running, 1 queued, 464 in all"),
            (("ready", "draining"), "1 draining, 1 ready   requests: 5 running, 1 queued"),
            (("ready", "draining", "silent"), "1 of 3 ready   requests: 5 running, 1 queued"),
        ):
            engines = [
                replace(ENGINE, state=state, info=replace(ENGINE.info, engine_id=f"e{index}"))
                for index, state in enumerate(states)
            ]
            it.router.state = replace(STATUS, engines=engines, requests_total=464)
            await it.look()
            line = it.screen().splitlines()[1].strip()
            assert re.fullmatch(f"{said}   0 tok/s ▁+", line), line
        # A wider one has it all.
        await it.pilot.resize_terminal(120, 24)
        await it.look()
        assert (
            it.screen()
            .splitlines()[1]
            .strip()
            .startswith(
                "engines: 1 draining, 1 ready, 1 silent   requests: 5 running, 1 queued, 464 in all   0 tok/s ▁"
            )
        )

    run(work)


def test_prefixes_that_begin_alike_are_told_apart_on_a_small_screen() -> None:
    def prefix(*tokens: int) -> PrefixEntry:
        return PrefixEntry(prompt=pack_tokens(tokens), pages=1, references=0, pinned=False)

    async def spelled(ids: list[int], *, model: str) -> str:
        return "".join(f"<{each}>" for each in ids)

    async def work(it: Panes) -> None:
        shared = range(100, 160)
        it.router.prefixes = [
            prefix(*shared, 7, *range(200, 260)),
            prefix(*shared, 8, *range(200, 260)),
            prefix(*shared),
        ]
        it.router.detokenize = spelled  # type: ignore[method-assign]
        await it.press("4")
        await it.look()
        shown = [line[line.index("<") :] for line in it.screen().splitlines() if "<100>" in line]
        begin = "<100><101><102><"
        assert shown[0].startswith(f"{begin} … <7><200><201>")
        assert shown[1].startswith(f"{begin} … <8><200><201>")
        # The end of one that goes on in others.
        assert shown[2].startswith(f"{begin} … <136><137><138>")
        # The ends are there still, for who scrolls or filters.
        text = str(it.table("prefixes").get_row_at(0)[-1])
        assert (text.count(" … "), text.endswith("<258><259>")) == (2, True)

    run(work)


def test_a_mouse_is_enough_for_dialogs() -> None:
    async def work(it: Panes) -> None:
        it.router.state = replace(
            STATUS, engines=[replace(ENGINE, info=replace(ENGINE.info, engine_id=name)) for name in ("a", "b")]
        )
        it.router.prefixes = [PrefixEntry(prompt=pack_tokens(range(4)), pages=1, references=0, pinned=False)]
        await it.press("4")
        await it.look()

        async def click(button: str, text: str) -> None:
            assert text in it.screen()
            await it.pilot.click(f"#{button}")
            await it.pilot.pause()
            assert len(it.app.screen_stack) == 1

        await it.press("p")
        await click("cancel", "Cancel (Esc)")
        assert it.router.done == []
        await it.press("p")
        await click("yes", "Pin (Enter)")
        assert it.router.done == ["pin 4 for 3600"]
        await it.press("m")
        assert "Move 4 tokens from a to:" in it.screen()
        await click("cancel", "Cancel (Esc)")
        # What is wrong is told, and the dialog stays.
        await it.press("p", *["backspace"] * 4)
        await it.pilot.click("#yes")
        await it.pilot.pause()
        assert "'' is no number of seconds" in it.screen()

    run(work)
