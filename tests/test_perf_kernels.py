"""Which kernel is what, and what each is charged: pure, so without a GPU."""

from __future__ import annotations

from perf.kernels import (
    ATTENTION,
    DOWN,
    GAPS,
    GATE_UP,
    HEAD,
    NORM,
    OUTPUT,
    QKV,
    REST,
    ROTATION,
    SILU,
    Kernel,
    by_step,
    charge,
    classify,
)

PROMPT = {
    "nvjet_qkv": QKV,
    "_rotate_and_store": ROTATION,
    "void flashinfer::PrefillWithKVCacheKernel<cutlass>": ATTENTION,
    "nvjet_output": OUTPUT,
    "FusedAddRMSNormKernel": NORM,
    "nvjet_gate_up": GATE_UP,
    "act_and_mul_kernel": SILU,
    "nvjet_down": DOWN,
    "void splitKreduce_kernel": DOWN,
    "second FusedAddRMSNormKernel": NORM,
}
DECODE = {
    "nvjet_qkv": QKV,
    "_decode": ATTENTION,
    "_product output": OUTPUT,
    "_add_norm": NORM,
    "_product gated": GATE_UP,
    "_product down": DOWN,
    "another _add_norm": NORM,
}
BEGIN = {"vectorized_gather": REST, "RMSNormKernel": NORM}
END = {"_product head": HEAD, "reduce_kernel": REST}


def test_products_are_told_apart_by_where_they_stand() -> None:
    step = [*BEGIN.items(), *PROMPT.items(), *PROMPT.items(), *END.items()]
    step += [*BEGIN.items(), *DECODE.items(), *DECODE.items(), *END.items()]
    names, kinds = zip(*step * 2, strict=True)
    assert classify(names) == list(kinds)


def test_a_chunk_that_samples_nothing_has_no_head() -> None:
    chunk = [*BEGIN.items(), *PROMPT.items(), *PROMPT.items()]
    names, kinds = zip(*chunk, *chunk, *END.items(), strict=True)
    assert classify(names) == list(kinds)


def test_time_is_charged_once_and_gaps_are_told() -> None:
    kernels = [Kernel("a", 0, 10), Kernel("b", 4, 14), Kernel("inside b", 5, 12), Kernel("c", 20, 25)]
    assert charge(kernels) == [10, 4, 0, 5]
    mega = [Kernel(each.name, each.start * 10**6, each.end * 10**6) for each in kernels]
    steps = list(
        by_step(
            [*mega, *(Kernel(e.name, e.start + 10**8, e.end + 10**8) for e in mega)], [GATE_UP, SILU, DOWN, REST] * 2, 1
        )
    )
    assert steps == [{GATE_UP: 10.0, SILU: 4.0, DOWN: 0.0, REST: 5.0, GAPS: 81.0}]
