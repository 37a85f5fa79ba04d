"""Keys between real processes, and what daemons tell a service manager."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any, get_args
from unittest.mock import Mock

import pytest
from tests.cluster import FAKE, Cluster, daemon_environ, state_of

from microserve.engine import verbs
from microserve.router import bus_api
from microserve.runtime.client import Client
from microserve.runtime.errors import Forbidden, PeerLost, Unauthorized
from microserve.runtime.keys import ROLES, new_identity, revoke
from microserve.runtime.messages import (
    AbortRequest,
    Announce,
    Claim,
    ClaimEnded,
    Detokenize,
    EngineCall,
    EngineVerb,
    Generate,
    Heartbeat,
    Info,
    Leave,
    ListEvents,
    ListModels,
    ListRequests,
    ListStrategies,
    PeerHello,
    RollbackStrategy,
    RouterVerb,
    SetStrategy,
    Stats,
    Status,
    Tokenize,
)
from microserve.runtime.zmq_bus import new_key_pair

if TYPE_CHECKING:
    from pathlib import Path

    from microserve.runtime.async_client import Options


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    for name, role in (("r", "router"), ("e0", "engine"), ("me", "client"), ("root", "admin")):
        new_identity(made, name, role, new_key_pair)
    return made


def test_a_fleet_with_keys_serves_those_who_have_one_and_nobody_else(folder: Path) -> None:
    engine = (*FAKE, "--key-file", str(folder / "e0.key"))
    router = ("--key-file", str(folder / "r.key"))
    os.environ["MICROSERVE_KEY_FILE"] = str(folder / "root.key")
    try:
        with Cluster(engines=1, engine_args=engine, router_args=router) as cluster:
            with Client(cluster.router, key_file=folder / "me.key") as client:
                assert client.generate([1, 2, 3], max_tokens=4, ignore_eos=True).finish_reason == "length"
                with pytest.raises(Forbidden, match="may not call SetStrategy"):
                    client.set_strategy("data_parallel")
                with pytest.raises(Forbidden, match="may not call Drain on an engine"):
                    client.engine("e0").drain()
            with Client(cluster.router, key_file=folder / "root.key") as admin:
                admin.engine("e0").stats()
                admin.set_strategy("data_parallel", model="tokens-only")
            del os.environ["MICROSERVE_KEY_FILE"]
            with pytest.raises((PeerLost, Unauthorized)), Client(cluster.router, connect_timeout=5.0):
                pass
            os.environ["MICROSERVE_KEY_FILE"] = str(folder / "root.key")
            assert revoke(folder, "me")
            with pytest.raises((PeerLost, Unauthorized)):
                ask_until_refused(cluster, folder / "me.key")
    finally:
        os.environ.pop("MICROSERVE_KEY_FILE", None)


def test_every_verb_of_a_router_is_for_somebody() -> None:
    """A new one that nobody thought of would be for clients: it has to be entered here."""
    everybody, engines, admins = {"client", "admin"}, {"engine", "admin"}, {"admin"}
    wanted: dict[object, set[str]] = {
        **dict.fromkeys((Announce, Heartbeat, Leave), engines),
        **dict.fromkeys((Generate, ListModels, Tokenize, Detokenize, Status, ListStrategies), everybody),
        **dict.fromkeys((SetStrategy, RollbackStrategy, ListRequests, AbortRequest, ListEvents), admins),
    }
    # What is cached is other people's prompts.
    looks = {Info, Stats}

    def may(body: Any) -> set[str]:
        found = set()
        for role in ROLES:
            with contextlib.suppress(Forbidden):
                bus_api._check_role(role, body)
                found.add(role)
        return found

    made = {verb: Mock(spec=verb) for verb in (*get_args(RouterVerb), *get_args(EngineVerb))}
    assert {verb: may(made[verb]) for verb in get_args(RouterVerb) if verb is not EngineCall} == wanted
    calls = {verb: may(EngineCall(engine_id="e", body=made[verb])) for verb in get_args(EngineVerb)}
    assert calls == {verb: everybody if verb in looks else admins for verb in get_args(EngineVerb)}


def test_an_engines_key_lets_it_send_to_another_and_no_more() -> None:
    def may(body: Any) -> set[str]:
        found = set()
        for role in ("", *ROLES):
            with contextlib.suppress(Forbidden):
                verbs._check_role(role, body)
                found.add(role)
        return found

    everybody, peers = {"", "router", "admin"}, (PeerHello, Claim, ClaimEnded)
    for verb in get_args(EngineVerb):
        assert may(Mock(spec=verb)) == (everybody | {"engine"} if verb in peers else everybody), verb


def test_revoking_a_key_ends_what_runs_in_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_identity(folder, "e1", "engine", new_key_pair)
    monkeypatch.setenv("MICROSERVE_KEY_FILE", str(folder / "root.key"))
    long: Options = {"max_tokens": 30_000, "ignore_eos": True}
    with Cluster(engines=0, router_args=("--key-file", str(folder / "r.key"))) as cluster:
        cluster.add_engine("e0", "--key-file", str(folder / "e0.key"))
        with Client(cluster.router, key_file=folder / "me.key") as me, cluster.client().stream([4, 5], **long) as other:
            mine = me.stream([1, 2, 3], **long)
            next(mine), next(other)
            assert revoke(folder, "me")
            with pytest.raises(PeerLost, match="your key was revoked"):
                for _ in mine:
                    pass
            # At the engine, too; and another key's goes on.
            cluster.wait_for(lambda status: status.engines[0].load.running == 1, "one of two to stop")
            next(other)
            # An engine's: what it has goes on at another, and it gets nothing new, however alive it seems.
            cluster.add_engine("e1", "--key-file", str(folder / "e1.key"))
            assert revoke(folder, "e0")
            cluster.wait_for(
                lambda status: [each.load.running for each in status.engines if each.info.engine_id == "e1"] == [1],
                "the stream to go on at e1",
            )
            next(other)
            cluster.wait_for(lambda status: state_of(status, "e0") in ("connecting", "silent"), "e0 to be let go of")
            for number in range(6):
                assert cluster.client().generate([6, number], max_tokens=2, ignore_eos=True).finish_reason == "length"


def test_daemons_get_other_keys_without_a_restart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSERVE_KEY_FILE", str(folder / "root.key"))
    engine, router = (*FAKE, "--key-file", str(folder / "e0.key")), ("--key-file", str(folder / "r.key"))
    with Cluster(engines=1, engine_args=engine, router_args=router) as cluster:
        (epoch,) = [each.info.epoch for each in cluster.client().status().engines]
        for name, role in (("e0", "engine"), ("r", "router")):
            assert revoke(folder, name)
            cluster.wait_for(lambda status: state_of(status, "e0") != "ready", f"{name} to be let go of")
            (folder / f"{name}.key").unlink()
            new_identity(folder, name, role, new_key_pair)
            cluster.wait_for(lambda status: state_of(status, "e0") == "ready", f"{name} to come back")
            assert cluster.client().generate([6, 7], max_tokens=2, ignore_eos=True).finish_reason == "length"
        assert [each.info.epoch for each in cluster.client().status().engines] == [epoch]


def ask_until_refused(cluster: Cluster, key_file: Path) -> None:
    """The router looks at the list four times a heartbeat."""
    while True:
        with Client(cluster.router, key_file=key_file, connect_timeout=5.0) as client:
            client.status()


def ended(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", *arguments], capture_output=True, text=True, timeout=60, env=daemon_environ()
    )
    return done.returncode, done.stderr


def test_a_port_that_others_can_reach_needs_keys_or_the_word_insecure(folder: Path) -> None:
    for arguments in (
        ("microserve.router", "--bind", "tcp://0.0.0.0:*"),
        ("microserve.router", "--http-host", "0.0.0.0", "--key-file", str(folder / "r.key")),
        ("microserve.engine", "--executor", "fake", "--bind", "tcp://*:*"),
        ("microserve.engine", "--executor", "fake", "--events-bind", "tcp://0.0.0.0:*"),
    ):
        code, said = ended(*arguments)
        assert code == 2, arguments
        assert "--insecure" in said


def test_a_key_file_that_others_can_read_stops_the_daemon(folder: Path) -> None:
    (folder / "r.key").chmod(0o644)
    code, said = ended("microserve.router", "--key-file", str(folder / "r.key"))
    assert code == 2
    assert "chmod 600" in said


@pytest.mark.parametrize(
    "arguments",
    [("microserve.router", "--http-port", "0"), ("microserve.engine", *FAKE)],
)
def test_a_daemon_called_other_than_its_key_does_not_start(arguments: tuple[str, ...], folder: Path) -> None:
    """Nobody would let it in, and it would look well."""
    kind = arguments[0].partition(".")[2]
    key = folder / f"{'r' if kind == 'router' else 'e0'}.key"
    code, said = ended(*arguments, "--bind", "tcp://127.0.0.1:*", "--key-file", str(key), f"--{kind}-id", "other")
    assert (code, f"cannot speak as {kind} 'other'" in said) == (2, True), said


@pytest.mark.parametrize("kind", ["router", "engine"])
def test_a_service_manager_hears_ready_status_and_stopping(kind: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        arguments = {
            "router": ("--bind", "tcp://127.0.0.1:*", "--http-port", "0"),
            "engine": ("--executor", "fake", "--routers", "tcp://127.0.0.1:9"),
        }[kind]
        environ = daemon_environ() | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        process = subprocess.Popen([sys.executable, "-P", "-m", f"microserve.{kind}", *arguments], env=environ)
        try:
            heard = ""
            while "READY=1" not in heard:
                heard = manager.recv(4096).decode()
            assert "STATUS=" + {"router": "0 of 0 engines ready", "engine": "ready: 0 running"}[kind] in heard
            assert manager.recv(4096) == b"WATCHDOG=1"
            process.send_signal(signal.SIGTERM)
            while "STOPPING=1" not in heard:
                heard = manager.recv(4096).decode()
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()
