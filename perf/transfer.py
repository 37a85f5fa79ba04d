"""KV pages pushed from process to process through the transport of the engines, against a copy of the same bytes.

Two processes, a pool in each, NIXL between them as engines use it; `post` and `poll` are timed together, planning of
descriptors included. On a CPU the peer is a memcpy of the same pages, run by run, within one process. Between GPUs
(`--device cuda:0 --peer-device cuda:1`) it is one plain copy of as many bytes from device to device.
Pages lie in one piece, in runs of four, or scattered, on both sides.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from microserve.kv.transfer.base import KvMemory, PostState
from microserve.kv.transfer.cuda_ipc import near_memory
from microserve.kv.transfer.nixl import NixlTransport
from microserve.kv.transfer.plan import runs
from perf.harness import Benchmark, Sample, interleave, measure, ratio

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from microserve.kv.pages import PageArray

_POLL = 20e-6
"""Seconds between polls of the receiver: as an engine does while it expects pages."""


class Buffer:
    """`nbytes` on a device, touched."""

    def __init__(self, device: str, nbytes: int) -> None:
        self.device = device
        self.nbytes = nbytes
        self.owner: Any
        if device == "cpu":
            self.owner = np.ones(nbytes, dtype=np.uint8)
            self.address = int(self.owner.ctypes.data)
        else:
            import torch

            self.owner = torch.ones(nbytes, dtype=torch.uint8, device=device)
            torch.cuda.synchronize(device)
            self.address = int(self.owner.data_ptr())

    def memory(self, page_bytes: int) -> KvMemory:
        return KvMemory(self.address, page_bytes, self.nbytes // page_bytes, device=self.device, owner=self.owner)


def main() -> None:
    bench = Benchmark("transfer", "KV pages pushed to another process, against a copy of the same bytes")
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu", help="where the sender's pool is (default: %(default)s)")
    parser.add_argument("--peer-device", default="cpu", help="where the receiver's pool is (default: %(default)s)")
    parser.add_argument(
        "--mib", type=int, default=64, help="MiB in one push; pools are twice that (default: %(default)s)"
    )
    parser.add_argument(
        "--page-kib",
        type=int,
        nargs="+",
        default=[16, 64, 512, 2048],
        help="page sizes, KiB; 2048 is 16 tokens of an 8B model (default: %(default)s)",
    )
    parser.add_argument(
        "--tls", help="UCX_TLS: what UCX may use, such as tcp; ^cuda_ipc maps no pool either (default: its own choice)"
    )
    parser.add_argument("--ucx-alone", action="store_true", help="map no pool of a GPU: UCX carries every page")
    args = bench.arguments(parser, repeat=9, warmup=2)
    if args.tls:
        os.environ["UCX_TLS"] = args.tls
    nbytes = args.mib << 20
    sizes = [kib << 10 for kib in args.page_kib]
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    receiver = context.Process(target=receive, args=(there, args.peer_device, 2 * nbytes, sizes), daemon=True)
    receiver.start()
    there.close()
    try:
        metadata: dict[int, bytes] = here.recv()
        buffer = Buffer(args.device, 2 * nbytes)
        copy = copier(buffer, args.peer_device, nbytes)
        for size in sizes:
            transport = open_end(buffer, size, "sender", mapping=not args.ucx_alone)
            run(bench, args, transport, metadata[size], size, nbytes, copy)
            transport.close()
    finally:
        here.close()
        receiver.join(10)
        receiver.kill()
    bench.finish(args)


def open_end(buffer: Buffer, page_bytes: int, side: str, *, mapping: bool = True) -> NixlTransport:
    """As an engine opens it."""
    memory = buffer.memory(page_bytes)
    return NixlTransport(memory, f"{side}-{page_bytes}:1", near=near_memory(memory) if mapping else None)


def run(
    bench: Benchmark,
    args: argparse.Namespace,
    transport: NixlTransport,
    metadata: bytes,
    size: int,
    nbytes: int,
    copy: Callable[[PageArray, PageArray, int], None],
) -> None:
    """Every row of one page size."""
    peer = f"receiver-{size}:1"
    connecting = transport.connect(peer, metadata)
    while (report := connecting.poll()) is None:
        transport.arrivals()
    if report.error:
        raise SystemExit(report.error)

    def push(source: PageArray, target: PageArray) -> None:
        post = transport.post(peer, source, target, b"pages")
        if isinstance(post, str):
            raise SystemExit(post)
        while (status := transport.poll(post)).state is PostState.ACTIVE:
            pass
        if status.error:
            raise SystemExit(status.error)
        transport.release(post)

    name = f"{size >> 10} KiB pages"
    for layout, length in (("in one piece", nbytes // size), ("in runs of 4", 4), ("scattered", 1)):
        source, target = (scatter(2 * nbytes // size, nbytes // size, length, seed) for seed in (1, 2))
        taken = interleave(
            {"push": partial(push, source, target), "copy": partial(copy, source, target, size)},
            warmup=args.warmup,
            repeat=args.repeat,
        )
        pieces = len(runs(source, target))
        rates = {key: Sample(tuple(nbytes / seconds / 1e9 for seconds in taken[key].values)) for key in taken}
        what = "memcpy" if args.device == "cpu" else "one peer copy"
        way = report.transport + (", mapped" if peer in transport.mapped else "")
        bench.row(f"{name} {layout}: push", rates["push"], unit="GB/s", note=f"{way}, {pieces} pieces")
        bench.row(f"{name} {layout}: {what}", rates["copy"], unit="GB/s")
        bench.row(f"{name} {layout}: push / {what}", ratio(rates["push"], rates["copy"]), unit="×")
    page = np.zeros(1, dtype=np.int32)
    one = measure(lambda: push(page, page), warmup=args.warmup, repeat=5 * args.repeat)
    bench.row(f"{name}: one page", one, unit="µs", scale=1e6)


def scatter(total: int, count: int, length: int, seed: int) -> PageArray:
    """`count` pages of `total` in runs of `length`, the runs in random places; the first `count` when it is one run."""
    if length == count:
        return np.arange(count, dtype=np.int32)
    places = np.random.default_rng(seed).permutation(total // length)[: count // length]
    return (places[:, None] * length + np.arange(length)).reshape(-1).astype(np.int32)


def copier(buffer: Buffer, peer_device: str, nbytes: int) -> Callable[[PageArray, PageArray, int], None]:
    """What a push is held against: copies the same bytes within this process."""
    other = Buffer(peer_device, buffer.nbytes)
    if buffer.device == "cpu":

        def memcpy(source: PageArray, target: PageArray, size: int) -> None:
            for first, second, count in runs(source, target):
                ctypes.memmove(other.address + second * size, buffer.address + first * size, count * size)

        return memcpy
    import torch

    def peer_copy(source: PageArray, target: PageArray, size: int) -> None:
        other.owner[:nbytes].copy_(buffer.owner[:nbytes], non_blocking=True)
        torch.cuda.synchronize(buffer.device)
        torch.cuda.synchronize(peer_device)

    return peer_copy


def receive(pipe: Connection, device: str, nbytes: int, sizes: list[int]) -> None:
    """The other process: a pool, and a transport for each page size over it, looked after until the sender is done."""
    buffer = Buffer(device, nbytes)
    transports = {size: open_end(buffer, size, "receiver") for size in sizes}
    pipe.send({size: transport.metadata() for size, transport in transports.items()})
    while not pipe.poll():
        for transport in transports.values():
            transport.arrivals()
        time.sleep(_POLL)
    for transport in transports.values():
        transport.close()


if __name__ == "__main__":
    main()
