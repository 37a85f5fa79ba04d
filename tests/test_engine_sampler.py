"""The sampler: each setting by its definition, and randomness that depends on seed and output index alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from microserve.engine.plan import Sampled, SequenceStart
from microserve.engine.sampler import Sampler, philox4x32, uniforms
from microserve.runtime.messages import SamplingParams

VOCABULARY = 32
EOS = 31


def start(
    sequence: int = 1, *, history: list[int] | None = None, prompt: int = 0, seed: int = 0, **sampling: Any
) -> SequenceStart:
    known = np.array(history or [], dtype=np.int32)
    return SequenceStart(sequence, known, prompt, SamplingParams(**sampling), seed, (EOS,))


def pick(logits: torch.Tensor, begun: SequenceStart, index: int = 0) -> Sampled:
    sampler = Sampler(VOCABULARY)
    sampler.start(begun)
    (sampled,) = sampler.sample(logits.clone().unsqueeze(0), [(begun.sequence, index)])
    return sampled


def row(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # The known answers that Random123, the authors' library, publishes for philox4x32 with 10 rounds.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    words = philox4x32(np.array([counter], dtype=np.uint64), np.array([key], dtype=np.uint64))
    assert tuple(words[0].tolist()) == expected


def test_uniform_numbers_are_spread_and_differ_by_seed_and_index() -> None:
    numbers = uniforms([5] * 4000, range(4000))
    assert 0 <= numbers.min() < numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=0.02)
    assert numbers.std() == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    assert len({*uniforms([1, 2, -1], [0, 0, 0]).tolist(), *uniforms([1], [1]).tolist()}) == 4


def test_greedy_takes_the_best_and_the_first_of_equals() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[[7, 9]] = 3.0
    assert pick(logits, start(temperature=0.0)).token == 7


def test_a_draw_is_the_same_alone_and_in_any_batch_and_order() -> None:
    rows = {i: row(i) for i in range(16)}
    settings = {
        i: start(i, seed=100 + i, temperature=0.5 + i / 8, top_p=0.9 if i % 2 else 1.0, top_k=5 if i % 3 else 0)
        for i in range(16)
    }
    alone = {i: pick(rows[i], settings[i], index=3).token for i in range(16)}
    for order in (list(range(16)), list(reversed(range(16))), [3, 11, 5]):
        sampler = Sampler(VOCABULARY)
        for i in order:
            sampler.start(settings[i])
        batch = sampler.sample(torch.stack([rows[i] for i in order]), [(i, 3) for i in order])
        assert {s.sequence: s.token for s in batch} == {i: alone[i] for i in order}


def draws(count: int, logits: torch.Tensor, **sampling: Any) -> np.ndarray:
    sampler = Sampler(VOCABULARY)
    sampler.start(start(seed=9, **sampling))
    rows = [(1, index) for index in range(count)]
    sampled = sampler.sample(logits.repeat(count, 1), rows)
    return np.bincount([s.token for s in sampled], minlength=VOCABULARY) / count


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = row()
    expected = torch.softmax(logits / 1.5, dim=-1).numpy()
    assert np.abs(draws(20_000, logits, temperature=1.5) - expected).max() < 0.012


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05] + [1e-9] * (VOCABULARY - 5)))
    assert np.flatnonzero(draws(3000, logits, top_k=2)).tolist() == [0, 1]
    assert np.flatnonzero(draws(3000, logits, top_p=0.75)).tolist() == [0, 1, 2]
    assert np.flatnonzero(draws(3000, logits, top_p=0.01)).tolist() == [0]
    assert np.flatnonzero(draws(3000, logits, min_p=0.3)).tolist() == [0, 1, 2]
    # Top-p looks at what top-k left: 0.4 / 0.85 is less than 0.5.
    assert np.flatnonzero(draws(3000, logits, top_k=3, top_p=0.5)).tolist() == [0, 1]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_what_was_seen() -> None:
    logits = torch.full((VOCABULARY,), -9.0)
    logits[:3] = torch.tensor([3.0, 2.0, 1.9])
    begun = start(history=[0, 1], prompt=1, temperature=0.0, repetition_penalty=2.0)
    assert pick(logits, begun).token == 2
    logits[:3] = torch.tensor([-1.0, -1.5, -9.0])
    assert pick(logits, start(history=[0], prompt=1, temperature=0.0, repetition_penalty=2.0)).token == 1


def test_presence_and_frequency_count_output_only_and_grow_with_each_token() -> None:
    logits = torch.full((VOCABULARY,), -9.0)
    logits[:2] = torch.tensor([2.0, 1.0])
    prompt_only = start(history=[0, 0, 0], prompt=3, temperature=0.0, presence_penalty=2.0)
    assert pick(logits, prompt_only).token == 0
    assert pick(logits, start(history=[5, 0], prompt=1, temperature=0.0, presence_penalty=2.0)).token == 1
    sampler = Sampler(VOCABULARY)
    sampler.start(start(temperature=0.0, frequency_penalty=0.4))
    tokens = [sampler.sample(logits.clone().unsqueeze(0), [(1, i)])[0].token for i in range(6)]
    assert tokens == [0, 0, 0, 1, 0, 1]


def test_a_resumed_sequence_has_the_penalties_of_its_output_so_far() -> None:
    logits = row()
    sampling: dict[str, Any] = {"temperature": 0.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3}
    sampler = Sampler(VOCABULARY)
    sampler.start(start(history=[4, 5], prompt=2, **sampling))
    through = [sampler.sample(logits.clone().unsqueeze(0), [(1, i)])[0].token for i in range(8)]
    resumed = Sampler(VOCABULARY)
    resumed.start(start(history=[4, 5, *through[:5]], prompt=2, **sampling))
    assert [resumed.sample(logits.clone().unsqueeze(0), [(1, i)])[0].token for i in range(5, 8)] == through[5:]


def test_logit_bias_moves_and_forbids() -> None:
    logits = row()
    best = int(logits.argmax())
    assert pick(logits, start(temperature=0.0, logit_bias={best: -100.0})).token != best
    assert pick(logits, start(temperature=1.0, logit_bias={6: 100.0})).token == 6


def test_min_tokens_keeps_ends_away_until_then() -> None:
    logits = torch.zeros(VOCABULARY)
    logits[EOS], logits[4], logits[2] = 9.0, 8.0, 7.0
    begun = start(temperature=0.0, min_tokens=2, stop_token_ids=(4,))
    assert [pick(logits, begun, index).token for index in range(3)] == [2, 2, EOS]


def test_logprobs_are_those_of_the_model_before_any_setting() -> None:
    logits = row()
    expected = torch.log_softmax(logits, dim=-1)
    sampled = pick(logits, start(temperature=0.3, logit_bias={6: 100.0}, logprobs=3))
    assert sampled.token == 6
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprob == pytest.approx(float(expected[6]))
    assert sampled.logprobs.top_ids == expected.topk(3).indices.tolist()
    assert sampled.logprobs.top_logprobs == pytest.approx(expected.topk(3).values.tolist())
    assert pick(logits, start(logprobs=0)).logprobs is not None
    assert pick(logits, start()).logprobs is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_their_sequence_and_no_other(value: float, temperature: float) -> None:
    sampler = Sampler(VOCABULARY)
    for sequence in (1, 2):
        sampler.start(start(sequence, temperature=temperature, seed=3))
    good, bad = row(), row()
    bad[3] = value
    first, second = sampler.sample(torch.stack([bad, good]), [(1, 0), (2, 0)])
    assert first.error == "the model's logits are not finite numbers"
    assert (second.error, second.token) == (None, pick(good, start(2, temperature=temperature, seed=3)).token)


def test_a_forgotten_sequence_leaves_nothing() -> None:
    sampler = Sampler(VOCABULARY)
    sampler.start(start())
    sampler.forget(1)
    sampler.forget(1)
    assert len(sampler) == 0


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-40, 5e-324])
def test_the_coldest_draw_the_likeliest(temperature: float) -> None:
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 30
    logits[0, 7] = 400.0
    assert np.flatnonzero(draws(50, logits, temperature=temperature)).tolist() == [7]
