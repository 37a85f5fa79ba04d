"""Who may call what over HTTP, where API keys are in use. Revoking a key ends what it has running."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from microserve.runtime.errors import CallerError, Forbidden, Unauthorized
from microserve.runtime.log import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from microserve.router.openai.exchange import Exchange
    from microserve.runtime.api_keys import ApiKey, ApiKeys

Needs = Literal["nothing", "a key", "admin"]
"""What a route asks of its caller."""

_log = get_logger(__name__)


class InvalidApiKey(Unauthorized):
    """No key, or none that is let in."""

    code = "invalid_api_key"


class HttpAuth:
    """Lets exchanges in. `keys` None: everybody may do everything (whoever may reach the port).

    `refused` is told the reason of every refusal: "no key", "wrong key", "revoked" or "not admin".
    """

    def __init__(self, keys: ApiKeys | None, *, refused: Callable[[str], object] = lambda reason: None) -> None:
        self._keys = keys
        self._refused = refused
        self._live: dict[asyncio.Task[object], ApiKey] = {}
        self._revoked: set[asyncio.Task[object]] = set()

    def look(self) -> None:
        """Reads the keys again if they have changed, and ends what revoked ones have running. Call it now and then."""
        if self._keys is None:
            return
        ended = self._keys.look()
        for task, key in self._live.items():
            if key.id in ended:
                self._revoked.add(task)
                task.cancel()

    @contextmanager
    def admitted(self, exchange: Exchange, needs: Needs) -> Iterator[None]:
        """Lets an exchange in for as long as its task is inside. Raises `Unauthorized` or `Forbidden` when it may not
        come in, and `Unauthorized` when its key is revoked meanwhile."""
        if self._keys is None or needs == "nothing":
            yield
            return
        key = self._identify(exchange, self._keys)
        if needs == "admin" and key.scope != "admin":
            raise self._refuse("not admin", exchange, Forbidden("this needs an API key of scope admin"))
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an exchange belongs to a task")
        self._live[task] = key
        exchange.caller = key.name
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._revoked:
                raise
            task.uncancel()
            raise self._refuse("revoked", exchange, InvalidApiKey("the API key was revoked")) from None
        finally:
            del self._live[task]
            self._revoked.discard(task)

    def _identify(self, exchange: Exchange, keys: ApiKeys) -> ApiKey:
        given = exchange.header(b"authorization") or b""
        scheme, _, key = given.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            say = "this needs an API key: Authorization: Bearer …"
            raise self._refuse("no key", exchange, InvalidApiKey(say))
        try:
            return keys.check(key.strip())
        except Unauthorized as error:
            # Of the key nothing is repeated, here or in the log.
            raise self._refuse("wrong key", exchange, InvalidApiKey(error.message)) from None

    def _refuse(self, reason: str, exchange: Exchange, error: CallerError) -> CallerError:
        self._refused(reason)
        client = exchange.scope.get("client")
        peer = client[0] if client else ""
        _log.warning(
            "HTTP request refused",
            every=5.0,
            request=exchange.request_id,
            why=reason,
            peer=peer,
            path=exchange.scope["path"],
        )
        if isinstance(error, Unauthorized):
            exchange.headers.append((b"www-authenticate", b"Bearer"))
        return error
