"""`microserve top` against a real router with `fake` engines: panes, actions, a lost router, a real terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import Cluster, daemon_environ, state_of
from textual.widgets import Input, RichLog, Static

from microserve.runtime.async_client import AsyncClient
from microserve.runtime.errors import Cancelled
from microserve.runtime.keys import new_identity
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools.tui.app import TopApp
from microserve.tools.tui.live_table import LiveTable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from textual.pilot import Pilot

SLOW = (
    *("--executor", "fake", "--fake-decode-base-us", "20000", "--fake-prefill-us-per-token", "10"),
    *("--model", "tokens-only"),
)
"""Requests that last as long as a test needs them."""
LIMIT = 20.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(engines=2, engine_args=SLOW) as cluster:
        yield cluster


class Top:
    """The application under the pilot, with a client of its own that makes requests."""

    def __init__(self, app: TopApp, pilot: Pilot[None], client: AsyncClient) -> None:
        self.app = app
        self.pilot = pilot
        self.client = client

    async def until(self, holds: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + LIMIT
        while not holds():
            assert time.monotonic() < deadline, f"waited {LIMIT:g} s for {what}; the screen:\n{self.screen()}"
            await self.pilot.pause(0.02)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    def rows(self, table: str) -> list[list[str]]:
        found = self.app.query_one(f"#{table}", LiveTable)
        return [[str(cell) for cell in found.get_row_at(index)] for index in range(found.row_count)]

    def text(self, name: str) -> str:
        return str(self.app.screen.query_one(f"#{name}", Static).render())

    def said(self) -> list[str]:
        return [each.message for each in self.app._notifications]

    def screen(self) -> str:
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in lines)


@asynccontextmanager
async def top(router: str, *, size: tuple[int, int] = (80, 24), **options: Any) -> AsyncIterator[Top]:
    watching, acting = (AsyncClient(router, connect_timeout=1.0, **options) for _ in range(2))
    app = TopApp(watching, router, interval=0.1)
    try:
        async with app.run_test(size=size) as pilot:
            yield Top(app, pilot, acting)
    finally:
        await watching.close()
        await acting.close()


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
def test_the_fleet_with_its_links(cluster: Cluster, size: tuple[int, int]) -> None:
    async def main() -> None:
        async with top(cluster.router, size=size) as it:
            await it.until(lambda: len(it.rows("engines")) == 2, "engines")
            assert [row[:2] for row in it.rows("engines")] == [["e0", "ready"], ["e1", "ready"]]
            # What the narrow table has no room for is below it; the links come from the engine itself.
            await it.until(lambda: "GB/s measured" in it.text("engine"), "the links of e0")
            assert "model tokens-only" in it.text("engine")
            assert "→ e1 ready" in it.text("engine")
            titles = it.app.query_one("#engines", LiveTable).titles
            assert ("sent/s" in titles) == (size[0] > 100)
            await it.press("down")
            await it.until(lambda: "→ e0 ready" in it.text("engine"), "the links of e1")
            shown = it.screen()
            assert "router r" in shown
            assert "2 ready" in shown
            assert max(map(len, shown.splitlines())) <= size[0]
            # A window that grows gets the wide table.
            await it.pilot.resize_terminal(170, 40)
            await it.until(lambda: len(it.rows("engines")[0]) == 14, "the wide table")

    asyncio.run(main())


def test_an_engine_is_drained_after_a_question_and_comes_back(cluster: Cluster) -> None:
    async def main() -> None:
        async with top(cluster.router) as it:
            await it.until(lambda: it.rows("engines"), "engines")
            await it.press("d")
            await it.until(lambda: "Drain e0?" in it.screen(), "the question")
            await it.press("enter")  # No is what Enter gives
            await it.until(lambda: "Drain e0?" not in it.screen(), "the end of the question")
            assert state_of(await it.client.status(), "e0") == "ready"
            await it.press("d", "y")
            await it.until(lambda: it.rows("engines")[0][1] == "draining", "e0 to drain")
            assert "e0 drains" in it.said()
            await it.press("u", "y")
            await it.until(lambda: it.rows("engines")[0][1] == "ready", "e0 to take work again")

    asyncio.run(main())


def test_requests_with_their_timeline_a_filter_and_an_abort(cluster: Cluster) -> None:
    async def main() -> None:
        async with top(cluster.router, size=(120, 30)) as it:
            names = ("first", "second")
            running = [
                asyncio.create_task(
                    it.client.generate(list(range(1, 100)), max_tokens=2000, ignore_eos=True, request_id=name)
                )
                for name in names
            ]
            await it.press("2")
            await it.until(lambda: [row[0] for row in it.rows("requests")[:2]] == list(names), "both requests")
            await it.until(lambda: "start_generate" in it.text("timeline"), "the timeline")
            assert [row[1] for row in it.rows("requests")[:2]] == ["running", "running"]
            assert "running" in it.text("timeline")
            await it.press("slash", *"second", "enter")
            await it.until(lambda: [row[0] for row in it.rows("requests")] == ["second"], "the filter")
            await it.press("a")
            await it.until(lambda: "Abort request second?" in it.screen(), "the question")
            await it.press("n")
            assert not running[1].done()
            await it.press("a", "y")
            with pytest.raises(Cancelled, match="by an operator"):
                await running[1]
            await it.until(lambda: it.rows("requests")[0][1] == "cancelled", "it to be shown as ended")
            await it.press("escape")
            await it.until(lambda: it.rows("requests")[0][0] == "first", "the end of the filter")
            await it.press("e")
            await it.until(lambda: [row[0] for row in it.rows("requests")] == ["first"], "only what runs")
            running[0].cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await it.press("e")
            await it.press("home", "a")
            await it.until(lambda: "this request has ended" in it.said(), "that nothing can be aborted")

    asyncio.run(main())


def test_a_strategy_is_edited_checked_applied_compared_and_rolled_back(cluster: Cluster) -> None:
    async def main() -> None:
        async with top(cluster.router, size=(160, 50)) as it:
            await it.client.generate([1, 2, 3], max_tokens=3, ignore_eos=True)
            await it.press("3")
            await it.until(lambda: it.rows("choices"), "strategies")
            names = [row[0] for row in it.rows("choices")]
            it.app.query_one("#choices", LiveTable).move_cursor(row=names.index("balanced"))
            await it.press("enter")
            await it.until(lambda: it.app.screen.query("#setting-ratio"), "the dialog")
            ratio = it.app.screen.query_one("#setting-ratio", Input)
            ratio.value = "much"
            await it.press("ctrl+s")
            await it.until(lambda: "must be a float" in it.text("wrong"), "what is wrong")
            ratio.value = "0.4"
            it.app.screen.query_one("#share", Input).value = "200"
            await it.press("ctrl+s")
            await it.until(lambda: "share" in it.text("wrong"), "what is wrong with the share")
            it.app.screen.query_one("#share", Input).value = "25"
            await it.pilot.click("#check")
            await it.until(lambda: "it would be: " in it.text("wrong"), "the check")
            assert len((await it.client.strategies()).history) == 1
            await it.press("ctrl+s")
            await it.until(lambda: len(it.rows("versions")) == 2, "two versions")
            assert [row[1] for row in it.rows("versions")] == ["75%", "25%"]
            served = it.rows("versions")[0]
            assert served[0].startswith("data_parallel@")
            # What it served is beside the newcomer, which has served nothing.
            assert (served[2] != "0", "-" in served[4:13]) == (True, False)
            assert it.rows("versions")[1][2:5] == ["0", "0", "-"]
            assert "ratio=0.4" in it.rows("versions")[1][14]
            assert len(it.rows("history")) == 2
            await it.press("b")
            await it.until(lambda: "Roll back the last change of every model?" in it.screen(), "the question")
            await it.press("y")
            await it.until(lambda: len(it.rows("versions")) == 1, "the way back")
            # Nothing is left to roll back: refused, told, nothing breaks.
            await it.press("b", "y")
            await it.until(lambda: any("no earlier state" in each for each in it.said()), "the refusal")

    asyncio.run(main())


def test_prefixes_are_pinned_moved_and_evicted(cluster: Cluster) -> None:
    async def main() -> None:
        async with top(cluster.router, size=(120, 30)) as it:
            for engine in ("e0", "e1"):
                await it.client.engine(engine).cache_evict()
            prompt = list(range(7, 167))
            await it.client.engine("e0").generate(prompt, max_tokens=1, ignore_eos=True)
            await it.until(lambda: it.rows("engines"), "engines")
            await it.press("c")
            await it.until(lambda: it.rows("prefixes"), "prefixes of e0")
            [row] = it.rows("prefixes")
            assert row[:4] == ["160", "10", "0", ""]
            assert row[4].startswith("7 8 9 10 ")
            await it.press("p")
            await it.until(lambda: it.app.screen.query("#answer"), "the question")
            answer = it.app.screen.query_one("#answer", Input)
            answer.value = "soon"
            await it.press("enter")
            await it.until(lambda: "no number of seconds" in it.text("wrong"), "what is wrong")
            answer.value = "60"
            await it.press("enter")
            await it.until(lambda: it.rows("prefixes")[0][3] == "pinned", "the pin")
            assert "pinned: 160 tokens" in it.said()
            # A pinned prefix is not evicted.
            await it.press("e", "y")
            await it.until(lambda: "evicted: 0 pages" in it.said(), "nothing to be evicted")
            await it.press("u")
            await it.until(lambda: it.rows("prefixes")[0][3] == "", "the end of the pin")
            await it.press("m")
            await it.until(lambda: "Move 160 tokens from e0 to:" in it.screen(), "where to")
            await it.press("enter")
            await it.until(lambda: any("e0 → e1: 160 tokens" in each for each in it.said()), "the move")
            assert await it.client.engine("e1").cache_match(prompt) == 160
            await it.press("right_square_bracket")
            await it.until(lambda: [row[0] for row in it.rows("prefixes")] == ["160"], "prefixes of e1")
            await it.press("E")
            await it.until(lambda: "Evict all of e1's cache" in it.screen(), "the question")
            await it.press("escape")
            assert await it.client.engine("e1").cache_match(prompt) == 160
            await it.press("E", "y")
            await it.until(lambda: "evicted: 10 pages" in it.said(), "the eviction")
            await it.until(lambda: it.rows("prefixes") == [], "an empty tree")

    asyncio.run(main())


def test_events_and_help(cluster: Cluster) -> None:
    async def main() -> None:
        async with top(cluster.router) as it:
            await it.press("5")
            log = it.app.query_one(RichLog)
            await it.until(lambda: any("joined" in line.text for line in log.lines), "events")
            await it.press("slash", *"joined e1")
            await it.until(lambda: len(log.lines) == 1, "the filter")
            assert "e1" in log.lines[0].text
            await it.press("enter", "escape")
            await it.until(lambda: len(log.lines) > 1, "everything again")
            await it.press("question_mark")
            await it.until(lambda: "What destroys asks first" in it.screen(), "help")
            await it.press("escape")
            await it.until(lambda: "What destroys asks first" not in it.screen(), "the end of help")
            # The mouse reaches every pane, too.
            await it.pilot.click("#tabs", offset=(4, 0))
            await it.until(lambda: it.app.pane.title == "Fleet", "the first pane")

    asyncio.run(main())


def test_names_that_others_chose_are_text_and_nothing_else(cluster: Cluster) -> None:
    """Neither markup, which may be wrong and end the program, nor what a terminal obeys."""

    async def main() -> None:
        async with top(cluster.router, size=(160, 50)) as it:
            name = "[/b]\x1b]0;x\x9b2J\nz\u202e"
            seen = "[/b]\\x1b]0;x\\x9b2J\\nz\\u202e"
            task = asyncio.create_task(it.client.generate([1, 2, 3], max_tokens=2000, ignore_eos=True, request_id=name))
            await it.press("2")
            await it.until(lambda: it.rows("requests")[:1] and it.rows("requests")[0][0] == seen, "the request")
            await it.press("a")
            await it.until(lambda: f"Abort request {seen}?" in it.screen(), "the question")
            await it.press("y")
            with pytest.raises(Cancelled):
                await task
            await it.until(lambda: it.rows("requests")[0][1] == "cancelled", "its end")
            await it.press("5")
            log = it.app.query_one(RichLog)
            await it.until(lambda: any(seen in line.text for line in log.lines), "the event")
            for pane in "12345":
                await it.press(pane)
                await it.pilot.pause()
                assert not {char for char in it.screen() if char != "\n" and not char.isprintable()}

    asyncio.run(main())


def test_a_router_that_is_gone_is_shown_and_comes_back() -> None:
    async def main(cluster: Cluster) -> None:
        async with top(cluster.router) as it:
            await it.until(lambda: it.rows("engines"), "the engine")
            daemon = cluster.router_daemon
            assert daemon is not None
            daemon.kill()
            await it.until(lambda: "no router answers" in it.text("banner"), "the banner")
            assert it.rows("engines")[0][0] == "e0"
            assert it.app.query_one("#panes").has_class("stale")
            await it.press("d", "y")
            await it.until(lambda: any("no router answers" in each for each in it.said()), "the refusal")
            cluster.start_router()
            await it.until(lambda: not it.app.query_one("#panes").has_class("stale"), "the router")
            await it.until(lambda: it.rows("engines") and it.rows("engines")[0][1] == "ready", "the engine")
            assert not it.app.query_one("#banner").display

    with Cluster(engines=1, engine_args=SLOW) as cluster:
        asyncio.run(main(cluster))


def test_without_a_router_it_waits_for_one() -> None:
    async def main() -> None:
        with Cluster(engines=0, start_router=False) as cluster:
            async with top(cluster.router) as it:
                await it.until(lambda: "no router answers" in it.text("banner"), "the banner")
                await it.press("2", "3", "4", "5", "1", "d", "c")
                assert it.app.is_running

    asyncio.run(main())


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("needs tmux")
    terminal = Terminal(tmp_path)
    try:
        yield terminal
    finally:
        terminal.tmux("kill-server")


class Terminal:
    """A real one, 80x24, for one command."""

    def __init__(self, folder: Path) -> None:
        self._socket = str(folder / "tmux")
        self._code = folder / "code"

    def tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-u", "-S", self._socket, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=daemon_environ(),
        )
        return done.stdout

    def start(self, *command: str) -> None:
        line = f"{shlex.join(command)}; echo $? > {self._code}"
        self.tmux(
            "-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "-s", "top", shlex.join(["sh", "-c", line])
        )

    def screen(self) -> list[str]:
        return self.tmux("capture-pane", "-p", "-t", "top").splitlines()

    def press(self, key: str) -> None:
        self.tmux("send-keys", "-t", "top", key)

    def wait(self, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT
        while not holds():
            assert time.monotonic() < deadline, "\n".join(self.screen())
            time.sleep(0.05)

    def wait_code(self) -> int:
        """The exit code of the command."""
        self.wait(lambda: self._code.exists() and self._code.read_text().endswith("\n"))
        return int(self._code.read_text())


def test_in_a_terminal(cluster: Cluster, terminal: Terminal) -> None:
    terminal.start(sys.executable, "-P", "-m", "microserve.tools", "top", "--router", cluster.router)
    # The foot is drawn apart from the table.
    terminal.wait(lambda: all(mark in "".join(terminal.screen()) for mark in ("e1", "q quit")))
    shown = terminal.screen()
    assert shown[0].startswith(" router r ")
    assert "5 Events" in shown[2]
    assert "q quit" in shown[23]
    # What has changed is drawn, and nothing else: the terminal must have it, too.
    terminal.press("d")
    terminal.wait(lambda: any("Drain e0?" in line for line in terminal.screen()))
    terminal.press("y")
    terminal.wait(lambda: any("e0" in line and "draining" in line for line in terminal.screen()[3:6]))
    terminal.press("u")
    terminal.wait(lambda: any("Resume e0?" in line for line in terminal.screen()))
    terminal.press("y")
    terminal.wait(lambda: any("e0" in line and "ready" in line for line in terminal.screen()[3:6]))
    terminal.press("Down")
    terminal.wait(lambda: any("→ e0 ready" in line for line in terminal.screen()))
    terminal.press("q")
    assert terminal.wait_code() == 0


def test_a_bug_is_no_success(cluster: Cluster, terminal: Terminal) -> None:
    broken = "from microserve.tools import top; from microserve.tools.tui.fleet import FleetPane; FleetPane.show = 0; "
    script = f"{broken} raise SystemExit(top.main(['--router', '{cluster.router}']))"
    terminal.start(sys.executable, "-P", "-c", script)
    assert terminal.wait_code() == 1


def test_without_a_terminal_it_says_so(cluster: Cluster) -> None:
    command = [sys.executable, "-P", "-m", "microserve.tools", "top", "--router", cluster.router]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=daemon_environ(), timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs a terminal" in done.stderr
    done = subprocess.run([*command, "--interval", "0"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2


def test_errors_that_go_elsewhere_leave_no_blank_screen(cluster: Cluster) -> None:
    """It draws on standard error: `microserve top 2>log`."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-P", "-m", "microserve.tools", "top", "--router", cluster.router]
    try:
        done = subprocess.run(
            command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, check=False, env=daemon_environ(), timeout=60
        )
        shown = os.read(ours, 4096).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    said = "microserve top: needs a terminal for its input, output and errors; `microserve engines --json` does not"
    assert (done.returncode, done.stderr.decode(), shown) == (2, f"{said}\n", f"{said}\r\n")


def test_it_ends_with_its_terminal() -> None:
    ours, its = pty.openpty()
    command = [sys.executable, "-P", "-m", "microserve.tools", "top", "--router", "tcp://127.0.0.1:1"]
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, env={**daemon_environ(), "TERM": "xterm"}, start_new_session=True
    )
    try:
        os.close(its)
        assert os.read(ours, 1), "it draws"
        # As a connection that breaks does it; the process is not of the terminal's session.
        os.close(ours)
        assert process.wait(30) in (128 + signal.SIGHUP, -signal.SIGHUP)
    finally:
        process.kill()
        process.wait()


def test_a_key_that_may_not_is_told_so(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    for name, role in (("r", "router"), ("e0", "engine"), ("ann", "client")):
        new_identity(folder, name, role, new_key_pair)
    os.environ["MICROSERVE_KEY_FILE"] = str(folder / "ann.key")

    async def main(cluster: Cluster) -> None:
        async with top(cluster.router, key_file=str(folder / "ann.key")) as it:
            await it.until(lambda: it.rows("engines"), "the engine")
            await it.press("d", "y")
            await it.until(lambda: any("may not call Drain on an engine" in each for each in it.said()), "the refusal")
            await it.press("2")
            await it.until(lambda: "may not call ListRequests" in it.text("banner"), "why there are no requests")
            await it.press("1")
            await it.until(lambda: not it.app.query_one("#banner").display, "the fleet again")

    try:
        engine, router = (*SLOW, "--key-file", str(folder / "e0.key")), ("--key-file", str(folder / "r.key"))
        with Cluster(engines=1, engine_args=engine, router_args=router) as cluster:
            asyncio.run(main(cluster))
    finally:
        del os.environ["MICROSERVE_KEY_FILE"]
