"""A step's slices as flat arrays: which row is where, and which page it goes to."""

from __future__ import annotations

import numpy as np
import pytest

from microserve.engine.cuda_inputs import ladder, lay, step_arrays, table_room
from microserve.engine.plan import Slice

PAGE = 4
SLOTS = {1: 10, 2: 20, 3: 30, 4: 40}


def decode(sequence: int, start: int, pages: list[int], token: int | None = None, *, sample: bool = True) -> Slice:
    tokens = None if token is None else np.array([token], dtype=np.int32)
    return Slice(sequence, tokens, start, np.array(pages, dtype=np.int32), sample, 5)


def prompt(sequence: int, start: int, length: int, pages: list[int], *, sample: bool = True) -> Slice:
    tokens = np.arange(100 * sequence, 100 * sequence + length, dtype=np.int32)
    return Slice(sequence, tokens, start, np.array(pages, dtype=np.int32), sample, 0)


def test_decodes_name_their_pages_and_where_their_token_is() -> None:
    arrays = step_arrays([decode(1, 3, [7]), decode(2, 4, [8, 9, 99], token=55)], SLOTS, PAGE)
    assert arrays.decodes == 2
    assert arrays.source.tolist() == [-1 - 10, 55], "the first one's token is in its slot"
    assert arrays.positions.tolist() == [3, 4]
    assert arrays.decode_indptr.tolist() == [0, 1, 3]
    assert arrays.decode_pages.tolist() == [7, 8, 9], "a page beyond the token's is left out"
    assert arrays.sampled_rows.tolist() == [0, 1]
    assert arrays.sampled_slots.tolist() == [10, 20]
    assert arrays.samples == [(1, 5), (2, 5)]
    assert len(arrays.pages) == len(arrays.prefill_last) == 0


def test_decodes_come_first_and_samples_keep_the_plans_order() -> None:
    slices = [prompt(3, 0, 6, [5, 6]), decode(1, 8, [1, 2, 3]), prompt(4, 4, 3, [8, 9], sample=False)]
    arrays = step_arrays(slices, SLOTS, PAGE)
    assert arrays.decodes == 1
    assert arrays.source.tolist() == [-11, *range(300, 306), *range(400, 403)]
    assert arrays.positions.tolist() == [8, 0, 1, 2, 3, 4, 5, 4, 5, 6]
    assert arrays.pages.tolist() == [5, 5, 5, 5, 6, 6, 9, 9, 9]
    assert arrays.prefill_tokens.tolist() == [0, 6, 9]
    assert arrays.prefill_indptr.tolist() == [0, 2, 4]
    assert arrays.prefill_pages.tolist() == [5, 6, 8, 9]
    assert arrays.prefill_last.tolist() == [2, 3]
    assert arrays.samples == [(3, 0), (1, 5)]
    assert arrays.sampled_rows.tolist() == [6, 0], "the prompt's last token, then the decode"
    assert arrays.sampled_slots.tolist() == [30, 10]
    assert not arrays.fresh


def test_prompts_are_fresh_when_none_has_a_past() -> None:
    assert step_arrays([prompt(3, 0, 6, [5, 6]), decode(1, 8, [1, 2, 3])], SLOTS, PAGE).fresh
    assert not step_arrays([prompt(3, 0, 6, [5, 6]), prompt(4, 1, 2, [8])], SLOTS, PAGE).fresh


def test_a_lone_token_of_a_prompt_attends_as_a_decode_and_need_not_be_sampled() -> None:
    arrays = step_arrays([decode(2, 0, [4], token=9, sample=False)], SLOTS, PAGE)
    assert arrays.decodes == 1
    assert arrays.samples == []
    assert arrays.decode_pages.tolist() == [4]


def test_arrays_lie_one_behind_another_at_multiples_of_four() -> None:
    memory = np.full(16, -1, dtype=np.int32)
    first, none, second = np.arange(5, dtype=np.int32), np.empty(0, dtype=np.int32), np.array([9], dtype=np.int32)
    places, end = lay(memory, (first, none, second))
    assert [memory[place].tolist() for place in places] == [[0, 1, 2, 3, 4], [], [9]]
    assert (places[2].start, end) == (8, 12)
    with pytest.raises(ValueError, match="17 places are needed, and there are 16"):
        lay(memory, (np.zeros(13, dtype=np.int32), second))


def test_tables_of_sequences_that_share_their_pages_have_room() -> None:
    assert table_room(512, 4100, 16) == 512 * 257, "a page that all of them share stands in every table"
    assert table_room(4096, 1 << 20, 1) == 1 << 26
    shared = [decode(sequence, 11, [1, 2, 3]) for sequence in SLOTS]
    arrays = step_arrays(shared, SLOTS, PAGE)
    assert len(arrays.decode_pages) == table_room(len(SLOTS), 12, PAGE)


def test_the_ladder_ends_with_the_largest_batch() -> None:
    assert ladder(1) == [1]
    assert ladder(20) == [1, 2, 4, 8, 16, 20]
    assert ladder(512)[-3:] == [448, 480, 512]
    assert all(small < large for small, large in zip(ladder(600), ladder(600)[1:], strict=False))
