"""One engine process on a GPU, offline: decode by batch, prefill by length, throughput, and start to ready.

Prompts are random token ids, weights are made up, sampling is greedy and ignores the end token; everything goes over
the bus, so the figures hold for what a router sees. Decode is the slope between 32 and 256 outputs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from microserve.runtime.codec import pack_tokens
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import Announce, Generated, Heartbeat, Leave, Ok, SamplingParams, StartGenerate, Stats
from microserve.runtime.rpc import RpcServer, connect
from microserve.runtime.zmq_bus import ZmqBus
from perf.harness import Benchmark, Sample
from perf.shapes import SHAPES, write_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from microserve.runtime.rpc import IncomingCall, RpcClient

PEER: dict[str, float] = {
    "decode 1": 4.95,
    "decode 8": 5.10,
    "decode 64": 6.10,
    "decode 256": 11.44,
    "prefill 512": 16.1,
    "prefill 2048": 52.3,
    "prefill 8192": 218.6,
    "throughput": 6180.0,
    "start": 36.0,
}
"""vLLM 0.24.0 on one H200 with its defaults: milliseconds, output tokens/s, seconds."""


AIM: dict[str, str] = {
    "decode 1": "4.3",
    "decode 8": "4.4",
    "decode 64": "5.5",
    "decode 256": "9.5",
    "prefill 512": "13.5",
    "prefill 2048": "46",
    "prefill 8192": "205",
}


def main() -> None:
    bench = Benchmark("engine", "one engine process: decode, prefill, throughput, start")
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b", help="(default: %(default)s)")
    parser.add_argument("--batches", default="1,8,64,256", help="decode batches (default: %(default)s)")
    parser.add_argument("--prompts", default="512,2048,8192", help="prefill lengths (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=500, help="throughput: requests (default: %(default)s)")
    parser.add_argument("--flags", default="", help="further flags of the engine, separated by spaces")
    args = bench.arguments(parser, repeat=3, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder) / args.shape, args.shape)
        asyncio.run(_run(bench, args, model))
    bench.finish(args)


class _Router:
    """As much of a router as an engine needs to announce itself to."""

    def __init__(self) -> None:
        self.server = RpcServer(self._handle)
        self.announced: asyncio.Future[Announce] = asyncio.get_running_loop().create_future()

    def _handle(self, call: IncomingCall) -> None:
        if isinstance(call.body, Announce) and not self.announced.done():
            self.announced.set_result(call.body)
        if isinstance(call.body, Announce | Heartbeat | Leave):
            call.reply(Ok())


async def _run(bench: Benchmark, args: argparse.Namespace, model: Path) -> None:
    bus = ZmqBus(Peer("router", "perf", new_epoch()))
    router = _Router()
    listener = await bus.listen("tcp://127.0.0.1:*", router.server)
    command = [sys.executable, "-P", "-m", "microserve.engine", "--model", str(model), "--dummy-weights"]
    command += ["--executor", "cuda", "--step-tokens", "8192", "--max-running", "512", "--max-context", "16384"]
    command += ["--routers", listener.endpoint, "--engine-id", "perf", *args.flags.split()]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*command, env=os.environ)
    try:
        announced = await _announced(router, process)
        ready = time.perf_counter() - began
        bench.row("start to ready", Sample((ready,)), unit="s", limit="15 s", note=f"vLLM {PEER['start']} s")
        client = await connect(bus, announced.info.endpoint)
        load = _Load(client, announced.info.model.vocab_size)
        await load.generate(8, 128, 16)
        for batch in map(int, filter(None, args.batches.split(","))):
            sample = Sample(tuple([await load.decode_step(batch) for _ in range(args.repeat)]))
            _row(bench, f"decode {batch}", sample, "ms a step")
        for length in map(int, filter(None, args.prompts.split(","))):
            await load.generate(1, length, 1)
            sample = Sample(tuple([1e3 * await load.generate(1, length, 1) for _ in range(args.repeat)]))
            _row(bench, f"prefill {length}", sample, "ms")
        if args.requests:
            seconds = await load.generate(args.requests, 1024, 256)
            rate = args.requests * 256 / seconds
            bench.row(
                f"{args.requests} x 1024/256",
                Sample((rate,)),
                unit="tok/s",
                limit="6900" if args.requests == 500 else "",
                note=f"vLLM {PEER['throughput']:.0f}",
            )
        stats = await client.call(Stats())
        print(json.dumps({"integrity": getattr(stats, "integrity", "?")}), file=sys.stderr)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 60)
        await bus.close()


async def _announced(router: _Router, process: asyncio.subprocess.Process) -> Announce:
    ended = asyncio.create_task(process.wait())
    try:
        ends: set[asyncio.Future[Any]] = {router.announced, ended}
        await asyncio.wait(ends, timeout=300, return_when=asyncio.FIRST_COMPLETED)
        if not router.announced.done():
            raise SystemExit("perf.engine: the engine did not start; it says why above")
        return router.announced.result()
    finally:
        ended.cancel()


def _row(bench: Benchmark, name: str, sample: Sample, unit: str) -> None:
    peer = PEER.get(name)
    bench.row(name, sample, unit=unit, limit=AIM.get(name, ""), note=f"vLLM {peer} ms" if peer is not None else "")


class _Load:
    """Sends requests to one engine and waits for their ends."""

    def __init__(self, client: RpcClient, vocabulary: int) -> None:
        self._client = client
        self._random = np.random.default_rng(0)
        self._vocabulary = vocabulary
        self._number = 0

    async def generate(self, batch: int, prompt: int, output: int) -> float:
        """Seconds for `batch` requests at once, each with a prompt of its own."""
        bodies = [self._body(prompt, output) for _ in range(batch)]
        began = time.perf_counter()
        ends = await asyncio.gather(*[self._client.call(body) for body in bodies])
        seconds = time.perf_counter() - began
        _check(ends, output)
        return seconds

    async def decode_step(self, batch: int) -> float:
        """Milliseconds a step at that batch: the slope between 32 and 256 outputs."""
        short = await self.generate(batch, 128, 32)
        long = await self.generate(batch, 128, 256)
        return 1e3 * (long - short) / (256 - 32)

    def _body(self, prompt: int, output: int) -> StartGenerate:
        self._number += 1
        ids = self._random.integers(0, self._vocabulary, prompt)
        sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
        return StartGenerate(
            request_id=f"r{self._number}", sub_id=f"s{self._number}", prompt=pack_tokens(ids), sampling=sampling
        )


def _check(ends: Sequence[Any], output: int) -> None:
    for end in ends:
        if not isinstance(end, Generated) or end.usage.completion_tokens != output:
            raise RuntimeError(f"a request ended otherwise: {end!r}")


if __name__ == "__main__":
    main()
