"""What the GPU makes of penalties, biases and `min_tokens`, on a CPU and on a GPU, against the CPU's own sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from microserve.engine.cuda_adjust import Adjustments
from microserve.engine.plan import SequenceStart
from microserve.engine.sampler import Sampler
from microserve.runtime.errors import InternalError
from microserve.runtime.messages import SamplingParams

VOCAB = 50
ENDS = (7, 9)
SETTINGS = [
    SamplingParams(temperature=0, repetition_penalty=1.7),
    SamplingParams(temperature=0, repetition_penalty=0.6, presence_penalty=-0.5),
    SamplingParams(temperature=0, presence_penalty=1.5, frequency_penalty=0.7),
    SamplingParams(temperature=0, frequency_penalty=-0.3, logit_bias={3: 4.0, 11: -100.0, 4000: 9.0, -2: 9.0}),
    SamplingParams(temperature=0, logit_bias={5: 100.0}, min_tokens=3, stop_token_ids=(5, 4000)),
    SamplingParams(temperature=0, min_tokens=2),
]


def started(sequence: int, sampling: SamplingParams, *, prompt: int = 6, output: int = 0) -> SequenceStart:
    history = np.random.default_rng(sequence).integers(0, VOCAB, prompt + output).astype(np.int32)
    return SequenceStart(sequence, history, prompt, sampling, 0, ENDS)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make(device: torch.device, most: int = 16) -> Adjustments:
    return Adjustments(most, VOCAB, device)


def step(
    adjustments: Adjustments, logits: torch.Tensor, samples: list[tuple[int, int]]
) -> tuple[torch.Tensor, list[int]]:
    """Adjusted logits, and the greedy tokens, which are counted. Rows that are no numbers say -1."""
    columns = torch.from_numpy(adjustments.columns([sequence for sequence, _ in samples])).to(logits.device)
    adjusted = adjustments.adjusted(logits, columns, samples)
    best, ids = adjusted.max(dim=-1)
    tokens = torch.where(torch.isfinite(best), ids, -1).int()
    adjustments.count(columns, tokens)
    return adjusted, tokens.tolist()


@pytest.mark.parametrize("output", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_adjusted_as_the_cpu_adjusts_them_step_by_step(
    output: int, dtype: torch.dtype, device: torch.device
) -> None:
    """From the beginning, and from where a sequence that was preempted goes on."""
    torch.manual_seed(output)
    adjustments, sampler = make(device), Sampler(VOCAB)
    for sequence, sampling in enumerate(SETTINGS):
        start = started(sequence, sampling, output=output)
        adjustments.start(start)
        sampler.start(start)
    for index in range(output, output + 12):
        samples = [(sequence, index) for sequence in range(len(SETTINGS))]
        logits = (2 * torch.randn(len(samples), VOCAB)).to(dtype)
        logits[0, :9] = 0.0
        before, exact = logits.clone(), logits.clone().float()
        expected = [each.token for each in sampler.sample(exact, samples)]
        given = logits.to(device)
        adjusted, tokens = step(adjustments, given, samples)
        # The CPU's sampler has changed what it was given.
        torch.testing.assert_close(adjusted.cpu(), exact, atol=1e-6, rtol=1e-6)
        assert tokens == expected
        assert torch.equal(given.cpu(), before), "what log probabilities are of"


def test_a_row_of_no_numbers_is_not_counted_and_leaves_the_others_alone(device: torch.device) -> None:
    adjustments = make(device)
    for sequence in (1, 2):
        adjustments.start(started(sequence, SETTINGS[2]))
    logits = torch.randn(2, VOCAB, device=device)
    logits[0, 4] = torch.nan
    _, tokens = step(adjustments, logits, [(1, 0), (2, 0)])
    assert tokens[0] == -1
    zeros = torch.zeros(2, VOCAB, device=device)
    adjusted, _ = step(adjustments, zeros, [(1, 1), (2, 1)])
    assert (adjusted[0] == 0).all()
    assert adjusted[1].nonzero().flatten().tolist() == [tokens[1]]


def test_a_sequence_that_is_forgotten_leaves_its_place_clean(device: torch.device) -> None:
    adjustments = make(device, most=2)
    adjustments.start(started(1, SETTINGS[2], output=20))
    adjustments.start(started(2, SETTINGS[2], output=20))
    assert (len(adjustments), 2 in adjustments, 3 in adjustments) == (2, True, False)
    with pytest.raises(InternalError):
        adjustments.start(started(3, SETTINGS[2]))
    adjustments.forget(1)
    adjustments.forget(1)
    adjustments.forget(5)
    adjustments.start(started(3, SETTINGS[2]))
    adjusted, _ = step(adjustments, torch.zeros(1, VOCAB, device=device), [(3, 0)])
    assert (adjusted == 0).all(), "what the sequence before said in this place is counted no more"
    assert len(adjustments) == 2


def test_a_start_that_fails_takes_no_place_and_a_second_one_takes_that_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adjustments = make(torch.device("cpu"), most=1)

    def fails(*arguments: object) -> None:
        raise RuntimeError("the host cannot pin")

    with monkeypatch.context() as broken:
        broken.setattr(adjustments, "_sent", fails)
        for _ in range(3):
            with pytest.raises(RuntimeError):
                adjustments.start(started(1, SETTINGS[0]))
    assert 1 not in adjustments
    for _ in range(3):
        adjustments.start(started(1, SETTINGS[2], output=5))
    adjusted, _ = step(adjustments, torch.zeros(1, VOCAB), [(1, 5)])
    said = started(1, SETTINGS[2], output=5).history[6:]
    assert sorted(adjusted[0].nonzero().flatten().tolist()) == sorted(set(said.tolist()))


def test_numbers_of_a_token_do_not_run_over(device: torch.device) -> None:
    adjustments = make(device)
    history = np.full(40_000, 3, dtype=np.int32)
    sampling = SamplingParams(temperature=0, frequency_penalty=1.0, repetition_penalty=2.0)
    adjustments.start(SequenceStart(1, history, 1, sampling, 0, ()))
    for index in range(3):
        columns = torch.from_numpy(adjustments.columns([1])).to(device)
        adjusted = adjustments.adjusted(torch.ones(1, VOCAB, device=device), columns, [(1, index)])
        assert adjusted[0, 3] == 0.5 - 0x3FFF
        assert (adjusted[0, 4:] == 1).all()
        adjustments.count(columns, torch.tensor([3], dtype=torch.int32, device=device))
