"""The GPU executor against `transformers`, through the real scheduler with two steps in flight. Needs a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pytest
import torch
from tests import oracle_rig
from tests.oracle_rig import Oracle

from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.engine.plan import SequenceStart, Slice, StepPlan
from microserve.engine.request import Request
from microserve.engine.scheduler import Limits, Scheduler
from microserve.kv.cache import KvCache
from microserve.runtime.clock import ManualClock
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.config import EngineConfig
from microserve.runtime.messages import Generated, SamplingParams, TokenLogprobs, Tokens, Usage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

# FlashInfer may have to compile its kernels first: 80 to 100 s for each further kind of attention, on 32 cores.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

CASES: dict[str, dict[str, Any]] = {
    "heads-of-128": {
        "arch": "llama",
        "hidden_size": 512,
        "head_dim": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "heads-of-64": {
        "arch": "llama",
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    # Seven heads to one, as Qwen2's are.
    "qwen2": {"arch": "qwen2", "hidden_size": 896, "head_dim": 64, "num_attention_heads": 14, "num_key_value_heads": 2},
    # Eight to one, and as many rows in the head as our own kernel for it takes.
    "qwen3": {
        "arch": "qwen3",
        "hidden_size": 256,
        "head_dim": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": 32768,
    },
    "window": {
        "arch": "mistral",
        "hidden_size": 256,
        "head_dim": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 40,
    },
}
SERVED = [(case, "bfloat16") for case in CASES] + [("heads-of-128", "float16"), ("qwen2", "float16")]
ROUNDING = {"bfloat16": 0.3, "float16": 0.04}
"""Log probabilities of two programs on these models differ by less."""
LEAST = {"bfloat16": 0.02, "float16": 0.003}
"""What rounding does to log probabilities at least, as a root of the mean square."""


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    end: Generated | Exception | None = None


class Serving:
    """The executor under the scheduler: step n + 1 is launched before step n is collected."""

    def __init__(
        self,
        checkpoint: Path,
        dtype: str,
        *,
        pages: int | None = 512,
        step_tokens: int = 256,
        max_running: int = 24,
        gpu_memory: float = 0.92,
    ) -> None:
        from microserve.engine.cuda_open import open_cuda_executor

        config = msgspec.convert(
            {
                **{"model": str(checkpoint), "executor": "cuda", "dtype": dtype, "kv_pages": pages},
                **{"step_tokens": step_tokens, "max_running": max_running, "gpu_memory": gpu_memory},
            },
            EngineConfig,
        )
        self.executor = open_cuda_executor(config, torch.device("cuda:0"))
        self.cache = KvCache(self.executor.total_pages, config.page_size, clock=ManualClock())
        limits = Limits(max_running, 1000, step_tokens, self.executor.model.max_context)
        self.scheduler = Scheduler(self.cache, limits, eos_token_ids=self.executor.model.eos_token_ids)
        self.answers: dict[Request, Answer] = {}

    def run(self, prompts: Sequence[np.ndarray], counts: Sequence[int], **sampling: Any) -> list[Answer]:
        requests = []
        for prompt, count in zip(prompts, counts, strict=True):
            settings = SamplingParams(**{"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **sampling})
            requests.append(Request(prompt.astype(np.int32), settings, seed=settings.seed or 0))
        for request in requests:
            self.answers[request] = Answer()
            self.scheduler.submit(request, 0.0)
        launched = 0
        while True:
            plan = self.scheduler.schedule(0.0)
            if plan is not None:
                self.executor.launch(plan)
                launched += 1
            if launched and (plan is None or launched >= 2):
                self.scheduler.complete(self.executor.collect(), 0.0)
                launched -= 1
            elif plan is None:
                break
            self._read()
        self.scheduler.check_integrity()
        pages = self.cache.statistics()
        assert pages.free + pages.cached == pages.total, "pages are left behind"
        return [self.answers.pop(request) for request in requests]

    def _read(self) -> None:
        for output in self.scheduler.take_outputs():
            assert isinstance(output.request, Request)
            answer, body = self.answers[output.request], output.body
            if isinstance(body, Tokens):
                answer.tokens.extend(unpack_tokens(body.ids).tolist())
                answer.logprobs.extend(body.logprobs or [])
            else:
                assert isinstance(body, Generated | Exception)
                answer.end = body


class RoundedOracle(Oracle):
    """`transformers` in float32, with weights that were rounded as ours are."""

    def __init__(self, checkpoint: Path, dtype: str) -> None:
        super().__init__(checkpoint)
        # Parameters alone: rotary frequencies are of float32 in every format, and rounded, they would turn token 450 by
        # another angle.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype)).float()
        self.rounding = ROUNDING[dtype]
        self.least = LEAST[dtype]
        self.rounded = Oracle(checkpoint, getattr(torch, dtype))
        """`transformers` in our own number format: what it is off by, programs of that format may be off by."""

    def check_near(self, prompt: np.ndarray, answer: Answer, count: int) -> None:
        """Every token is the oracle's best, or within rounding of it."""
        assert isinstance(answer.end, Generated), answer.end
        assert len(answer.tokens) == count
        reference = self.logprobs(prompt, answer.tokens)
        for position, token in enumerate(answer.tokens):
            gap = float(reference[position].max() - reference[position, token])
            assert gap < self.rounding, f"token {position} is {gap} below the best"
        for position, entry in enumerate(answer.logprobs):
            assert abs(entry.logprob - float(reference[position, answer.tokens[position]])) < self.rounding

    def check_precise(self, prompt: np.ndarray, answer: Answer, count: int) -> None:
        """The likeliest tokens' log probabilities are as near the exact ones as those of `transformers`, which rounds
        as often, and in other places. On a CPU our torch executor is at 0.8 to 1.2 times their error."""
        assert isinstance(answer.end, Generated), answer.end
        assert len(answer.logprobs) == len(answer.tokens) == count
        ids = torch.tensor([entry.top_ids for entry in answer.logprobs])
        found = torch.tensor([entry.top_logprobs for entry in answer.logprobs])
        exact, theirs = (each.logprobs(prompt, answer.tokens).gather(1, ids) for each in (self, self.rounded))
        ours, usual = (float((each - exact).square().mean().sqrt()) for each in (found, theirs))
        assert ours < 2 * max(usual, self.least), f"{len(prompt)} tokens: off by {ours}, transformers by {usual}"


@pytest.fixture(scope="module", params=SERVED, ids=" ".join)
def served(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The shape of a checkpoint, and what it is computed in."""
    case, dtype = request.param
    return case, dtype


@pytest.fixture(scope="module")
def dtype(served: tuple[str, str]) -> str:
    return served[1]


@pytest.fixture(scope="module")
def checkpoint(served: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(served[0])
    return write_random_checkpoint(folder, scale=0.08, seed=7, **CASES[served[0]])


@pytest.fixture(scope="module")
def serving(checkpoint: Path, dtype: str) -> Iterator[Serving]:
    made = Serving(checkpoint, dtype)
    yield made
    made.executor.close()


@pytest.fixture(scope="module")
def oracle(checkpoint: Path, dtype: str) -> RoundedOracle:
    return RoundedOracle(checkpoint, dtype)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, length) for length in lengths]


def test_mixed_batches_of_odd_lengths_are_those_of_transformers(serving: Serving, oracle: RoundedOracle) -> None:
    given = prompts([1, 2, 15, 16, 17, 31, 33, 100, 129, 200])
    counts = [5, 40, 3, 17, 1, 33, 12, 20, 9, 30]
    for prompt, count, answer in zip(given, counts, serving.run(given, counts), strict=True):
        oracle.check_near(prompt, answer, count)


DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "top_k": 50, "min_p": 0.01, "seed": 1}
ADJUSTED: dict[str, Any] = {
    **{"repetition_penalty": 1.2, "frequency_penalty": 0.1, "logit_bias": {3: 1.0}, "min_tokens": 2}
}
LENGTHS = [1, 2, 15, 16, 17, 31, 33, 100, 129, 200, 300, 450]
"""Chunks, odd ends and whole pages, in steps of 256 tokens."""


def test_log_probabilities_are_as_near_the_exact_ones_as_those_of_transformers(
    serving: Serving, oracle: RoundedOracle
) -> None:
    serving.cache.evict()
    given = prompts(LENGTHS, seed=12)
    for cached in (0, 1):
        answers = serving.run(given, [12] * len(given), logprobs=5)
        for prompt, answer in zip(given, answers, strict=True):
            oracle.check_precise(prompt, answer, 12)
            assert isinstance(answer.end, Generated)
            # Of the second round, whole pages; the last token is always computed.
            assert answer.end.usage.cached_tokens == cached * ((len(prompt) - 1) // 16 * 16)


def test_log_probabilities_are_those_of_the_cpu(
    serving: Serving, oracle: RoundedOracle, checkpoint: Path, dtype: Literal["bfloat16", "float16"]
) -> None:
    given = prompts(LENGTHS, seed=8)
    answers = serving.run(given, [9] * len(given), logprobs=5)
    cpu = oracle_rig.Serving(checkpoint, pages=512, dtype=dtype)
    for output in (0, 1, 8):
        # What the GPU said so far is a part of the prompt: so both are asked the same.
        longer = [np.array([*prompt, *answer.tokens[:output]]) for prompt, answer in zip(given, answers, strict=True)]
        theirs = cpu.run(longer, 1, logprobs=20)
        for prompt, mine, reference in zip(longer, answers, theirs, strict=True):
            found, (expected,) = mine.logprobs[output], reference.logprobs
            likely = dict(zip(expected.top_ids, expected.top_logprobs, strict=True))
            # The least likely of our five may be none of their twenty where all are alike; the first three are.
            mine_three = list(zip(found.top_ids, found.top_logprobs, strict=True))[:3]
            off = max(abs(logprob - likely[token]) for token, logprob in mine_three)
            exact, usual = (each.logprobs(prompt, [0])[0, list(likely)] for each in (oracle, oracle.rounded))
            error = float((usual - exact).square().mean().sqrt())
            # Both are off, and the largest of a few is some three times what they are off by as a rule.
            assert off < 6 * max(error, oracle.least), f"{len(prompt)} tokens: {off}, transformers are off by {error}"


def test_plain_torch_serves_on_the_gpu(checkpoint: Path) -> None:
    plain = oracle_rig.Serving(checkpoint, device="cuda:0")
    assert plain.executor.memory.device.startswith("cuda")
    given = prompts([1, 17, 100], seed=9)
    # Both in float32, where another order of additions seldom changes the likeliest token.
    cpu = oracle_rig.Serving(checkpoint).run(given, 8, logprobs=1)
    for mine, reference in zip(plain.run(given, 8, logprobs=1), cpu, strict=True):
        assert isinstance(mine.end, Generated)
        assert mine.tokens == reference.tokens
        assert [each.logprob for each in mine.logprobs] == pytest.approx(
            [each.logprob for each in reference.logprobs], abs=1e-3
        )


def test_prompts_longer_than_a_step_come_in_chunks(serving: Serving, oracle: RoundedOracle) -> None:
    given = prompts([300, 5, 450], seed=1)
    for prompt, answer in zip(given, serving.run(given, [8, 60, 8]), strict=True):
        oracle.check_near(prompt, answer, 60 if len(prompt) == 5 else 8)


def test_steps_of_every_size_and_too_large_for_a_graph(checkpoint: Path, dtype: str, oracle: RoundedOracle) -> None:
    serving = Serving(checkpoint, dtype, step_tokens=1200, max_running=12)
    try:
        for size in (2, 15, 33, 97, 130, 200, 260, 400, 600, 1000, 1024, 1025, 1101):
            given = prompts([100] * ((size - 1) // 100) + [(size - 1) % 100 + 1], seed=size)
            for prompt, answer in zip(given, serving.run(given, [3] * len(given)), strict=True):
                oracle.check_near(prompt, answer, 3)
            serving.cache.evict()
    finally:
        serving.executor.close()


def test_more_requests_than_places_and_every_graph(serving: Serving, oracle: RoundedOracle) -> None:
    lengths = [3 + i % 29 for i in range(60)]
    given = prompts(lengths, seed=2)
    counts = [1 + i % 13 for i in range(60)]
    for prompt, count, answer in zip(given, counts, serving.run(given, counts), strict=True):
        oracle.check_near(prompt, answer, count)


def test_a_cached_prefix_gives_the_same_answer(serving: Serving, oracle: RoundedOracle) -> None:
    (prompt,) = prompts([80], seed=3)
    first = serving.run([prompt], [10])[0]
    again = serving.run([prompt], [10])[0]
    assert isinstance(again.end, Generated)
    assert again.end.usage.cached_tokens == 64
    oracle.check_near(prompt, first, 10)
    oracle.check_near(prompt, again, 10)


def test_requests_that_share_a_prompt_share_its_pages(serving: Serving, oracle: RoundedOracle) -> None:
    (prompt,) = prompts([80], seed=10)
    oracle.check_near(prompt, serving.run([prompt], [4])[0], 4)
    for answer in serving.run([prompt] * 6, [9] * 6):
        assert isinstance(answer.end, Generated)
        assert answer.end.usage.cached_tokens == 64
        oracle.check_near(prompt, answer, 9)


def test_a_step_that_failed_spoils_no_other(
    serving: Serving, oracle: RoundedOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = serving.executor
    first, lost, after = (each.astype(np.int32) for each in prompts([40, 30, 50], seed=11))
    sampling = SamplingParams(temperature=0.0, max_tokens=1)
    pages = np.arange(8, dtype=np.int32)

    def step(number: int, tokens: np.ndarray, at: int) -> StepPlan:
        sequence = 10**6 + number
        start = SequenceStart(sequence, tokens, len(tokens), sampling, 0, ())
        return StepPlan(number, (Slice(sequence, tokens, 0, pages[at : at + 4], True, 0),), (start,))

    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    executor.launch(step(1, first, 0))
    with monkeypatch.context() as broken:
        broken.setattr(executor, "_plan", fails)
        with pytest.raises(torch.OutOfMemoryError):
            executor.launch(step(2, lost, 4))
    executor.launch(step(3, after, 4))
    for prompt in (first, after):
        ((token,),) = ([each.token for each in executor.collect().sampled],)
        oracle.check_near(prompt, Answer([token], end=_ended()), 1)
    executor.launch(StepPlan(4, (), forgotten=tuple(10**6 + number for number in (1, 2, 3))))
    assert executor.collect().sampled == ()


def _ended() -> Generated:
    return Generated(finish_reason="length", usage=Usage(prompt_tokens=0, completion_tokens=1))


def test_a_seed_gives_the_same_tokens_whatever_else_runs(serving: Serving) -> None:
    (prompt,) = prompts([20], seed=4)
    settings = {"temperature": 0.8, "seed": 42, "top_p": 0.9, "top_k": 40}
    alone = serving.run([prompt], [20], **settings)[0].tokens
    assert len(set(alone)) > 3
    serving.cache.evict()
    assert serving.run([prompt], [20], **settings)[0].tokens == alone


def test_settings_that_change_logits_work_beside_those_that_do_not(serving: Serving, oracle: RoundedOracle) -> None:
    given = prompts([9, 30, 12], seed=5)
    with_logprobs = serving.run(given, [12, 12, 12], logprobs=3)
    for prompt, answer in zip(given, with_logprobs, strict=True):
        oracle.check_near(prompt, answer, 12)
        oracle.check_precise(prompt, answer, 12)
    # They are the model's own, whatever a bias does.
    biased = serving.run(given, [12, 12, 12], logprobs=3, logit_bias={0: -100.0})
    for prompt, answer in zip(given, biased, strict=True):
        oracle.check_precise(prompt, answer, 12)
    banned = serving.run(given[:1], [12], logit_bias={token: -100.0 for token in with_logprobs[0].tokens})[0]
    assert not set(banned.tokens) & set(with_logprobs[0].tokens)
    never_twice = serving.run(given, [40] * 3, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=50.0)
    for answer in never_twice:
        assert len(set(answer.tokens)) == 40, "counted one step late, a token would follow itself"


def test_preempted_requests_answer_as_if_they_had_not_been(checkpoint: Path, dtype: str, oracle: RoundedOracle) -> None:
    small = Serving(checkpoint, dtype, pages=24, max_running=6, step_tokens=64)
    given = prompts([40, 41, 42, 43, 44], seed=6)
    for prompt, answer in zip(given, small.run(given, [60] * 5), strict=True):
        oracle.check_near(prompt, answer, 60)
    assert small.scheduler.statistics()["scheduler_preemptions"] > 0
    small.executor.close()


def test_prompts_attend_by_fa3_on_hopper(serving: Serving) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FA3 is for Hopper")
    attention = serving.executor._attention
    assert (attention._paged._backend, attention._fresh._backend) == ("fa3", "fa3")


def test_a_prompts_lone_token_need_not_be_sampled(serving: Serving) -> None:
    history, sampling = np.array([7, 8, 9], dtype=np.int32), SamplingParams(temperature=0.0, max_tokens=4)
    start = SequenceStart(10**6, history, 3, sampling, 0, ())
    pages, executor = np.array([0], dtype=np.int32), serving.executor
    executor.launch(StepPlan(1, (Slice(10**6, history[:1], 0, pages, False, 0),), (start,)))
    executor.launch(StepPlan(2, (Slice(10**6, history[1:], 1, pages, True, 0),)))
    assert executor.collect().sampled == ()
    together = executor.collect().sampled
    executor.launch(StepPlan(3, (Slice(10**6, history, 0, pages, True, 0),)))
    assert executor.collect().sampled == together
    executor.launch(StepPlan(4, (), forgotten=(10**6,)))
    assert executor.collect().sampled == ()


def test_whether_a_step_has_ended_is_seen_without_waiting_for_it(serving: Serving) -> None:
    history, sampling = np.array([7, 8, 9], dtype=np.int32), SamplingParams(temperature=0.0, max_tokens=4)
    start = SequenceStart(10**6, history, 3, sampling, 0, ())
    executor = serving.executor
    assert executor.ended(), "there is none"
    with torch.cuda.stream(executor._stream):
        torch.cuda._sleep(10**9)  # type: ignore[no-untyped-call, unused-ignore] # half a second
    executor.launch(StepPlan(1, (Slice(10**6, history, 0, np.array([0], dtype=np.int32), True, 0),), (start,)))
    assert not executor.ended()
    torch.cuda.synchronize()
    assert executor.ended()
    assert len(executor.collect().sampled) == 1
    executor.launch(StepPlan(2, (), forgotten=(10**6,)))
    assert executor.collect().sampled == ()


def test_a_gpu_that_is_behind_reads_what_was_meant_for_each_step(
    serving: Serving, oracle: RoundedOracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are in flight, and what the CPU writes for the second may not touch what the first has yet to read."""
    launch = serving.executor.launch

    def late(plan: StepPlan) -> None:
        with torch.cuda.stream(serving.executor._stream):
            torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call, unused-ignore] # 10 ms
        launch(plan)

    serving.cache.evict()
    given = prompts([300, 5, 450, 64, 33, 129, 17, 200], seed=13)
    monkeypatch.setattr(serving.executor, "launch", late)
    for prompt, answer in zip(given, serving.run(given, [6] * len(given), logprobs=5), strict=True):
        oracle.check_precise(prompt, answer, 6)
    for sampling in (DRAWN, ADJUSTED, {**ADJUSTED, **DRAWN}):
        serving.cache.evict()
        behind = [answer.tokens for answer in serving.run(given, [6] * len(given), **sampling)]
        with monkeypatch.context() as undelayed:
            undelayed.setattr(serving.executor, "launch", launch)
            serving.cache.evict()
            assert behind == [answer.tokens for answer in serving.run(given, [6] * len(given), **sampling)]


def test_rows_that_are_adjusted_in_parts_are_those_that_are_adjusted_at_once(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = prompts([17, 9, 33, 5, 40, 21, 12], seed=16)

    def tokens() -> list[list[list[int]]]:
        found = []
        for sampling in (ADJUSTED, DRAWN):
            serving.cache.evict()
            found.append([answer.tokens for answer in serving.run(given, [12] * 7, logprobs=2, **sampling)])
        return found

    at_once = tokens()
    monkeypatch.setattr("microserve.engine.cuda_executor.ROWS_AT_ONCE", 3)
    monkeypatch.setattr("microserve.engine.cuda_sampler.ROWS_AT_ONCE", 3)
    assert tokens() == at_once


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_step_that_draws_on_the_gpu_waits_for_nothing(serving: Serving) -> None:
    given = prompts([17, 300, 33], seed=14)
    for sampling in ({}, DRAWN, {"logprobs": 5}, {"logprobs": 0, **DRAWN}, ADJUSTED, {**ADJUSTED, **DRAWN}):
        serving.run(given, [4] * 3, **sampling)
        serving.cache.evict()
        try:
            torch.cuda.set_sync_debug_mode("error")
            serving.run(given, [12] * 3, **sampling)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_pool_takes_what_the_worst_step_leaves(checkpoint: Path, dtype: str) -> None:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = (total - free) / total + 0.06
    sized = Serving(checkpoint, dtype, pages=None, step_tokens=2048, max_running=64, gpu_memory=share)
    try:
        assert sized.executor.memory.total_pages * sized.executor.memory.page_bytes > 0.02 * total
        # Prompts that fill steps, among decodes of many.
        given = prompts([100] * 60 + [900] * 8, seed=15)
        for answer in sized.run(given, [20] * 60 + [3] * 8):
            assert isinstance(answer.end, Generated)
        torch.cuda.synchronize()
        assert total - torch.cuda.mem_get_info()[0] <= share * total
    finally:
        sized.executor.close()


def test_steps_leave_no_memory_behind(serving: Serving) -> None:
    given = prompts([17, 100, 33], seed=7)
    serving.run(given, [20] * 3)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        serving.run(given, [20] * 3)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before
