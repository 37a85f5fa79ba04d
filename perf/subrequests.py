"""What the engine verbs cost in themselves: one page of KV moved and one token generated, against bare ZeroMQ.

Two engine processes with the `fake` executor (no time for computing) and the transport that engines use. The prompt is
one page, which the sender has in its prefix tree, and one token. A caller in this process does what a router does:

    prep_recv at the receiver → remote_send at the sender, start_generate at the receiver → the first token

Beside it, in the same run and taking turns with it: as many round trips to a bare pyzmq echo in another process as this
takes one after the other. They are four: prep_recv; remote_send, within it the claim from engine to engine; and the
token, which comes back when the pages have arrived. And, taking turns with both, the same three calls one after the
other, each timed by itself and held against its own round trips.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop
import zmq
from tests.cluster import Cluster

from microserve.runtime.codec import encode, pack_tokens
from microserve.runtime.frames import HEADER_BYTES
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import (
    Call,
    Generated,
    Info,
    InfoReply,
    Prepared,
    PrepRecv,
    RemoteSend,
    SamplingParams,
    SendReport,
    StartGenerate,
)
from microserve.runtime.rpc import RpcClient, connect
from microserve.runtime.zmq_bus import ZmqBus
from perf.bus import echo, serve_echo
from perf.harness import Benchmark, Sample, interleave, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator

    from microserve.runtime.codec import TokenArray

PAGE = 16
VERBS = {"prep_recv": 1, "remote_send": 2, "start_generate": 1}
"""The round trips of each: those of `remote_send` are its own and that of its claim."""
ROUND_TRIPS = sum(VERBS.values())
_FAKE = (
    *("--executor", "fake", "--model", "tokens-only", "--fake-total-pages", "32768"),
    *("--fake-decode-base-us", "0", "--fake-prefill-us-per-token", "0", "--fake-decode-us-per-sequence", "0"),
)
_ONE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)


class Caller:
    """What a router does for one request, by hand."""

    def __init__(self, sender: RpcClient, receiver: RpcClient) -> None:
        self._sender = sender
        self._receiver = receiver
        self._ids = itertools.count()

    def _names(self) -> dict[str, Any]:
        number = next(self._ids)
        return {"request_id": f"r{number}", "sub_id": f"s{number}"}

    async def warm(self, prompts: list[TokenArray]) -> None:
        """The sender computes the page of each prompt."""
        for prompt in prompts:
            await self._token(self._sender, StartGenerate(**self._names(), prompt=pack_tokens(prompt), sampling=_ONE))

    async def disaggregated(self, prompts: list[TokenArray]) -> None:
        """The page goes from the sender to the receiver, which generates one token."""
        for prompt in prompts:
            data = pack_tokens(prompt)
            prepared = await self._receiver.call(PrepRecv(**self._names(), prompt=data, end=PAGE, expect_tokens=1))
            if not isinstance(prepared, Prepared):
                raise SystemExit(f"prep_recv answered {prepared}")
            address = prepared.address
            if address.matched:
                raise SystemExit("the receiver had the page already: nothing was moved")
            sending = self._sender.stream(RemoteSend(**self._names(), prompt=data, address=address, begin=0, end=PAGE))
            done = await self._token(
                self._receiver,
                StartGenerate(**self._names(), prompt=data, begin=PAGE, lease=address.lease, sampling=_ONE),
            )
            async for _ in sending:
                pass
            report = sending.reply
            if not isinstance(report, SendReport) or report.reused != PAGE or done.received_tokens != PAGE:
                raise SystemExit(f"the page was not sent from the sender's cache: {report}, {done}")

    async def one_by_one(self, prompts: list[TokenArray]) -> dict[str, float]:
        """The same, but nothing overlaps. Seconds in each verb."""
        spent = dict.fromkeys(VERBS, 0.0)
        for prompt in prompts:
            data = pack_tokens(prompt)
            began = perf_counter()
            prepared = await self._receiver.call(PrepRecv(**self._names(), prompt=data, end=PAGE, expect_tokens=1))
            ready = perf_counter()
            if not isinstance(prepared, Prepared) or prepared.address.matched:
                raise SystemExit(f"prep_recv answered {prepared}")
            address = prepared.address
            report = await self._sender.call(
                RemoteSend(**self._names(), prompt=data, address=address, begin=0, end=PAGE)
            )
            sent = perf_counter()
            done = await self._token(
                self._receiver,
                StartGenerate(**self._names(), prompt=data, begin=PAGE, lease=address.lease, sampling=_ONE),
            )
            ended = perf_counter()
            if not isinstance(report, SendReport) or report.reused != PAGE or done.received_tokens != PAGE:
                raise SystemExit(f"the page was not sent from the sender's cache: {report}, {done}")
            for verb, seconds in zip(VERBS, (ready - began, sent - ready, ended - sent), strict=True):
                spent[verb] += seconds
        return spent

    async def local(self, prompts: list[TokenArray]) -> None:
        """The sender itself generates one token."""
        await self.warm(prompts)

    @staticmethod
    async def _token(client: RpcClient, body: StartGenerate) -> Generated:
        stream = client.stream(body)
        async for _ in stream:
            pass
        if not isinstance(stream.reply, Generated):
            raise SystemExit(f"start_generate answered {stream.reply}")
        return stream.reply


async def _connect(bus: ZmqBus, cluster: Cluster) -> dict[str, RpcClient]:
    """A session to each engine, once the engines know each other."""
    clients = {}
    for engine in cluster.status().engines:
        client = clients[engine.info.engine_id] = await connect(bus, engine.info.endpoint)
        async with asyncio.timeout(30):
            while True:
                info = await client.call(Info())
                if isinstance(info, InfoReply) and any(link.state == "ready" for link in info.links):
                    break
                await asyncio.sleep(0.05)
    return clients


def _prompts(seed: int) -> Iterator[TokenArray]:
    """Prompts that have no page in common."""
    random = np.random.default_rng(seed)
    while True:
        yield random.integers(3, 30_000, PAGE + 1).astype(np.int32)


def main() -> None:
    bench = Benchmark("subrequests", "prep_recv, remote_send and start_generate against bare ZeroMQ round trips")
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=50, help="requests of one run (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few runs: shows that it works, not how fast")
    args = bench.arguments(parser, repeat=41, warmup=3)
    if args.quick:
        args.calls, args.repeat, args.warmup = 10, 3, 1

    pipe, end = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve_echo, args=(end,), daemon=True)
    server.start()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(pipe.recv())
    with Cluster(2, engine_args=_FAKE) as cluster, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        bus = runner.run(_make_bus())
        clients = runner.run(_connect(bus, cluster))
        caller = Caller(clients["e0"], clients["e1"])
        fresh = _prompts(0)
        runs = args.warmup + args.repeat
        prompts, others = ([[next(fresh) for _ in range(args.calls)] for _ in range(runs)] for _ in range(2))
        for each in prompts + others:
            runner.run(caller.warm(each))
        moved, stayed, single = iter(prompts), iter(prompts), iter(others)
        spent: list[dict[str, float]] = []
        body = StartGenerate(request_id="r1000", sub_id="s1000", prompt=bytes(4 * (PAGE + 1)), sampling=_ONE)
        size = HEADER_BYTES + len(encode(Call(id=100, body=body)))
        request = size.to_bytes(2, "little") + bytes(size - 2)
        samples = interleave(
            {
                "echo": partial(echo, socket, request, ROUND_TRIPS * args.calls),
                "local": lambda: runner.run(caller.local(next(stayed))),
                "moved": lambda: runner.run(caller.disaggregated(next(moved))),
                "one by one": lambda: spent.append(runner.run(caller.one_by_one(next(single)))),
            },
            warmup=args.warmup,
            repeat=args.repeat,
        )
        runner.run(bus.close())
    socket.send(b"")
    context.destroy(linger=500)
    server.join()

    scale = 1e6 / args.calls
    note = f"{size} bytes each way"
    bench.row(f"{ROUND_TRIPS} bare round trips", samples["echo"], unit="µs", scale=scale, note=note)
    bench.row("start_generate alone", samples["local"], unit="µs", scale=scale, note="one engine, its page cached")
    name, bare = "prep_recv + remote_send + start_generate", f"{ROUND_TRIPS} bare round trips"
    note = "one page from the sender's cache, one token; the last two at once"
    bench.row(name, samples["moved"], unit="µs", scale=scale, limit=bare, note=note)
    bench.row(f"{name} / bare", ratio(samples["moved"], samples["echo"]), unit="x", limit=bare)
    for verb, trips in VERBS.items():
        sample = Sample(tuple(each[verb] for each in spent[args.warmup :]))
        limit = f"{trips} bare round trip{'s' if trips > 1 else ''}"
        bench.row(f"{verb}, one after the other", sample, unit="µs", scale=scale, limit=limit)
        echo_share = samples["echo"].scaled(trips / ROUND_TRIPS)
        bench.row(f"{verb}, one after the other / bare", ratio(sample, echo_share), unit="x", limit=limit)
    bench.finish(args)


async def _make_bus() -> ZmqBus:
    return ZmqBus(Peer("router", "perf", new_epoch()))


if __name__ == "__main__":
    main()
