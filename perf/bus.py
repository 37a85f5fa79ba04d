"""RPC over the bus against a bare pyzmq DEALER/ROUTER echo, and the tokens per second that a stream carries.

Two processes on tcp loopback. The echo blocks in `recv` and moves frames of the same sizes as the call and its answer;
the two alternate, so that a machine whose speed drifts slows both. The ratio is taken round by round.
The caller is kept on one core and the answering process on another: where the scheduler puts the four threads of a
round trip decides its time more than anything else does, and would decide it differently for the two.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
from functools import partial
from typing import TYPE_CHECKING

import uvloop
import zmq

from microserve.runtime.codec import encode
from microserve.runtime.frames import HEADER_BYTES
from microserve.runtime.ids import Peer
from microserve.runtime.messages import (
    Call,
    EngineInfo,
    Generated,
    Info,
    InfoReply,
    Layout,
    Load,
    ModelInfo,
    Ok,
    Reply,
    Resume,
    SamplingParams,
    StartGenerate,
    Tokens,
    Usage,
)
from microserve.runtime.rpc import IncomingCall, Outgoing, RpcClient, RpcServer, connect
from microserve.runtime.zmq_bus import ZmqBus
from perf.harness import Benchmark, Sample, interleave, measure, ratio

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from microserve.runtime.messages import EngineVerb, ReplyBody

_INFO = InfoReply(
    info=EngineInfo(
        engine_id="engine-a",
        epoch=1_750_000_000_000_000,
        endpoint="tcp://127.0.0.1:40001",
        events_endpoint="tcp://127.0.0.1:40002",
        model=ModelInfo(
            name="demo",
            revision="0" * 16,
            architecture="llama",
            vocab_size=32_000,
            max_context=8_192,
            path="/models/demo",
        ),
        layout=Layout(model_revision="0" * 16, dtype="float32", page_size=16, layers=8, kv_heads=4, head_dim=64),
        executor="torch",
        max_running=64,
        started_at=1_750_000_000.0,
    ),
    load=Load(running=12, waiting=3, free_pages=900, owned_pages=100, total_pages=1_000, steps=123_456),
)

_GENERATED = Generated(finish_reason="length", usage=Usage(prompt_tokens=1, completion_tokens=200))

_VERBS: dict[str, tuple[EngineVerb, ReplyBody]] = {
    "resume → ok": (Resume(), Ok()),
    "info → info reply": (Info(), _INFO),
}


def serve_echo(pipe: Connection) -> None:
    """Answers every message with as many bytes as its first two say, until it is empty."""
    _pin(1)
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    pipe.send(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
    answer = b""
    while True:
        routing_id, body = socket.recv_multipart()
        if not body:
            break
        size = int.from_bytes(body[:2], "little")
        if len(answer) != size:
            answer = bytes(size)
        socket.send_multipart([routing_id, answer])
    context.destroy(linger=0)


def _serve_rpc(pipe: Connection) -> None:
    _pin(1)
    uvloop.run(_serve_rpc_until_told(pipe))


def _pin(core: int) -> None:
    """Keeps this process on the `core`-th of the cores that it may use, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[core % len(cores)]})


class _Stream:
    """A call that still has tokens to come."""

    def __init__(self, call: IncomingCall, left: int) -> None:
        self.call = call
        self.left = left


class _Engine:
    """Answers `Resume` and `Info` at once; streams for `StartGenerate`, one message per step, as an engine does."""

    def __init__(self) -> None:
        self.server = RpcServer(self._handle)
        self._loop = asyncio.get_running_loop()
        self._streams: list[_Stream] = []

    def _handle(self, call: IncomingCall) -> None:
        if not isinstance(call.body, StartGenerate):
            call.reply(_INFO if isinstance(call.body, Info) else Ok())
            return
        self._streams.append(_Stream(call, call.body.sampling.max_tokens))
        if len(self._streams) == 1:
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        outgoing: list[Outgoing] = []
        for stream in self._streams:
            outgoing.append(Outgoing(stream.call, Tokens(ids=b"\1\0\0\0"), False))
            stream.left -= 1
            if not stream.left:
                outgoing.append(Outgoing(stream.call, _GENERATED, True))
        self._streams = [stream for stream in self._streams if stream.left]
        self.server.send_many(outgoing)
        if self._streams:
            self._loop.call_soon(self._step)


async def _serve_rpc_until_told(pipe: Connection) -> None:
    engine = _Engine()
    bus = ZmqBus(Peer("engine", "perf", 1))
    listener = await bus.listen("tcp://127.0.0.1:*", engine.server)
    pipe.send(listener.endpoint)
    await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
    await bus.close()


def echo(socket: zmq.Socket[bytes], request: bytes, calls: int) -> None:
    for _ in range(calls):
        socket.send(request)
        socket.recv()


async def _call(client: RpcClient, verb: EngineVerb, calls: int) -> None:
    for _ in range(calls):
        await client.call(verb)


async def _consume(client: RpcClient, number: int, tokens: int) -> None:
    verb = StartGenerate(
        request_id=f"r{number}", sub_id=f"s{number}", prompt=b"\0\0\0\0", sampling=SamplingParams(max_tokens=tokens)
    )
    stream = client.stream(verb)
    async for _ in stream:
        pass


async def _consume_all(client: RpcClient, streams: int, tokens: int) -> None:
    await asyncio.gather(*(_consume(client, number, tokens) for number in range(streams)))


def main() -> None:
    bench = Benchmark("bus", "RPC round trip against a bare DEALER/ROUTER echo, and streamed tokens")
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=300, help="round trips per run (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="concurrent streams (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per stream and run (default: %(default)s)")
    args = bench.arguments(parser, repeat=41, warmup=3)

    spawn = multiprocessing.get_context("spawn")
    echo_pipe, echo_end = spawn.Pipe()
    rpc_pipe, rpc_end = spawn.Pipe()
    echo_server = spawn.Process(target=serve_echo, args=(echo_end,))
    rpc_server = spawn.Process(target=_serve_rpc, args=(rpc_end,))
    echo_server.start()
    rpc_server.start()
    echo_endpoint, rpc_endpoint = echo_pipe.recv(), rpc_pipe.recv()
    _pin(0)  # after the children, which would inherit it
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(echo_endpoint)
    loop = uvloop.new_event_loop()
    bus = loop.run_until_complete(_make_bus())
    client = loop.run_until_complete(connect(bus, rpc_endpoint))

    for name, (verb, reply) in _VERBS.items():
        sent = HEADER_BYTES + len(encode(Call(id=100, body=verb)))
        answered = HEADER_BYTES + len(encode(Reply(id=100, body=reply)))
        request = answered.to_bytes(2, "little") + bytes(sent - 2)
        samples = interleave(
            {
                "echo": partial(echo, socket, request, args.calls),
                "rpc": lambda verb=verb: loop.run_until_complete(_call(client, verb, args.calls)),  # type: ignore[misc]
            },
            warmup=args.warmup,
            repeat=args.repeat,
        )
        scale = 1e6 / args.calls
        sizes = f"{sent} bytes out, {answered} back"
        bench.row(f"{name}: bare echo", samples["echo"], unit="µs", scale=scale, note=sizes)
        bench.row(f"{name}: call", samples["rpc"], unit="µs", scale=scale, note=sizes)
        bench.row(f"{name}: call / echo", ratio(samples["rpc"], samples["echo"]), unit="x", limit="at most 2x")

    seconds = measure(
        lambda: loop.run_until_complete(_consume_all(client, args.streams, args.tokens)),
        warmup=args.warmup,
        repeat=args.repeat,
    )
    total = args.streams * args.tokens
    rate = Sample(tuple(total / value for value in seconds.values))
    note = f"{args.streams} streams; both processes' work, engine to consumer"
    bench.row("streamed tokens", rate, unit="tokens/s", note=note)
    bench.row("time a streamed token", seconds, unit="µs", scale=1e6 / total, note=note)

    socket.send(b"")
    rpc_pipe.send(None)
    loop.run_until_complete(bus.close())
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    context.destroy(linger=500)
    echo_server.join()
    rpc_server.join()
    bench.finish(args)


async def _make_bus() -> ZmqBus:
    return ZmqBus(Peer("router", "perf", 1))


if __name__ == "__main__":
    main()
