"""CPU time of the router process a request and a streamed token, against a bare Starlette endpoint.

Real processes: a router, engines with the fake executor behind it, and a bare endpoint that streams the same bytes. The
figures are CPU time of the server process (user and system, all threads), so neither engines nor clients count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from perf.harness import Benchmark, Sample, ratio

if TYPE_CHECKING:
    from collections.abc import Iterator

_READY_LIMIT = 60.0
_PORTIONS = 4
_END = b"0\r\n\r\n"


@dataclass
class Server:
    """A server under measurement: where it listens and which process it is."""

    port: int
    process: subprocess.Popen[bytes]

    def cpu(self) -> float:
        """CPU seconds so far, user and system, of all its threads: to the nanosecond, where ticks are 10 ms."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


@dataclass
class Fleet:
    """Every process of the benchmark; ended together."""

    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *arguments: str, output: int | None = None) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{len(self.processes)}.log").open("wb")
        with log:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output or log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(self.folder.glob("*.log")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start_router(fleet: Fleet, model: str, engines: int, step: float, *, module: str = "microserve.router") -> Server:
    """A router and its engines, ready. `step` is a decode step's time in seconds, whatever it holds."""
    port, bus = free_port(), f"tcp://127.0.0.1:{free_port()}"
    quiet = ("--log-level", "warning")
    router = fleet.start(module, "--bind", bus, "--http-port", str(port), *quiet)
    for index in range(engines):
        fleet.start(
            *("microserve.engine", "--engine-id", f"e{index}", "--routers", bus, *quiet),
            *(
                "--executor",
                "fake",
                "--model",
                model,
                "--model-name",
                "demo",
                "--max-running",
                "512",
                "--step-tokens",
                "4096",
            ),
            *("--fake-decode-base-us", str(step * 1e6), "--fake-decode-us-per-sequence", "0"),
            *("--fake-prefill-us-per-token", "0"),
        )
    deadline = time.monotonic() + _READY_LIMIT
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                if f'engines{{state="ready"}} {float(engines)}' in answer.read().decode():
                    return Server(port, router)
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise SystemExit(f"the router was not ready within {_READY_LIMIT:g} s\n{fleet.logs()}")


def start_bare(fleet: Fleet, recorded: dict[str, Any]) -> Server:
    """The bare endpoint, serving `recorded`."""
    file = fleet.folder / "events.json"
    file.write_text(json.dumps(recorded))
    process = fleet.start("perf.bare_http", str(file), output=subprocess.PIPE)
    if process.stdout is None or not (line := process.stdout.readline()):
        raise SystemExit(f"the bare endpoint did not start\n{fleet.logs()}")
    return Server(int(line), process)


class Connection(asyncio.Protocol):
    """One keep-alive connection: a request at a time, and as little of our own CPU as possible."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.body = bytearray()
        self.done: asyncio.Future[float] | None = None
        self.first = 0.0
        self.began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if not self.first and b"data:" in data:
            self.first = time.perf_counter()
        self.body += data
        if self.body.endswith(_END) and self.done is not None and not self.done.done():
            self.done.set_result(time.perf_counter())

    def connection_lost(self, error: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError(f"closed: {error}"))

    async def request(self, raw: bytes) -> float:
        """Sends `raw`; when its answer is complete, the time. The answer is in `body`."""
        if self.transport is None:
            raise ConnectionError("not connected")
        self.body.clear()
        self.first = 0.0
        self.done = asyncio.get_running_loop().create_future()
        self.began = time.perf_counter()
        self.transport.write(raw)
        return await self.done


def encode_request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(data)
    ) + data


def events_of(body: bytes | bytearray) -> list[str]:
    """The events of a chunked answer."""
    _, _, rest = bytes(body).partition(b"\r\n\r\n")
    text = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        text += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return [event + "\n\n" for event in text.decode().split("\n\n") if event]


async def connections(port: int, count: int) -> list[Connection]:
    loop = asyncio.get_running_loop()
    made = []
    for _ in range(count):
        _, connection = await loop.create_connection(Connection, "127.0.0.1", port)
        made.append(connection)
    return made


async def load(port: int, raw: bytes, *, requests: int, concurrency: int) -> int:
    """Sends `requests` over `concurrency` connections. How many failed."""
    open_connections = await connections(port, concurrency)
    left = iter(range(requests))
    failed = 0

    async def work(connection: Connection, numbers: Iterator[int]) -> None:
        nonlocal failed
        for _ in numbers:
            await connection.request(raw)
            failed += not (connection.body.startswith(b"HTTP/1.1 200") and b"data: [DONE]" in connection.body)

    await asyncio.gather(*(work(connection, left) for connection in open_connections))
    for connection in open_connections:
        if connection.transport is not None:
            connection.transport.close()
    await asyncio.sleep(0)
    return failed


def cpu_of(server: Server, raw: bytes, *, requests: int, concurrency: int) -> float:
    """CPU seconds a request."""
    before = server.cpu()
    failed = uvloop.run(load(server.port, raw, requests=requests, concurrency=concurrency))
    if failed:
        raise SystemExit(f"{failed} of {requests} requests failed")
    return (server.cpu() - before) / requests


async def hold(port: int, raw: bytes, count: int) -> tuple[int, int, float]:
    """`count` streams at once: how many failed, the most open at one time, and the seconds taken."""
    open_connections = await connections(port, count)
    began = time.perf_counter()
    ends = await asyncio.gather(*(connection.request(raw) for connection in open_connections), return_exceptions=True)
    seconds = time.perf_counter() - began
    good = [
        (connection.first, end)
        for connection, end in zip(open_connections, ends, strict=True)
        if isinstance(end, float) and b"data: [DONE]" in connection.body and b'"error"' not in connection.body
    ]
    changes = sorted([(first, 1) for first, _ in good] + [(end, -1) for _, end in good])
    at_once = most = 0
    for _, change in changes:
        at_once += change
        most = max(most, at_once)
    for connection in open_connections:
        if connection.transport is not None:
            connection.transport.close()
    await asyncio.sleep(0)
    return count - len(good), most, seconds


def prompt_of(port: int, tokens: int) -> str:
    """A text of exactly `tokens` tokens."""
    words = "The router takes a prompt, asks an engine, and streams what comes back. " * tokens

    def count(text: str) -> int:
        body = json.dumps({"prompt": text}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/tokenize", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: int = json.load(answer)["count"]
            return found

    low, high = 1, len(words)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if count(words[:middle]) < tokens else (low, middle)
    return words[:low]


def body_of(prompt: str, tokens: int, name: str) -> dict[str, Any]:
    """The request. `user` tells the bare endpoint which recording to play."""
    return {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "user": name,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo", help="checkpoint whose tokenizer is used (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="requests a run of one token (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="connections (default: %(default)s)")
    parser.add_argument("--long", type=int, default=256, help="requests a run of many tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=129, help="tokens of a long stream (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="time between two tokens (default: %(default)s)")
    parser.add_argument("--held", type=int, default=1000, help="streams held at once (default: %(default)s)")
    bench = Benchmark("router", "CPU time of the router a request and a token, against a bare Starlette endpoint")
    args = bench.arguments(parser, repeat=5, warmup=1)
    if args.step_ms <= 0 or args.tokens < 2:
        # Without a pause both sides merge tokens into as few events as they like, and nothing is compared.
        parser.error("--step-ms must be positive, and --tokens at least 2")
    with tempfile.TemporaryDirectory(prefix="microserve-perf-") as folder:
        fleet = Fleet(Path(folder))
        try:
            compare(bench, args, fleet)
        finally:
            fleet.end()
    with tempfile.TemporaryDirectory(prefix="microserve-perf-") as folder:
        fleet = Fleet(Path(folder))
        try:
            hold_many(bench, args, fleet)
        finally:
            fleet.end()
    bench.finish(args)


def compare(bench: Benchmark, args: argparse.Namespace, fleet: Fleet) -> None:
    """Interleaved rounds of both servers, short streams and long ones."""
    step = args.step_ms / 1000
    ours = start_router(fleet, args.model, 1, step)
    prompt = prompt_of(ours.port, 128)
    raw, recorded = {}, {}
    for name, tokens in (("short", 1), ("long", args.tokens)):
        raw[name] = encode_request(body_of(prompt, tokens, name))

        async def record(data: bytes = raw[name]) -> list[str]:
            (connection,) = await connections(ours.port, 1)
            await connection.request(data)
            return events_of(connection.body)

        recorded[name] = {"events": uvloop.run(record()), "pause": step}
    events = len(recorded["long"]["events"]) - len(recorded["short"]["events"])
    servers = {"router": ours, "bare": start_bare(fleet, recorded)}
    found: dict[tuple[str, str], list[float]] = {(who, what): [] for who in servers for what in raw}
    for turn in range(args.warmup + args.repeat):
        used = dict.fromkeys(found, 0.0)
        # Small portions in the order A B, B A, A B …: what else the machine does meets both alike.
        for portion in range(_PORTIONS):
            order = list(servers.items())[:: -1 if portion % 2 else 1]
            for what, requests in (("short", args.requests), ("long", args.long)):
                for who, server in order:
                    count = max(1, requests // _PORTIONS)
                    seconds = cpu_of(server, raw[what], requests=count, concurrency=min(count, args.streams))
                    used[who, what] += seconds / _PORTIONS
        if turn >= args.warmup:
            for key, seconds in used.items():
                found[key].append(seconds)
    request = {who: Sample(tuple(found[who, "short"])) for who in servers}
    token = {
        who: Sample(
            tuple(
                (long - short) / (args.tokens - 1)
                for long, short in zip(found[who, "long"], found[who, "short"], strict=True)
            )
        )
        for who in servers
    }
    size = sum(map(len, recorded["long"]["events"])) / len(recorded["long"]["events"])
    pace = f"{args.streams} streams, a token each {args.step_ms:g} ms"
    for label, samples, note in (
        ("request (128-token prompt, 1 token)", request, pace),
        ("streamed token", token, f"{pace}; {events} events for {args.tokens - 1} tokens, {size:.0f} B each"),
    ):
        for who, sample in samples.items():
            bench.row(f"CPU a {label}, {who}", sample, unit="µs", scale=1e6, note=note)
        bench.row(
            f"CPU a {label}, router / bare", ratio(samples["router"], samples["bare"]), unit="x", limit="at most 2x"
        )


def hold_many(bench: Benchmark, args: argparse.Namespace, fleet: Fleet) -> None:
    """Many streams at once, over four engines: all complete, none failed."""
    server = start_router(fleet, args.model, 4, 0.1)
    raw = encode_request(body_of("hold", 100, "hold"))
    used = server.cpu()
    failed, most, seconds = uvloop.run(hold(server.port, raw, args.held))
    used = server.cpu() - used
    bench.row(
        "streams open at once", Sample((float(most),)), unit="streams", limit=f"{args.held}", note="4 fake engines"
    )
    bench.row("streams that failed", Sample((float(failed),)), unit="streams", limit="0", note=f"of {args.held}")
    bench.row("all streams complete after", Sample((seconds,)), unit="s", note="100 tokens each, steps of 100 ms")
    bench.row("router CPU meanwhile", Sample((used / seconds,)), unit="cores")


if __name__ == "__main__":
    main()
