"""What API keys and TLS hold up against: settings that would open a router, odd requests, files that break in use."""

from __future__ import annotations

import asyncio
import io
import logging
import re
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from tests.cluster import FAKE, Cluster
from tests.http_support import Call, FakeCore, chat, post
from tests.test_http_keys import make_certificate, presented, until
from tests.test_router_http_auth import OPEN, Keys, ask, bearer
from tests.virtual_time import run_virtual

from microserve.router import http_auth
from microserve.router.daemon import serve
from microserve.runtime.api_keys import new_api_key, revoke_api_key
from microserve.runtime.config import RouterConfig, load_config
from microserve.runtime.errors import ConfigError
from microserve.runtime.log import LineFormatter, get_logger
from microserve.runtime.service import Lifecycle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starlette.applications import Starlette

LOOPBACK: dict[str, Any] = {"http_port": 0, "bind": "tcp://127.0.0.1:*"}
EXPOSED: dict[str, Any] = LOOPBACK | {"http_host": "0.0.0.0"}
DOCS = (*OPEN, "/microserving/v1/docs")
"""What asks for no key."""

# --- settings ------------------------------------------------------------------------------------------------------


def refusal(config: RouterConfig) -> str:
    """Why a router does not start."""

    async def start() -> None:
        async with asyncio.timeout(10):
            await serve(config, "r", Lifecycle())

    with pytest.raises(ConfigError) as caught:
        asyncio.run(start())
    message = caught.value.message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate and its key, which no test changes."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def test_a_file_of_keys_that_is_named_by_nothing_opens_no_router(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    file = tmp_path / "router.toml"
    tls = f"tls_cert = '{pair[0]}'\ntls_key = '{pair[1]}'\n"
    file.write_text(f"http_host = '0.0.0.0'\nhttp_port = 0\nbind = 'tcp://127.0.0.1:*'\napi_keys_file = ''\n{tls}")
    assert "nothing would ask them who they are" in refusal(load_config(RouterConfig, file=file))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.example.org", "10.0.0.1", ""])
def test_an_address_that_is_not_loopback_for_sure_needs_keys(host: str) -> None:
    assert f"http_host = {host!r} can be reached" in refusal(RouterConfig(**LOOPBACK | {"http_host": host}))


def _encrypted(folder: Path, key: Path) -> Path:
    """The key under a passphrase."""
    made = folder / "encrypted.pem"
    command = ["openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(made), "-passout", "pass:hunter2"]
    subprocess.run(command, check=True, capture_output=True)
    made.chmod(0o600)
    return made


def _garbage(folder: Path, _key: Path) -> Path:
    made = folder / "garbage.pem"
    made.write_text("-----BEGIN PRIVATE KEY-----\nhunter2\n-----END PRIVATE KEY-----\n")
    made.chmod(0o600)
    return made


def _another(folder: Path, _key: Path) -> Path:
    return make_certificate(folder)[1]


def _readable(folder: Path, key: Path) -> Path:
    made = folder / "readable.pem"
    made.write_bytes(key.read_bytes())
    made.chmod(0o604)
    return made


def _nowhere(folder: Path, _key: Path) -> Path:
    return folder / "nowhere.pem"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_encrypted, "tls_key"),
        (_garbage, "tls_key"),
        (_another, "key values mismatch"),
        (_readable, "chmod 600"),
        (_nowhere, "No such file"),
    ],
)
def test_a_key_of_tls_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, pair: tuple[Path, Path], make: Callable[[Path, Path], Path], said: str
) -> None:
    made = make(tmp_path, pair[1])
    message = refusal(RouterConfig(**LOOPBACK, tls_cert=str(pair[0]), tls_key=str(made)))
    assert said in message
    assert str(made) in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("[[keys]\nname = 'hunter2'", 0o644, "is not valid TOML"),
        ("keys = " + "[" * 5000, 0o644, "is not valid TOML"),
        ("[[keys]]\nname = 'a'\nsecret = 'hunter2'\n", 0o644, "$.keys[0]"),
        ("[keyz]\na = 'hunter2'\n", 0o644, "unknown field `keyz`"),
        ("\xff hunter2", 0o644, "is not valid TOML"),
        ("", 0o664, "may be written by others"),
        ("", 0o646, "may be written by others"),
    ],
)
def test_a_file_of_keys_that_cannot_be_used_is_told_in_one_line(
    tmp_path: Path, text: str, mode: int, said: str
) -> None:
    file = tmp_path / "api_keys.toml"
    file.write_text(text, encoding="latin-1")
    file.chmod(mode)
    message = refusal(RouterConfig(**LOOPBACK, api_keys_file=str(file)))
    assert said in message
    assert str(file) in message
    assert "hunter2" not in message


def test_keys_and_tls_may_be_exposed_and_insecure_may_lack_either(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    file = tmp_path / "api_keys.toml"
    new_api_key(file, "ann", "serve")
    tls = {"tls_cert": str(pair[0]), "tls_key": str(pair[1])}

    async def main(config: RouterConfig) -> None:
        lifecycle = Lifecycle()
        lifecycle.draining.set()
        await serve(config, "r", lifecycle)

    for options in (
        {"api_keys_file": str(file), **tls},
        {"api_keys_file": str(file), "insecure": True},
        {"insecure": True, **tls},
    ):
        asyncio.run(main(RouterConfig(**EXPOSED, **options)))


# --- requests ------------------------------------------------------------------------------------------------------


def test_no_route_was_forgotten(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        asked = 0
        for route in app.routes:
            assert isinstance(route, Route)
            path = re.sub(r"\{[^}]*\}", "x", route.path)
            for method in route.methods or ():
                call = await Call(app, method, path, b"{}").finish()
                assert (call.status == 401) is (path not in DOCS), (method, path, call.status)
                asked += call.status == 401
                if method not in ("GET", "HEAD") or path.startswith("/admin"):
                    served = await Call(app, method, path, b"?", bearer(keys.serve)).finish()
                    generates = path.startswith("/v1/") or path.endswith("tokenize")
                    assert served.status == (400 if generates else 403), (method, path)
        assert keys.refused["no key"] == asked > 15

    ask(tmp_path, work)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.binary(max_size=80) | st.binary(max_size=80).map(lambda given: b"Bearer " + given))
@example(header=b"Bearer ms_")
@example(header=b"bearer\tms_00000000_x")
@example(header=b"Bearer \xe9\xff\x00")
@example(header=b"Bearer " + b"_" * 70)
def test_nothing_but_a_key_gets_in_whatever_the_header_says(one: Keys, header: bytes) -> None:
    async def main() -> None:
        call = await Call(
            FakeCore().app(auth=one.auth), "GET", "/v1/models", b"", [(b"authorization", header)]
        ).finish()
        assert (call.status, call.error["code"]) == (401, "invalid_api_key")

    run_virtual(main())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Keys that no test changes."""
    return Keys(tmp_path_factory.mktemp("keys"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_key_with_one_character_changed_is_none(one: Keys, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(one.admin) - 1))
    other = data.draw(st.characters(min_codepoint=33, max_codepoint=126).filter(lambda each: each != one.admin[at]))
    wrong = one.admin[:at] + other + one.admin[at + 1 :]

    async def main() -> None:
        for key, status in ((wrong, 401), (one.admin, 200)):
            call = await Call(FakeCore().app(auth=one.auth), "GET", "/admin/strategies", b"", bearer(key)).finish()
            assert call.status == status

    run_virtual(main())


def test_a_key_is_known_however_the_scheme_is_written(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        for scheme in ("Bearer ", "bearer ", "BEARER   "):
            call = await Call(
                app, "GET", "/v1/models", b"", [(b"authorization", (scheme + keys.serve).encode())]
            ).finish()
            assert call.status == 200, scheme
        # Elsewhere than in its header a key is none: addresses end in logs of proxies.
        elsewhere = [(b"cookie", f"key={keys.serve}".encode()), (b"x-key", keys.serve.encode())]
        assert (await Call(app, "GET", "/v1/models", b"", elsewhere).finish()).status == 401

    ask(tmp_path, work)


def test_a_refusal_in_the_log_is_one_line_without_the_key(tmp_path: Path, lines: io.StringIO) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        wrong = keys.serve[:-1] + "!"
        for number in range(20):
            path = f"/v1/models/x\r\u20282026-01-01 error forged {number}\x1b[2J"
            assert (await Call(app, "GET", path, b"", bearer(wrong)).finish()).status == 401
        text = lines.getvalue()
        assert len(text.splitlines()) == 1
        assert "HTTP request refused" in text
        assert "\x1b" not in text
        assert wrong.split("_", 2)[2] not in text

    ask(tmp_path, work)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the door logs, as a daemon would write it."""
    # Its limits remember what other tests let it say.
    monkeypatch.setattr(http_auth, "_log", get_logger(http_auth.__name__))
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(LineFormatter("router:r"))
    logger = logging.getLogger(http_auth.__name__)
    logger.addHandler(handler)
    yield handler.stream
    logger.removeHandler(handler)


# --- revoked while it runs -----------------------------------------------------------------------------------------


def test_a_stream_that_has_not_begun_ends_with_a_status_of_its_own(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        call = post(app, "/v1/chat/completions", chat(stream=True), bearer(keys.serve))
        await core.started.wait()
        revoke_api_key(keys.path, "ann")
        keys.auth.look()
        await call.finish()
        assert (call.status, call.headers["www-authenticate"]) == (401, "Bearer")
        assert (call.error["code"], call.error["message"]) == ("invalid_api_key", "the API key was revoked")
        assert core.generations[0].cancelled.is_set()

    ask(tmp_path, work)


def test_every_choice_of_a_stream_ends_with_its_key(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        call = post(app, "/v1/chat/completions", chat(stream=True, n=3), bearer(keys.serve))
        await asyncio.sleep(0.1)
        for generation in core.generations:
            generation.say("Hel")
        await asyncio.sleep(0.1)
        revoke_api_key(keys.path, "ann")
        keys.auth.look()
        # Its task has not run yet, and is not ended twice.
        keys.auth.look()
        await call.finish()
        assert [generation.cancelled.is_set() for generation in core.generations] == [True] * 3
        events = call.events()
        assert [event["error"]["code"] for event in events if "error" in event] == ["invalid_api_key"]
        assert "error" in events[-1]
        assert call.complete
        assert keys.refused == {"revoked": 1}

    ask(tmp_path, work)


def test_a_key_that_may_less_than_before_ends_what_it_has_running_and_may_less(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        call = post(app, "/v1/chat/completions", chat(), bearer(keys.admin))
        await core.started.wait()
        replaced = keys.path.with_name("new")
        replaced.write_text(keys.path.read_text().replace("scope = 'admin'", "scope = 'serve'"))
        replaced.replace(keys.path)
        keys.auth.look()
        assert (await call.finish()).status == 401
        for path, status in (("/admin/strategies", 403), ("/v1/models", 200)):
            assert (await Call(app, "GET", path, b"", bearer(keys.admin)).finish()).status == status

    ask(tmp_path, work)


# --- a real router -------------------------------------------------------------------------------------------------


def test_files_that_break_while_they_are_in_use_and_clients_that_speak_no_tls(tmp_path: Path) -> None:
    cert, private = make_certificate(tmp_path, "first")
    (tmp_path / "renewed").mkdir()
    new_cert, new_private = make_certificate(tmp_path / "renewed", "second")
    trusted = ssl.create_default_context(cadata=cert.read_text() + new_cert.read_text())
    file = tmp_path / "api_keys.toml"
    ann, root = new_api_key(file, "ann", "serve"), new_api_key(file, "root", "admin")
    router_args = ("--api-keys-file", str(file), "--tls-cert", str(cert), "--tls-key", str(private))
    with Cluster(engines=1, engine_args=FAKE, router_args=router_args) as cluster:
        url = cluster.http.replace("http://", "https://")
        daemon = cluster.router_daemon
        assert daemon is not None
        port = int(url.rpartition(":")[2])
        told = len(daemon.text().splitlines())
        for sent in (b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x02\x00", b"\x00" * 600, b""):
            assert_no_answer(port, sent)
        with httpx.Client(verify=trusted) as client:
            assert models(client, url, ann) == 200
            assert len(daemon.text().splitlines()) == told, daemon.tail()

            good = file.read_text()
            replace(file, "[[keys")
            until(lambda: "API keys were not read again" in daemon.text(), "the router to see the broken file")
            assert models(client, url, ann) == 200
            # Whoever renews it replaces one file, then the other: between the two they do not fit.
            new_cert.replace(cert)
            until(lambda: "the certificate was not read again" in daemon.text(), "the router to see the certificate")
            assert presented(url) == "first"
            new_private.replace(private)
            until(lambda: "certificate read again" in daemon.text(), "the router to see its key")
            assert presented(url) == "second"
            assert daemon.text().count("API keys were not read again") == 1
            assert daemon.text().count("the certificate was not read again") == 1

            # Files that work again work again, and a verb of an engine ends with its key.
            replace(file, good)
            until(lambda: "API keys read again" in daemon.text(), "the router to see the repaired file")
            body = {"prompt": [1, 2, 3], "sampling": {"max_tokens": 50_000, "ignore_eos": True}, "stream": True}
            asked = client.stream(
                "POST", f"{url}/microserving/v1/engines/e0/start_generate", json=body, headers=authorized(root)
            )
            with asked as answer:
                assert answer.status_code == 200
                events = (line for line in answer.iter_lines() if line.startswith("data: "))
                next(events)
                assert revoke_api_key(file, "root")
                *_, last = events
            assert '"invalid_api_key"' in last
            cluster.wait_for(lambda status: status.engines[0].load.running == 0, "the engine to stop")
            assert (models(client, url, root), models(client, url, ann)) == (401, 200)
            assert daemon.text().count("certificate read again") == 1
            assert "Traceback" not in daemon.text()


def authorized(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def models(client: httpx.Client, url: str, key: str) -> int:
    return client.get(f"{url}/v1/models", headers=authorized(key)).status_code


def replace(path: Path, text: str) -> None:
    """As editors do: another file under the same name."""
    made = path.with_name(f"{path.name}.new")
    made.write_text(text)
    made.replace(path)


def assert_no_answer(port: int, sent: bytes) -> None:
    """Says `sent` in clear text, and gets no HTTP back."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while part := connection.recv(4096):
                received += part
        except ConnectionResetError:
            pass
        assert b"HTTP" not in received
