"""What metrics and tracing cost a router: CPU time a request and a streamed token, with them and without.

Two real routers, each with an engine of its own, take the same load in turn; one of them counts nothing of its requests
and remembers none. Every run starts both anew: where a process's memory happens to lie is worth a few percent.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from perf.harness import Benchmark, Sample, ratio
from perf.router import Fleet, body_of, cpu_of, encode_request, prompt_of, start_router

_PORTIONS = 4
_MODULES = {"with": "microserve.router", "without": "perf.unmetered_router"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo", help="checkpoint whose tokenizer is used (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="requests a run of one token (default: %(default)s)")
    parser.add_argument("--long", type=int, default=256, help="requests a run of many tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=129, help="tokens of a long stream (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="connections (default: %(default)s)")
    parser.add_argument("--step-ms", type=float, default=10.0, help="time between two tokens (default: %(default)s)")
    bench = Benchmark("metrics", "CPU time of the router with metrics and tracing, against one without")
    args = bench.arguments(parser, repeat=7, warmup=0)
    with tempfile.TemporaryDirectory(prefix="microserve-perf-") as folder:
        compare(bench, args, Path(folder))
    bench.finish(args)


def compare(bench: Benchmark, args: argparse.Namespace, folder: Path) -> None:
    found: dict[tuple[str, str], list[float]] = {(who, what): [] for who in _MODULES for what in ("short", "long")}
    for turn in range(args.warmup + args.repeat):
        fleet = Fleet(folder)
        try:
            used = run(args, fleet, turn)
        finally:
            fleet.end()
        if turn >= args.warmup:
            for key, seconds in used.items():
                found[key].append(seconds)
    request = {who: Sample(tuple(found[who, "short"])) for who in _MODULES}
    token = {
        who: Sample(
            tuple(
                (long - short) / (args.tokens - 1)
                for long, short in zip(found[who, "long"], found[who, "short"], strict=True)
            )
        )
        for who in _MODULES
    }
    for label, samples, limit in (
        ("request (128-token prompt, 1 token)", request, ""),
        ("streamed token", token, "at most 1.05x"),
    ):
        for who, sample in samples.items():
            bench.row(f"CPU a {label}, {who}", sample, unit="µs", scale=1e6)
        bench.row(f"CPU a {label}, with / without", ratio(samples["with"], samples["without"]), unit="x", limit=limit)


def run(args: argparse.Namespace, fleet: Fleet, turn: int) -> dict[tuple[str, str], float]:
    """CPU seconds a request, by who served it and how long it was, of two routers that start now."""
    step = args.step_ms / 1000
    modules = list(_MODULES.items())[:: -1 if turn % 2 else 1]
    servers = {who: start_router(fleet, args.model, 1, step, module=module) for who, module in modules}
    prompt = prompt_of(servers["with"].port, 128)
    raw = {
        "short": encode_request(body_of(prompt, 1, "short")),
        "long": encode_request(body_of(prompt, args.tokens, "long")),
    }
    for server in servers.values():
        cpu_of(server, raw["long"], requests=args.streams, concurrency=args.streams)  # The first cost more.
    used = {(who, what): 0.0 for who in servers for what in raw}
    # Small portions in the order A B, B A, A B …: what else the machine does meets both alike.
    for portion in range(_PORTIONS):
        order = list(servers.items())[:: -1 if portion % 2 else 1]
        for what, requests in (("short", args.requests), ("long", args.long)):
            for who, server in order:
                count = max(1, requests // _PORTIONS)
                seconds = cpu_of(server, raw[what], requests=count, concurrency=min(count, args.streams))
                used[who, what] += seconds / _PORTIONS
    return used


if __name__ == "__main__":
    main()
