"""The first two tokens of disaggregated requests, through a router: engines at rest, and engines that serve others.

Two engine processes, one that prefills and one that decodes, and the transport that engines use. A client on the bus
sees the first token of a prompt that nobody has cached, and the second: by who says the first one, and against a
local prefill in the same run. Then the same while the engine that decodes does so for others, and while the engine that
prefills has long prompts to compute, one after the other: whatever waits for their steps shows there.

    python -m perf.first_token                               # steps that take as long as an 8B's on an H200
    python -m perf.first_token --devices cuda:0,cuda:1       # an 8B on two GPUs, with dummy weights
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from tests.cluster import Cluster

from microserve.runtime.async_client import AsyncClient
from microserve.runtime.messages import Tokens
from perf.harness import Benchmark, Sample
from perf.shapes import write_shape

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

_PREFILLS, _DECODES = "p", "d"
_SETTINGS = {
    "from the engine that prefills": {"min_remote": 1, "early_first": 8192},
    "from the engine that decodes": {"min_remote": 1, "early_first": 0},
}
_STEP_TOKENS = 8192
# As in `perf.strategies`.
_FAKE = (
    *("--executor", "fake", "--model", "tokens-only", "--kv-pages", "16384"),
    *("--fake-decode-base-us", "4300", "--fake-decode-us-per-sequence", "100", "--fake-prefill-us-per-token", "20.4"),
    *("--fake-max-context", "16384", "--max-running", "64", "--step-tokens", str(_STEP_TOKENS)),
)


def main() -> None:
    bench = Benchmark("first_token", "the first two tokens of disaggregated requests, through a router")
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", help="of the two engines: cuda:0,cuda:1 (default: steps of modelled length)")
    parser.add_argument("--tokens", type=int, default=3000, help="prompt length (default: %(default)s)")
    parser.add_argument("--busy", type=int, default=8000, help="length of the others' prompts (default: %(default)s)")
    parser.add_argument("--decodes", type=int, default=16, help="others for whom one decodes (default: %(default)s)")
    args = bench.arguments(parser, repeat=15, warmup=3)
    with tempfile.TemporaryDirectory() as folder, _cluster(args, Path(folder)) as cluster:
        asyncio.run(_measure(bench, args, cluster))
    bench.finish(args)


@contextlib.contextmanager
def _cluster(args: argparse.Namespace, folder: Path) -> Iterator[Cluster]:
    devices: Sequence[str] = ("", "")
    flags: tuple[str, ...] = _FAKE
    if args.devices is not None:
        devices = tuple(args.devices.split(","))
        model = write_shape(folder / "llama-3.1-8b", "llama-3.1-8b")
        flags = ("--executor", "cuda", "--model", str(model), "--dummy-weights", "--kv-pages", "6000")
        flags += ("--max-context", "16384", "--max-running", "64", "--step-tokens", str(_STEP_TOKENS))
    with Cluster(0, engine_args=flags) as cluster:
        for name, label, device in zip((_PREFILLS, _DECODES), ("prefill", "decode"), devices, strict=True):
            where = ("--device", device) if device else ()
            cluster.add_engine(name, "--labels", f"{label}=yes", *where, wait=False)
        cluster.wait_ready(2)
        yield cluster


async def _measure(bench: Benchmark, args: argparse.Namespace, cluster: Cluster) -> None:
    prompts = _prompts()
    async with AsyncClient(cluster.router) as client:
        await _linked(client)
        local = [await _local(client, next(prompts)[: args.tokens]) for _ in range(args.warmup + args.repeat)]
        alone = Sample(tuple(local[args.warmup :]))
        bench.row("local prefill: first token", alone, unit="ms", scale=1e3)
        loads = {
            "at rest": None,
            "decoding": _Load(_DECODES, args.decodes, 100, 2000),
            "prefilling": _Load(_PREFILLS, 2, args.busy, 1),
        }
        for state, load in loads.items():
            for name, settings in _SETTINGS.items():
                await client.set_strategy("prefill_decode", settings=settings)
                async with _others(client, load):
                    seen = [await _two(client, next(prompts)[: args.tokens]) for _ in range(args.warmup + args.repeat)]
                first, second = (Sample(tuple(each)) for each in zip(*seen[args.warmup :], strict=True))
                note = f"{first.median / alone.median:.3f}x local" if load is None else ""
                bench.row(f"{state}, {name}: first token", first, unit="ms", scale=1e3, note=note)
                bench.row(f"{state}, {name}: second, after the first", second, unit="ms", scale=1e3)


def _prompts() -> Iterator[list[int]]:
    """Prompts that have no page in common."""
    random = np.random.default_rng(1)
    while True:
        yield random.integers(3, 30_000, _STEP_TOKENS).tolist()


async def _linked(client: AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            links = (await client.engine(_PREFILLS).info()).links
            if links and all(link.state == "ready" for link in links):
                return
            await asyncio.sleep(0.05)


async def _local(client: AsyncClient, prompt: list[int]) -> float:
    """Seconds to the first token, where nothing moves."""
    began = perf_counter()
    async for part in client.engine(_DECODES).start_generate(prompt, max_tokens=1, temperature=0, ignore_eos=True):
        if isinstance(part, Tokens):
            return perf_counter() - began
    raise SystemExit("the engine said nothing")


async def _two(client: AsyncClient, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token, and from there to the second."""
    began, stamps = perf_counter(), list[float]()
    async with client.stream(prompt, max_tokens=2, temperature=0, ignore_eos=True) as stream:
        async for delta in stream:
            stamps += [perf_counter()] * len(delta.token_ids)
    return stamps[0] - began, stamps[1] - stamps[0]


@dataclass(frozen=True, slots=True)
class _Load:
    """So many others at an engine, each with one request after the other."""

    engine: str
    others: int
    prompt: int
    output: int


@contextlib.asynccontextmanager
async def _others(client: AsyncClient, load: _Load | None) -> AsyncIterator[None]:
    random = np.random.default_rng(2)

    async def ask(load: _Load) -> None:
        while True:
            prompt = random.integers(3, 30_000, load.prompt).tolist()
            await client.engine(load.engine).generate(prompt, max_tokens=load.output, temperature=0, ignore_eos=True)

    asking = [] if load is None else [asyncio.ensure_future(ask(load)) for _ in range(load.others)]
    await asyncio.sleep(1.0 if asking else 0.0)
    try:
        yield
    finally:
        for each in asking:
            each.cancel()
        await asyncio.gather(*asking, return_exceptions=True)


if __name__ == "__main__":
    main()
