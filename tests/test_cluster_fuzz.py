"""Random bytes, and random valid messages in random order, to a live engine and a live router: both keep serving.

Then calls of every verb, with arguments that fit and that do not, to a router and two engines that move KV: every call
ends, and in an answer or an error that says whose fault it was.

After everything the engines' books are checked: their integrity, and that their pages are all where they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.cluster import FAKE, Cluster

from microserve.runtime.client import AsyncClient
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import InternalError, MicroserveError, PeerLost, ProtocolError
from microserve.runtime.frames import HEADER, pack
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    AbortRequest,
    Announce,
    Batch,
    Bye,
    CacheEvict,
    CacheMatch,
    CacheMatched,
    CachePin,
    CachePrefixes,
    CacheUnpin,
    Call,
    Cancel,
    ChatMessage,
    Claim,
    ClaimEnded,
    Commit,
    Detokenize,
    Drain,
    EngineCall,
    EngineEvent,
    EngineInfo,
    ErrorInfo,
    Failure,
    Forgo,
    Generate,
    Heartbeat,
    Hello,
    Info,
    InfoReply,
    KvAddress,
    Layout,
    Leave,
    ListEvents,
    ListModels,
    ListRequests,
    ListStrategies,
    Load,
    ModelInfo,
    Ok,
    Part,
    Ping,
    Pong,
    Prepared,
    PrepRecv,
    Release,
    RemoteSend,
    Reply,
    Resume,
    RollbackStrategy,
    SamplingParams,
    SetStrategy,
    StartGenerate,
    Stats,
    StatsReply,
    Status,
    TextChunk,
    Tokenize,
    Tokens,
    Welcome,
)
from microserve.runtime.rpc import connect
from microserve.runtime.zmq_bus import ZmqBus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microserve.runtime.bus import Session
    from microserve.runtime.messages import EngineVerb, Message, RouterVerb, RpcMessage
    from microserve.runtime.rpc import RpcClient

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # What a live process did cannot be replayed example by example.
    phases=(Phase.explicit, Phase.generate),
    database=None,
)

# --- what is thrown ------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "e0", "", "x" * 256, "\u00e9\U0001f600", "../etc/passwd"])
ids = st.integers(0, 5)
seconds = st.none() | st.sampled_from([0.0, 1e-9, 0.01, 5.0, 1e300, float("inf")])
token_bytes = st.one_of(
    st.lists(st.integers(0, 31999), max_size=80).map(pack_tokens),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5).map(
        lambda each: pack_tokens([abs(n) % 2**31 for n in each])
    ),
    st.binary(max_size=9),
    st.just(pack_tokens(range(1, 2000))),
)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 2, 30, 100, 10**9]),
    temperature=st.sampled_from([0.0, 1.0, 100.0]),
    top_k=st.sampled_from([0, 1, 10**12]),
    top_p=st.sampled_from([1e-9, 1.0]),
    logprobs=st.sampled_from([None, 0, 20]),
    seed=st.sampled_from([None, -(2**63), 2**63 - 1]),
    min_tokens=st.sampled_from([0, 5, 10**15]),
    logit_bias=st.sampled_from([{}, {0: 1.0}, {-5: 100.0, 2**60: -100.0}]),
    stop_token_ids=st.sampled_from([(), (0,), (-1, 2**40)]),
)
models = st.builds(
    ModelInfo,
    name=names,
    revision=names,
    architecture=names,
    vocab_size=st.sampled_from([0, 1, 32000]),
    max_context=st.sampled_from([0, 100, 10**9]),
    path=st.sampled_from(["", "/nowhere", "/etc"]),
)
layouts = st.builds(
    Layout,
    model_revision=names,
    dtype=names,
    page_size=st.sampled_from([0, 16]),
    layers=st.just(1),
    kv_heads=st.just(1),
    head_dim=st.just(1),
)
loads = st.builds(Load, running=st.integers(-5, 5), total_pages=st.integers(0, 10), state=names)
infos = st.builds(
    EngineInfo,
    engine_id=st.sampled_from(["ghost", "\u00e9", "", "ghost-2"]),
    epoch=st.integers(-1, 5),
    endpoint=st.sampled_from(["tcp://127.0.0.1:1", "nonsense", "", "ipc:///nowhere"]),
    events_endpoint=st.sampled_from(["tcp://127.0.0.1:1", "nonsense", ""]),
    model=models,
    layout=layouts,
    executor=names,
    max_running=st.integers(-1, 5),
    labels=st.dictionaries(names, names, max_size=2),
)
starts = st.builds(
    StartGenerate,
    request_id=names,
    sub_id=names,
    prompt=token_bytes,
    begin=st.sampled_from([0, 0, 0, 1, -1, 16, 10**9]),
    sampling=sampling,
    prior_output=st.sampled_from([0, 0, 1, 50]),
    admit_by=seconds,
    first_token_by=seconds,
)
messages = st.lists(st.builds(ChatMessage, role=names, content=st.text(max_size=20)), max_size=3)
generates = st.builds(
    Generate,
    model=st.sampled_from(["", "served", "nothing"]),
    text=st.none() | st.text(max_size=20),
    prompt=st.none() | token_bytes,
    messages=st.none() | messages,
    sampling=sampling,
    stop=st.lists(st.text(max_size=3), max_size=3).map(tuple),
    request_id=st.none() | names,
    timeout=seconds,
)
leases = st.integers(0, 5) | st.sampled_from([2**53, 2**63 - 1])
positions = st.sampled_from([0, 16, 48, -1, 10**9, 2**63 - 1, -(2**63)])
addresses = st.builds(
    KvAddress,
    engine_id=names,
    epoch=st.integers(-1, 5),
    endpoint=st.sampled_from(["nonsense", "", "ipc:///nowhere"]),
    lease=leases,
    matched=positions,
    end=positions,
    pages=token_bytes,
    layout=layouts,
)
kv_verbs = st.one_of(
    st.builds(
        PrepRecv, request_id=names, sub_id=names, prompt=token_bytes, end=st.none() | positions, admit_by=seconds
    ),
    st.builds(
        RemoteSend,
        request_id=names,
        sub_id=names,
        prompt=token_bytes,
        address=addresses,
        begin=positions,
        end=positions,
    ),
    st.builds(Commit, request_id=names, sub_id=names, lease=leases, wait=seconds),
    st.builds(Release, lease=leases),
    st.builds(Forgo, lease=leases, begin=positions, end=positions),
    st.builds(
        Claim, lease=leases, epoch=st.integers(-1, 5), begin=positions, end=positions, engine_id=names, sender_epoch=ids
    ),
    st.builds(ClaimEnded, claim=ids, error=names),
    st.builds(CacheMatch, prompt=token_bytes),
    st.builds(CachePin, prompt=token_bytes, ttl=st.just(0.01)),
    st.builds(CacheUnpin, prompt=token_bytes),
    st.builds(CacheEvict, prompt=st.none() | token_bytes),
    st.builds(CachePrefixes, count=st.integers(-1, 1001)),
)
strategy_verbs = st.one_of(
    st.builds(
        SetStrategy,
        name=st.sampled_from(["data_parallel", "nonsense", ""]),
        model=st.sampled_from(["", "served", "nothing"]),
        settings=st.dictionaries(names, st.sampled_from([True, 2**63, float("nan"), ""]), max_size=2),
        share=st.sampled_from([1.0, 0.5, 0.0, -1.0, 1e-300]),
    ),
    st.builds(RollbackStrategy, number=st.none() | positions),
    st.builds(ListStrategies),
    st.builds(ListRequests, recent=ids, limit=positions),
    st.builds(ListEvents, after=positions),
    st.builds(AbortRequest, request_id=names),
)
verbs = st.one_of(
    kv_verbs,
    kv_verbs,
    strategy_verbs,
    st.builds(EngineCall, engine_id=st.sampled_from(["e0", "nobody", ""]), body=kv_verbs | starts | st.builds(Stats)),
    starts,
    starts,
    starts,
    st.builds(Abort, sub_id=names),
    st.builds(Info),
    st.builds(Stats),
    st.builds(Drain),
    st.builds(Resume),
    st.builds(Announce, info=infos, load=loads),
    st.builds(Heartbeat, engine_id=names, epoch=st.integers(-1, 5), load=loads),
    st.builds(Leave, engine_id=names, epoch=st.integers(-1, 5)),
    generates,
    generates,
    generates,
    st.builds(ListModels),
    st.builds(Tokenize, text=st.text(max_size=50), model=names),
    st.builds(Detokenize, ids=token_bytes, model=names),
    st.builds(Status),
)
bodies = st.one_of(
    st.builds(Ok),
    st.builds(Tokens, ids=token_bytes),
    st.builds(TextChunk, text=st.text(max_size=5)),
    st.builds(Aborted, outcome=names),
)
answers = st.one_of(
    st.builds(Part, id=ids, body=bodies),
    st.builds(Reply, id=ids, body=bodies),
    st.builds(Failure, id=st.none() | ids, error=st.builds(ErrorInfo, code=names, message=names)),
)
rpc_messages = st.one_of(
    st.builds(Call, id=ids, body=verbs, budget=seconds),
    st.builds(Call, id=ids, body=verbs, budget=st.none()),
    st.builds(Cancel, id=ids),
    answers,
    st.builds(Batch, items=st.lists(answers, max_size=3)),
)
any_messages = st.one_of(
    rpc_messages,
    rpc_messages,
    st.builds(
        Hello,
        version=st.sampled_from([PROTOCOL_VERSION, 0, 99]),
        kind=st.sampled_from(["client", "engine", "router", ""]),
        name=names,
        epoch=st.integers(-1, 5),
        heartbeat=st.sampled_from([0.0, 1.0, 1e300]),
    ),
    st.builds(Welcome, version=st.just(PROTOCOL_VERSION), kind=names, name=names, epoch=ids),
    st.builds(Ping),
    st.builds(Pong),
    st.builds(Bye, reason=names),
    st.builds(EngineEvent, engine_id=names, epoch=ids, seq=ids, kind=names, load=loads),
)
# In sequence, out of it, of another version, cut short, or nothing of ours at all.
frames = st.one_of(
    st.tuples(st.just("next"), any_messages),
    st.tuples(st.just("next"), any_messages),
    st.tuples(st.integers(0, 3), any_messages),
    st.tuples(st.just("cut"), any_messages),
    st.tuples(st.just("bytes"), st.binary(max_size=60)),
    st.tuples(st.just("framed"), st.binary(max_size=60)),
    st.tuples(st.just("parts"), st.lists(st.binary(max_size=10), min_size=2, max_size=4)),
)


# --- where it is thrown --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(
        engines=1, engine_args=(*FAKE, "--model-name", "served", "--max-running", "8", "--kv-pages", "600")
    ) as cluster:
        yield cluster


def endpoints(cluster: Cluster) -> dict[str, str]:
    engine = next(engine for engine in cluster.status().engines if engine.info.engine_id == "e0")
    return {"engine": engine.info.endpoint, "router": cluster.router}


async def ask_load(rpc: RpcClient) -> Load:
    reply = await rpc.call(Info(), budget=10)
    assert isinstance(reply, InfoReply)
    return reply.load


async def check_books(engine: str) -> None:
    """The engine answers, and its books are right."""
    bus = ZmqBus(Peer("client", "check", new_epoch()))
    try:
        rpc = await connect(bus, engine)
        await rpc.call(Resume(), budget=10)
        async with asyncio.timeout(20):
            load = await ask_load(rpc)
            while load.running or load.waiting or load.owned_pages or load.leased_pages or load.quarantined_pages:
                load = await ask_load(rpc)
        stats = await rpc.call(Stats(), budget=10)
        assert isinstance(stats, StatsReply)
        assert stats.integrity == "ok"
        assert load.free_pages + load.cached_pages == load.total_pages == 600
        assert load.leased_pages == load.quarantined_pages == 0
        # No request is left that would keep a cached page from being evicted.
        assert stats.values["cache_locks"] == 0
        assert stats.values["cache_evictable"] == load.cached_pages
    finally:
        await bus.close()


async def check_serving(cluster: Cluster, engine: str) -> None:
    """The engine's books are right; then a request goes through the router."""
    await check_books(engine)
    # A router that was just told of a drained engine hears of its return within a heartbeat.
    await asyncio.to_thread(
        cluster.wait_for,
        lambda status: any(each.info.engine_id == "e0" and each.state == "ready" for each in status.engines),
        "e0 to be ready",
    )
    async with AsyncClient(cluster.router) as client:
        completion = await client.generate([1, 2, 3], model="served", max_tokens=4, ignore_eos=True, timeout=20)
        assert len(completion.token_ids) == 4


FENCE = 1_000


class Fenced:
    """A session handler that wants nothing but the answer of call `FENCE`, or the end of the session."""

    def __init__(self) -> None:
        self.passed = asyncio.Event()

    def opened(self, session: Session) -> None:
        pass

    def received(self, session: Session, message: RpcMessage) -> None:
        if isinstance(message, Reply | Failure) and message.id == FENCE:
            self.passed.set()

    def lost(self, session: Session, error: MicroserveError) -> None:
        self.passed.set()


def as_frame(how: Any, what: Any, seq: int) -> list[bytes]:
    if how == "bytes":
        return [what]
    if how == "framed":
        return [HEADER.pack(PROTOCOL_VERSION, seq) + what]
    if how == "parts":
        return list(what)
    frame = pack(what, seq if how in ("next", "cut") else how)
    return [frame[: len(frame) * 2 // 3]] if how == "cut" else [frame]


@pytest.mark.parametrize("target", ["engine", "router"])
def test_random_frames(cluster: Cluster, target: str) -> None:
    """Below the session: whatever a socket can send, greeted or not."""
    where = endpoints(cluster)
    context = zmq.Context()

    @FUZZ
    @given(greet=st.booleans(), thrown=st.lists(frames, max_size=12))
    def throw(greet: bool, thrown: list[tuple[Any, Message | bytes]]) -> None:
        with context.socket(zmq.DEALER) as socket:
            peer = Peer("client", "fuzz", new_epoch())
            socket.setsockopt(zmq.ROUTING_ID, peer.routing_id)
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(where[target])
            seq = 0
            if greet:
                seq = 1
                socket.send(pack(Hello(version=PROTOCOL_VERSION, kind="client", name="fuzz", epoch=peer.epoch), seq))
            for how, what in thrown:
                seq += 1
                socket.send_multipart(as_frame(how, what, seq))

    try:
        throw()
    finally:
        context.term()
    asyncio.run(check_serving(cluster, where["engine"]))


@pytest.mark.parametrize("target", ["engine", "router"])
def test_random_messages_in_a_session(cluster: Cluster, target: str) -> None:
    """Through a real session, in sequence: valid messages that make no sense together."""
    where = endpoints(cluster)

    async def talk(thrown: list[tuple[bool, list[RpcMessage]]]) -> None:
        bus = ZmqBus(Peer("client", "fuzz", new_epoch()))
        try:
            for patient, messages in thrown:
                handler = Fenced()
                session = await bus.dial(where[target], handler)
                with contextlib.suppress(PeerLost):
                    for message in messages:
                        session.send(message)
                    if patient:
                        # Whoever answers this has handled everything before it; the impatient leave in the middle.
                        session.send(Call(id=FENCE, body=Stats() if target == "engine" else Status()))
                        async with asyncio.timeout(20):
                            await handler.passed.wait()
                session.close()
        finally:
            await bus.close()

    @FUZZ
    @given(st.lists(st.tuples(st.booleans(), st.lists(rpc_messages, max_size=15)), min_size=1, max_size=3))
    def throw(thrown: list[tuple[bool, list[RpcMessage]]]) -> None:
        asyncio.run(talk(thrown))

    throw()
    asyncio.run(check_serving(cluster, where["engine"]))


# --- calls of every verb -------------------------------------------------------------------------------------------

HUGE = [2**63 - 1, -(2**63), 2**63, 2**64 - 1, 10**30]
PROMPTS = [pack_tokens(range(start, start + length)) for start, length in ((0, 0), (0, 5), (0, 48), (0, 200), (7, 90))]
ROUNDS, AT_ONCE = 80, 12
SEEN = {
    *("invalid_request", "not_found", "lease_not_found", "conflict"),
    *("Prepared", "SendReport", "Generated", "Released", "CacheMatched", "CacheEvicted"),
    *("StrategySet", "Finished", "Requests", "Events"),
}
"""How calls end, with every seed."""


class Caller:
    """Makes up calls from a seed: most fit what went before, and many are wrong in one thing."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.name = f"{seed}-sub"
        self.addresses: list[KvAddress] = []
        """Of the leases that were got; some have ended."""
        self.prompts: dict[int, bytes] = {}
        """What those are for."""
        self.made = 0

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def number(self, *good: int | None) -> Any:
        return self.one(*good) if self.random.random() < 0.93 else self.one(-1, *HUGE)

    def length(self) -> int:
        """Tokens to generate. Not as many as fit: that takes the fake engine half a minute."""
        return int(self.one(1, 5, 30, 30, 30, 30, 30, 30, 0, 2**63, 10**30))

    def names(self) -> dict[str, Any]:
        """Mostly new: a `sub_id` that is known repeats its call, or is a conflict."""
        self.made += 1
        name = self.one(*[f"{self.name}-{self.made}"] * 20, f"{self.name}-1", f"{self.name}-2", "", "x" * 257)
        return {"request_id": self.one("r", name), "sub_id": name}

    def seconds(self) -> Any:
        return self.one(*[None] * 8, 0.0, 0.05, 0.05, 0.3, 0.3, -1.0, float("nan"), float("inf"))

    def lease(self) -> Any:
        return self.one(*[address.lease for address in self.addresses[-6:]] * 2, 0, self.number(1))

    def address(self) -> KvAddress:
        """One that was given, or that with a field changed."""
        given: KvAddress = self.one(*self.addresses[-6:])
        changes = self.one(
            *[{}] * 12,
            {"epoch": self.number(1)},
            {"lease": self.lease()},
            {"end": self.number(0, 10**6)},
            {"engine_id": self.one("e0", "e1", "nobody", "")},
            {"endpoint": self.one("nonsense", "", "ipc:///nowhere")},
            {"pages": self.one(b"", b"123", pack_tokens([0]), pack_tokens([2**31 - 1]))},
            {"layout": msgspec.structs.replace(given.layout, page_size=self.number(0, 32))},
        )
        return msgspec.structs.replace(given, **changes)

    def engine_verb(self) -> Any:
        prompt = self.one(*PROMPTS[1:] * 5, PROMPTS[0], b"123")
        verb = self.random.randrange(13 if self.addresses else 10)
        match verb:
            case 0 | 1:
                end, room = self.number(None, 0, 16, 48), self.number(0, 10, 10**6)
                return PrepRecv(prompt=prompt, end=end, expect_tokens=room, admit_by=self.seconds(), **self.names())
            case 2 | 9:
                budget: dict[str, Any] = {self.one("kv_wait", "admit_by", "first_token_by"): self.seconds()}
                return StartGenerate(
                    prompt=prompt,
                    begin=self.number(0, 0, 0, 16),
                    sampling=SamplingParams(max_tokens=self.length(), top_k=self.number(0, 5), ignore_eos=True),
                    lease=self.one(None, None, None, self.lease()),
                    prior_output=self.number(0, 0, 0, 5),
                    **budget,
                    **self.names(),
                )
            case 3:
                return CachePin(prompt=prompt, ttl=self.one(0.01, 0.2, 0.0, -1.0, float("inf"), float("nan")))
            case 4:
                return self.one(CacheMatch(prompt=prompt), CacheUnpin(prompt=prompt))
            case 5:
                return self.one(CacheEvict(prompt=self.one(None, prompt)), CachePrefixes(count=self.number(1, 1000)))
            case 6:
                return self.one(Info(), Stats(), Drain(), *[Resume()] * 5)
            case 7:
                return Abort(sub_id=self.one(f"{self.name}-1", f"{self.name}-{self.made}", "", "x" * 257))
            case 8:
                lease, begin, end = self.lease(), self.number(0, 16), self.number(16, 48)
                commit = Commit(lease=lease, wait=self.seconds(), **self.names())
                return self.one(commit, Release(lease=lease), Forgo(lease=lease, begin=begin, end=end))
            case 10 | 11:
                address = self.address()
                prompt = self.one(*[self.prompts.get(address.lease, prompt)] * 9, prompt)
                begin, end = self.one(address.matched, self.number(0, 16)), self.one(address.end, self.number(None, 16))
                return RemoteSend(prompt=prompt, address=address, begin=begin, end=end, **self.names())
            case _:
                # "ghost" is nobody's peer, so none is granted.
                return Claim(
                    lease=self.lease(),
                    epoch=self.one(self.address().epoch, self.number(1)),
                    begin=self.number(0, 16),
                    end=self.number(16, 48),
                    engine_id="ghost",
                    sender_epoch=self.number(1),
                    sub_id=self.one("", "x" * 257, f"{self.name}-{self.made}"),
                )

    def router_verb(self) -> Any:
        name, model = (
            self.one("data_parallel", "prefill_decode", "prefill_decode", "nonsense"),
            self.one("", "served", "other"),
        )
        settings = self.one({}, {}, {"x": 1}, {"threshold": self.number(0)}, {"": float("nan")})
        share = self.one(1.0, 1.0, 1.0, 0.5, 1e-300, 0.0, -1.0, float("nan"))
        return self.one(
            SetStrategy(name=name, model=model, settings=settings, share=share, dry_run=self.one(False, True)),
            SetStrategy(name=name, model=model, share=share),
            RollbackStrategy(model=model, number=self.number(None, 0, 1, 10**6)),
            ListStrategies(),
            ListRequests(recent=self.number(0, 256), limit=self.number(1, 10_000), request_id=self.one(None, "r")),
            ListEvents(after=self.number(0, 5), limit=self.number(1, 1000)),
            AbortRequest(request_id=self.one("r", "", "x" * 257)),
            Generate(
                prompt=self.one(*PROMPTS),
                model=model,
                sampling=SamplingParams(max_tokens=self.length(), ignore_eos=True),
                timeout=self.one(None, 5.0),
            ),
        )

    def saw(self, body: object, answer: object) -> None:
        if isinstance(answer, Prepared):
            self.addresses.append(answer.address)
            asked = body.body if isinstance(body, EngineCall) else body
            assert isinstance(asked, PrepRecv)
            self.prompts[answer.address.lease] = asked.prompt


@pytest.fixture(scope="module")
def moving() -> Iterator[Cluster]:
    """Two engines that know the way to each other. Leases that nobody was told of end soon."""
    arguments = (
        *FAKE,
        "--model-name",
        "served",
        "--max-running",
        "8",
        "--kv-pages",
        "600",
        "--kv-wait",
        "1",
        "--lease-term",
        "3",
    )
    with Cluster(engines=2, engine_args=arguments) as cluster:
        yield cluster
        for daemon in cluster.daemons:
            assert daemon.alive
            assert "Traceback" not in daemon.text(), daemon.tail(60)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_calls_of_every_verb_end_in_an_answer_or_a_typed_error(moving: Cluster, seed: int) -> None:
    """To the engines by themselves and through the router, a dozen at once; what they opened is ended like anything."""

    async def main() -> None:
        caller, engines = Caller(seed), moving.endpoints()
        bus = ZmqBus(Peer("client", "fuzz", new_epoch()))
        ended: dict[str, int] = {}
        untold: list[tuple[str, EngineVerb | RouterVerb, MicroserveError]] = []
        """Calls whose error does not say what the caller may do."""
        try:
            router = await connect(bus, moving.router)
            direct = {name: await connect(bus, endpoint) for name, endpoint in engines.items()}

            async def call(rpc: RpcClient, engine: str, body: EngineVerb | RouterVerb) -> None:
                try:
                    answer = await rpc.call(body, budget=5.0)
                    caller.saw(body, answer)
                    outcome = type(answer).__name__
                except (InternalError, ProtocolError, PeerLost) as error:
                    untold.append((engine, body, error))
                    return
                except MicroserveError as error:
                    outcome = error.code
                ended[outcome] = ended.get(outcome, 0) + 1

            def throw() -> asyncio.Task[None]:
                engine = caller.one("e0", "e1")
                match caller.random.randrange(5):
                    case 0:
                        where, rpc, body = "", router, caller.router_verb()
                    case 1 | 2:
                        target = caller.one(*[engine] * 9, "nobody", "x" * 257)
                        where, rpc, body = engine, router, EngineCall(engine_id=target, body=caller.engine_verb())
                    case _:
                        where, rpc, body = engine, direct[engine], caller.engine_verb()
                return asyncio.create_task(call(rpc, where, body), name=f"{where} {body}")

            for _ in range(ROUNDS):
                _, waiting = await asyncio.wait([throw() for _ in range(AT_ONCE)], timeout=20)
                for task in waiting:
                    task.cancel()
                assert [task.get_name() for task in waiting] == [], "every call ends"
            assert untold == []
            assert ended.keys() >= SEEN, "too few of the calls get as far as they should"
            for address in caller.addresses:
                await direct[address.engine_id].call(Release(lease=address.lease), budget=10)
            for rpc in direct.values():
                for prompt in PROMPTS[1:]:
                    while await rpc.call(CacheUnpin(prompt=prompt), budget=10) != CacheMatched(tokens=0):
                        pass
            assert not any(rpc.closed or rpc.open_calls for rpc in (router, *direct.values()))
        finally:
            await bus.close()
        for endpoint in engines.values():
            await check_books(endpoint)
        await check_serving(moving, engines["e0"])

    asyncio.run(main())


def test_both_processes_have_survived(cluster: Cluster) -> None:
    """Last: the same processes that began still run, and logged no bug."""
    for daemon in cluster.daemons:
        assert daemon.alive
        assert "Traceback" not in daemon.text(), daemon.tail(60)
