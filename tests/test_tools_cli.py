"""The command line: help, versions, wrong usage, and a start that loads nothing it does not need."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from tests.cluster import daemon_environ

import microserve
from microserve.tools import cli

COMMANDS = [*cli.COMMANDS, *cli.DAEMONS]


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "microserve.tools", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=60, env=daemon_environ(), check=False
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    listed = re.findall(r"^  ([\w-]+)  +\w", capsys.readouterr().out, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_version(command: str) -> None:
    shown = run(command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: microserve {command} ")
    version = run(command, "--version")
    assert (version.returncode, version.stdout) == (0, f"microserve {command} {microserve.__version__}\n") or (
        version.stdout == f"microserve {microserve.__version__}\n"
    )


def test_version() -> None:
    assert run("--version").stdout == f"microserve {microserve.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["serve"], "there is no command 'serve'; there are: up, chat, "),
        (["statsu"], "there is no command 'statsu'; did you mean status?"),
        (["status", "--jsn"], "unrecognized arguments: --jsn"),
        (["engine", "--page-siz", "3"], "unrecognized arguments: --page-siz 3"),
        (["engine", "--page-size", "x"], "page_size: 'x' is not a whole number"),
        (["router", "--http-port", "99999"], "http_port: 99999 is not a whole number, at least 0 and at most 65535"),
        (["up", "--engines", "-1"], "--engines: -1 is not a number of engines"),
        (["up", "--http-port", "x"], "http_port: 'x' is not a whole number"),
        (["up", "--model", "nothing-there"], "no model 'nothing-there'"),
        (["up", "--config", "nothing.toml"], "cannot read configuration nothing.toml"),
    ],
)
def test_wrong_usage_is_told_in_a_line_and_exits_2(arguments: list[str], told: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert told in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", [["status"], ["chat"]])
def test_without_a_router_one_line_says_what_to_do(command: list[str]) -> None:
    ended = run(*command, "--router", "tcp://127.0.0.1:1", stdin="hello\n")
    assert ended.returncode == 1
    told = f"microserve {command[0]}: no router answers at tcp://127.0.0.1:1; start one with `microserve up`\n"
    assert (ended.stdout, ended.stderr) == ("", told)


def test_a_daemon_takes_over_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Became(Exception):
        pass

    def execv(path: str, arguments: list[str]) -> None:
        raise Became(path, arguments)

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Became) as became:
        cli.main(["engine", "--model", "x"])
    assert became.value.args == (sys.executable, [sys.executable, "-P", "-m", "microserve.engine", "--model", "x"])


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["status", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom microserve.tools.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'rich', 'zmq', 'starlette', 'tokenizers', 'uvloop'}\n"
        "print(*heavy & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-P", "-c", code, *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, env=daemon_environ(), check=True)
    assert shown.stderr.strip() == ""


@pytest.mark.parametrize(
    "address", ["127.0.0.1:7700", "http://127.0.0.1:8000", "tcp://127.0.0.1", "tcp://:7700", "ipc://"]
)
def test_what_is_no_address_of_a_bus_is_said_so(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["status", "--router", address])
    assert ended.value.code == 2
    assert f"{address!r} is not the address of a router's bus" in capsys.readouterr().err
