"""Random bytes, and random valid messages in random order, to a live engine and a live router: both keep serving.

After everything the engine's books are checked: its integrity, and that its pages are all where they were.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.cluster import FAKE, Cluster

from microserve.runtime.client import AsyncClient
from microserve.runtime.codec import pack_tokens
from microserve.runtime.errors import PeerLost
from microserve.runtime.frames import HEADER, pack
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import (
    PROTOCOL_VERSION,
    Abort,
    Aborted,
    Announce,
    Batch,
    Bye,
    Call,
    Cancel,
    ChatMessage,
    Detokenize,
    Drain,
    EngineEvent,
    EngineInfo,
    ErrorInfo,
    Failure,
    Generate,
    Heartbeat,
    Hello,
    Info,
    InfoReply,
    Layout,
    Leave,
    ListModels,
    Load,
    ModelInfo,
    Ok,
    Part,
    Ping,
    Pong,
    Reply,
    Resume,
    SamplingParams,
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
    from microserve.runtime.errors import MicroserveError
    from microserve.runtime.messages import Message, RpcMessage
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
verbs = st.one_of(
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


async def check_serving(cluster: Cluster, engine: str) -> None:
    """The engine answers and its books are right; then a request goes through the router."""
    bus = ZmqBus(Peer("client", "check", new_epoch()))
    try:
        rpc = await connect(bus, engine)
        await rpc.call(Resume(), budget=10)
        async with asyncio.timeout(20):
            load = await ask_load(rpc)
            while load.running or load.waiting or load.owned_pages:
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


def test_both_processes_have_survived(cluster: Cluster) -> None:
    """Last: the same processes that began still run, and logged no bug."""
    for daemon in cluster.daemons:
        assert daemon.alive
        assert "Traceback" not in daemon.text(), daemon.tail(60)
