"""The torch executor, driven by hand-made plans: what it writes, what it reads, and what it refuses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from microserve.engine.model.checkpoint import load_weights
from microserve.engine.model.config import read_config
from microserve.engine.model.decoder import Decoder
from microserve.engine.model.kernels import TorchKernels
from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.engine.plan import Sampled, SequenceStart, Slice, StepPlan
from microserve.engine.progress import Progress
from microserve.engine.torch_executor import TorchExecutor, describe, open_torch_executor
from microserve.kv.pool import PagePool, PageShape
from microserve.runtime.config import EngineConfig
from microserve.runtime.errors import InternalError
from microserve.runtime.messages import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4
PAGES = 24


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("llama"), scale=0.2, seed=3)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(
        tmp_path_factory.mktemp("mistral"), arch="mistral", scale=0.2, num_hidden_layers=1, sliding_window=6
    )


class Hand:
    """An executor on a pool that the test can look into, and plans made of (sequence, tokens, start, pages)."""

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        config = read_config(folder)
        weights = load_weights(folder, config, dtype=dtype)
        decoder = Decoder(config, weights, TorchKernels(), max_context=256)
        self.pool = PagePool(PAGES, PageShape(config.kv_heads, config.layers, PAGE, config.head_dim, dtype))
        info = describe(config, folder, name="hand", max_context=256)
        self.executor = TorchExecutor(decoder, self.pool, info)
        self.steps = 0

    def step(self, *slices: Slice, started: tuple[SequenceStart, ...] = (), forgotten: tuple[int, ...] = ()) -> Any:
        self.steps += 1
        self.executor.launch(StepPlan(self.steps, slices, started, forgotten))
        result = self.executor.collect()
        assert result.step == self.steps
        return result.sampled


def begin(sequence: int = 1, **sampling: Any) -> SequenceStart:
    settings = SamplingParams(**{"temperature": 0.0, "logprobs": 20, **sampling})
    return SequenceStart(sequence, np.empty(0, dtype=np.int32), 0, settings, 7, (260,))


def part(
    tokens: list[int] | None, start: int, pages: list[int], *, sequence: int = 1, sample: bool = True, index: int = 0
) -> Slice:
    ids = None if tokens is None else np.array(tokens, dtype=np.int32)
    return Slice(sequence, ids, start, np.array(pages, dtype=np.int32), sample, index)


def tokens(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 256, count).tolist()
    return ids


def same(left: Sampled, right: Sampled, within: float = 1e-5) -> bool:
    """Whether two results are of the same logits, as far as their log probabilities show."""
    assert left.logprobs is not None
    assert right.logprobs is not None
    near = np.allclose(left.logprobs.top_logprobs, right.logprobs.top_logprobs, rtol=0, atol=within)
    return left.token == right.token and left.logprobs.top_ids == right.logprobs.top_ids and near


def test_only_slices_that_ask_are_sampled_and_in_the_plans_order(checkpoint: Path) -> None:
    hand = Hand(checkpoint)
    started = tuple(begin(sequence) for sequence in (1, 2, 3))
    sampled = hand.step(
        part(tokens(5, 1), 0, [0, 1], sequence=3),
        part(tokens(6, 2), 0, [2, 3], sequence=1, sample=False),
        part(tokens(1, 3), 0, [4], sequence=2),
        started=started,
    )
    assert [one.sequence for one in sampled] == [3, 2]
    assert hand.step(part(tokens(1), 6, [2, 3], sequence=1, sample=False)) == ()
    assert hand.step() == ()


def test_chunks_decodes_and_one_pass_give_the_same_logits(checkpoint: Path) -> None:
    ids = tokens(19)
    (whole,) = Hand(checkpoint).step(part(ids, 0, [0, 1, 2, 3, 4]), started=(begin(),))
    hand = Hand(checkpoint)
    pages = [9, 2, 17, 23, 0]
    hand.step(part(ids[:3], 0, pages[:1], sample=False), started=(begin(),))
    hand.step(part(ids[3:14], 3, pages[:4], sample=False))
    hand.step(part(ids[14:15], 14, pages[:4], sample=False))
    hand.step(part(ids[15:18], 15, pages, sample=False))
    (cut,) = hand.step(part(ids[18:], 18, pages))
    assert same(whole, cut)


def test_a_step_writes_the_rows_of_its_tokens_and_nothing_else(checkpoint: Path) -> None:
    hand = Hand(checkpoint)
    hand.pool.tensor.fill_(5.0)
    ids = tokens(6)
    hand.step(part(ids[:5], 0, [7, 3], sample=False), started=(begin(),))
    assert torch.equal(
        hand.pool.tensor[[p for p in range(PAGES) if p not in (7, 3)]], torch.full((22, 2, 2, 2, 4, 16), 5.0)
    )
    assert not (hand.pool.tensor[7] == 5.0).any()
    assert not (hand.pool.tensor[3, :, :, :, :1] == 5.0).any()
    assert not hand.pool.tensor[3, :, :, :, 1:].any(), "the rest of a page that was begun is zero"
    before = hand.pool.tensor.clone()
    hand.step(part(ids[5:], 5, [7, 3], sample=False))
    changed = (hand.pool.tensor != before).any(-1).nonzero()
    assert {(page, offset) for page, *_, offset in changed.tolist()} == {(3, 1)}
    assert len(changed) == 2 * 2 * 2, "every head, every layer, key and value"


def test_keys_and_values_lie_where_the_pools_views_say(checkpoint: Path) -> None:
    """The second of two equal tokens in one layer has the same value, and another key: it stands elsewhere."""
    hand = Hand(checkpoint)
    hand.step(part([65, 65], 0, [4], sample=False), started=(begin(),))
    keys, values = hand.pool.layer_views(0)
    torch.testing.assert_close(values[4, :, 0], values[4, :, 1])
    assert not torch.allclose(keys[4, :, 0], keys[4, :, 1], atol=1e-3)


def test_what_a_sequence_is_given_does_not_depend_on_its_batch(checkpoint: Path) -> None:
    lengths = [1, 3, 4, 9, 14]
    alone = []
    for i, length in enumerate(lengths):
        hand = Hand(checkpoint)
        hand.step(part(tokens(length, i), 0, [0, 1, 2, 3], sample=False), started=(begin(),))
        alone.append(hand.step(part([200 + i], length, [0, 1, 2, 3]))[0])
    hand = Hand(checkpoint)
    pages = [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(5)]
    started = tuple(begin(i) for i in range(5))
    prefills = [part(tokens(n, i), 0, pages[i], sequence=i, sample=False) for i, n in enumerate(lengths)]
    hand.step(*prefills, started=started)
    chunk = part(tokens(8, 9), 0, [20, 21], sequence=9)
    decodes = [part([200 + i], n, pages[i], sequence=i) for i, n in enumerate(lengths)]
    together = hand.step(*decodes[:2], chunk, *decodes[2:], started=(begin(9),))
    assert [one.sequence for one in together] == [0, 1, 9, 2, 3, 4]
    assert all(same(a, b) for a, b in zip(alone, [one for one in together if one.sequence != 9], strict=True))


@pytest.mark.parametrize("decode", [True, False])
def test_a_window_hides_what_is_older_and_nothing_younger(windowed: Path, decode: bool) -> None:
    """The token at position 11 sees positions 6 to 11; one layer, so nothing reaches further through the layers."""
    ids = tokens(12)

    def last(spoiled: int | None) -> Sampled:
        hand = Hand(windowed)
        hand.step(part(ids[:10], 0, [0, 1, 2], sample=False), started=(begin(),))
        if spoiled is not None:
            for side in hand.pool.layer_views(0):
                side[spoiled // PAGE, :, spoiled % PAGE] += 3.0
        if decode:
            hand.step(part(ids[10:11], 10, [0, 1, 2], sample=False))
            return hand.step(part(ids[11:], 11, [0, 1, 2]))[0]  # type: ignore[no-any-return]
        return hand.step(part(ids[10:], 10, [0, 1, 2]))[0]  # type: ignore[no-any-return]

    assert same(last(None), last(5))
    assert not same(last(None), last(6))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_stay_with_their_sequence(checkpoint: Path, value: float) -> None:
    """Not to a neighbour in the batch that is shorter, and not to the next owner of the page."""
    clean = Hand(checkpoint)
    clean.step(part(tokens(5, 2), 0, [8, 9], sequence=2, sample=False), started=(begin(2),))
    (expected,) = clean.step(part([50], 5, [8, 9], sequence=2))
    hand = Hand(checkpoint)
    hand.step(
        part(tokens(14, 1), 0, [0, 1, 2, 3], sequence=1, sample=False),
        part(tokens(5, 2), 0, [8, 9], sequence=2, sample=False),
        started=(begin(1), begin(2)),
    )
    hand.pool.tensor[:4] = value
    poisoned, healthy = hand.step(part([60], 14, [0, 1, 2, 3], sequence=1), part([50], 5, [8, 9], sequence=2))
    assert poisoned.error == "the model's logits are not finite numbers"
    assert same(expected, healthy)
    hand.step(part(tokens(5, 2), 0, [0, 2], sequence=3, sample=False), started=(begin(3),), forgotten=(1,))
    (next_owner,) = hand.step(part([50], 5, [0, 2], sequence=3))
    assert next_owner.error is None
    assert same(expected, next_owner)


def test_sampler_state_lives_from_start_to_forgotten_and_may_start_again(checkpoint: Path) -> None:
    hand = Hand(checkpoint)
    ids = tokens(6)
    (plain,) = hand.step(part(ids, 0, [0, 1]), started=(begin(),))
    banned = begin(logit_bias={plain.token: -100.0})
    (again,) = hand.step(part(ids[5:], 5, [0, 1]), started=(banned,), forgotten=(1,))
    assert again.token != plain.token
    hand.step(forgotten=(1,))
    with pytest.raises(KeyError):
        hand.step(part(ids[5:], 5, [0, 1]))


def test_bfloat16_is_near_float32(checkpoint: Path) -> None:
    ids = tokens(11)
    (exact,) = Hand(checkpoint).step(part(ids, 0, [0, 1, 2]), started=(begin(logprobs=1),))
    hand = Hand(checkpoint, dtype=torch.bfloat16)
    hand.step(part(ids[:10], 0, [0, 1, 2], sample=False), started=(begin(logprobs=1),))
    (rounded,) = hand.step(part(ids[10:], 10, [0, 1, 2]))
    assert hand.pool.tensor.dtype == torch.bfloat16
    assert rounded.token == exact.token
    assert rounded.logprobs is not None
    assert exact.logprobs is not None
    assert rounded.logprobs.logprob == pytest.approx(exact.logprobs.logprob, abs=0.3)


def test_what_its_depth_forbids_is_refused(checkpoint: Path) -> None:
    hand = Hand(checkpoint)
    assert hand.executor.depth == 1
    with pytest.raises(InternalError, match="without a launched step"):
        hand.executor.collect()
    with pytest.raises(InternalError, match="needs every token"):
        hand.step(part(None, 0, [0]), started=(begin(),))
    assert len(hand.step(part(tokens(3), 0, [0]))) == 1, "and it goes on"


def test_it_opens_from_a_configuration(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = EngineConfig(model=str(checkpoint), model_name="small", page_size=8, kv_memory="1MiB", threads=1)
    executor = open_torch_executor(config, Progress(bars=True))
    page_bytes = 2 * 2 * 2 * 8 * 16 * 4  # heads, layers, key and value, tokens, head_dim, float32
    assert executor.total_pages == (1 << 20) // page_bytes
    assert (executor.model.name, executor.model.architecture, executor.model.max_context) == ("small", "llama", 1024)
    assert executor.model.eos_token_ids == (256,)
    layout = executor.layout
    assert (layout.dtype, layout.page_size, layout.layers, layout.kv_heads, layout.head_dim) == ("float32", 8, 2, 2, 16)
    assert layout.model_revision == executor.model.revision
    assert capsys.readouterr().out == "", "the bar is drawn on standard error"
    executor.close()


def test_the_pool_is_no_larger_than_the_requests_could_use(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), max_context=64, max_running=2, dtype="bfloat16")
    executor = open_torch_executor(config)
    assert executor.total_pages == 2 * 2 * (64 // 16)
    assert (executor.layout.dtype, executor.model.max_context) == ("bfloat16", 64)
    given = open_torch_executor(EngineConfig(model=str(checkpoint), kv_pages=5))
    assert given.total_pages == 5
