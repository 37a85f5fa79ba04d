"""One engine's verbs for Python programs outside of the router, through the router's bus.

    engine, other = client.engine("a"), client.engine("b")
    address = await engine.prep_recv(prompt, end=-1)
    await other.remote_send(prompt, address)
    async for tokens in engine.start_generate(prompt, begin=-1, lease=address.lease, max_tokens=64): ...

Whoever calls owns what it opens: a lease that is not used is to be released, or ends with its term.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

from microserve.runtime.arguments import Objection, objection
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.errors import MicroserveError, ProtocolError
from microserve.runtime.messages import (
    Abort,
    Aborted,
    CacheEvict,
    CacheEvicted,
    CacheMatch,
    CacheMatched,
    CachePin,
    CachePrefixes,
    CacheUnpin,
    Commit,
    Committed,
    Drain,
    EngineCall,
    Forgo,
    Generated,
    Info,
    InfoReply,
    Name,
    Ok,
    Prefixes,
    Prepared,
    PrepRecv,
    Release,
    Released,
    RemoteSend,
    Resume,
    SamplingParams,
    SendReport,
    StartGenerate,
    Stats,
    StatsReply,
    Tokens,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from microserve.runtime.messages import EngineVerb, KvAddress, PrefixEntry
    from microserve.runtime.rpc import RpcClient

R = TypeVar("R")

_BUDGET = 30.0
_LONG_BUDGET = 600.0


class Connected(Protocol):
    """What this needs of a client."""

    async def connect(self) -> RpcClient: ...


class AsyncEngine:
    """An engine, by its id. Every call raises the engine's own errors, and `NotFound` when there is no such engine."""

    def __init__(self, client: Connected, engine_id: str) -> None:
        self.id = engine_id
        self._client = client

    # --- moving KV ---------------------------------------------------------------------------------------------------

    async def prep_recv(
        self,
        prompt: Sequence[int],
        *,
        end: int | None = None,
        expect_tokens: int = 0,
        admit_by: float | None = None,
        request_id: str = "",
        sub_id: str = "",
    ) -> KvAddress:
        """A lease on pages for the KV of `prompt[:end]` that is not cached there, and its address."""
        named = _named(sub_id)
        body = PrepRecv(
            request_id=request_id or named,
            sub_id=named,
            prompt=_tokens(prompt),
            end=end,
            expect_tokens=expect_tokens,
            admit_by=admit_by,
        )
        return _expect(await self._call(body), Prepared).address

    async def remote_send(
        self,
        prompt: Sequence[int],
        address: KvAddress,
        *,
        begin: int | None = None,
        end: int | None = None,
        request_id: str = "",
        sub_id: str = "",
    ) -> SendReport:
        """Produces KV of `[begin, end)` on this engine, by default all that is awaited, and pushes it to `address`."""
        named = _named(sub_id)
        body = RemoteSend(
            request_id=request_id or named,
            sub_id=named,
            prompt=_tokens(prompt),
            address=address,
            begin=min(address.matched, address.end) if begin is None else begin,
            end=address.end if end is None else end,
        )
        return _expect(await self._call(body, _LONG_BUDGET), SendReport)

    async def start_generate(
        self,
        prompt: Sequence[int],
        *,
        begin: int = 0,
        lease: int | None = None,
        kv_wait: float | None = None,
        prior_output: int = 0,
        request_id: str = "",
        sub_id: str = "",
        **sampling: Any,
    ) -> AsyncIterator[Tokens | Generated]:
        """Streams `Tokens`, then one `Generated`. `sampling` are the fields of `SamplingParams`.

        Leaving the loop early and closing the iterator ends it at the engine, too.
        """
        try:
            params = msgspec.convert(sampling, SamplingParams)
        except msgspec.ValidationError as error:
            raise objection(error).refusal() from error
        named = _named(sub_id)
        body = StartGenerate(
            request_id=request_id or named,
            sub_id=named,
            prompt=_tokens(prompt),
            begin=begin,
            sampling=params,
            lease=lease,
            kv_wait=kv_wait,
            prior_output=prior_output,
        )
        stream = (await self._client.connect()).stream(EngineCall(engine_id=self.id, body=body), budget=_LONG_BUDGET)
        try:
            async for part in stream:
                yield _expect(part, Tokens)
            yield _expect(stream.reply, Generated)
        finally:
            stream.cancel()

    async def generate(self, prompt: Sequence[int], **options: Any) -> tuple[list[int], Generated]:
        """`start_generate`, whole: the token ids and how it ended."""
        ids: list[int] = []
        async for part in self.start_generate(prompt, **options):
            if isinstance(part, Generated):
                return ids, part
            ids += unpack_tokens(part.ids).tolist()
        raise ProtocolError(f"engine {self.id} ended a generation without saying how")

    async def commit(self, lease: int, *, wait: float | None = None, request_id: str = "", sub_id: str = "") -> int:
        """What arrived of a lease enters the prefix tree; up to which position."""
        named = _named(sub_id)
        body = Commit(request_id=request_id or named, sub_id=named, lease=lease, wait=wait)
        return _expect(await self._call(body), Committed).committed_until

    async def release(self, lease: int) -> str:
        """Ends a lease: "freed", "quarantined" or "unknown"."""
        return _expect(await self._call(Release(lease=lease)), Released).outcome

    async def forgo(self, lease: int, begin: int, end: int) -> str:
        """KV of a range will not come: "freed", "quarantined" or "unknown"."""
        return _expect(await self._call(Forgo(lease=lease, begin=begin, end=end)), Released).outcome

    async def abort(self, sub_id: str) -> str:
        """Ends a sub-request: "freed" or "unknown"."""
        return _expect(await self._call(Abort(sub_id=sub_id)), Aborted).outcome

    # --- prefix tree -------------------------------------------------------------------------------------------------

    async def cache_match(self, prompt: Sequence[int]) -> int:
        """Tokens of the prompt that the prefix tree holds."""
        return _expect(await self._call(CacheMatch(prompt=_tokens(prompt))), CacheMatched).tokens

    async def cache_pin(self, prompt: Sequence[int], ttl: float) -> int:
        """Keeps what is cached of the prompt for `ttl` seconds; how many tokens that is."""
        return _expect(await self._call(CachePin(prompt=_tokens(prompt), ttl=ttl)), CacheMatched).tokens

    async def cache_unpin(self, prompt: Sequence[int]) -> int:
        """Ends a pin; the tokens that were pinned."""
        return _expect(await self._call(CacheUnpin(prompt=_tokens(prompt))), CacheMatched).tokens

    async def cache_evict(self, prompt: Sequence[int] | None = None) -> int:
        """Frees cached pages that nobody uses, of a prompt or all; how many pages."""
        body = CacheEvict(prompt=None if prompt is None else _tokens(prompt))
        return _expect(await self._call(body), CacheEvicted).pages

    async def cache_prefixes(self, count: int = 20) -> list[PrefixEntry]:
        """The longest prefixes of the tree."""
        return _expect(await self._call(CachePrefixes(count=count)), Prefixes).prefixes

    # --- control -----------------------------------------------------------------------------------------------------

    async def info(self) -> InfoReply:
        """What it is, how loaded it is, and its links to other engines."""
        return _expect(await self._call(Info()), InfoReply)

    async def stats(self) -> StatsReply:
        """Counters and gauges, and whether its accounting of pages is whole."""
        return _expect(await self._call(Stats()), StatsReply)

    async def drain(self) -> None:
        """Finish what runs, take nothing new."""
        _expect(await self._call(Drain()), Ok)

    async def resume(self) -> None:
        """Take new work again."""
        _expect(await self._call(Resume()), Ok)

    async def _call(self, body: EngineVerb, budget: float = _BUDGET) -> object:
        rpc = await self._client.connect()
        return await rpc.call(EngineCall(engine_id=self.id, body=body), budget=budget)


async def migrate(prompt: Sequence[int], source: AsyncEngine, target: AsyncEngine) -> int:
    """Moves a context: the KV of `prompt` is copied from `source`, which computes what it has not cached, into the
    prefix tree of `target`. Returns how many tokens are cached there then: whole pages.

    Raises what the engines raise; then nothing is left behind.
    """
    address = await target.prep_recv(prompt)
    try:
        await source.remote_send(prompt, address)
        return await target.commit(address.lease)
    except BaseException:
        # Failed, or cancelled: what is under way ends without us, but for the lease.
        with contextlib.suppress(MicroserveError):
            await target.release(address.lease)
        raise


def _named(sub_id: str) -> str:
    """`sub_id`, or a new one. It is looked at here because a `request_id` is made of it, and would be blamed."""
    try:
        return msgspec.convert(sub_id, Name) or f"sub-{os.urandom(8).hex()}"
    except msgspec.ValidationError as error:
        raise Objection(objection(error).what, "sub_id").refusal() from error


def _tokens(prompt: Sequence[int]) -> bytes:
    return pack_tokens(list(prompt))


def _expect(body: object, kind: type[R]) -> R:
    if not isinstance(body, kind):
        raise ProtocolError(f"the engine answered with {type(body).__name__}, not {kind.__name__}")
    return body
