"""The strategies compared: TTFT, TPOT and JCT by request rate, on engines that take as long as an 8B model on an H200.

Router core, strategies, engines' verbs, schedulers, leases and sends are the real ones; time is virtual (see
`tests.simulation`), so the figures are those of the latency model and of every decision that our code makes, exactly
repeatable, and not of this machine. What our code itself takes, and the network under the bus, count as nothing.

The workload and the form are those of the paper (arXiv 2412.12488, section 5): prompts of 3,000 tokens, answers of 100,
Poisson arrivals, rates up to saturation and beyond; the same engines for every strategy. A second workload has prompts
that begin with one of a few documents, for what is cached to matter. A run has the seed of its arrivals and prompts.

    python -m perf.strategies                     # two engines; writes perf/strategies.png and strategies-shared.png
    python -m perf.strategies --engines 4 --plot four.png
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tests.simulation import Deployment
from tests.virtual_time import run_virtual

from microserve.router.core import GenerationSpec
from microserve.runtime.config import FakeConfig
from microserve.runtime.errors import MicroserveError
from microserve.runtime.messages import SamplingParams
from perf.harness import Benchmark, Sample, number
from perf.load import Job, Outcome, Summary, fixed, summarize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from microserve.router.strategy import SettingValue

Results = dict[str, dict[float, list[Summary]]]
"""Runs by case and rate, one for each seed."""

_VOCABULARY = 30_000
_METRICS = ("TTFT", "TPOT", "JCT")
_KINDS = {"mean": "Mean", "p99": "P99"}

# An 8B model in bfloat16 on an H200: a decode step reads 16 GB of weights in 4.3 ms and, for each sequence of 3,000
# tokens, 0.4 GB of KV in 0.1 ms; a chunk of 2,048 prompt tokens takes 46 ms in all. KV is 0.131 MB a token, and a link
# moves 300 GB/s.
STEP_TOKENS = 2048
MODEL = FakeConfig(
    decode_base_us=4300,
    decode_us_per_sequence=100,
    prefill_us_per_token=(46_000 - 4300) / STEP_TOKENS,
    vocab_size=_VOCABULARY,
)
PAGE = 16
SECONDS_PER_PAGE = PAGE * 0.131e6 / 300e9
PAGES = 32_768
"""2 MiB each: a pool of 64 GiB."""


@dataclass(frozen=True, slots=True)
class Case:
    """One strategy with its settings. `prefill` is the share of the engines that carry the label "prefill"."""

    name: str
    strategy: str
    settings: dict[str, SettingValue] = field(default_factory=dict)
    prefill: float = 0.0

    def engines(self, count: int) -> dict[str, dict[str, str]]:
        """Labels by engine name."""
        split = round(count * self.prefill)
        label = ["prefill"] * split + ["decode"] * (count - split) if split else [""] * count
        return {f"e{number}": {each: "yes"} if each else {} for number, each in enumerate(label)}


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked, and of which cases. The first `shared` part of a prompt is that of one of `documents`.

    It has `times` as many engines and requests as was asked for.
    """

    key: str
    name: str
    rates: tuple[float, ...]
    cases: tuple[Case, ...]
    shared: float = 0.0
    documents: int = 0
    times: int = 1

    def jobs(self, args: argparse.Namespace, rate: float, seed: int) -> list[Job]:
        jobs = fixed(
            args.requests * self.times,
            rate=rate,
            seed=seed,
            vocab=_VOCABULARY,
            prompt_tokens=args.prompt,
            output_tokens=args.output,
        )
        if not self.documents:
            return jobs
        random = np.random.default_rng([seed, self.documents])
        length = int(args.prompt * self.shared)
        texts = [tuple(random.integers(3, _VOCABULARY, length).tolist()) for _ in range(self.documents)]
        return [replace(job, prompt=texts[int(random.integers(self.documents))] + job.prompt[length:]) for job in jobs]


WORKLOADS = (
    Workload(
        "different",
        "all prompts differ",
        (2, 6, 10, 14, 18, 20, 22, 24, 28, 32),
        (
            Case("data parallel", "data_parallel"),
            Case("prefill-decode", "prefill_decode", prefill=0.5),
            Case("prefill-decode, first token late", "prefill_decode", {"early_first": 0}, prefill=0.5),
            Case("balanced 0.1", "balanced", {"ratio": 0.1}, prefill=0.5),
            Case("balanced 0.2", "balanced", {"ratio": 0.2}, prefill=0.5),
            Case("balanced 0.37", "balanced", {"ratio": 0.37}, prefill=0.5),
        ),
    ),
    Workload(
        "shared",
        "two thirds of a prompt are one of 32 documents",
        (4, 20, 36, 44, 56, 72, 88),
        (
            Case("data parallel", "data_parallel"),
            Case("cache-aware", "cache_aware"),
            Case("prefill-decode, not cache-aware", "prefill_decode", {"cache_aware": False}, prefill=0.5),
            Case("prefill-decode", "prefill_decode", prefill=0.5),
            Case("balanced 0.2", "balanced", {"ratio": 0.2}, prefill=0.5),
        ),
        shared=2 / 3,
        documents=32,
        times=2,  # with one engine of a kind there is nothing to choose
    ),
)
TTFT_OBJECTIVE, TPOT_OBJECTIVE = 0.5, 0.02


async def serve(case: Case, engines: int, jobs: Sequence[Job]) -> list[Outcome]:
    """What each job saw, in virtual seconds. Afterwards nothing may be left anywhere."""
    async with Deployment(
        case.engines(engines),
        fake=MODEL,
        seconds_per_page=SECONDS_PER_PAGE,
        router={
            "strategy": case.strategy,
            "strategy_settings": case.settings,
            "max_active": 100_000,
            "request_timeout": 3600.0,
        },
        verify=False,
        kv_pages=PAGES,
        page_size=PAGE,
        step_tokens=STEP_TOKENS,
        max_running=256,
        max_waiting=100_000,
    ) as deployment:
        began = deployment.clock()

        async def one(number: int, job: Job) -> Outcome:
            await asyncio.sleep(began + job.at - deployment.clock())
            sent, stamps, count = deployment.clock(), [], 0
            sampling = SamplingParams(max_tokens=job.output_tokens, temperature=0, ignore_eos=True)
            prompt = np.array(job.prompt, dtype=np.int32)
            try:
                async for chunk in deployment.core.generate(GenerationSpec(f"r{number}", "", prompt, sampling)):
                    if chunk.tokens:
                        stamps.append(deployment.clock())
                        count += len(chunk.tokens)
            except MicroserveError as error:
                ended = deployment.clock()
                return Outcome(ended - sent, ended - sent, count, (), f"{error.code}: {error.message}")
            gaps = tuple(np.diff(stamps).tolist())
            return Outcome(stamps[0] - sent, stamps[-1] - sent, count, gaps)

        outcomes = await asyncio.gather(*(one(number, job) for number, job in enumerate(jobs)))
        await deployment.settle_whole()
        return list(outcomes)


def main() -> None:
    bench = Benchmark("strategies", "strategies compared in virtual time: 8B on H200, by request rate")
    args = _arguments(bench)
    workloads = [each for each in WORKLOADS if args.workload in (None, each.key)]
    results = [_measure(bench, args, workload) for workload in workloads]
    bench.finish(args, table=False)
    for workload, found in zip(workloads, results, strict=True):
        count = workload.times * args.engines
        print(f"\n### {count} engines, {args.prompt:,} tokens in, {args.output:,} out; {workload.name}")
        path = args.plot if not workload.documents else args.plot.with_stem(f"{args.plot.stem}-shared")
        _plot(path, found, f"{count} engines, {args.prompt} in, {args.output} out; {workload.name}")
        print(f"\n![mean and P99 by rate]({path.name})")
        _tables(found)


def _measure(bench: Benchmark, args: argparse.Namespace, workload: Workload) -> Results:
    results: Results = {}
    for case in workload.cases:
        for rate in args.rates or workload.rates:
            found = results.setdefault(case.name, {}).setdefault(rate, [])
            for seed in range(args.repeat):
                jobs = workload.jobs(args, rate, seed)
                outcomes = run_virtual(serve(case, workload.times * args.engines, jobs))
                if errors := {outcome.error for outcome in outcomes if outcome.error}:
                    raise SystemExit(f"{case.name} at {rate:g}/s failed: {errors}")
                found.append(summarize(jobs, outcomes, slo_ttft=TTFT_OBJECTIVE, slo_tpot=TPOT_OBJECTIVE))
            _rows(bench, f"{workload.name}: {case.name}", rate, found)
    return results


def _arguments(bench: Benchmark) -> argparse.Namespace:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--engines", type=int, default=2, help="engines of every strategy")
    parser.add_argument("--workload", choices=[each.key for each in WORKLOADS], help="this one alone")
    parser.add_argument("--rates", type=_rates, help="requests a second, instead of each workload's own")
    parser.add_argument("--requests", type=int, default=300, help="requests of one run")
    parser.add_argument("--prompt", type=int, default=3000, help="prompt tokens")
    parser.add_argument("--output", type=int, default=100, help="output tokens")
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_suffix(".png"), help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="few requests at two rates: shows that it works")
    args = bench.arguments(parser, repeat=3, warmup=0)
    if args.quick:
        args.rates, args.requests, args.repeat = [4.0, 12.0], 40, 1
    return args


def _rates(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _figure(summaries: list[Summary], metric: str, kind: str) -> Sample:
    """In milliseconds, a value a seed."""
    return Sample(tuple(summary.metrics[metric][kind] * 1e3 for summary in summaries))


def _rows(bench: Benchmark, name: str, rate: float, summaries: list[Summary]) -> None:
    for metric in _METRICS:
        for kind in _KINDS:
            bench.row(f"{name}, {rate:g}/s: {metric} {kind}", _figure(summaries, metric, kind), unit="ms")


def _tables(results: Results) -> None:
    """One for each figure: the median of the seeds, and in brackets the lowest and the highest."""

    def figure(metric: str, kind: str, found: list[Summary]) -> str:
        return _spread(_figure(found, metric, kind))

    for metric in _METRICS:
        for kind, word in _KINDS.items():
            _table(f"{word} {metric}, ms", results, partial(figure, metric, kind))
    within = f"{TTFT_OBJECTIVE * 1e3:g} ms to the first token and {TPOT_OBJECTIVE * 1e3:g} ms for each further one"
    _table(f"Requests served within {within}, %", results, lambda found: _spread(_good(found)))


def _table(title: str, results: Results, cell: Callable[[list[Summary]], str]) -> None:
    print(f"\n{title}:\n")
    print("| requests/s | " + " | ".join(results) + " |")
    print("|---:|" + "---:|" * len(results))
    for rate in sorted({rate for by_rate in results.values() for rate in by_rate}):
        print(f"| {rate:g} | " + " | ".join(cell(by_rate[rate]) for by_rate in results.values()) + " |")


def _spread(sample: Sample) -> str:
    if number(sample.low) == number(sample.high):
        return number(sample.median)
    return f"{number(sample.median)} ({number(sample.low)}–{number(sample.high)})"


def _good(summaries: list[Summary]) -> Sample:
    return Sample(tuple(100 * summary.goodput / summary.request_rate for summary in summaries))


def _plot(path: Path, results: Results, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(_KINDS), len(_METRICS), figsize=(4 * len(_METRICS), 3 * len(_KINDS)))
    for row, kind in zip(axes, _KINDS, strict=True):
        for axis, metric in zip(row, _METRICS, strict=True):
            for name, by_rate in results.items():
                rates = sorted(by_rate)
                axis.plot(
                    rates, [_figure(by_rate[rate], metric, kind).median for rate in rates], marker="o", label=name
                )
            axis.set(title=f"{_KINDS[kind]} {metric}", xlabel="requests/s", ylabel="ms", yscale="log")
            axis.grid(alpha=0.3, which="both")
    figure.suptitle(f"8B on H200, latency model: {title}")
    # Below the plots, where it hides no line.
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(results), fontsize="small")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
