"""What the GPU can do at best, measured: copy bandwidth, bf16 matrix rate, reading weights, and copying to a peer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from perf.harness import Benchmark, Sample

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> None:
    bench = Benchmark("roofline", "limits of the GPU")
    args = bench.arguments(argparse.ArgumentParser(), repeat=10, warmup=3)
    if not torch.cuda.is_available():
        raise SystemExit("perf.roofline: torch finds no GPU")

    def timed(work: Callable[[], object]) -> tuple[float, ...]:
        """Seconds of each of a few calls, by the GPU's clock."""
        for _ in range(args.warmup):
            work()
        seconds = []
        for _ in range(args.repeat):
            begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
            end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
            begin.record()
            work()
            end.record()
            end.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        return tuple(seconds)

    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copied = timed(lambda: target.copy_(source))
    bench.row("copy", Sample(tuple(2 * target.nbytes / each / 1e12 for each in copied)), unit="TB/s", note="both ways")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    products = timed(lambda: a @ b)
    bench.row("bf16 product 8192", Sample(tuple(2 * 8192**3 / each / 1e12 for each in products)), unit="TFLOP/s")
    for rows in (1, 8, 64, 256):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        wide = [torch.randn(28672, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(8)]

        def read(x: torch.Tensor = x, wide: list[torch.Tensor] = wide) -> None:
            for weight in wide:
                torch.nn.functional.linear(x, weight)

        nbytes = sum(weight.nbytes for weight in wide)
        rates = tuple(nbytes / each / 1e12 for each in timed(read))
        bench.row(f"gate_up product, {rows} rows", Sample(rates), unit="TB/s", note="weights read")
        del wide
    if torch.cuda.device_count() > 1:
        here = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
        there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
        moved = timed(lambda: there.copy_(here))
        bench.row("peer copy of 1 GiB", Sample(tuple((1 << 30) / each / 1e9 for each in moved)), unit="GB/s")
    bench.finish(args)


if __name__ == "__main__":
    main()
