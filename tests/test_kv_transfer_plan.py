"""Runs and descriptors say the same as the page pairs they were made of, with as few pieces as their order allows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.kv.transfer.plan import descriptors, planned, runs

Pairs = list[tuple[int, int]]

PIECES = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200), st.integers(1, 6)), max_size=12)
"""(source, target, length): pairs with runs in them."""


def _pairs(pieces: list[tuple[int, int, int]]) -> Pairs:
    return [(source + i, target + i) for source, target, length in pieces for i in range(length)]


def _sides(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    both = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return both[:, 0], both[:, 1]


@given(PIECES)
def test_runs_are_the_pairs_in_order_and_maximal(pieces: list[tuple[int, int, int]]) -> None:
    pairs = _pairs(pieces)
    found = runs(*_sides(pairs))
    assert [(a + i, b + i) for a, b, count in found for i in range(count)] == pairs
    assert all(count >= 1 for _, _, count in found)
    for (a, b, count), (c, d, _) in itertools.pairwise(found):
        assert (a + count, b + count) != (c, d)


@given(PIECES, st.integers(1, 1 << 22), st.integers(0, 1 << 47), st.integers(0, 7))
def test_descriptors_cover_exactly_the_bytes_of_the_pages(
    pieces: list[tuple[int, int, int]], page_bytes: int, address: int, device: int
) -> None:
    pairs = _pairs(pieces)
    found = runs(*_sides(pairs))
    for side in (0, 1):
        made = descriptors(found, side, address, page_bytes, device).tolist()
        covered = [start + offset for start, length, _ in made for offset in range(0, length, page_bytes)]
        assert covered == [address + pair[side] * page_bytes for pair in pairs]
        assert all(length % page_bytes == 0 and on == device for _, length, on in made)


def test_one_run_when_both_sides_go_on_and_two_when_one_does_not() -> None:
    assert runs(np.array([4, 5, 6], np.int32), np.array([8, 9, 10], np.int32)) == [(4, 8, 3)]
    assert runs(np.array([4, 5, 6], np.int32), np.array([8, 9, 11], np.int32)) == [(4, 8, 2), (6, 11, 1)]
    assert runs(np.array([5, 4], np.int32), np.array([9, 8], np.int32)) == [(5, 9, 1), (4, 8, 1)]
    assert runs(np.array([], np.int32), np.array([], np.int32)) == []
    with pytest.raises(ValueError, match="2 pages cannot go into 1"):
        runs(np.array([1, 2], np.int32), np.array([1], np.int32))


def test_descriptors_of_pools_beyond_four_gigabytes_do_not_wrap() -> None:
    made = descriptors([(0, 40_000, 2)], 1, 1 << 46, 2 << 20, 3)
    assert made.dtype == np.uint64
    assert made.tolist() == [[(1 << 46) + 40_000 * (2 << 20), 4 << 20, 3]]


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ([0], [0], [(0, 0, 1)]),
        ([8, 9, 0], [3, 4, 4], [(8, 3, 2), (0, 4, 1)]),
        ([], [], "0 pages cannot be pushed into 0"),
        ([1], [1, 2], "1 pages cannot be pushed into 2"),
        ([10], [0], "page 10 is not among our 10"),
        ([0, -1], [0, 1], "page -1 is not among our 10"),
        ([0], [5], "page 5 is not among the peer's 5"),
        ([0, 1], [4, 5], "page 5 is not among the peer's 5"),
    ],
)
def test_pairs_that_cannot_be_pushed_are_named(source: list[int], target: list[int], found: object) -> None:
    assert planned(np.array(source, np.int32), np.array(target, np.int32), 10, 5) == found
