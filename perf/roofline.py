"""What the GPU can do at best: copies, bf16 products, attention, reading weights, copying to a peer."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from perf.harness import Benchmark, Sample
from perf.limits import ATTENTION, COPY, LASTING, PRODUCT

if TYPE_CHECKING:
    from collections.abc import Callable


_LENGTH, _HEADS, _SIZE = 8192, 32, 128
"""Of the attention that is measured: one sequence, as a prefill has it."""


_LASTING = 2.0
"""Seconds of products without a pause."""


def _state() -> str:
    """Clock and power of the GPU as it is now, where NVML's package is there to ask."""
    try:
        return f"{torch.cuda.clock_rate()} MHz, {torch.cuda.power_draw() / 1e3:.0f} W"
    except Exception:  # NVML's errors have no base of torch's, and nothing hangs on this
        return ""


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
    bench.row(COPY, Sample(tuple(2 * target.nbytes / each / 1e12 for each in copied)), unit="TB/s", note="both ways")
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    products = timed(lambda: a @ b)
    bench.row(PRODUCT, Sample(tuple(2 * 8192**3 / each / 1e12 for each in products)), unit="TFLOP/s")
    # Of work that goes on and on: the board's power, not the chip, sets the clock.
    began = time.monotonic()
    lasting: list[float] = []
    while time.monotonic() - began < _LASTING:
        lasting += timed(lambda: a @ b)
    late = Sample(tuple(2 * 8192**3 / each / 1e12 for each in lasting[len(lasting) // 2 :]))
    bench.row(LASTING, late, unit="TFLOP/s", note=f"after {_LASTING / 2:g} s; {_state()}")
    q, k, v = (torch.randn(1, _HEADS, _LENGTH, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rates = []
    # Which of them is there, and the faster one, depends on the machine.
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            try:
                seconds = timed(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
            except RuntimeError:
                continue
        flops = 4 * _HEADS * _SIZE * _LENGTH**2 / 2
        rates.append(Sample(tuple(flops / each / 1e12 for each in seconds)))
    bench.row(ATTENTION, max(rates, key=lambda rate: rate.median), unit="TFLOP/s", note="causal, 32 heads of 128")
    for rows in (1, 8, 64, 256):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
        wide = [torch.randn(28672, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(8)]

        def read(x: torch.Tensor = x, wide: list[torch.Tensor] = wide) -> None:
            for weight in wide:
                linear(x, weight)

        nbytes = sum(weight.nbytes for weight in wide)
        read_rates = tuple(nbytes / each / 1e12 for each in timed(read))
        bench.row(f"gate_up product, {rows} rows", Sample(read_rates), unit="TB/s", note="weights read")
        del wide
    if torch.cuda.device_count() > 1:
        here = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
        there = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
        moved = timed(lambda: there.copy_(here))
        bench.row("peer copy of 1 GiB", Sample(tuple((1 << 30) / each / 1e9 for each in moved)), unit="GB/s")
    bench.finish(args)


if __name__ == "__main__":
    main()
