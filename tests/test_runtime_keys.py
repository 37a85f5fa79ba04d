"""Keys on the bus: who gets in, who does not, and what happens to those whose key is revoked. Real sockets."""

from __future__ import annotations

import asyncio
import fcntl
import os
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.bus_support import PATIENCE, Recorder, Signal

from microserve.runtime import api_keys, keys
from microserve.runtime.errors import ConfigError, Forbidden, PeerLost, Unauthorized
from microserve.runtime.ids import Peer
from microserve.runtime.keys import (
    AUTHORIZED_FILE,
    BusSecurity,
    KeyRing,
    authorize,
    check_exposed,
    is_loopback,
    new_identity,
    read_authorized,
    read_identity,
    replace_file,
    revoke,
    write_authorized,
)
from microserve.runtime.messages import Call as CallMessage
from microserve.runtime.messages import EngineEvent, Hello, Info, Load
from microserve.runtime.zmq_bus import ZmqBus, new_key_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

ENGINE, ROUTER = Peer("engine", "engine-0", 7), Peer("router", "router-0", 3)
CLIENT = Peer("client", "somebody", 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "keys"
    for name, role in (("router-0", "router"), ("engine-0", "engine"), ("me", "client"), ("root", "admin")):
        new_identity(made, name, role, new_key_pair)
    return made


def bus(folder: Path, key: str | None, me: Peer, **options: Any) -> ZmqBus:
    security = BusSecurity.load(folder / f"{key}.key") if key is not None else None
    return ZmqBus(me, heartbeat=0.2, silence=2.0, security=security, **options)


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE):
            await work()

    asyncio.run(bounded())


async def counted(router: ZmqBus) -> None:
    """Returns when the router has counted somebody: it hears of a failed handshake in its own time."""
    while router.statistics().unauthorized < 1:  # noqa: ASYNC110 - the bus has no event for it
        await asyncio.sleep(0.001)


async def refused(dialler: ZmqBus, endpoint: str, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        await dialler.dial(endpoint, Recorder(), timeout=PATIENCE)
    return str(caught.value)


# --- on the bus ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "me", "role"), [("engine-0", ENGINE, "engine"), ("me", CLIENT, "client"), ("root", CLIENT, "admin")]
)
def test_an_authorized_key_gets_in_and_its_role_is_known(folder: Path, key: str, me: Peer, role: str) -> None:
    async def work() -> None:
        router, dialler, server, client = bus(folder, "router-0", ROUTER), bus(folder, key, me), Recorder(), Recorder()
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            session = await dialler.dial(listener.endpoint, client)
            session.send(CallMessage(id=1, body=Info()))
            await server.until(lambda it: it.messages)
            assert server.messages == [CallMessage(id=1, body=Info())]
            assert (server.session.peer, server.session.role) == (me, role)
            server.session.send(CallMessage(id=2, body=Info()))
            await client.until(lambda it: it.messages)
            assert router.statistics().unauthorized == 0
        finally:
            await dialler.close()
            await router.close()

    run(work)


@pytest.mark.parametrize(
    ("me", "said"),
    [
        (CLIENT, "asks for a key: --key-file or MICROSERVE_KEY_FILE (or it is no router's bus)"),
        (ENGINE, "asks for a key, and key_file is not set"),
    ],
)
def test_without_a_key_nobody_gets_in_and_it_is_counted(folder: Path, me: Peer, said: str) -> None:
    async def work() -> None:
        router, dialler, server = bus(folder, "router-0", ROUTER), bus(folder, None, me), Recorder()
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            assert await refused(dialler, listener.endpoint, Unauthorized) == f"{listener.endpoint} {said}"
            await counted(router)
            assert server.sessions == []
        finally:
            await dialler.close()
            await router.close()

    run(work)


def test_who_presents_a_key_where_there_are_none_is_told_of_that_too(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        router, dialler, server = bus(folder, None, ROUTER), bus(folder, "me", CLIENT), Recorder()
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            assert await refused(dialler, listener.endpoint, Unauthorized) == (
                f"{listener.endpoint} refused our key: it is not authorized there, or no keys are used there"
            )
            await counted(router)
            assert server.sessions == []
        finally:
            await dialler.close()
            await router.close()

    run(work)
    assert caplog.messages == ["a connection was refused: it has keys, and this bus has none"]


def test_a_key_of_another_fleet_does_not_get_in(folder: Path, tmp_path: Path) -> None:
    new_identity(tmp_path / "other", "me", "client", new_key_pair)

    async def work() -> None:
        router, dialler, server = bus(folder, "router-0", ROUTER), bus(tmp_path / "other", "me", CLIENT), Recorder()
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            await refused(dialler, listener.endpoint, Unauthorized)
            assert server.sessions == []
        finally:
            await dialler.close()
            await router.close()

    run(work)


def test_a_key_that_is_not_authorized_does_not_get_in(folder: Path) -> None:
    assert revoke(folder, "me")

    async def work() -> None:
        router, dialler, server = bus(folder, "router-0", ROUTER), bus(folder, "me", CLIENT), Recorder()
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            # Before a word of ours is read: what answers later says "is not authorized here".
            assert "refused our key" in await refused(dialler, listener.endpoint, Unauthorized)
            await counted(router)
            assert server.sessions == []
        finally:
            await dialler.close()
            await router.close()

    run(work)


def test_a_hello_is_not_believed_without_its_key_in_the_list(folder: Path) -> None:
    """Whoever comes past the sockets' own question: a list may change between the two."""
    security = BusSecurity.load(folder / "router-0.key")
    hello, public = Hello(1, "client", "somebody", 1), read_identity(folder / "me.key").public
    assert security.admit(hello, public) == "client"
    revoke(folder, "me")
    security.ring.reload()
    with pytest.raises(Unauthorized, match="is not authorized here"):
        security.admit(hello, public)


@pytest.mark.parametrize(
    ("key", "me", "why"),
    [
        ("me", ENGINE, "cannot speak as engine"),
        ("root", ROUTER, "cannot speak as router"),
        ("engine-0", CLIENT, "cannot speak as a client"),
        ("engine-0", Peer("engine", "engine-1", 7), "cannot speak as engine engine-1"),
    ],
)
def test_a_key_speaks_for_what_it_was_made_for_alone(folder: Path, key: str, me: Peer, why: str) -> None:
    async def work() -> None:
        router, dialler, server = bus(folder, "router-0", ROUTER), bus(folder, key, me), Recorder()
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            assert why in (await refused(dialler, listener.endpoint, Forbidden)).replace("'", "")
            assert (server.sessions, router.statistics().unauthorized) == ([], 1)
        finally:
            await dialler.close()
            await router.close()

    run(work)


def test_revoking_a_key_ends_its_sessions_and_no_others(folder: Path) -> None:
    async def work() -> None:
        router, server = bus(folder, "router-0", ROUTER), Recorder()
        mine, other = bus(folder, "me", CLIENT), bus(folder, "root", Peer("client", "other", 1))
        lost, kept = Recorder(), Recorder()
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            await mine.dial(listener.endpoint, lost)
            await other.dial(listener.endpoint, kept)
            assert revoke(folder, "me")
            await lost.until(lambda it: it.losses)
            assert "your key was revoked" in str(lost.losses[0][1])
            assert [str(session.peer) for session, _ in server.losses] == [str(CLIENT)]
            assert kept.losses == []
            await refused(mine, listener.endpoint, Unauthorized)
        finally:
            await mine.close()
            await other.close()
            await router.close()

    run(work)


def test_revoking_a_daemons_key_ends_what_was_dialled_to_it_too(folder: Path) -> None:
    """Who listens proves to be of the fleet, and no more: the list says whether it is let in still."""

    async def work() -> None:
        engine, router = bus(folder, "engine-0", ENGINE), bus(folder, "router-0", ROUTER)
        mine, lost, kept = bus(folder, "me", CLIENT), Recorder(), Recorder()
        try:
            listener = await engine.listen("tcp://127.0.0.1:*", Recorder())
            await router.dial(listener.endpoint, lost)
            await mine.dial(listener.endpoint, kept)
            assert revoke(folder, "engine-0")
            await lost.until(lambda it: it.losses)
            assert "the key of engine:engine-0:7 was revoked" in str(lost.losses[0][1])
            assert "engine:engine-0:7 is not authorized here" in await refused(router, listener.endpoint, Unauthorized)
            # A client is told by nobody who is let in, and asks for the fleet alone.
            assert kept.losses == []
        finally:
            await mine.close()
            await router.close()
            await engine.close()

    run(work)


def test_a_key_that_gets_another_role_is_not_what_it_was(folder: Path) -> None:
    """Revoked and authorized again between two looks, or edited: the list never shows the router that it was gone."""

    async def work() -> None:
        router, server = bus(folder, "router-0", ROUTER), Recorder()
        mine, other = bus(folder, "root", CLIENT), bus(folder, "me", Peer("client", "other", 1))
        lost, kept = Recorder(), Recorder()
        path = folder / AUTHORIZED_FILE
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            await mine.dial(listener.endpoint, lost)
            await other.dial(listener.endpoint, kept)
            assert [session.role for session in server.sessions] == ["admin", "client"]
            write_authorized(
                path,
                [
                    msgspec.structs.replace(each, role="client") if each.name == "root" else each
                    for each in read_authorized(path)
                ],
            )
            await lost.until(lambda it: it.losses)
            assert "your key was revoked" in str(lost.losses[0][1])
            await mine.dial(listener.endpoint, Recorder())
            assert [session.role for session in server.sessions] == ["admin", "client", "client"]
            assert kept.losses == []
        finally:
            await mine.close()
            await other.close()
            await router.close()

    run(work)


def test_a_key_that_is_authorized_later_gets_in_without_a_restart(folder: Path) -> None:
    async def work() -> None:
        router, server = bus(folder, "router-0", ROUTER), Recorder()
        listener = await router.listen("tcp://127.0.0.1:*", server)
        new_identity(folder, "late", "client", new_key_pair)
        late = bus(folder, "late", CLIENT)
        try:
            while True:
                try:
                    await late.dial(listener.endpoint, Recorder())
                except Unauthorized:
                    continue  # the router looks at the file four times a heartbeat
                break
        finally:
            await late.close()
            await router.close()

    run(work)


def test_a_list_that_became_unreadable_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        router, server, client = bus(folder, "router-0", ROUTER), Recorder(), Recorder()
        mine = bus(folder, "me", CLIENT)
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            session = await mine.dial(listener.endpoint, client)
            ring, looked = KeyRing.reload, Signal()
            looks: list[str] = []

            def reload(self: KeyRing) -> None:
                try:
                    ring(self)
                finally:
                    looks.append(self.path.read_text())
                    looked.set()

            async def seen(text: str) -> None:
                await looked.until(lambda: looks[-1:] == [text])

            monkeypatch.setattr(KeyRing, "reload", reload)
            # The last one is too deep for the reader: whatever that raises, the bus must go on looking.
            for text in ("keys = nonsense", "[[keyz]]", "keys = " + "[" * 5000):
                (folder / AUTHORIZED_FILE).write_text(text)
                await seen(text)
            session.send(CallMessage(id=1, body=Info()))
            await server.until(lambda it: it.messages)
            (folder / AUTHORIZED_FILE).write_text("")
            await client.until(lambda it: it.losses)
            assert "your key was revoked" in str(client.losses[0][1])
        finally:
            await mine.close()
            await router.close()

    run(work)


@pytest.mark.parametrize("key", [None, "root"])
def test_events_reach_authorized_subscribers_alone(folder: Path, key: str | None) -> None:
    """Nobody says hello there: the sockets alone ask for keys."""
    revoke(folder, "root")

    async def work() -> None:
        engine, mine = bus(folder, "engine-0", ENGINE), bus(folder, "me", CLIENT)
        stranger = bus(folder, key, Peer("client", "stranger", 1))
        seen, unseen, signal = [], [], Signal()

        def receive(event: EngineEvent) -> None:
            seen.append(event.seq)
            signal.set()

        try:
            publisher = await engine.publisher("tcp://127.0.0.1:*")
            await mine.subscribe(publisher.endpoint, receive)
            await stranger.subscribe(publisher.endpoint, lambda event: unseen.append(event.seq))

            async def publish() -> None:
                for number in range(1, 10_000):
                    publisher.publish(EngineEvent(engine_id="engine-0", epoch=7, seq=number, kind="load", load=Load()))
                    await asyncio.sleep(0.01)

            publishing = asyncio.create_task(publish())
            await signal.until(lambda: len(seen) >= 3)
            publisher.reopen()
            count = len(seen)
            await signal.until(lambda: len(seen) >= count + 3)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            assert unseen == []
        finally:
            await mine.close()
            await stranger.close()
            await engine.close()

    run(work)


def test_a_key_that_is_revoked_gets_no_more_events(folder: Path) -> None:
    """Its connection would outlive it; of the others each is back at once."""
    public = read_identity(folder / "root.key").public

    async def work() -> None:
        engine, mine = bus(folder, "engine-0", ENGINE), bus(folder, "me", CLIENT)
        theirs = bus(folder, "root", Peer("client", "theirs", 1))
        seen: dict[ZmqBus, list[int]] = {mine: [], theirs: []}
        signal = Signal()

        def receiver(which: ZmqBus) -> Callable[[EngineEvent], None]:
            def receive(event: EngineEvent) -> None:
                seen[which].append(event.seq)
                signal.set()

            return receive

        assert engine.security is not None
        ring, without = engine.security.ring, 0
        try:
            # Who listens looks at the list.
            await engine.listen("tcp://127.0.0.1:*", Recorder())
            publisher = await engine.publisher("tcp://127.0.0.1:*")
            for each in seen:
                await each.subscribe(publisher.endpoint, receiver(each))

            async def publish() -> None:
                nonlocal without
                for number in range(1, 10_000):
                    if not without and ring.find(public) is None:
                        without = number
                    publisher.publish(EngineEvent(engine_id="engine-0", epoch=7, seq=number, kind="load", load=Load()))
                    await asyncio.sleep(0.01)

            publishing = asyncio.create_task(publish())
            await signal.until(lambda: all(len(each) >= 3 for each in seen.values()))
            revoke(folder, "root")
            await signal.until(lambda: without and seen[mine][-1] >= without + 20)
            publishing.cancel()
            await asyncio.gather(publishing, return_exceptions=True)
            assert max(seen[theirs]) < without
        finally:
            await mine.close()
            await theirs.close()
            await engine.close()

    run(work)


def test_a_client_key_cannot_listen(folder: Path) -> None:
    async def work() -> None:
        mine = bus(folder, "me", CLIENT)
        try:
            with pytest.raises(ConfigError, match="cannot listen"):
                await mine.listen("tcp://127.0.0.1:*", Recorder())
        finally:
            await mine.close()

    run(work)


@pytest.mark.parametrize(
    ("key", "me", "advice"),
    [
        ("router-0", Peer("router", "other", 3), "make one for it ('microserve keys new'), or leave router_id out"),
        ("engine-0", Peer("router", "engine-0", 3), "make one for it ('microserve keys new')"),
        ("router-0", ENGINE, "make one for it ('microserve keys new')"),
    ],
)
def test_a_daemon_does_not_listen_under_another_name_than_its_keys(
    folder: Path, key: str, me: Peer, advice: str
) -> None:
    async def work() -> None:
        posing = bus(folder, key, me)
        try:
            with pytest.raises(ConfigError) as caught:
                await posing.listen("tcp://127.0.0.1:*", Recorder())
            owner = f"{key.removesuffix('-0')} '{key}'"
            assert caught.value.message == (
                f"key_file is the key of {owner}, and cannot speak as {me.kind} {me.name!r}: {advice}"
            )
        finally:
            await posing.close()

    run(work)


def test_another_keys_connection_does_not_inherit_a_session(folder: Path) -> None:
    """Routing ids are the dialler's own choice, and libzmq hands a taken one over to the newcomer."""

    async def work() -> None:
        router, server, client = bus(folder, "router-0", ROUTER), Recorder(), Recorder()
        engine, thief = bus(folder, "engine-0", ENGINE), bus(folder, "me", ENGINE)
        try:
            listener = await router.listen("tcp://127.0.0.1:*", server)
            await engine.dial(listener.endpoint, client)
            await refused(thief, listener.endpoint, Forbidden)
            await server.until(lambda it: it.losses)
            assert isinstance(server.losses[0][1], PeerLost)
            assert len(server.sessions) == 1
        finally:
            await engine.close()
            await thief.close()
            await router.close()

    run(work)


# --- files ---------------------------------------------------------------------------------------------------------


def test_what_is_made_is_secret_and_authorized(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["fleet.key", "router-0.key", "engine-0.key", "me.key", "root.key", AUTHORIZED_FILE]
    )
    for path in folder.glob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600
    assert [(each.name, each.role) for each in read_authorized(folder / AUTHORIZED_FILE)] == [
        ("router-0", "router"),
        ("engine-0", "engine"),
        ("me", "client"),
        ("root", "admin"),
    ]
    engine, client = read_identity(folder / "engine-0.key"), read_identity(folder / "me.key")
    assert engine.fleet_public == client.fleet_public
    assert engine.fleet_secret is not None
    assert client.fleet_secret is None
    assert engine.secret not in repr(engine)
    assert engine.fleet_secret not in repr(engine)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_secret_that_others_can_read_is_refused(folder: Path, mode: int) -> None:
    path = folder / "me.key"
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_identity(path)


def test_a_list_that_others_can_write_is_refused(folder: Path) -> None:
    path = folder / AUTHORIZED_FILE
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="may be written by others"):
        KeyRing(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = 'x", "not valid TOML"),
        ("name = 'x'", "not a key file"),
        ("a = " + "[" * 5000, "not valid TOML"),
        ("name='a'\nrole='client'\npublic='p'\nsecret='s'\nfleet_public='f'\nfleet='x'", "unknown field `fleet`"),
        ("name='a'\nrole='king'\npublic='p'\nsecret='s'\nfleet_public='f'", "not a key file"),
        ("name='a'\nrole='client'\npublic='p'\nsecret='s'\nfleet_public='f'", "has 40 characters"),
    ],
)
def test_a_file_that_is_no_key_is_refused_and_not_repeated(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "a.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=why) as caught:
        read_identity(path)
    assert "secret='s'" not in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_identity(tmp_path / "none.key")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[[keys", "not valid TOML"),
        ("[[keyz]]\nname = 'a'", "unknown field `keyz`"),
        ("[[keys]]\nname='a'\nrole='client'\npublic='p'\nuntil='x'", "unknown field `until`"),
        ("[[keys]]\nname='a'\nrole='king'\npublic='p'", "Invalid enum value 'king'"),
        ("[[keys]]\nname='a'\nrole='client'\npublic='p'", "has 40 characters"),
        (f"[[keys]]\nname='a'\nrole='client'\npublic='{'_' * 40}'", "Z85"),
        (
            "".join(f"[[keys]]\nname='{n}'\nrole='client'\npublic='{'p' * 40}'\n" for n in "ab"),
            "'a' and 'b' have the same",
        ),
    ],
)
def test_a_list_that_is_none_says_what_is_wrong(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / AUTHORIZED_FILE
    path.write_text(text)
    with pytest.raises(ConfigError, match=why) as caught:
        KeyRing(path)
    assert str(path) in caught.value.message


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_daemons_can_read_what_an_administrator_changed(tmp_path: Path, umask: int) -> None:
    """Whatever the umask; and what root writes belongs to whom the folder belongs."""
    folder = tmp_path / "keys"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, 12345, 12346)
    before = os.umask(umask)
    try:
        path = new_identity(folder, "me", "client", new_key_pair)
        revoke(folder, "me")
    finally:
        os.umask(before)
    owner = (folder.stat().st_uid, folder.stat().st_gid)
    for each, mode in ((path, 0o600), (folder / "fleet.key", 0o600), (folder / AUTHORIZED_FILE, 0o644)):
        found = each.stat()
        assert (found.st_mode & 0o777, (found.st_uid, found.st_gid)) == (mode, owner), each


def locked(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_a_list_is_read_and_written_by_one_command_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a key that one of two revokes comes back with what the other writes."""
    seen: list[tuple[str, bool]] = []

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append((work.__name__, locked(folder)))
            return work(*arguments)

        return call

    monkeypatch.setattr(keys, "read_authorized", watched(keys.read_authorized))
    monkeypatch.setattr(api_keys, "read_api_keys", watched(api_keys.read_api_keys))
    for module in (keys, api_keys):
        monkeypatch.setattr(module, "replace_file", watched(replace_file))
    new_identity(folder, "ann", "client", new_key_pair)
    authorize(folder, "guest", "client", new_key_pair()[0])
    revoke(folder, "guest")
    assert seen == [
        *[("read_authorized", True), ("replace_file", True), ("replace_file", True)],
        *[("read_authorized", True), ("replace_file", True)] * 2,
    ]
    seen.clear()
    file = folder / "api_keys.toml"
    api_keys.new_api_key(file, "app", "serve")
    api_keys.new_api_key(file, "other", "serve")
    api_keys.revoke_api_key(file, "app")
    assert seen == [("replace_file", True), *[("read_api_keys", True), ("replace_file", True)] * 2]
    assert not locked(folder)


def test_a_file_that_grew_is_another_whatever_its_clock_says(folder: Path) -> None:
    path = folder / AUTHORIZED_FILE
    ring, found = KeyRing(path), path.stat()
    public, _ = new_key_pair()
    with path.open("a") as file:
        file.write(f"[[keys]]\nname = 'late'\nrole = 'client'\npublic = '{public}'\n")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert ring.changed()


def test_a_daemon_without_the_fleets_secret_is_refused(folder: Path) -> None:
    path = folder / "engine-0.key"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("fleet_secret")]
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="needs the fleet's secret"):
        BusSecurity.load(path)


def test_names_and_roles_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match="has a key"):
        new_identity(folder, "me", "client", new_key_pair)
    assert revoke(folder, "me")
    with pytest.raises(ConfigError, match=r"me\.key is there still; remove it first"):
        new_identity(folder, "me", "client", new_key_pair)
    (folder / "me.key").unlink()
    new_identity(folder, "me", "client", new_key_pair)
    with pytest.raises(ConfigError, match="is not a name"):
        new_identity(folder, "../me", "client", new_key_pair)
    with pytest.raises(ConfigError, match="role 'king'"):
        new_identity(folder, "him", "king", new_key_pair)
    public, _ = new_key_pair()
    authorize(folder, "guest", "client", public)
    with pytest.raises(ConfigError, match="authorized already"):
        authorize(folder, "guest", "client", public)
    with pytest.raises(ConfigError, match="authorized already, as 'guest'"):
        authorize(folder, "guest-2", "client", public)
    with pytest.raises(ConfigError, match="has 40 characters"):
        authorize(folder, "guest-2", "client", "short")
    with pytest.raises(ConfigError, match="Z85"):
        authorize(folder, "guest-2", "client", "'" + public[1:])
    assert not revoke(folder, "nobody")
    assert os.listdir(folder) == [path.name for path in folder.iterdir()]  # no temporary file is left


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("tcp://127.0.0.1:7700", True),
        ("tcp://[::1]:7700", True),
        ("tcp://localhost:*", True),
        ("ipc:///run/x.sock", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("tcp://*:7700", False),
        ("tcp://0.0.0.0:7700", False),
        ("tcp://10.0.0.1:7700", False),
        ("tcp://eth0:7700", False),
        ("tcp://127.example.org:7700", False),
        ("127.example.org", False),
        ("0.0.0.0", False),
        ("::", False),
    ],
)
def test_what_is_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


def test_exposed_without_keys_is_refused_unless_it_is_meant() -> None:
    exposed = [("bind", "tcp://0.0.0.0:7700")]
    with pytest.raises(ConfigError, match=r"bind = .tcp:..0\.0\.0\.0:7700."):
        check_exposed(exposed, secured=False, insecure=False)
    check_exposed(exposed, secured=True, insecure=False)
    check_exposed(exposed, secured=False, insecure=True)
    check_exposed([("bind", "tcp://127.0.0.1:7700")], secured=False, insecure=False)
