"""`microserve doctor` against real routers and engines, and in front of a broken machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from tests.cluster import FAKE, Cluster, daemon_environ, free_ports
from tests.command_support import PROGRAM, Ended, Terminal

from microserve.runtime.keys import new_identity
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools.checks.everything import check_fleet

if TYPE_CHECKING:
    from pathlib import Path

PATIENT = ("--timeout", "40")
"""The machine that tests run on may be busy."""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Nobody's: the user's own configuration and keys are not looked at."""
    made = tmp_path / "home"
    made.mkdir()
    return made


def doctor(home: Path, *arguments: str, **environ: str) -> Ended:
    done = subprocess.run(
        [*PROGRAM, "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=daemon_environ() | {"HOME": str(home)} | environ,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def found(home: Path, *arguments: str, **environ: str) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit code, and the findings by check."""
    ended = doctor(home, "--json", *arguments, **environ)
    assert ended.err == ""
    by_check: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(ended.out):
        assert set(finding) == {"check", "status", "message", "advice"}
        assert finding["advice"] or finding["status"] == "ok"
        by_check.setdefault(finding["check"], []).append(finding)
    return ended.code, by_check


def statuses(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["status"] for finding in findings]


def test_a_fleet_that_is_well(home: Path) -> None:
    with Cluster(engines=2, engine_args=FAKE) as cluster:
        cluster.wait_for(lambda _status: linked(cluster), "the engines to have met")
        code, by_check = found(home, *PATIENT, "--router", cluster.router)
        bus = cluster.router.rpartition(":")[2]
        assert [each["message"] for each in by_check["engines"]] == [
            "engine e0 answers: tokens-only, fake, 0 running",
            "engine e1 answers: tokens-only, fake, 0 running",
        ]
        for check in ("python", "packages", "torch", "transports", "router", "http", "versions", "layouts", "links"):
            assert set(statuses(by_check[check])) == {"ok"}, by_check[check]
        assert by_check["layouts"][0]["message"] == "2 engines of tokens-only agree: 16 tokens a page, fake"
        assert "the clock of router r agrees with ours" in [each["message"] for each in by_check["clock"]]
        router = cluster.router_daemon
        assert router is not None
        assert [each["message"] for each in by_check["ports"]] == [
            f"bus port {bus} of 127.0.0.1 is a microserve router's (process {router.process.pid})"
        ]
        assert code == 0, by_check


def linked(cluster: Cluster) -> bool:
    client = cluster.client()
    return all([link.state for link in client.engine(name).info().links] == ["ready"] for name in cluster.endpoints())


def test_layouts_that_differ_and_an_engine_that_hangs(home: Path) -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        cluster.add_engine("e1", "--page-size", "32")
        cluster.wait_for(lambda _status: refused(cluster), "the engines to have refused each other")
        code, by_check = found(home, *PATIENT, "--router", cluster.router)
        assert code == 1
        (layouts,) = by_check["layouts"]
        assert layouts["status"] == "problem"
        assert layouts["message"] == "engines of tokens-only exchange no KV: page_size is 16 on e0 and 32 on e1"
        assert "page_size" in layouts["advice"]
        assert "problem" in statuses(by_check["links"])
        assert "page_size" in by_check["links"][-1]["message"]
        cluster.engines[1].pause()
        try:
            ended = doctor(home, "--json", "--timeout", "10", "--router", cluster.router)
        finally:
            cluster.engines[1].resume()
        messages = {each["message"]: each["status"] for each in json.loads(ended.out) if each["check"] == "engines"}
        assert any(message.startswith("engine e1 ") and status == "problem" for message, status in messages.items())


def refused(cluster: Cluster) -> bool:
    return any(link.state == "refused" for link in cluster.client().engine("e1").info().links)


def test_a_router_without_engines_takes_no_requests(home: Path) -> None:
    with Cluster(engines=0) as cluster:
        code, by_check = found(home, *PATIENT, MICROSERVE_ROUTER=cluster.router)
        assert (code, statuses(by_check["router"])) == (1, ["ok"])
        assert by_check["http"][0]["message"].endswith("no engine is ready")


def test_nothing_answers_and_it_takes_seconds_all_the_same(home: Path) -> None:
    # One port is closed; at the other somebody listens who never says a word.
    (closed,) = free_ports(1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        config = home / "engine.toml"
        config.write_text(f'routers = ["tcp://127.0.0.1:{closed}", "tcp://127.0.0.1:{port}"]\n')
        began = time.monotonic()
        ended = doctor(home, "--json", "--config", str(config))
        took = time.monotonic() - began
    routers = [finding for finding in json.loads(ended.out) if finding["check"] == "router"]
    assert [finding["message"] for finding in routers] == [
        f"no router answers at tcp://127.0.0.1:{closed}",
        f"no router answers at tcp://127.0.0.1:{port}",
    ]
    assert (ended.code, statuses(routers)) == (1, ["problem", "problem"])
    # 5.75 s are the limit of the checks; the rest is the start of Python on a machine that others use, too.
    assert took < 12.0


def test_a_router_that_nobody_spoke_of_need_not_be_there() -> None:
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    for expected, status in ((False, "note"), (True, "problem")):
        (finding,) = check_fleet([endpoint], None, 1.0, expected=expected)
        assert (finding.status, finding.message) == (status, f"no router answers at {endpoint}")


def test_a_port_that_another_program_has(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = home / "router.toml"
        config.write_text(f'http_port = {port}\nbind = "tcp://127.0.0.1:{free_ports(1)[0]}"\n')
        code, by_check = found(home, "--config", str(config))
    taken, free = by_check["ports"]
    assert code == 1
    assert taken["status"] == "problem"
    assert taken["message"].startswith(f"HTTP port {port} of 127.0.0.1 is in use by another program: ")
    assert taken["message"].endswith(f"(process {os.getpid()})")
    assert (free["status"], "http_port" in taken["advice"]) == ("ok", True)


def test_a_secret_that_others_may_read_and_a_file_that_is_no_toml(home: Path) -> None:
    folder = home / "keys"
    new_identity(folder, "r", "router", new_key_pair)
    (folder / "r.key").chmod(0o644)
    good, bad = home / "router.toml", home / "engine.toml"
    good.write_text(f'key_file = "{folder}/r.key"\n')
    bad.write_text("engine_id = \n")
    code, by_check = found(home, "--router", "tcp://127.0.0.1:9", "--config", str(good), str(bad))
    assert code == 1
    assert statuses(by_check["configuration"]) == ["ok", "problem"]
    assert "is not valid TOML" in by_check["configuration"][1]["message"]
    assert by_check["keys"][0]["message"].endswith("others may read it (mode 0644)")
    assert by_check["keys"][0]["advice"].startswith(f"chmod 600 {folder}/r.key")


def test_a_fleet_with_keys(home: Path) -> None:
    folder = home / "keys"
    for name, role in (("r", "router"), ("e0", "engine"), ("ann", "client")):
        new_identity(folder, name, role, new_key_pair)
    mine = {"MICROSERVE_KEY_FILE": str(folder / "ann.key")}
    secrets = [line for path in folder.glob("*.key") for line in path.read_text().splitlines() if "secret" in line]
    engine = (*FAKE, "--key-file", str(folder / "e0.key"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICROSERVE_KEY_FILE", mine["MICROSERVE_KEY_FILE"])
        with Cluster(engines=1, engine_args=engine, router_args=("--key-file", str(folder / "r.key"))) as cluster:
            code, by_check = found(home, *PATIENT, "--router", cluster.router, **mine)
            assert (code, statuses(by_check["engines"])) == (0, ["ok"]), by_check
            assert not any(line.split("'")[1] in json.dumps(by_check) for line in secrets if "'" in line)
            without = doctor(home, "--json", *PATIENT, "--router", cluster.router)
            (router,) = [each for each in json.loads(without.out) if each["check"] == "router"]
            assert (without.code, router["status"], "--key-file" in router["advice"]) == (1, "problem", True)


def test_as_text_and_on_a_terminal(home: Path) -> None:
    with Cluster(engines=1, engine_args=FAKE) as cluster:
        plain = doctor(home, *PATIENT, "--router", cluster.router)
        lines = plain.out.splitlines()
        assert lines[0].startswith("ok       python         Python 3.")
        assert "\x1b" not in plain.out
        assert lines[-1].startswith("no problems, ")
        with Terminal(cluster, "doctor", *PATIENT) as terminal:
            terminal.until("✓")
            terminal.until("python")
            terminal.until("engine e0 answers")
            terminal.until(" problem")
            assert terminal.end() in (0, 1)


def test_without_a_package_that_everything_needs_it_says_which(home: Path, tmp_path: Path) -> None:
    (tmp_path / "msgspec.py").write_text("raise ImportError('libsomething.so.1: cannot open')\n")
    path = os.pathsep.join([str(tmp_path), daemon_environ()["PYTHONPATH"]])
    ended = doctor(home, PYTHONPATH=path)
    assert ended.code == 1
    assert ended.err.startswith("microserve doctor: only Python and the packages are checked: libsomething.so.1")
    wrong = "problem  packages       msgspec cannot be imported: ImportError: libsomething.so.1: cannot open"
    assert wrong in ended.out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--router", "7700"), "--router: '7700' is no endpoint such as tcp://127.0.0.1:7700"),
        (("--timeout", "0"), "--timeout: 0 is not above 0"),
        (("--timeout", "soon"), "argument --timeout: invalid float value: 'soon'"),
        (("--config",), "argument --config: expected at least one argument"),
        (("--fix",), "unrecognized arguments: --fix"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], said: str, home: Path) -> None:
    ended = doctor(home, *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.splitlines()[-1].endswith(f"error: {said}")


def test_ctrl_c_ends_it_without_a_traceback(home: Path) -> None:
    with subprocess.Popen(
        [*PROGRAM, "doctor", "--router", "tcp://127.0.0.1:9"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=daemon_environ() | {"HOME": str(home)},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("ok       python")
        # As a terminal does: everybody in the group is told.
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == ""
