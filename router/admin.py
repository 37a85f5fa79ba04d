"""HTTP for operators: strategies, live. The same verbs are on the bus; `microserve strategy` speaks those.

GET  /admin/strategies            what can be chosen, what serves, what was
PUT  /admin/strategies            {"name": …, "settings": {…}, "model": "", "share": 1.0, "dry_run": false}
POST /admin/strategies/rollback   {"model": "", "number": null}
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from microserve.router.openai import parse
from microserve.runtime.errors import InvalidRequest
from microserve.runtime.messages import SettingValue, StrategySet

if TYPE_CHECKING:
    from microserve.router.openai.endpoints import Core
    from microserve.router.openai.exchange import Exchange


class SetRequest(Struct, forbid_unknown_fields=True):
    """The body of PUT /admin/strategies."""

    name: str
    settings: dict[str, SettingValue] = {}
    model: str = ""
    share: float = 1.0
    dry_run: bool = False


class RollbackRequest(Struct, forbid_unknown_fields=True):
    """The body of POST /admin/strategies/rollback."""

    model: str = ""
    number: int | None = None


class AdminPages:
    """Handlers of the routes above."""

    def __init__(self, core: Core, max_body: int) -> None:
        self._core = core
        self._versions = core.versions
        self._max_body = max_body
        self._set = msgspec.json.Decoder(SetRequest)
        self._rollback = msgspec.json.Decoder(RollbackRequest)

    async def strategies(self, exchange: Exchange) -> None:
        """What can be chosen, what serves, what was."""
        await exchange.answer(_plain_json(await self._core.strategies()))

    async def set(self, exchange: Exchange) -> None:
        """Another version for new requests."""
        asked = parse.parse(self._set, await exchange.body(self._max_body))
        active = await self._versions.set(
            asked.name,
            asked.settings,
            model=asked.model,
            share=asked.share,
            dry_run=asked.dry_run,
            by=exchange.caller,
        )
        await exchange.answer(_plain_json(StrategySet(active=active, dry_run=asked.dry_run)))

    async def roll_back(self, exchange: Exchange) -> None:
        """Back to what served before."""
        body = await exchange.body(self._max_body)
        asked = parse.parse(self._rollback, body or b"{}")
        if asked.number is not None and asked.number < 1:
            raise InvalidRequest(f"changes are numbered from 1, not {asked.number}", param="number")
        active = self._versions.roll_back(model=asked.model, number=asked.number, by=exchange.caller)
        await exchange.answer(_plain_json(StrategySet(active=active)))


def _plain_json(body: Struct) -> bytes:
    """A message as JSON: every field, and not its tag."""
    fields = msgspec.structs.asdict(body)
    return msgspec.json.encode({name: _full(value) for name, value in fields.items()})


def _full(value: object) -> object:
    if isinstance(value, Struct):
        return {name: _full(each) for name, each in msgspec.structs.asdict(value).items()}
    if isinstance(value, list):
        return [_full(each) for each in value]
    return value
