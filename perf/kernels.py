"""What steps are made of: the GPU's time by kind of kernel, with the executor and the scheduler in this process.

Every case runs for a while before the steps that count, so that the GPU's clock is what its power leaves. A kernel is
charged from its start, or the end of the one before where that is later, to its own end: kernels that overlap are not
counted twice, and what nobody is charged is a gap. Products are told apart by where they stand between attentions.

    python -m perf.kernels --prompts 8192 --decodes '' --requests 0
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from microserve.engine.cuda_open import open_cuda_executor
from microserve.engine.limits import Limits
from microserve.engine.request import Request
from microserve.engine.scheduler import Scheduler
from microserve.kv.cache import KvCache
from microserve.runtime.clock import monotonic
from microserve.runtime.config import EngineConfig
from microserve.runtime.messages import SamplingParams
from perf.harness import Benchmark, Sample
from perf.shapes import SHAPES, write_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_STEP_TOKENS = 8192
_LASTING = 1.5
"""Seconds after which the GPU's clock is what its power leaves."""
_OUTPUTS = 200
"""Tokens of a decode's sequences, whose prompts have 128."""
QKV, OUTPUT, GATE_UP, DOWN, HEAD = "QKV product", "output product", "gate and up product", "down product", "head"
ATTENTION, ROTATION, NORM, SILU, REST = "attention", "rotation and KV store", "residual and norm", "SiLU", "the rest"
SUMS = "split-K sums"
GAPS = "gaps"
_KINDS = (
    ("PrefillWith", ATTENTION),
    ("MergeState", ATTENTION),
    ("PersistentVariableLength", ATTENTION),
    ("_decode", ATTENTION),
    ("_rotate_and_store", ROTATION),
    ("act_and_mul", SILU),
    ("norm", NORM),
    ("Norm", NORM),
    ("_product", "product"),
    ("_gated", "product"),
    ("nvjet", "product"),
    ("gemm", "product"),
    ("splitKreduce", SUMS),
)
_FOLLOWING = {OUTPUT: GATE_UP, GATE_UP: DOWN, DOWN: QKV, QKV: QKV}


class Kernel(NamedTuple):
    """One launch; nanoseconds."""

    name: str
    start: int
    end: int


def classify(names: Sequence[str]) -> list[str]:
    """What each kernel of a run, in order, is for."""
    kinds = [next((kind for part, kind in _KINDS if part in name), REST) for name in names]
    product = QKV
    """What the last product was, or, behind an attention, what comes next."""
    fresh = True
    pending: int | None = None
    """A product that is taken for one of queries, keys and values until another follows without attention."""
    for place, kind in enumerate(kinds):
        if kind == ATTENTION:
            product, fresh, pending = OUTPUT, True, None
        elif kind == "product":
            product = product if fresh else _FOLLOWING[product]
            fresh = False
            kinds[place] = product
            if product == QKV:
                if pending is not None:
                    kinds[pending] = HEAD
                pending = place
    if pending is not None:
        kinds[pending] = HEAD
    return kinds


def charge(kernels: Sequence[Kernel]) -> list[int]:
    """Nanoseconds that each of them, in order, is charged."""
    charged, until = [], 0
    for kernel in kernels:
        charged.append(max(0, kernel.end - max(kernel.start, until)))
        until = max(until, kernel.end)
    return charged


def by_step(kernels: Sequence[Kernel], kinds: Sequence[str], layers: int) -> Iterator[dict[str, float]]:
    """Milliseconds of every whole step by kind, gaps included: from the first layer's MLP to the next step's."""
    begins = [place for place, kind in enumerate(kinds) if kind == GATE_UP][::layers]
    charged = charge(kernels)
    for begin, end in itertools.pairwise(begins):
        yield _sum(charged[begin:end], kinds[begin:end], kernels[end].start - kernels[begin].start)


def _sum(charged: Sequence[int], kinds: Sequence[str], whole: int) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for kind, each in zip(kinds, charged, strict=True):
        found[kind] += each / 1e6
    found[GAPS] = whole / 1e6 - sum(found.values())
    return found


def main() -> None:
    bench = Benchmark("kernels", "what steps are made of, kernel by kernel")
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b", help="(default: %(default)s)")
    parser.add_argument("--prompts", default="128,512,2048,8192", help="prefill lengths (default: %(default)s)")
    parser.add_argument("--decodes", default="1,8,64,256", help="decode batches (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=500, help="of 1,024 in and 256 out (default: %(default)s)")
    parser.add_argument("--names", action="store_true", help="name the kernels of each kind on standard error")
    args = bench.arguments(parser, repeat=5, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(write_shape(Path(folder) / args.shape, args.shape))
        layers = SHAPES[args.shape]["num_hidden_layers"]
        for length in map(int, filter(None, args.prompts.split(","))):
            prompt = partial(run.generate, 1, length, 1)
            run.for_a_while(prompt)
            # A step is counted from its first MLP to the next one's, so the last prompt is the end of the one before.
            kernels = run.profiled(partial(_again, prompt, args.warmup + args.repeat + 1))
            _tell(bench, args, f"prefill {length}", kernels, layers)
        for batch in map(int, filter(None, args.decodes.split(","))):
            decodes = partial(run.generate, batch, 128, _OUTPUTS)
            run.for_a_while(decodes)
            _tell(bench, args, f"decode {batch}", run.profiled(decodes), layers)
        if args.requests:
            run.for_a_while(partial(run.generate, 1, _STEP_TOKENS, 1))
            kernels = run.profiled(partial(run.generate, args.requests, 1024, 256))
            kinds = classify([kernel.name for kernel in kernels])
            found = _sum(charge(kernels), kinds, max(kernel.end for kernel in kernels) - kernels[0].start)
            _rows(bench, args, f"{args.requests} x 1024/256", [found], kernels, kinds)
    bench.finish(args)


def _again(work: Callable[[], None], times: int) -> None:
    for _ in range(times):
        work()


def _tell(bench: Benchmark, args: argparse.Namespace, name: str, kernels: list[Kernel], layers: int) -> None:
    kinds = classify([kernel.name for kernel in kernels])
    steps = list(by_step(kernels, kinds, layers))
    # From the middle: a batch is whole there, and prompts, one after the other, are all alike.
    first = max(0, len(steps) - args.repeat) // 2
    _rows(bench, args, name, steps[first : first + args.repeat], kernels, kinds)


def _rows(
    bench: Benchmark,
    args: argparse.Namespace,
    name: str,
    steps: Sequence[dict[str, float]],
    kernels: Sequence[Kernel],
    kinds: Sequence[str],
) -> None:
    for kind in (GATE_UP, SILU, DOWN, QKV, OUTPUT, SUMS, NORM, ATTENTION, ROTATION, HEAD, REST, GAPS):
        sample = Sample(tuple(step.get(kind, 0.0) for step in steps))
        if sample.high:
            bench.row(f"{name}: {kind}", sample, unit="ms")
    bench.row(f"{name}: all", Sample(tuple(sum(step.values()) for step in steps)), unit="ms")
    if args.names:
        for (kind, kernel), count in sorted(Counter(zip(kinds, (each.name for each in kernels), strict=True)).items()):
            print(f"{name}: {kind}: {count} x {kernel[:100]}", file=sys.stderr)


class _Run:
    """The executor under the scheduler, as the engine's loop has it: step n + 1 is launched before n is read."""

    def __init__(self, model: Path) -> None:
        config = EngineConfig(
            model=str(model),
            executor="cuda",
            dummy_weights=True,
            step_tokens=_STEP_TOKENS,
            max_running=512,
            max_context=16384,
        )
        self._executor = open_cuda_executor(config, torch.device("cuda:0"))
        cache = KvCache(self._executor.total_pages, config.page_size, clock=monotonic)
        limits = Limits(512, 1000, _STEP_TOKENS, self._executor.model.max_context)
        self._scheduler = Scheduler(cache, limits, eos_token_ids=())
        self._random = np.random.default_rng(0)

    def generate(self, batch: int, prompt: int, outputs: int) -> None:
        for _ in range(batch):
            ids = self._random.integers(0, self._executor.model.vocab_size, prompt).astype(np.int32)
            sampling = SamplingParams(max_tokens=outputs, temperature=0.0, ignore_eos=True)
            self._scheduler.submit(Request(ids, sampling, seed=0), monotonic())
        launched = 0
        while True:
            plan = self._scheduler.schedule(monotonic())
            if plan is not None:
                self._executor.launch(plan)
                launched += 1
            if launched and (plan is None or launched >= self._executor.depth):
                self._scheduler.complete(self._executor.collect(), monotonic())
                launched -= 1
            elif plan is None:
                return
            self._scheduler.take_outputs()

    def for_a_while(self, work: Callable[[], None]) -> None:
        """Until the GPU is as warm as it gets."""
        until = monotonic() + _LASTING
        while monotonic() < until:
            work()

    def profiled(self, work: Callable[[], None]) -> list[Kernel]:
        """Every kernel that `work` ran, in order."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            # The profiler takes a moment to begin, in which the GPU rests.
            work()
            torch.cuda.synchronize()
        found: Any = profile.profiler.kineto_results.events()
        kernels = [
            Kernel(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in found
            if event.device_type() == torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
        ]
        return sorted(kernels, key=lambda kernel: kernel.start)


if __name__ == "__main__":
    main()
