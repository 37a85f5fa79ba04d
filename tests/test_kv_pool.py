"""The pool tensor: a page is contiguous, and a layer's views read and write the same memory."""

from __future__ import annotations

import ctypes

import pytest
import torch

from microserve.kv.pool import PagePool, PageShape

SHAPE = PageShape(kv_heads=2, layers=3, page_size=4, head_dim=8, dtype=torch.float32)


def test_a_page_is_one_contiguous_run_of_the_stated_size() -> None:
    pool = PagePool(5, SHAPE)
    assert SHAPE.page_bytes == 2 * 3 * 2 * 4 * 8 * 4
    assert pool.nbytes == 5 * SHAPE.page_bytes
    assert pool.tensor[3].is_contiguous()
    assert pool.tensor[3].data_ptr() - pool.tensor[2].data_ptr() == SHAPE.page_bytes
    assert SHAPE.pages_in(10 * SHAPE.page_bytes + 1) == 10


def test_a_layer_view_writes_the_layers_slice_of_the_page_and_nothing_else() -> None:
    pool = PagePool(2, SHAPE)
    keys, values = pool.layer_views(1)
    assert keys.shape == values.shape == (2, 2, 4, 8)
    keys[1, 0, 2] = 7.0
    values[1, 1, 3] = 9.0
    assert pool.tensor[1, 0, 1, 0, 2].tolist() == [7.0] * 8
    assert pool.tensor[1, 1, 1, 1, 3].tolist() == [9.0] * 8
    assert float(pool.tensor.sum()) == 8 * 16.0


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0, SHAPE)


def test_as_plain_memory_it_is_the_tensors_bytes() -> None:
    pool = PagePool(5, SHAPE)
    memory = pool.memory
    assert (memory.page_bytes, memory.total_pages, memory.device) == (SHAPE.page_bytes, 5, "cpu")
    ctypes.memset(memory.address + 3 * memory.page_bytes, 0x3F, memory.page_bytes)
    assert [float(pool.tensor[page].max()) for page in range(5)] == [0.0, 0.0, 0.0, pytest.approx(0.7470588), 0.0]
