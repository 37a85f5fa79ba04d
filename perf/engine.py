"""One engine process on a GPU, offline: decode by batch, prefill by length, throughput, and start to ready.

Prompts are random token ids, weights are made up, sampling is greedy unless `--temperature` says otherwise, the end
token is ignored, and everything goes over the bus: the figures hold for what a router sees. Decode is the slope between
32 and 256 outputs. With `--limits`, what the GPU can do at best is measured first, and beside each figure stands the
least that the shape leaves it. With `--logprobs` or `--repetition-penalty`, every row asks for such.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from microserve.runtime.codec import pack_tokens
from microserve.runtime.ids import Peer, new_epoch
from microserve.runtime.messages import Announce, Generated, Heartbeat, Leave, Ok, SamplingParams, StartGenerate, Stats
from microserve.runtime.rpc import RpcServer, connect
from microserve.runtime.zmq_bus import ZmqBus
from perf.harness import Benchmark, Sample, number
from perf.limits import measured, work_of
from perf.shapes import SHAPES, write_shape

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from microserve.runtime.messages import EngineInfo
    from microserve.runtime.rpc import IncomingCall, RpcClient
    from perf.limits import Rates, Work

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
    "start": "15",
    "decode 1": "4.3",
    "decode 8": "4.4",
    "decode 64": "5.5",
    "decode 256": "9.5",
    "prefill 512": "13.5",
    "prefill 2048": "46",
    "prefill 8192": "205",
    "throughput": "6900",
}
_PROMPT, _SHORT, _LONG = 128, 32, 256
"""Tokens of a decode's prompt, where nothing else is said, and outputs of its two runs."""


def main() -> None:
    bench = Benchmark("engine", "one engine process: decode, prefill, throughput, start")
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b", help="(default: %(default)s)")
    parser.add_argument("--batches", default="1,8,64,256", help="decode batches (default: %(default)s)")
    parser.add_argument("--behind", type=int, default=_PROMPT, help="prompt of a decode (default: %(default)s tokens)")
    parser.add_argument("--prompts", default="128,512,2048,8192", help="prefill lengths (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=500, help="throughput: requests (default: %(default)s)")
    parser.add_argument("--executor", choices=("cuda", "torch"), default="cuda", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    parser.add_argument("--logprobs", type=int, help="of so many tokens beside the chosen one (default: none)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="1 is none (default: %(default)s)")
    parser.add_argument("--limits", action="store_true", help="measure the GPU's limits first (perf.roofline)")
    parser.add_argument("--flags", default="", help="further flags of the engine, separated by spaces")
    args = bench.arguments(parser, repeat=3, warmup=1)
    table = _Table(bench, work_of(SHAPES[args.shape]), measured() if args.limits else ())
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder) / args.shape, args.shape)
        asyncio.run(_run(table, args, model))
    bench.finish(args)


class _Table:
    """Rows with what they are held against: the aim, the peer's figure, and the GPU's limit where it was measured."""

    def __init__(self, bench: Benchmark, work: Work, rates: tuple[Rates, ...]) -> None:
        self._bench = bench
        self._work = work
        self._rates = rates

    def start(self, sample: Sample) -> None:
        self._row("start to ready", "start", sample, "s")

    def decode(self, batch: int, prompt: int, sample: Sample) -> None:
        context = prompt + (_SHORT + _LONG) / 2
        limits = [1e3 * self._work.decode_step(batch, context, rates) for rates in self._rates]
        name = f"decode {batch}"
        if prompt == _PROMPT:
            self._row(name, name, sample, "ms", limits)
        else:
            self._row(f"{name} behind {prompt}", "", sample, "ms", limits)

    def prefill(self, tokens: int, sample: Sample) -> None:
        limits = [1e3 * self._work.prefill(tokens, rates) for rates in self._rates]
        self._row(f"prefill {tokens}", f"prefill {tokens}", sample, "ms", limits)

    def throughput(self, requests: int, prompt: int, output: int, sample: Sample) -> None:
        limits = [self._work.throughput(requests, prompt, output, rates) for rates in self._rates]
        key = "throughput" if (requests, prompt, output) == (500, 1024, 256) else ""
        self._row(f"{requests} x {prompt}/{output}", key, sample, "tok/s", limits)

    def _row(self, name: str, key: str, sample: Sample, unit: str, limits: Sequence[float] = ()) -> None:
        notes = [f"vLLM {number(PEER[key])}"] if key in PEER else []
        if limits:
            notes.append(f"limit {', under load '.join(map(number, limits))}")
        self._bench.row(name, sample, unit=unit, limit=AIM.get(key, ""), note="; ".join(notes))


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


async def _run(table: _Table, args: argparse.Namespace, model: Path) -> None:
    # The sizes of steps are those that an engine takes by itself.
    flags = ["--model", str(model), "--dummy-weights", "--executor", args.executor, "--device", "cuda:0"]
    flags += ["--max-context", "16384", *args.flags.split()]
    sampling = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        logprobs=args.logprobs,
        ignore_eos=True,
    )
    async with started(flags) as engine:
        table.start(Sample((engine.seconds,)))
        load = _Load(engine.client, engine.info.model.vocab_size, sampling)
        await load.generate(8, _PROMPT, 16)
        for batch in map(int, filter(None, args.batches.split(","))):
            steps = [await load.decode_step(batch, args.behind) for _ in range(args.repeat)]
            table.decode(batch, args.behind, Sample(tuple(steps)))
        for length in map(int, filter(None, args.prompts.split(","))):
            await load.generate(1, length, 1)
            table.prefill(length, Sample(tuple([1e3 * await load.generate(1, length, 1) for _ in range(args.repeat)])))
        if args.requests:
            seconds = [await load.generate(args.requests, 1024, 256) for _ in range(args.repeat)]
            rates = Sample(tuple(args.requests * 256 / each for each in seconds))
            table.throughput(args.requests, 1024, 256, rates)
        stats = await engine.client.call(Stats())
        print(json.dumps({"integrity": getattr(stats, "integrity", "?")}), file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Started:
    """An engine that serves."""

    client: RpcClient
    info: EngineInfo
    seconds: float
    """From the start of its process until it announced itself."""


@contextlib.asynccontextmanager
async def started(flags: Sequence[str]) -> AsyncIterator[Started]:
    """An engine process with these flags, from when it is ready; on the way out it is told to end, and has ended."""
    bus = ZmqBus(Peer("router", "perf", new_epoch()))
    router = _Router()
    listener = await bus.listen("tcp://127.0.0.1:*", router.server)
    command = [sys.executable, "-P", "-m", "microserve.engine", *flags]
    command += ["--routers", listener.endpoint, "--engine-id", "perf"]
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(*command, env=os.environ)
    try:
        announced = await _announced(router, process)
        ready = time.perf_counter() - began
        yield Started(await connect(bus, announced.info.endpoint), announced.info, ready)
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
            raise SystemExit("the engine did not start; it says why above")
        return router.announced.result()
    finally:
        ended.cancel()


class _Load:
    """Sends requests to one engine and waits for their ends."""

    def __init__(self, client: RpcClient, vocabulary: int, sampling: SamplingParams) -> None:
        self._client = client
        self._sampling = sampling
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

    async def decode_step(self, batch: int, prompt: int) -> float:
        """Milliseconds a step at that batch: the slope between 32 and 256 outputs."""
        short = await self.generate(batch, prompt, _SHORT)
        long = await self.generate(batch, prompt, _LONG)
        return 1e3 * (long - short) / (_LONG - _SHORT)

    def _body(self, prompt: int, output: int) -> StartGenerate:
        self._number += 1
        ids = self._random.integers(0, self._vocabulary, prompt)
        return StartGenerate(
            request_id=f"r{self._number}",
            sub_id=f"s{self._number}",
            prompt=pack_tokens(ids),
            sampling=replace(self._sampling, max_tokens=output),
        )


def _check(ends: Sequence[Any], output: int) -> None:
    for end in ends:
        if not isinstance(end, Generated) or end.usage.completion_tokens != output:
            raise RuntimeError(f"a request ended otherwise: {end!r}")


if __name__ == "__main__":
    main()
