"""`microserve up`: its plan, its screen, and the whole of it with real processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from msgspec.structs import replace
from rich.console import Console
from tests.cluster import daemon_environ, free_ports
from tests.test_tools_status import STATUS
from tests.tokenizer_zoo import write_checkpoint

from microserve.runtime.client import Client
from microserve.runtime.errors import ConfigError
from microserve.tools.up import Plan, _parser, main, usable_cores
from microserve.tools.up_run import Up
from microserve.tools.up_screen import Screen, command_name, usage_lines

if TYPE_CHECKING:
    from collections.abc import Iterator


def plan(*arguments: str, environ: dict[str, str] | None = None) -> Plan:
    return Plan(_parser().parse_args(arguments), environ or {})


# --- plan ----------------------------------------------------------------------------------------------------------


def test_the_default_plan() -> None:
    router, *engines = plan().specs()
    assert (router.name, router.module, router.arguments) == ("router", "microserve.router", ("--router-id", "local"))
    assert [engine.name for engine in engines] == ["engine-0", "engine-1"]
    flags = dict(zip(engines[1].arguments[::2], engines[1].arguments[1::2], strict=True))
    assert flags == {
        "--threads": str(max(1, usable_cores() // 2)),
        "--engine-id": "engine-1",
        "--routers": "tcp://127.0.0.1:7700",
        "--bind": "tcp://127.0.0.1:*",
        "--events-bind": "tcp://127.0.0.1:*",
    }


def test_options_reach_the_process_that_they_are_for(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[engine]\nthreads = 3\n[router]\nhttp_port = 1234\n")
    made = plan("--config", str(file), "--engines", "1", "--bind", "tcp://0.0.0.0:9", "--model", "x", "--strategy", "s")
    router, engine = made.specs()
    assert router.arguments == (
        *("--config", str(file), "--bind", "tcp://0.0.0.0:9", "--strategy", "s", "--router-id", "local"),
    )
    assert engine.arguments[:6] == ("--config", str(file), "--model", "x", "--engine-id", "engine-0")
    assert "--threads" not in engine.arguments
    assert engine.arguments[engine.arguments.index("--routers") + 1] == "tcp://127.0.0.1:9"
    assert made.router.http_port == 1234


def test_a_file_of_one_daemon_is_refused_with_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text("http_port = 1234\nmax_active = 3\n")
    with pytest.raises(ConfigError, match=r"no tables \[engine\] and \[router\].*put http_port, max_active under one"):
        plan("--config", str(file))
    file.write_text("")
    assert plan("--config", str(file)).router.http_port == 8000


def test_a_wrong_setting_is_found_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="MICROSERVE_ENGINE_PAGE_SIZ; did you mean"):
        plan(environ={"MICROSERVE_ENGINE_PAGE_SIZ": "1"})
    with pytest.raises(ConfigError, match="has no fixed port"):
        plan("--bind", "tcp://127.0.0.1:*").check()


def test_a_port_that_is_taken_is_named_with_the_way_out() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (free,) = free_ports(1)
        with pytest.raises(ConfigError) as http:
            plan("--http-port", str(port), "--bind", f"tcp://127.0.0.1:{free}").check()
        with pytest.raises(ConfigError) as bus:
            plan("--http-port", str(free), "--bind", f"tcp://127.0.0.1:{port}").check()
        with pytest.raises(ConfigError) as both:
            plan("--http-port", str(port), "--bind", f"tcp://127.0.0.1:{port}").check()
    us = f"{Path(psutil.Process().cmdline()[0]).name} (process {os.getpid()})"
    assert http.value.message == f"HTTP port {port} of 127.0.0.1 is taken by {us}; choose another with --http-port"
    assert bus.value.message == f"bus port {port} of 127.0.0.1 is taken by {us}; choose another with --bind"
    assert both.value.message == f"{http.value.message}; {bus.value.message}"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--kv-memory", "1GiB"],
            "kv_memory is the engines': set MICROSERVE_ENGINE_KV_MEMORY, or put it under [engine] in a file",
        ),
        (["--state-folder=x"], "state_folder is the routers': set MICROSERVE_ROUTER_STATE_FOLDER"),
        (["--plan", "--kv-pages", "9"], "unrecognized arguments: --plan --kv-pages 9; kv_pages is the engines'"),
    ],
)
def test_a_flag_of_a_daemon_is_told_its_place(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_table_of_another_name_is_told_which_may_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "up.toml"
    file.write_text("[engin]\nmax_running = 3\n")
    assert main(["--config", str(file)]) == 2
    assert "put engin under one of them; did you mean [engine]?" in capsys.readouterr().err


def test_a_flag_that_nobody_has_is_told_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--nonsense", "--events-bind"):
        with pytest.raises(SystemExit):
            main([flag])
        assert capsys.readouterr().err.endswith(f"unrecognized arguments: {flag}\n")


# --- screen --------------------------------------------------------------------------------------------------------


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(["engine-0"], "tcp://127.0.0.1:9", on=False) as screen:
        screen.line("waiting")
        screen.child_line("engine-0", "ready")
        screen.show(STATUS, [], "ready")
        screen.announce(STATUS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["up       | waiting", "engine-0 | ready", "serving llama at http://127.0.0.1:8000/v1"]
    assert lines[-1] == "or:  microserve chat --router tcp://127.0.0.1:9"


def test_the_example_finds_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_name("/a b/.venv/bin/microserve") == "'/a b/.venv/bin/microserve'"
    assert command_name("/lib/pytest/__main__.py") == "microserve"
    (tmp_path / "microserve").touch(mode=0o755)
    assert command_name("/a b/.venv/bin/microserve") == "microserve"


def test_the_curl_example_is_a_valid_request() -> None:
    (curl,) = [line for line in usage_lines(STATUS, "x") if line.startswith("try: curl")]
    body = json.loads(re.search(r"-d '(.*)'$", curl)[1])  # type: ignore[index]
    assert body == {"model": "llama", "messages": [{"role": "user", "content": "Hello!"}]}
    assert "http://127.0.0.1:8000/v1/chat/completions" in curl


def test_the_screen_shows_fleet_phase_and_last_lines() -> None:
    screen = Screen(["engine-0"], "tcp://127.0.0.1:7700", on=True)
    out = io.StringIO()
    screen._recent.append("engine-0 | loading layer 3")
    screen.show(STATUS, [], "ready")
    Console(file=out, width=200).print(screen._render())
    shown = out.getvalue()
    for expected in ("router r", "gpu-a", "ready", "engine-0 | loading layer 3", "Ctrl-C stops"):
        assert expected in shown


def test_the_screen_fits_eighty_columns_and_says_that_it_stops() -> None:
    engine = STATUS.engines[0]
    names = ["engine-0", "engine-1"]
    engines = [replace(engine, info=replace(engine.info, engine_id=name)) for name in names]
    screen = Screen(names, "tcp://127.0.0.1:7700", on=True)
    out = io.StringIO()
    began = "2026-11-28T00:44:49.258Z info    router:local@6614b7b6bac08"
    screen.child_line("router", f"{began} engine joined  engine=engine-1")
    screen.show(replace(STATUS, engines=engines), [], "ready")
    screen.stopping()
    Console(file=out, width=80).print(screen._render())
    shown = out.getvalue()
    for expected in (*names, "requests", "running", "router   | 00:44:49 info engine joined  engine=engine-1"):
        assert expected in shown
    assert "…" not in shown
    assert ("stopping: running requests finish" in shown, "Ctrl-C again ends them now" in shown) == (True, True)


# --- all of it -----------------------------------------------------------------------------------------------------


class Running:
    """A `microserve up` and its output."""

    def __init__(self, folder: Path, *more: str, environ: dict[str, str] | None = None) -> None:
        http_port, bus_port = free_ports(2)
        self.bus = f"tcp://127.0.0.1:{bus_port}"
        self.http = f"http://127.0.0.1:{http_port}"
        self.lines: list[str] = []
        command = [sys.executable, "-P", "-m", "microserve.tools", "up", "--plain", "--executor", "fake"]
        command += ["--model", str(folder), "--http-port", str(http_port), "--bind", self.bus]
        self.process = subprocess.Popen(
            [*command, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**daemon_environ(), **(environ or {})},
            start_new_session=True,
        )
        self.daemons: list[psutil.Process] = []

    def until(self, text: str) -> str:
        """Read lines up to one that contains `text`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"ended without {text!r}:\n" + "\n".join(self.lines))

    def children(self) -> dict[str, psutil.Process]:
        """The daemons by name."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            words = child.cmdline()
            found[words[words.index("--engine-id") + 1] if "--engine-id" in words else "router"] = child
        self.daemons += found.values()
        return found

    def end(self) -> int:
        assert self.process.stdout is not None
        self.lines += [line.rstrip() for line in self.process.stdout]
        return self.process.wait(30)


@contextlib.contextmanager
def running(folder: Path, *more: str, environ: dict[str, str] | None = None) -> Iterator[Running]:
    up = Running(folder, *more, environ=environ)
    try:
        yield up
    except BaseException as error:
        error.add_note("\n".join(up.lines))
        raise
    finally:
        up.process.kill()
        up.process.communicate()
        gone, alive = psutil.wait_procs(up.daemons, timeout=10)
        for process in alive:
            process.kill()
        assert not alive, f"{alive} outlived their supervisor ({len(gone)} did not)"


def chat(up: Running, **more: Any) -> httpx.Response:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **more}
    return httpx.post(f"{up.http}/v1/chat/completions", json=body, timeout=30)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "m").mkdir()
    return write_checkpoint(tmp_path / "m")


def test_logs_that_have_no_folder_are_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    ports = free_ports(2)
    flags = ["--http-port", str(ports[0]), "--bind", f"tcp://127.0.0.1:{ports[1]}", "--engines", "0"]
    assert main([*flags, "--logs", str(file)]) == 2
    assert capsys.readouterr().err == f"microserve up: error: --logs: {file} cannot be a folder: File exists\n"


def test_up_serves_restarts_a_killed_engine_and_stops_clean(folder: Path, tmp_path: Path) -> None:
    with running(folder, "--logs", str(tmp_path / "logs")) as up:
        assert up.until("serving m at") == f"serving m at {up.http}/v1"
        assert any(line.startswith("up       | waiting for") for line in up.lines)
        assert chat(up).status_code == 200
        before = up.children()
        assert set(before) == {"router", "engine-0", "engine-1"}
        before["engine-1"].kill()
        up.until("engine-1 | ended (killed by SIGKILL); starting again in 0.5 s")
        up.until("up       | ready")
        after = up.children()
        assert after["engine-1"].pid != before["engine-1"].pid
        assert after["engine-0"].pid == before["engine-0"].pid
        with Client(up.bus) as client:
            client.engine("engine-1").drain()
            up.until("up       | ready, but for what is drained: `microserve resume engine-1` takes it back")
            client.engine("engine-1").resume()
            up.until("up       | ready")
        assert chat(up).status_code == 200
        up.process.send_signal(signal.SIGINT)
        assert up.end() == 0
        assert "up       | stopping: running requests may finish; Ctrl-C again ends them now" in up.lines
        assert up.lines[-1] == "up       | stopped"
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert set(logs) == {"router.log", "engine-0.log", "engine-1.log"}
    assert logs["engine-1.log"].count(" ready ") == 2
    assert [name for name, log in logs.items() if " drained " not in log] == [], "somebody was killed"


def test_engines_that_their_router_lets_go_of_as_it_ends_are_not_killed() -> None:
    up = Up(plan("--engines", "2"), screen=False)
    engines = [
        replace(STATUS.engines[0], info=replace(STATUS.engines[0].info, engine_id=f"engine-{n}")) for n in (0, 1)
    ]
    up._show(replace(STATUS, engines=engines))
    up._stopping.set()
    up._show(replace(STATUS, engines=[]))
    assert up._joined == {"engine-0", "engine-1"}


def test_a_running_request_finishes_and_a_second_signal_does_not_wait(folder: Path) -> None:
    def start(up: Running, tokens: int) -> contextlib.AbstractContextManager[httpx.Response]:
        body = {"model": "m", "prompt": [1, 2], "max_tokens": tokens, "stream": True, "ignore_eos": True}
        return httpx.stream("POST", f"{up.http}/v1/completions", json=body, timeout=30)

    slow = {"MICROSERVE_ENGINE_FAKE_DECODE_BASE_US": "20000"}
    with running(folder, "--engines", "1", environ=slow) as up:
        up.until("serving m at")
        up.children()
        with start(up, tokens=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            up.process.send_signal(signal.SIGINT)
            up.until("stopping")
            rest = [line for line in lines if line]
            assert len(rest) > 20
            assert rest[-1] == "data: [DONE]"
        assert up.end() == 0
    with running(folder, "--engines", "1", environ=slow) as up:
        up.until("serving m at")
        up.children()
        with start(up, tokens=10000) as answer:
            next(answer.iter_lines())
            up.process.send_signal(signal.SIGINT)
            up.until("stopping")
            up.process.send_signal(signal.SIGINT)
            assert up.end() == 130
        assert up.lines[-1] == "up       | stopped; what still ran was cut off"


def test_daemons_do_not_outlive_a_killed_supervisor(folder: Path) -> None:
    with running(folder) as up:
        up.until("serving m at")
        assert len(up.children()) == 3
        up.process.kill()
        # Leaving the block checks that they have ended.


def test_a_daemon_that_refuses_its_configuration_ends_up(folder: Path) -> None:
    with running(folder, "--strategy", "no-such-strategy") as up:
        assert up.end() == 2
        assert any("router does not start (exit code 2); stopping" in line for line in up.lines)
        assert any("no-such-strategy" in line for line in up.lines[-3:])
