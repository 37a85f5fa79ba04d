"""The CPU engine against `transformers` generate: tokens/s at batch 1 and 16, float32, greedy, equal threads.

Ours is the engine's scheduler, cache and executor, step by step; `transformers` runs one batched `generate` with its
cache on. The two alternate, so that a machine whose speed drifts slows both.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.engine.request import Request
from microserve.engine.scheduler import Limits, Scheduler
from microserve.engine.torch_executor import open_torch_executor
from microserve.kv.cache import KvCache
from microserve.runtime.clock import monotonic
from microserve.runtime.config import EngineConfig
from microserve.runtime.messages import SamplingParams
from perf.harness import Benchmark, Sample, interleave, ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

SHAPES: dict[str, dict[str, Any]] = {
    "6M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4},
    "120M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}


def main() -> None:
    bench = Benchmark("cpu_engine", "tokens/s of the CPU engine against transformers generate")
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="6M,120M", help="model shapes (default: %(default)s)")
    parser.add_argument("--batches", default="1,16", help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens (default: %(default)s)")
    parser.add_argument("--output", type=int, default=64, help="output tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: %(default)s)")
    args = bench.arguments(parser, repeat=5, warmup=1)
    torch.set_num_threads(args.threads)
    for shape in args.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_random_checkpoint(
                Path(folder), vocab_size=8192, num_key_value_heads=2, head_dim=64, scale=0.02, **SHAPES[shape]
            )
            for batch in (int(text) for text in args.batches.split(",")):
                _compare(bench, args, checkpoint, shape, batch)
    bench.finish(args)


def _compare(bench: Benchmark, args: argparse.Namespace, checkpoint: Path, shape: str, batch: int) -> None:
    random = np.random.default_rng(0)
    ours = _Ours(checkpoint, args.threads)
    theirs = _transformers(checkpoint)

    def prompts() -> list[np.ndarray]:
        """New ones each time, so that nothing is in the prefix tree."""
        return [random.integers(0, 256, args.prompt, dtype=np.int32) for _ in range(batch)]

    seconds = interleave(
        {
            "ours": lambda: ours.run(prompts(), args.output),
            "transformers": lambda: theirs(prompts(), args.output),
        },
        warmup=args.warmup,
        repeat=args.repeat,
    )
    for name, sample in seconds.items():
        rate = Sample(tuple(batch * args.output / value for value in sample.values))
        bench.row(f"{shape}, batch {batch}: {name}", rate, unit="tokens/s")
    faster = ratio(seconds["transformers"], seconds["ours"])
    bench.row(f"{shape}, batch {batch}: ours / transformers", faster, unit="x", limit="above 1")


class _Ours:
    def __init__(self, checkpoint: Path, threads: int) -> None:
        config = EngineConfig(model=str(checkpoint), executor="torch", kv_pages=1024, threads=threads)
        self._executor = open_torch_executor(config)
        self._cache = KvCache(1024, config.page_size, clock=monotonic)
        self._scheduler = Scheduler(self._cache, Limits(64, 64, 2048, 1024, None))

    def run(self, prompts: Sequence[np.ndarray], count: int) -> None:
        settings = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
        for prompt in prompts:
            self._scheduler.submit(Request(prompt, settings), time.monotonic())
        tokens = 0
        while (plan := self._scheduler.schedule(time.monotonic())) is not None:
            self._executor.launch(plan)
            result = self._executor.collect()
            self._scheduler.complete(result, time.monotonic())
            self._scheduler.take_outputs()
            tokens += len(result.sampled)
        if tokens != len(prompts) * count:
            raise SystemExit(f"{tokens} tokens instead of {len(prompts) * count}")


def _transformers(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()

    def run(prompts: Sequence[np.ndarray], count: int) -> None:
        ids = torch.from_numpy(np.stack(prompts).astype(np.int64))
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        if output.shape[1] != ids.shape[1] + count:
            raise SystemExit(f"transformers made {output.shape[1] - ids.shape[1]} tokens instead of {count}")

    return run


if __name__ == "__main__":
    main()
