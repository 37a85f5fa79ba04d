"""What tests of the router share: engines that do as they are told, and a router core in front, without sockets.

Use it under `run_virtual`: the network delivers at once, and timers jump.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from microserve.router.core import GenerationSpec, RouterCore
from microserve.router.metrics import RouterMetrics
from microserve.router.strategies.data_parallel import data_parallel
from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.config import RouterConfig
from microserve.runtime.errors import Cancelled
from microserve.runtime.ids import Peer
from microserve.runtime.memory_bus import MemoryNetwork
from microserve.runtime.messages import (
    Abort,
    Aborted,
    Commit,
    Committed,
    EngineInfo,
    Forgo,
    Generated,
    KvAddress,
    Layout,
    Load,
    Meet,
    ModelInfo,
    Ok,
    Prepared,
    PrepRecv,
    Release,
    Released,
    RemoteSend,
    SamplingParams,
    SendReport,
    StartGenerate,
    Tokens,
    Usage,
)
from microserve.runtime.rpc import RpcServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from microserve.router.dispatch import Generation
    from microserve.router.strategy import Chunk, Program
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.rpc import IncomingCall

CONTEXT = 100
VOCABULARY = 1000


def engine_info(name: str = "a", *, epoch: int = 1, model: str = "m", **changes: Any) -> EngineInfo:
    """An engine's description; `changes` are fields of `EngineInfo`, or of its model."""
    described = ModelInfo(
        name=model,
        revision=changes.pop("revision", "1"),
        architecture="fake",
        vocab_size=VOCABULARY,
        max_context=changes.pop("max_context", CONTEXT),
        path=changes.pop("path", ""),
    )
    values: dict[str, Any] = {
        "endpoint": f"memory://{name}-{epoch}",
        "events_endpoint": "",
        "model": described,
        "layout": Layout(model_revision="1", dtype="float32", page_size=16, layers=1, kv_heads=1, head_dim=8),
        "executor": "fake",
        "max_running": 8,
    }
    return EngineInfo(engine_id=name, epoch=epoch, **(values | changes))


def folder_with_tokenizer(folder: Path) -> str:
    """A checkpoint folder without weights: a tokenizer of the letters a to z (ids 0 to 25) and a chat template."""
    tokenizer = Tokenizer(models.WordLevel({chr(97 + index): index for index in range(26)} | {"?": 26}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 27, "eos_token_id": 26}))
    return str(folder)


class ScriptedEngine:
    """An engine that records its calls and answers as a test says. `open` are those without a terminal answer."""

    def __init__(self, network: MemoryNetwork, info: EngineInfo) -> None:
        self.info = info
        self.calls: list[IncomingCall] = []
        self.cancelled: list[MicroserveError] = []
        self.met: list[Meet] = []
        """What the router said of other engines; always answered."""
        self.answers: dict[type, Callable[[IncomingCall], object]] = {}
        """How calls with a body of that type are answered at once."""
        self.log: list[str] = []
        """Every call, in words. Engines of one world share it."""
        self.leases: set[int] = set()
        """Leases that nothing has ended."""
        self.dead = False
        self.matched = 0
        """Tokens that a prepared receive finds cached."""
        self.refuse_with: MicroserveError | None = None
        self.bus = network.bus(Peer("engine", info.engine_id, info.epoch))
        self._network = network
        self._server = RpcServer(self._handle, clock=network.clock)

    async def listen(self) -> None:
        await self.bus.listen(self.info.endpoint, self._server)

    @property
    def open(self) -> list[IncomingCall]:
        return [call for call in self.calls if not call.done]

    def started(self, index: int = -1) -> StartGenerate:
        body = self.calls[index].body
        assert isinstance(body, StartGenerate)
        return body

    def _handle(self, call: IncomingCall) -> None:
        if isinstance(call.body, Meet):
            self.met.append(call.body)
            call.reply(Ok())
            return
        self.log.append(f"{self.info.engine_id} {_in_words(call.body)}")
        told = type(call.body) in self.answers or self.refuse_with is not None
        if isinstance(call.body, Release | Forgo | Abort) and not told:
            self._handle_posted(call, call.body)
            return
        self.calls.append(call)
        if self.refuse_with is not None:
            raise self.refuse_with
        call.on_cancel = lambda error: self._cancel(call, error)
        if (answer := self.answers.get(type(call.body))) is not None:
            answer(call)

    def _handle_posted(self, call: IncomingCall, body: Release | Forgo | Abort) -> None:
        """What is said without waiting for an answer is always answered."""
        if isinstance(body, Abort):
            meant = [each for each in self.open if getattr(each.body, "sub_id", None) == body.sub_id]
            for each in meant:
                each.fail(Cancelled("aborted"))
            call.reply(Aborted(outcome="freed" if meant else "unknown"))
            return
        known = body.lease in self.leases
        if isinstance(body, Release):
            self.leases.discard(body.lease)
        call.reply(Released(outcome="freed" if known else "unknown"))

    def _cancel(self, call: IncomingCall, error: MicroserveError) -> None:
        self.cancelled.append(error)
        self.log.append(f"{self.info.engine_id} cancel {_in_words(call.body).split()[0]}")
        self._use_up(call)
        call.fail(Cancelled("freed"))

    def _use_up(self, call: IncomingCall) -> None:
        """An engine ends the lease of a call that has begun with it."""
        if isinstance(call.body, StartGenerate | Commit) and call.body.lease is not None:
            self.leases.discard(call.body.lease)

    def last(self, kind: type) -> IncomingCall:
        """The latest call with a body of that type."""
        return [call for call in self.calls if isinstance(call.body, kind)][-1]

    def grant(self, call: IncomingCall) -> None:
        """Answers a preparation with a lease."""
        body = call.body
        assert isinstance(body, PrepRecv)
        length = len(unpack_tokens(body.prompt))
        end = length if body.end is None else body.end if body.end >= 0 else length + body.end
        lease = len(self.calls) + 100 * (ord(self.info.engine_id) - 96)
        self.leases.add(lease)
        pages = max(0, -(-end // 16) - self.matched // 16)
        address = KvAddress(
            engine_id=self.info.engine_id,
            epoch=self.info.epoch,
            endpoint=self.info.endpoint,
            lease=lease,
            matched=self.matched,
            end=end,
            pages=pack_tokens(range(pages)),
            layout=self.info.layout,
        )
        call.reply(Prepared(address=address))

    def report(self, call: IncomingCall, *, reused: int = 0) -> None:
        """Answers a send as done."""
        body = call.body
        assert isinstance(body, RemoteSend)
        assert body.end is not None
        call.reply(SendReport(computed=body.end - body.begin - reused, reused=reused, bytes=64, seconds=0.1))

    def settle_commit(self, call: IncomingCall, until: int) -> None:
        """Answers a commit."""
        self._use_up(call)
        call.reply(Committed(committed_until=until))

    def grant_always(self, matched: int = 0) -> None:
        """Preparations are answered at once from now on."""
        self.matched = matched
        self.answers[PrepRecv] = self.grant

    async def tokens(self, *ids: int, call: int = -1) -> None:
        """Streams tokens and lets them arrive."""
        self._use_up(self.calls[call])
        self.calls[call].part(Tokens(ids=pack_tokens(ids)))
        await self._network.settle()

    async def finish(
        self,
        *ids: int,
        call: int = -1,
        reason: str = "length",
        cached: int = 0,
        received: int = 0,
        recomputed: int = 0,
        stop_token: int | None = None,
    ) -> None:
        """Streams the last tokens and ends the call."""
        incoming = self.calls[call]
        self._use_up(incoming)
        if ids:
            incoming.part(Tokens(ids=pack_tokens(ids), cached=cached))
        prompt = len(unpack_tokens(self.started(call).prompt))
        completion = self.started(call).prior_output + len(ids) + (stop_token is not None)
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
        incoming.reply(
            Generated(
                finish_reason=reason,
                usage=usage,
                received_tokens=received,
                recomputed_tokens=recomputed,
                stop_token=stop_token,
            )
        )
        await self._network.settle()

    async def fail(self, error: MicroserveError, *, call: int = -1) -> None:
        self.calls[call].fail(error)
        await self._network.settle()

    async def die(self) -> None:
        """As SIGKILL does it, seen over TCP."""
        self.dead = True
        self._network.kill(self.bus.me)
        await self._network.settle()


def _in_words(body: object) -> str:
    """A call, as tests compare it."""
    match body:
        case PrepRecv():
            return f"prep_recv end={body.end}"
        case RemoteSend():
            return f"remote_send {body.address.engine_id} {body.begin} {body.end}"
        case StartGenerate():
            lease = f" lease={body.lease}" if body.lease is not None else ""
            after = f" after={body.prior_output}" if body.prior_output else ""
            return f"start_generate {body.begin}{lease}{after}"
        case Commit():
            return f"commit lease={body.lease}"
        case Release():
            return f"release lease={body.lease}"
        case Forgo():
            return f"forgo lease={body.lease} {body.begin} {body.end}"
        case _:
            return type(body).__name__.lower()


class World:
    """A router core and scripted engines. Leaving it checks that nothing is left behind."""

    def __init__(self, program: Program | None = None, **config: Any) -> None:
        self.network = MemoryNetwork()
        self.registry = CollectorRegistry()
        self.engines: dict[str, ScriptedEngine] = {}
        self.log: list[str] = []
        """Every call on any engine, in order."""
        self.texts: dict[str, Any] = {}
        self.allow_tasks = 0
        self._config = RouterConfig(**config)
        self._program = program if program is not None else data_parallel.configure()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._before = asyncio.all_tasks()
        self.bus = self.network.bus(Peer("router", "r", 1))
        self.core = RouterCore(
            self._config,
            self.bus,
            self._program,
            metrics=RouterMetrics(self.registry),
            load_text=self.texts.__getitem__,
            clock=loop.time,
            version="test",
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.core.close()
        self.core.fleet.check_integrity()
        await self.bus.close()
        for engine in self.engines.values():
            await engine.bus.close()
        await self.network.settle()
        left = asyncio.all_tasks() - self._before
        assert len(left) == self.allow_tasks, left

    async def add(self, name: str, load: Load | None = None, **info: Any) -> ScriptedEngine:
        """An engine that has announced itself and can be picked."""
        engine = ScriptedEngine(self.network, engine_info(name, **info))
        engine.log = self.log
        self.engines[name] = engine
        await engine.listen()
        self.core.announce(engine.info, load if load is not None else Load())
        await self.network.settle()
        return engine

    def generate(self, prompt: Sequence[int] = (1, 2, 3), **changes: Any) -> Generation:
        """Starts a choice; `changes` are fields of `GenerationSpec` and of `SamplingParams`."""
        spec = GenerationSpec(
            request_id=changes.pop("request_id", "q"),
            model=changes.pop("model", "m"),
            prompt=np.asarray(prompt, dtype=np.int32),
            timeout=changes.pop("timeout", None),
            choice_of=changes.pop("choice_of", ""),
            sampling=SamplingParams(**changes),
        )
        return self.core.generate(spec)

    async def settle(self) -> None:
        await self.network.settle()

    def charges(self) -> dict[str, tuple[int, int]]:
        """(requests, tokens) charged, by engine."""
        return {link.id: (link.charged_requests, link.charged_tokens) for link in self.core.fleet.links}

    def check_clean(self) -> None:
        """No call, lease or charge is left."""
        for engine in self.engines.values():
            assert engine.dead or (engine.open, engine.leases) == ([], set()), engine.info.engine_id
        assert set(self.charges().values()) <= {(0, 0)}
        self.core.fleet.prefixes.check_integrity()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"microserve_router_{name}", labels)


async def read(generation: Generation) -> list[Chunk]:
    return [chunk async for chunk in generation]


def ids_of(chunks: Sequence[Chunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.tokens]
