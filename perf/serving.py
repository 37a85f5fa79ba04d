"""Serving figures through the router: TTFT, TPOT, ITL, JCT and throughput under Poisson arrivals.

Without `--url` it starts a router and engines of its own on this machine, and stops them at the end.

    python -m perf.serving                                   # the bundled model on the CPU, ShareGPT-like lengths
    python -m perf.serving --executor fake --rates 20,40,80  # the serving path without a model
    python -m perf.serving --url http://127.0.0.1:8000 --rates 1,2,4 --plot serving.png
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.harness import Benchmark, Sample
from perf.load import Summary, fixed, run, sharegpt_file, sharegpt_like, summarize
from perf.shapes import SHAPES, write_shape, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

_METRICS = ("TTFT", "TPOT", "ITL", "JCT")


def main() -> None:
    bench = Benchmark("serving", "latency and throughput through the router, by request rate")
    args = _arguments(bench)
    with _server(args) as url:
        model = _model(url)
        results: dict[float, list[Summary]] = {}
        for rate in args.rates:
            results[rate] = [_one(args, url, model, rate, seed) for seed in range(args.warmup + args.repeat)][
                args.warmup :
            ]
            _rows(bench, rate, results[rate])
    bench.finish(args)
    if args.plot is not None:
        _plot(args.plot, results)
    if any(summary.failed for summaries in results.values() for summary in summaries):
        raise SystemExit("some requests failed; see the table")


def _arguments(bench: Benchmark) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--url", help="a running server; without it, one is started")
    parser.add_argument("--engines", type=int, default=2, help="engines to start")
    parser.add_argument(
        "--executor", default="torch", choices=("torch", "cuda", "fake"), help="executor of those engines"
    )
    parser.add_argument("--model", default="demo", help="model of those engines; a shape's name means dummy weights")
    parser.add_argument("--rates", type=_rates, default=[2.0, 4.0, 8.0], help="requests a second; 0 is all at once")
    parser.add_argument("--requests", type=int, default=60, help="requests of one run")
    parser.add_argument(
        "--lengths", default="sharegpt", help="sharegpt, PROMPT/OUTPUT (fixed), or a ShareGPT JSON file"
    )
    parser.add_argument("--longest", type=int, default=1024, help="longest prompt, tokens")
    parser.add_argument("--longest-output", type=int, default=256, help="longest output, tokens")
    parser.add_argument("--slo-ttft", type=float, default=1.0, help="objective for goodput, seconds")
    parser.add_argument("--slo-tpot", type=float, default=0.05, help="objective for goodput, seconds")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds that a request may take")
    parser.add_argument("--plot", type=Path, help="write mean and P99 by rate as a picture")
    return bench.arguments(parser, repeat=3, warmup=1)


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _one(args: argparse.Namespace, url: str, model: dict[str, Any], rate: float, seed: int) -> Summary:
    vocab = 256
    if args.lengths == "sharegpt":
        jobs = sharegpt_like(
            args.requests, rate=rate, seed=seed, vocab=vocab, longest=args.longest, longest_output=args.longest_output
        )
    elif "/" in args.lengths and not Path(args.lengths).exists():
        prompt, output = (int(part) for part in args.lengths.split("/"))
        jobs = fixed(args.requests, rate=rate, seed=seed, vocab=vocab, prompt_tokens=prompt, output_tokens=output)
    else:
        jobs = sharegpt_file(
            Path(args.lengths),
            count=args.requests,
            rate=rate,
            seed=seed,
            tokenize=lambda text: _post(f"{url}/tokenize", {"model": model["id"], "prompt": text})["tokens"],
        )
    outcomes = asyncio.run(run(url, model["id"], jobs, timeout=args.timeout))
    for outcome in outcomes:
        if outcome.error:
            print(f"failed: {outcome.error}")
    return summarize(jobs, outcomes, slo_ttft=args.slo_ttft, slo_tpot=args.slo_tpot)


def _rows(bench: Benchmark, rate: float, summaries: list[Summary]) -> None:
    label = f"{rate:g} req/s" if rate else "all at once"
    for metric in _METRICS:
        for kind in ("mean", "p99"):
            values = tuple(summary.metrics.get(metric, {}).get(kind, float("nan")) for summary in summaries)
            bench.row(f"{label}: {kind} {metric}", Sample(values), unit="ms", scale=1e3)
    bench.row(f"{label}: output", Sample(tuple(s.output_rate for s in summaries)), unit="tokens/s")
    bench.row(f"{label}: completed", Sample(tuple(s.request_rate for s in summaries)), unit="requests/s")
    bench.row(f"{label}: goodput", Sample(tuple(s.goodput for s in summaries)), unit="requests/s")
    failed = Sample(tuple(float(s.failed) for s in summaries))
    bench.row(f"{label}: failed", failed, unit="requests", limit="0")


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    if args.url:
        yield args.url.rstrip("/")
        return
    from tests.cluster import FAKE, Cluster

    if args.executor == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            yield from _gpu_server(args, Path(folder))
        return
    threads = max(1, (os.cpu_count() or 1) // args.engines)
    real = ("--executor", args.executor, "--model", args.model, "--threads", str(threads))
    with Cluster(args.engines, engine_args=FAKE if args.executor == "fake" else real) as cluster:
        yield cluster.http


def _gpu_server(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    from tests.cluster import Cluster

    flags = ["--executor", "cuda", "--max-context", "16384"]
    model = args.model
    if args.model in SHAPES:
        model = str(write_shape(folder / args.model, args.model))
        write_tokenizer(Path(model), SHAPES[args.model]["vocab_size"])
        flags.append("--dummy-weights")
    with Cluster(args.engines, engine_args=(*flags, "--model", model)) as cluster:
        yield cluster.http


def _model(url: str) -> dict[str, Any]:
    models: list[dict[str, Any]] = _get(f"{url}/v1/models")["data"]
    if not models:
        raise SystemExit(f"{url} serves no model")
    return models[0]


def _get(url: str) -> Any:
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            return json.load(response)
    except urllib.error.URLError as error:
        raise SystemExit(f"{url}: {error}") from error


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def _plot(path: Path, results: dict[float, list[Summary]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(_METRICS), figsize=(4 * len(_METRICS), 3.2))
    rates = sorted(results)
    for axis, metric in zip(axes, _METRICS, strict=True):
        for kind in ("mean", "p99"):
            axis.plot(
                rates,
                [Sample(tuple(s.metrics[metric][kind] for s in results[rate])).median * 1e3 for rate in rates],
                marker="o",
                label=kind,
            )
        axis.set(title=metric, xlabel="requests/s", ylabel="ms", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


if __name__ == "__main__":
    main()
