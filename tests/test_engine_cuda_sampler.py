"""The GPU's sampler on the CPU: what it draws is the same program."""

from __future__ import annotations

import pytest
import torch

from microserve.engine.cuda_sampler import draw
from microserve.runtime.messages import SamplingParams

VOCAB = 1000


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


@pytest.mark.parametrize("temperature", [1e-5, 1e-20, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.5)])
def test_the_coldest_draw_the_likeliest(temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB).bfloat16() * 30
    logits[:, 7] = 400.0
    settings = [SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)] * 4
    assert draw(logits, settings, range(4), [0] * 4).tolist() == [7] * 4


def test_a_row_that_is_no_numbers_draws_a_token_that_there_is_and_leaves_its_neighbours_alone() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, VOCAB)
    settings = [SamplingParams(temperature=1.0)] * 3
    whole = draw(logits, settings, range(3), [0] * 3).tolist()
    logits[1] = torch.nan
    drawn = draw(logits, settings, range(3), [0] * 3).tolist()
    assert 0 <= drawn[1] < VOCAB
    assert (drawn[0], drawn[2]) == (whole[0], whole[2])


def test_a_row_is_drawn_alike_whatever_it_is_drawn_with() -> None:
    torch.manual_seed(0)
    rows = 300
    logits = torch.randn(rows, VOCAB)
    each = (
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.0, top_k=7),
        SamplingParams(temperature=2.0, top_p=0.6, min_p=0.02),
    )
    settings = [each[row % 3] for row in range(rows)]
    together = draw(logits, settings, range(rows), [4] * rows).tolist()
    for row in (0, 1, 2, 127, 128, 129, 299):
        alone = draw(logits[row : row + 1], settings[row : row + 1], [row], [4])
        assert together[row] == int(alone), row
