"""Scheduler cost of a step: `python -m perf.scheduler`. No executor: made-up tokens answer every plan."""

from __future__ import annotations

import argparse
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from microserve.engine.plan import Sampled, StepResult
from microserve.engine.request import Request
from microserve.engine.scheduler import Limits, Scheduler
from microserve.kv.cache import KvCache
from microserve.runtime.clock import monotonic
from microserve.runtime.messages import SamplingParams
from perf.harness import Benchmark, Sample

if TYPE_CHECKING:
    from microserve.engine.plan import StepPlan

PAGE_SIZE = 16
LIMIT = "300 µs"


def main() -> None:
    bench = Benchmark("scheduler", "time of schedule + complete + take_outputs per step, without the executor")
    parser = argparse.ArgumentParser()
    parser.add_argument("--running", type=int, default=256, help="requests that decode (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps in a run (default: %(default)s)")
    args = bench.arguments(parser, repeat=7)
    for depth in (1, 2):
        for history in (64, 4096):
            name = f"{args.running} decoding, {history}-token prompts, depth {depth}"
            sample = _steps(args.running, history, depth, args.steps, args.warmup, args.repeat)
            bench.row(name, sample, unit="µs", scale=1e6, limit=LIMIT, note=f"median of {args.steps} steps")
    sample = _churn(args.running, args.steps, args.warmup, args.repeat)
    note = "each request ends after 32 tokens and another takes its place: admission, insertion and release included"
    bench.row(f"{args.running} running, turnover of 1/32 a step", sample, unit="µs", scale=1e6, note=note)
    bench.finish(args)


def _steps(running: int, history: int, depth: int, steps: int, warmup: int, repeat: int) -> Sample:
    """Nothing begins or ends; pages are added as sequences grow."""
    driver = _Driver(running, depth, pages=running * (history + (warmup + repeat + 2) * steps) // PAGE_SIZE + running)
    for index in range(running):
        driver.submit(history + index % PAGE_SIZE, max_tokens=1 << 30)
    while driver.scheduler.load().queued_tokens:
        driver.step()
    return driver.measure(steps, warmup, repeat)


def _churn(running: int, steps: int, warmup: int, repeat: int) -> Sample:
    driver = _Driver(running, 1, pages=running * 64)
    driver.refill = 32
    for index in range(running):
        driver.submit(64, max_tokens=1 + index % 32)
    for _ in range(64):
        driver.step()
    return driver.measure(steps, warmup, repeat)


class _Driver:
    def __init__(self, running: int, depth: int, pages: int) -> None:
        self.scheduler = Scheduler(
            KvCache(pages, PAGE_SIZE, clock=monotonic), Limits(running, 4 * running, 8192 + running, 1 << 20)
        )
        self.refill = 0
        """Tokens that a request asks for which takes the place of one that ended; 0: nothing ends."""
        self._depth = depth
        self._plans: deque[StepPlan] = deque()
        self._rng = np.random.default_rng(0)

    def submit(self, prompt: int, max_tokens: int) -> None:
        tokens = self._rng.integers(0, 32000, prompt, dtype=np.int32)
        self.scheduler.submit(Request(tokens, SamplingParams(max_tokens=max_tokens)), 0.0)

    def step(self) -> float:
        """Seconds that the scheduler took for one step."""
        began = time.perf_counter()
        plan = self.scheduler.schedule(0.0)
        spent = time.perf_counter() - began
        if plan is not None:
            self._plans.append(plan)
        ended = 0
        if len(self._plans) >= self._depth:
            oldest = self._plans.popleft()
            sampled = tuple(Sampled(part.sequence, 7) for part in oldest.slices if part.sample)
            result = StepResult(oldest.step, sampled)
            began = time.perf_counter()
            self.scheduler.complete(result, 0.0)
            outputs = self.scheduler.take_outputs()
            spent += time.perf_counter() - began
            ended = sum(output.final for output in outputs) if self.refill else 0
        for _ in range(ended):
            self.submit(64, self.refill)
        return spent

    def measure(self, steps: int, warmup: int, repeat: int) -> Sample:
        """Median seconds a step, for each of `repeat` runs."""
        runs = [statistics.median(self.step() for _ in range(steps)) for _ in range(warmup + repeat)]
        return Sample(tuple(runs[warmup:]))


if __name__ == "__main__":
    main()
