"""Who may call what over HTTP: by scope, by route; and what becomes of a key that is revoked."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from tests.http_support import Call, FakeCore, chat, post
from tests.virtual_time import run_virtual

from microserve.router.http_auth import HttpAuth
from microserve.runtime.api_keys import ApiKeys, new_api_key, revoke_api_key
from microserve.runtime.config import RouterConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

    from starlette.applications import Starlette

ROUTES = {
    # path: (method, what a key of scope "serve" gets)
    "/health": ("GET", 200),
    "/ready": ("GET", 200),
    "/microserving/v1/openapi.json": ("GET", 200),
    "/v1/models": ("GET", 200),
    "/metrics": ("GET", 200),
    "/v1/chat/completions": ("POST", 400),
    "/v1/completions": ("POST", 400),
    "/tokenize": ("POST", 400),
    "/detokenize": ("POST", 400),
    "/admin/strategies": ("GET", 403),
    "/admin/strategies/rollback": ("POST", 403),
    "/microserving/v1/engines/a/drain": ("POST", 403),
    "/microserving/v1/engines/a/cache_evict": ("POST", 403),
}
OPEN = ("/health", "/ready", "/microserving/v1/openapi.json")


class Keys:
    """A file with a key of each scope, and a door that asks for them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "api_keys.toml"
        self.serve = new_api_key(self.path, "ann", "serve")
        self.admin = new_api_key(self.path, "root", "admin")
        self.refused: Counter[str] = Counter()
        self.auth = HttpAuth(ApiKeys(self.path), refused=lambda reason: self.refused.update([reason]))


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {key}".encode())]


def ask(folder: Path, work: Callable[[Keys, FakeCore, Starlette], Coroutine[Any, Any, None]], **config: Any) -> None:
    async def main() -> None:
        keys = Keys(folder)
        core = FakeCore(config=RouterConfig(**config))
        await work(keys, core, core.app(auth=keys.auth))

    run_virtual(main())


def test_every_route_asks_for_what_it_needs(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        for path, (method, with_key) in ROUTES.items():
            without = await Call(app, method, path, b"?").finish()
            assert without.status == (200 if path in OPEN else 401), path
            with_wrong = await Call(app, method, path, b"?", bearer("ms_00000000_x")).finish()
            assert with_wrong.status == without.status, path
            served = await Call(app, method, path, b"?", bearer(keys.serve)).finish()
            assert served.status == with_key, path
            if path.startswith("/admin"):
                assert (await Call(app, method, path, b"?", bearer(keys.admin)).finish()).status in (200, 400), path
        closed = len(ROUTES) - len(OPEN)
        assert keys.refused == {"no key": closed, "wrong key": closed, "not admin": 4}

    ask(tmp_path, work)


def test_what_a_refusal_looks_like(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        for headers in ([], [(b"authorization", b"Basic abc")], [(b"authorization", b"Bearer ")]):
            call = await Call(app, "GET", "/v1/models", b"", headers).finish()
            assert (call.status, call.headers["www-authenticate"]) == (401, "Bearer")
            assert (call.error["code"], call.error["type"]) == ("invalid_api_key", "authentication_error")
        wrong = await Call(app, "GET", "/v1/models", b"", bearer(keys.serve[:-1])).finish()
        assert wrong.error["message"] == "the API key is not valid"
        assert keys.serve[:-1] not in wrong.body.decode()
        admin = await Call(app, "PUT", "/admin/strategies", b"{}", bearer(keys.serve)).finish()
        assert (admin.status, admin.error["code"]) == (403, "forbidden")
        # What is not there says so to everybody.
        assert (await Call(app, "GET", "/nothing", b"").finish()).status == 404

    ask(tmp_path, work)


def test_metrics_may_be_open(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        assert (await Call(app, "GET", "/metrics", b"").finish()).status == 200

    ask(tmp_path, work, metrics_open=True)


@pytest.mark.parametrize("stream", [True, False])
def test_revoking_a_key_ends_what_it_has_running(tmp_path: Path, stream: bool) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        calls = [
            post(app, "/v1/chat/completions", chat(stream=stream), bearer(key)) for key in (keys.serve, keys.admin)
        ]
        await asyncio.sleep(0.1)
        for generation in core.generations:
            generation.say("Hel")
        await asyncio.sleep(0.1)
        keys.auth.look()
        assert not calls[0].task.done()
        revoke_api_key(keys.path, "ann")
        keys.auth.look()
        await calls[0].finish()
        assert core.generations[0].cancelled.is_set()
        assert not core.generations[1].cancelled.is_set()
        if stream:
            # The stream has begun: its last event says why it ends.
            assert calls[0].status == 200
            assert calls[0].events()[-1]["error"]["code"] == "invalid_api_key"
            assert calls[0].complete
        else:
            assert (calls[0].status, calls[0].error["message"]) == (401, "the API key was revoked")
        assert keys.refused == {"revoked": 1}
        core.generations[1].say("lo", finish="stop")
        await calls[1].finish()
        assert calls[1].status == 200
        again = await Call(app, "GET", "/v1/models", b"", bearer(keys.serve)).finish()
        assert again.status == 401

    ask(tmp_path, work)


def test_a_cancellation_of_the_server_is_not_a_revocation(tmp_path: Path) -> None:
    async def work(keys: Keys, core: FakeCore, app: Starlette) -> None:
        call = post(app, "/v1/chat/completions", chat(stream=True), bearer(keys.serve))
        await core.started.wait()
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.finish()
        assert keys.refused == {}

    ask(tmp_path, work)
