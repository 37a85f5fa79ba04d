"""The limits that figures of a GPU are held against."""

from __future__ import annotations

import pytest
from perf.limits import Rates, work_of
from perf.shapes import SHAPES

H200 = Rates(copy=4.26e12, product=790e12, attention=460e12)
LLAMA = work_of(SHAPES["llama-3.1-8b"])


def test_the_shape_is_counted() -> None:
    # 8.03e9 parameters in all, of which the embedding is as large as the head; norms are 266,240.
    assert LLAMA.body + 2 * LLAMA.head == 8_030_261_248 - 266_240
    assert LLAMA.kv_bytes == 128 * 1024


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 3.53), (8, 3.59), (64, 4.06), (256, 7.01)])
def test_a_decode_step(batch: int, milliseconds: float) -> None:
    assert 1e3 * LLAMA.decode_step(batch, 272, H200) == pytest.approx(milliseconds, abs=0.01)


@pytest.mark.parametrize(("tokens", "milliseconds"), [(512, 9.2), (2048, 38.6), (8192, 183.0)])
def test_a_prefill(tokens: int, milliseconds: float) -> None:
    assert 1e3 * LLAMA.prefill(tokens, H200) == pytest.approx(milliseconds, abs=0.1)


def test_throughput() -> None:
    assert LLAMA.throughput(500, 1024, 256, H200) == pytest.approx(7850, rel=0.01)


def test_a_config_may_leave_out_what_follows_from_the_rest() -> None:
    config = {name: value for name, value in SHAPES["llama-3.1-8b"].items() if name != "head_dim"}
    assert work_of(config) == LLAMA
    assert work_of(config | {"num_key_value_heads": None}).kv_bytes == 4 * LLAMA.kv_bytes
