"""Two engines on two GPUs: what moving KV between them costs, against a plain peer copy in the same run.

`remote_send` of cached prompts from a fresh pool and from a fragmented one, in GB/s of the pushes; what pushes cost the
decodes of the engine that sends; and the time to the first token of a prompt that one engine prefills and the other
continues (1P1D), against a local prefill. With one GPU for both, a copy takes next to no time: what a push takes then
is what it costs to order it and to see its end.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import Struct

from microserve.runtime.codec import pack_tokens, unpack_tokens
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import (
    Announce,
    CacheEvict,
    CacheEvicted,
    Generated,
    Heartbeat,
    Info,
    InfoReply,
    Leave,
    Meet,
    Ok,
    PeerAddress,
    Prepared,
    PrepRecv,
    Release,
    RemoteSend,
    SamplingParams,
    SendReport,
    StartGenerate,
    Tokens,
)
from microserve.runtime.rpc import RpcClient, RpcServer, connect
from microserve.runtime.zmq_bus import ZmqBus
from perf.harness import Benchmark, Sample
from perf.shapes import write_shape

if TYPE_CHECKING:
    from microserve.runtime.rpc import IncomingCall

_PAUSE = 5e-3
"""Seconds that GPUs rest before a copy, as they do before a push that is measured: an idle link takes time to wake."""
_PAGE_BYTES = 2 << 20
"""16 tokens of an 8B in bf16, the only shape there is."""
_SPARE_PAGES = 8
"""Pages that no prompt takes when a pool is filled: whoever is admitted finds a free one, and evicts nothing."""


def main() -> None:
    bench = Benchmark("disaggregation", "KV between two engines on two GPUs")
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="llama-3.1-8b", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=3000, help="prompt length (default: %(default)s)")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="of sender and receiver (default: %(default)s)")
    parser.add_argument("--pages", type=int, default=6000, help="pages of each pool (default: %(default)s)")
    parser.add_argument("--log-level", default="warning", help="of the engines (default: %(default)s)")
    args = bench.arguments(parser, repeat=9, warmup=2)
    devices = tuple(args.devices.split(","))
    most = max(int(each.removeprefix("cuda:")) for each in devices)
    if torch.cuda.device_count() <= most:
        raise SystemExit(f"perf.disaggregation: there is no cuda:{most} (--devices)")
    copied = _peer_copy(devices[0], devices[1], 1 << 30, args.repeat)
    bench.row("peer copy of 1 GiB", copied, unit="GB/s", note=args.devices)
    nbytes = args.tokens // 16 * _PAGE_BYTES
    for pause in (0.0, _PAUSE):
        rested = _peer_copy(devices[0], devices[1], nbytes, args.repeat, pause)
        note = f"after {1e3 * pause:g} ms without work" if pause else "one after the other"
        bench.row(f"peer copy of {nbytes >> 20} MiB", rested, unit="GB/s", note=note)
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder) / args.shape, args.shape)
        asyncio.run(_run(bench, args, model, devices, copied.median))
    bench.finish(args)


def _peer_copy(sender: str, receiver: str, nbytes: int, repeat: int, pause: float = 0.0) -> Sample:
    here = torch.empty(nbytes, dtype=torch.uint8, device=sender)
    there = torch.empty(nbytes, dtype=torch.uint8, device=receiver)
    rates = []
    for attempt in range(repeat + 2):
        torch.cuda.synchronize(sender)
        time.sleep(pause)
        began = time.perf_counter()
        there.copy_(here)
        torch.cuda.synchronize(sender)
        torch.cuda.synchronize(receiver)
        if attempt >= 2:
            rates.append(nbytes / (time.perf_counter() - began) / 1e9)
    return Sample(tuple(rates))


class _Router:
    """As much of a router as engines need to announce themselves to."""

    def __init__(self) -> None:
        self.server = RpcServer(self._handle)
        self.announced: dict[str, Announce] = {}
        self.changed = asyncio.Event()

    def _handle(self, call: IncomingCall) -> None:
        if isinstance(call.body, Announce):
            self.announced[call.body.info.engine_id] = call.body
            self.changed.set()
        if isinstance(call.body, Announce | Heartbeat | Leave):
            call.reply(Ok())


async def _run(bench: Benchmark, args: argparse.Namespace, model: Path, devices: tuple[str, ...], limit: float) -> None:
    bus = ZmqBus(Peer("router", "perf", new_epoch()))
    router = _Router()
    listener = await bus.listen("tcp://127.0.0.1:*", router.server)
    processes = []
    for name, device in zip("ab", devices, strict=True):
        command = [sys.executable, "-P", "-m", "microserve.engine", "--model", str(model), "--dummy-weights"]
        command += ["--executor", "cuda", "--device", device, "--step-tokens", "8192", "--max-running", "64"]
        command += ["--max-context", "16384", "--routers", listener.endpoint, "--engine-id", name]
        command += ["--transport", "nixl", "--kv-pages", str(args.pages), "--log-level", args.log_level]
        processes.append(await asyncio.create_subprocess_exec(*command, env=os.environ))
    try:
        async with asyncio.timeout(120):
            while len(router.announced) < 2:
                router.changed.clear()
                await router.changed.wait()
        engines = {name: await connect(bus, each.info.endpoint) for name, each in router.announced.items()}
        await _introduce(router, engines)
        pair = _Pair(engines["a"], engines["b"], args.tokens)
        links = await engines["a"].call(Info())
        if isinstance(links, InfoReply):
            print("links:", links.links, file=sys.stderr)
        for what in ("fresh", "fragmented"):
            if what == "fragmented":
                await pair.fragment(args.pages)
            for _ in range(args.warmup):
                await pair.send()
            reports = [await pair.send() for _ in range(args.repeat)]
            rates = Sample(tuple(each.bytes / each.push_seconds / 1e9 for each in reports))
            share = rates.median / limit
            bench.row(f"push, {what} pool", rates, unit="GB/s", note=f"{share:.0%} of the peer copy")
            bench.row(
                f"remote_send, {what} pool",
                Sample(tuple(1e3 * each.seconds for each in reports)),
                unit="ms",
                note="all",
            )
        await pair.evict()
        await pair.decode_step()
        alone, pushing, busy = [], [], []
        for _ in range(3):
            alone.append(await pair.decode_step())
            milliseconds, reports = await pair.decode_step_while_pushing()
            pushing.append(milliseconds)
            busy += [each.bytes / each.push_seconds / 1e9 for each in reports]
        bench.row("decode 8, alone", Sample(tuple(alone)), unit="ms")
        bench.row("decode 8, while pushing", Sample(tuple(pushing)), unit="ms", note=f"{len(busy)} pushes")
        rates = Sample(tuple(busy))
        bench.row("push, while decoding 8", rates, unit="GB/s", note=f"{rates.median / limit:.0%} of the peer copy")
        for _ in range(args.warmup):
            await pair.local()
            await pair.first_token_early()
            await pair.disaggregated()
        local, early, apart = [], [], []
        for _ in range(args.repeat):
            local.append(await pair.local())
            early.append(await pair.first_token_early())
            apart.append(await pair.disaggregated())
        prefilled = Sample(tuple(local))
        bench.row("TTFT, local prefill", prefilled, unit="ms", scale=1e3)
        first, second = (Sample(tuple(seconds)) for seconds in zip(*early, strict=True))
        note = f"{first.median / prefilled.median:.3f}x local"
        bench.row("TTFT, 1P1D, first token from the sender", first, unit="ms", scale=1e3, note=note)
        bench.row("1P1D: its second token, after the first", second, unit="ms", scale=1e3)
        whole, push = (Sample(tuple(getattr(each, name) for each in apart)) for name in ("seconds", "pushing"))
        ratio, without = whole.median / prefilled.median, (whole.median - push.median) / prefilled.median
        note = f"{ratio:.3f}x local; {without:.3f}x without the push"
        bench.row("TTFT, 1P1D, first token from the receiver", whole, unit="ms", scale=1e3, note=note)
        for name, what in _PARTS.items():
            part = Sample(tuple(getattr(each, name) for each in apart))
            bench.row(f"1P1D: {what}", part, unit="ms", scale=1e3)
        last = Sample(tuple([await pair.step_alone() for _ in range(3)]))
        bench.row("decode 1, prompt as long", last, unit="ms", note="what the last token's step is, at least")
    finally:
        for process in processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            await asyncio.wait_for(process.wait(), 60)
        await bus.close()


async def _introduce(router: _Router, engines: dict[str, RpcClient]) -> None:
    for name, client in engines.items():
        peers = [
            PeerAddress(engine_id=other, epoch=each.info.epoch, endpoint=each.info.endpoint)
            for other, each in router.announced.items()
            if other != name
        ]
        await client.call(Meet(peers=peers))
    async with asyncio.timeout(60):
        for client in engines.values():
            while True:
                reply = await client.call(Info())
                if isinstance(reply, InfoReply) and reply.links and reply.links[0].state != "connecting":
                    break
                await asyncio.sleep(0.05)


class _Apart(Struct, frozen=True):
    """The seconds of one 1P1D request, and of its parts, one after the other."""

    seconds: float
    preparing: float
    sending: float
    pushing: float
    rest: float


_PARTS = {
    "preparing": "prep_recv",
    "sending": "remote_send at the sender, from its arrival to the end of the push",
    "pushing": "the push",
    "rest": "messages to and from the sender, and the last token's step",
}


class _Pair:
    """A sender and a receiver."""

    def __init__(self, sender: RpcClient, receiver: RpcClient, tokens: int) -> None:
        self._sender = sender
        self._receiver = receiver
        self._tokens = tokens
        self._random = np.random.default_rng(1)
        self._number = 0

    def _prompt(self, tokens: int | None = None) -> bytes:
        return pack_tokens(self._random.integers(0, 120_000, self._tokens if tokens is None else tokens))

    def _names(self) -> dict[str, Any]:
        self._number += 1
        return {"request_id": f"r{self._number}", "sub_id": f"s{self._number}"}

    async def _generate(self, client: RpcClient, prompt: bytes, tokens: int = 1, **fields: Any) -> Generated:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        reply = await client.call(StartGenerate(prompt=prompt, sampling=sampling, **self._names(), **fields))
        if not isinstance(reply, Generated):
            raise TypeError(reply)
        return reply

    async def _prepare(self, prompt: bytes, end: int | None) -> Prepared:
        reply = await self._receiver.call(PrepRecv(prompt=prompt, end=end, **self._names()))
        if not isinstance(reply, Prepared):
            raise TypeError(reply)
        return reply

    async def send(self) -> SendReport:
        """Sends a prompt that the sender has cached."""
        prompt = self._prompt()
        await self._generate(self._sender, prompt)
        return await self._send_cached(prompt)

    async def _send_cached(self, prompt: bytes) -> SendReport:
        address = (await self._prepare(prompt, self._tokens // 16 * 16)).address
        reply = await self._sender.call(
            RemoteSend(prompt=prompt, address=address, begin=0, end=address.end, **self._names())
        )
        await self._receiver.call(Release(lease=address.lease))
        if not isinstance(reply, SendReport):
            raise TypeError(reply)
        return reply

    async def decode_step(self) -> float:
        """Milliseconds a step of eight decodes on the sender: the slope between 32 and 256 outputs."""
        seconds = []
        for outputs in (32, 256):
            began = time.perf_counter()
            await asyncio.gather(*[self._generate(self._sender, self._prompt(128), outputs) for _ in range(8)])
            seconds.append(time.perf_counter() - began)
        return 1e3 * (seconds[1] - seconds[0]) / (256 - 32)

    async def decode_step_while_pushing(self) -> tuple[float, list[SendReport]]:
        """The same while one push follows the other, and what those report."""
        prompt = self._prompt()
        await self._generate(self._sender, prompt)
        ended, reports = asyncio.Event(), []

        async def push() -> None:
            while not ended.is_set():
                reports.append(await self._send_cached(prompt))

        pushes = asyncio.ensure_future(push())
        try:
            milliseconds = await self.decode_step()
        finally:
            ended.set()
            await pushes
        return milliseconds, reports

    async def local(self) -> float:
        """Seconds to the first token of a prompt that nobody has cached."""
        prompt = self._prompt()
        began = time.perf_counter()
        await self._generate(self._receiver, prompt)
        return time.perf_counter() - began

    async def first_token_early(self) -> tuple[float, float]:
        """The same, prefilled by the sender, which says the first token and then sends KV, as with `early_first`.
        Seconds to the first token, and from there to the second, which is the receiver's."""
        ids = unpack_tokens(prompt := self._prompt())
        began = time.perf_counter()
        address = (await self._prepare(prompt, -1)).address
        (token,) = await self._first(self._sender, prompt)
        first = time.perf_counter()
        whole = address.end // 16 * 16
        sending = asyncio.ensure_future(
            self._sender.call(RemoteSend(prompt=prompt, address=address, begin=0, end=whole, **self._names()))
        )
        longer = pack_tokens(np.append(ids, token))
        end = await self._generate(self._receiver, longer, 2, prior_output=1, lease=address.lease, begin=whole)
        second = time.perf_counter()
        report = await sending
        if end.received_tokens != whole or not isinstance(report, SendReport) or report.computed:
            raise RuntimeError(f"KV did not come: {end}, {report}")
        return first - began, second - first

    async def _first(self, client: RpcClient, prompt: bytes) -> list[int]:
        """The first token of `prompt`."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        stream = client.stream(StartGenerate(prompt=prompt, sampling=sampling, **self._names()))
        return [
            token async for part in stream if isinstance(part, Tokens) for token in unpack_tokens(part.ids).tolist()
        ]

    async def disaggregated(self) -> _Apart:
        """The same, prefilled by the sender; the first token is the receiver's, which has waited for the KV."""
        prompt = self._prompt()
        began = time.perf_counter()
        address = (await self._prepare(prompt, -1)).address
        prepared = time.perf_counter()
        sending = asyncio.ensure_future(
            self._sender.call(RemoteSend(prompt=prompt, address=address, begin=0, end=-1, **self._names()))
        )
        end = await self._generate(self._receiver, prompt, lease=address.lease, begin=-1)
        ended = time.perf_counter()
        report = await sending
        if end.recomputed_tokens or not isinstance(report, SendReport):
            raise RuntimeError(f"KV did not come: {end}, {report}")
        rest = ended - prepared - report.seconds
        return _Apart(ended - began, prepared - began, report.seconds, report.push_seconds, rest)

    async def step_alone(self) -> float:
        """Milliseconds a step of one decode on the receiver, behind a prompt of this length."""
        prompt, seconds = self._prompt(), []
        for outputs in (1, 32, 256):
            began = time.perf_counter()
            await self._generate(self._receiver, prompt, outputs)
            seconds.append(time.perf_counter() - began)
        return 1e3 * (seconds[2] - seconds[1]) / (256 - 32)

    async def fragment(self, pages: int) -> None:
        """Leaves every second page free, in both pools of so many pages; but for the last few, which are all free."""
        for client in (self._sender, self._receiver):
            await client.call(CacheEvict())
            # A prompt is a page: the KV of its one output token is never computed, and takes no second one. An empty
            # pool gives its pages away in order, and requests are admitted in the order in which they come, though 64
            # run at once: prompts lie side by side as in this list.
            prompts = [self._prompt(16) for _ in range(pages - _SPARE_PAGES)]
            for begin in range(0, len(prompts), 64):
                await asyncio.gather(*[self._generate(client, each) for each in prompts[begin : begin + 64]])
            for each in prompts[::2]:
                reply = await client.call(CacheEvict(prompt=each))
                if not isinstance(reply, CacheEvicted) or reply.pages != 1:
                    raise RuntimeError(f"a prompt of one page was not cached as such: {reply!r}")

    async def evict(self) -> None:
        """Empties both prefix trees."""
        for client in (self._sender, self._receiver):
            await client.call(CacheEvict())


if __name__ == "__main__":
    main()
