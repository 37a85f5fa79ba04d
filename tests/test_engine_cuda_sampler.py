"""What the GPU's sampler tells its kernel, which a CPU can say; the kernel's own tests need a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microserve.engine.cuda_sampler import Draws, greedy, log_probabilities, plain
from microserve.engine.sampler import COLDEST, uniforms
from microserve.runtime.messages import SamplingParams


def slots(*numbers: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(numbers, dtype=np.int32)


def test_the_columns_of_a_step_are_those_of_its_slots_that_draw() -> None:
    draws = Draws(8)
    draws.start(5, SamplingParams(temperature=0.5, top_k=7, top_p=0.9, min_p=0.1), 42)
    draws.start(2, SamplingParams(temperature=1e-20), -1)
    assert len(draws) == 2
    columns = draws.columns(slots(0, 5, 1, 2), [9, 3, 9, 4])
    numbers = uniforms([42, -1], [3, 4])
    np.testing.assert_array_equal(
        columns, [[1, 3], [5, 2], [0.5, COLDEST], [7, 0], [0.9, 1.0], [0.1, 0.0], numbers], strict=False
    )
    assert columns.flags.c_contiguous


def test_a_slot_that_is_forgotten_draws_no_more_and_its_next_sequence_draws_its_own_way() -> None:
    draws = Draws(4)
    draws.start(1, SamplingParams(temperature=1.0, top_k=3), 7)
    draws.forget(1)
    draws.forget(1)
    assert (len(draws), draws.columns(slots(1), [0]).size) == (0, 0)
    draws.start(1, SamplingParams(temperature=2.0), 8)
    np.testing.assert_array_equal(
        draws.columns(slots(1), [5])[:, 0], [0, 1, 2.0, 0, 1.0, 0.0, uniforms([8], [5])[0]], strict=False
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "logprobs": 20}, True),
        ({"logit_bias": {3: 1.0}}, False),
        ({"min_tokens": 1}, False),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1}, False),
    ],
)
def test_which_settings_change_logits(settings: dict[str, object], expected: bool) -> None:
    assert plain(SamplingParams(**settings)) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1024), (64, 1024), (65, 1024), (2, 1000)])
def test_the_greedy_choice_is_the_first_of_the_largest(rows: int, vocab: int) -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 50, (rows, vocab)).bfloat16()
    best, ids = greedy(logits)
    assert torch.equal(best, logits.amax(dim=-1))
    assert ids.tolist() == [int((row == row.max()).nonzero()[0]) for row in logits]


@pytest.mark.parametrize("count", [1, 64, 65, 130])
def test_log_probabilities_are_those_of_the_rows_that_are_told_before_any_setting(count: int) -> None:
    torch.manual_seed(0)
    # No two values of a row are equal: whose turn it is among equals, nobody says.
    logits = torch.stack([torch.randperm(300) for _ in range(150)]).float() / 7
    tokens = torch.randint(0, 300, (150,), dtype=torch.int32)
    rows = torch.randperm(150)[:count]
    tokens[rows[0]] = -1
    values, ids = log_probabilities(logits, tokens, rows, 5)
    exact = torch.log_softmax(logits[rows].double(), dim=-1)
    best, places = exact.topk(5)
    assert (values.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert torch.equal(ids, places.int())
    torch.testing.assert_close(values[:, 1:].double(), best, atol=1e-5, rtol=0)
    chosen = exact.gather(1, tokens[rows].long().clamp(min=0).unsqueeze(1))
    torch.testing.assert_close(values[:, :1].double(), chosen, atol=1e-5, rtol=0)
    alone = log_probabilities(logits, tokens, rows, 0)
    assert (tuple(alone[0].shape), tuple(alone[1].shape)) == ((count, 1), (count, 0))
    torch.testing.assert_close(alone[0], values[:, :1])
