from __future__ import annotations

import ctypes
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.engine_rig import EOS, INSTANT, VOCABULARY, model

from microserve.engine.fake_executor import FakeExecutor, fake_model, fake_tokens
from microserve.engine.plan import SequenceStart, Slice, StepPlan
from microserve.runtime.clock import ManualClock
from microserve.runtime.config import EngineConfig, FakeConfig
from microserve.runtime.errors import InternalError
from microserve.runtime.messages import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from pathlib import Path

    from microserve.engine.plan import PageArray, TokenArray


def ints(*values: int) -> TokenArray:
    return np.array(values, dtype=np.int32)


def start(sequence: int, *history: int, prior: int = 0, **sampling: object) -> SequenceStart:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return SequenceStart(sequence, ints(*history), len(history) - prior, params, 0, (EOS,))


def executor(config: FakeConfig = INSTANT, **options: object) -> FakeExecutor:
    return FakeExecutor(config, model(), page_size=4, total_pages=16, **options)  # type: ignore[arg-type]


def prefill(sequence: int, tokens: TokenArray, begin: int, pages: PageArray, index: int | None) -> Slice:
    return Slice(sequence, tokens, begin, pages, index is not None, index or 0)


def run(fake: FakeExecutor, plan: StepPlan) -> list[int]:
    fake.launch(plan)
    return [sampled.token for sampled in fake.collect().sampled]


def test_tokens_depend_on_the_history_alone() -> None:
    history = ints(3, 1, 4, 1, 5, 9)
    whole = run(executor(), StepPlan(1, (prefill(1, history, 0, ints(2, 7), 0),), (start(1, *history),)))
    fake = executor()
    begin = (start(8, *history), start(9, 2, 7))
    parts = (prefill(8, history[:1], 0, ints(5), None), prefill(9, ints(2, 7), 0, ints(1), 0))
    assert len(run(fake, StepPlan(1, parts, begin))) == 1
    assert run(fake, StepPlan(2, (prefill(8, history[1:4], 1, ints(5), None),))) == []
    assert run(fake, StepPlan(3, (prefill(8, history[4:], 4, ints(5, 0), 0),))) == whole
    assert whole == fake_tokens(history, begin[0], model(), count=1)


def test_a_prefix_is_read_from_the_pool() -> None:
    fake = executor()
    run(fake, StepPlan(1, (prefill(1, ints(1, 2, 3, 4), 0, ints(6), 0),), (start(1, 1, 2, 3, 4),)))
    reference = fake_tokens(ints(1, 2, 3, 4, 5), start(2, 1, 2, 3, 4, 5), model(), count=1)
    right = StepPlan(2, (prefill(2, ints(5), 4, ints(6, 3), 0),), (start(2, 1, 2, 3, 4, 5),))
    assert run(fake, right) == reference
    wrong = StepPlan(3, (prefill(3, ints(5), 4, ints(9, 3), 0),), (start(3, 1, 2, 3, 4, 5),))
    assert run(fake, wrong) != reference


def test_a_decode_without_a_token_takes_the_last_sample() -> None:
    fake = executor(depth=2)
    fake.launch(StepPlan(1, (prefill(1, ints(1, 2), 0, ints(6), 0),), (start(1, 1, 2),)))
    fake.launch(StepPlan(2, (Slice(1, None, 2, ints(6), True, 1),)))
    got = [fake.collect().sampled[0].token, fake.collect().sampled[0].token]
    assert got == fake_tokens(ints(1, 2), start(1, 1, 2), model(), count=2)


def test_a_resumed_history_continues_the_reference() -> None:
    reference = fake_tokens(ints(1, 2), start(1, 1, 2), model(), count=6)
    history = ints(1, 2, *reference[:3])
    plan = StepPlan(1, (prefill(1, history, 0, ints(6, 5), 3),), (start(1, *history, prior=3),))
    assert run(executor(), plan) == [reference[3]]
    assert fake_tokens(history, start(1, *history, prior=3), model(), count=3) == reference[3:]


def test_eos_after_so_many_tokens() -> None:
    first = start(1, 1, 2)
    assert fake_tokens(ints(1, 2), first, model(), count=4, eos_after=2)[2:] == [EOS, EOS]
    assert EOS not in fake_tokens(ints(1, 2), first, model(), count=500)
    unending = start(1, 1, 2, ignore_eos=True)
    assert EOS not in fake_tokens(ints(1, 2), unending, model(), count=20, eos_after=2)
    held = start(1, 1, 2, min_tokens=3)
    assert fake_tokens(ints(1, 2), held, model(), count=4, eos_after=2).index(EOS) == 3


def test_min_tokens_bans_stop_tokens() -> None:
    banned = tuple(range(VOCABULARY - 2))
    tokens = fake_tokens(ints(1, 2), start(1, 1, 2, min_tokens=5, stop_token_ids=banned), model(), count=5)
    assert tokens == [VOCABULARY - 2] * 5


def test_logprobs_on_request() -> None:
    fake = executor()
    fake.launch(StepPlan(1, (prefill(1, ints(1, 2), 0, ints(6), 0),), (start(1, 1, 2, logprobs=2),)))
    sampled = fake.collect().sampled[0]
    expected = [sampled.token, (sampled.token + 1) % VOCABULARY]
    assert sampled.logprobs == TokenLogprobs(-0.5, expected, [-0.5, -1.5])


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_take_the_time_of_the_latency_model(depth: int) -> None:
    clock = ManualClock()
    config = FakeConfig(prefill_us_per_token=10, decode_base_us=1000, decode_us_per_sequence=100)
    fake = executor(config, clock=clock, sleep=clock.advance, depth=depth)
    began = clock()
    fake.launch(StepPlan(1, (prefill(1, ints(1, 2, 3), 0, ints(6), 0),), (start(1, 1, 2, 3),)))
    if depth == 1:
        fake.collect()
        assert clock() - began == pytest.approx(1030e-6)
    decode = Slice(1, None, 3, ints(6), True, 1)
    fake.launch(StepPlan(2, (decode, prefill(2, ints(5, 6), 0, ints(7), None)), (start(2, 5, 6, 7),)))
    fake.collect()
    if depth == 2:
        assert clock() - began == pytest.approx(1030e-6)
        fake.collect()
    assert clock() - began == pytest.approx(1030e-6 + 1120e-6)


def test_no_waiting_for_a_step_that_is_over() -> None:
    clock = ManualClock()
    fake = executor(FakeConfig(decode_base_us=1000), clock=clock, sleep=clock.advance)
    fake.launch(StepPlan(1, (prefill(1, ints(1), 0, ints(6), 0),), (start(1, 1),)))
    clock.advance(1)
    before = clock()
    fake.collect()
    assert clock() == before


def test_plans_that_break_the_protocol_are_refused() -> None:
    fake = executor()
    with pytest.raises(InternalError, match="sequence 1 was not started"):
        fake.launch(StepPlan(1, (prefill(1, ints(1), 0, ints(6), 0),)))
    with pytest.raises(InternalError, match="1 pages do not cover 5 positions"):
        fake.launch(StepPlan(1, (prefill(1, ints(1, 2, 3, 4, 5), 0, ints(6), 0),), (start(1, 1, 2, 3, 4, 5),)))
    with pytest.raises(InternalError, match="started twice"):
        fake.launch(StepPlan(1, (), (start(1, 1),)))
    with pytest.raises(InternalError, match="no step is launched"):
        fake.collect()
    fake.launch(StepPlan(2, (), (start(1, 1),), (1, 77)))
    assert fake.sequences == 1
    with pytest.raises(InternalError, match="1 steps are launched already"):
        fake.launch(StepPlan(3, ()))


def test_verify_notices_foreign_pages_and_tokens() -> None:
    fake = executor(verify=True)
    history = (1, 2, 3, 4, 5)
    run(fake, StepPlan(1, (prefill(1, ints(*history), 0, ints(6, 7), None),), (start(1, *history, 9, 9, 9, 8),)))
    with pytest.raises(InternalError, match="tokens 5…6 are not its history"):
        fake.launch(StepPlan(2, (prefill(1, ints(8), 5, ints(6, 7), None),)))
    with pytest.raises(InternalError, match="position 0 holds KV of another history"):
        fake.launch(StepPlan(2, (prefill(1, ints(9), 5, ints(5, 7), None),)))
    with pytest.raises(InternalError, match="names a page twice"):
        fake.launch(StepPlan(2, (prefill(1, ints(9), 5, ints(6, 6), None),)))
    run(fake, StepPlan(2, (prefill(1, ints(9), 5, ints(6, 7), None),)))


def test_the_model_is_described_by_the_checkpoint_if_there_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": [7, 9]}))
    described = fake_model(EngineConfig(model=str(folder), max_context=100))
    assert (described.name, described.vocab_size, described.eos_token_ids) == ("tiny", 300, (7, 9))
    assert (described.path, described.max_context) == (str(folder), 100)
    invented = fake_model(EngineConfig(model="none-such", model_name="m", fake=FakeConfig(vocab_size=40)))
    assert (invented.name, invented.vocab_size, invented.eos_token_ids, invented.path) == ("m", 40, (39,), "")
    assert invented.max_context == FakeConfig().max_context


def test_layout_and_sizes() -> None:
    fake = executor()
    assert (fake.total_pages, fake.depth, fake.layout.page_size) == (16, 1, 4)
    assert fake.model == model()
    fake.close()
    assert fake.sequences == 0


def test_kv_copied_from_one_pool_into_another_goes_on_there() -> None:
    here, there = executor(verify=True), executor(verify=True)
    prompt = ints(*range(5, 17))
    expected = fake_tokens(prompt, start(1, *prompt), model(), count=1)
    run(here, StepPlan(1, (prefill(1, prompt[:8], 0, ints(3, 7, 2), None),), (start(1, *prompt),), ()))
    memory, other = here.memory, there.memory
    assert (memory.page_bytes, memory.total_pages) == (4 * 8, 16)
    for source, target in ((3, 9), (7, 1)):
        ctypes.memmove(other.address + target * other.page_bytes, memory.address + source * 32, 32)
    last = prefill(1, prompt[8:], 8, ints(9, 1, 0), 0)
    assert run(there, StepPlan(1, (last,), (start(1, *prompt),), ())) == expected
