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
    SUMS,
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
    "void splitKreduce_kernel": SUMS,
    "second FusedAddRMSNormKernel": NORM,
}
LONG = {
    "nvjet_qkv": QKV,
    "_rotate_and_store": ROTATION,
    "void flashinfer::PrefillWithKVCacheKernel<cutlass>": ATTENTION,
    "nvjet_output": OUTPUT,
    "FusedAddRMSNormKernel": NORM,
    "_gated": GATE_UP,
    "nvjet_down": DOWN,
    "second FusedAddRMSNormKernel": NORM,
}
"""A prompt of many tokens, whose gate, up and SiLU are one kernel."""
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
    step += [*BEGIN.items(), *LONG.items(), *LONG.items(), *END.items()]
    names, kinds = zip(*step * 2, strict=True)
    assert classify(names) == list(kinds)


def test_a_chunk_that_samples_nothing_has_no_head() -> None:
    chunk = [*BEGIN.items(), *PROMPT.items(), *PROMPT.items()]
    names, kinds = zip(*chunk, *chunk, *END.items(), strict=True)
    assert classify(names) == list(kinds)


def test_time_is_charged_once() -> None:
    kernels = [
        Kernel("a", 0, 10),
        Kernel("b", 4, 14),
        Kernel("in b", 5, 12),
        Kernel("in b", 12, 13),
        Kernel("c", 20, 25),
    ]
    assert charge(kernels) == [10, 4, 0, 0, 5]


def test_a_step_is_from_its_first_mlp_to_the_next_ones_and_gaps_are_told() -> None:
    """Two layers; whatever a product is summed up by is no layer."""
    kinds = [OUTPUT, GATE_UP, SUMS, DOWN, OUTPUT, GATE_UP, SUMS, DOWN] * 3
    kernels = [Kernel(kind, 10**6 * 10 * place, 10**6 * (10 * place + 7)) for place, kind in enumerate(kinds)]
    whole = {OUTPUT: 14.0, GATE_UP: 14.0, SUMS: 14.0, DOWN: 14.0, GAPS: 24.0}
    assert list(by_step(kernels, kinds, 2)) == [whole, whole]
