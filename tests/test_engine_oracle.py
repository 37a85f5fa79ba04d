"""Greedy tokens equal those of `transformers`, however a request is cut into steps, shared or interrupted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.oracle_rig import Oracle, Serving

from microserve.engine.model.random_checkpoint import write_random_checkpoint
from microserve.router.text import TextModel
from microserve.runtime.models import resolve_model

if TYPE_CHECKING:
    from pathlib import Path

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"arch": "llama", "rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama-tied-linear": {
        "arch": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "llama-heads-of-64": {"arch": "llama", "head_dim": 64, "num_key_value_heads": 1},
    "mistral-window": {"arch": "mistral", "sliding_window": 24},
    "mistral-heads-of-128": {"arch": "mistral", "head_dim": 128, "num_key_value_heads": 4},
    "qwen2": {"arch": "qwen2", "shard": True},
    "qwen3": {"arch": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp(request.param), scale=0.2, seed=7, **CASES[request.param])


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length)


def test_alone_with_logprobs(checkpoint: Path, oracle: Oracle) -> None:
    asked = prompt(45)
    (answer,) = Serving(checkpoint).run([asked], 20, logprobs=5)
    assert len(answer.logprobs) == 20
    assert len(set(answer.tokens)) > 3, "a degenerate model would prove nothing"
    oracle.check(asked, answer, 20)


def test_in_a_mixed_batch_of_sixteen_of_different_lengths(checkpoint: Path, oracle: Oracle) -> None:
    prompts = [prompt(1 + 7 * i, seed=i) for i in range(16)]
    answers = Serving(checkpoint).run(prompts, 12, logprobs=0)
    for asked, answer in zip(prompts, answers, strict=True):
        oracle.check(asked, answer, 12)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_with_prefill_in_chunks(checkpoint: Path, oracle: Oracle, chunk: int) -> None:
    asked = prompt(70, seed=3)
    serving = Serving(checkpoint, prefill_chunk=chunk)
    (answer,) = serving.run([asked], 8)
    assert serving.scheduler.load().steps == -(-70 // chunk) + 7
    oracle.check(asked, answer, 8)


def test_with_a_reused_prefix(checkpoint: Path, oracle: Oracle) -> None:
    serving = Serving(checkpoint)
    shared = prompt(50, seed=4)
    longer = np.concatenate([shared, prompt(20, seed=5)])
    serving.run([shared], 4)
    (answer,) = serving.run([longer], 12, logprobs=1)
    assert answer.end.usage.cached_tokens == 48  # type: ignore[union-attr]
    oracle.check(longer, answer, 12)


def test_across_a_forced_preemption(checkpoint: Path, oracle: Oracle) -> None:
    serving = Serving(checkpoint, pages=12)
    prompts = [prompt(40, seed=10 + i) for i in range(3)]
    answers = serving.run(prompts, 40, logprobs=0)
    assert serving.scheduler.load().preemptions > 0
    for asked, answer in zip(prompts, answers, strict=True):
        oracle.check(asked, answer, 40)


def test_after_eviction(checkpoint: Path, oracle: Oracle) -> None:
    serving = Serving(checkpoint, pages=8)
    first = prompt(60, seed=20)
    serving.run([first], 4)
    serving.run([prompt(90, seed=21)], 4)
    assert serving.cache.match(first).length < 48
    (answer,) = serving.run([first], 12, logprobs=0)
    oracle.check(first, answer, 12)


def test_the_bundled_model_answers_as_in_transformers() -> None:
    folder = resolve_model("demo")
    text, oracle = TextModel.load(folder), Oracle(folder)
    asked = ["What is the capital of France?", "What is 12 + 30?", "Give me JSON with the capital of Italy."]
    prompts = [text.encode(text.render_chat([{"role": "user", "content": ask}])) for ask in asked]
    answers = Serving(folder).run(prompts, 24, ignore_eos=False)
    said = [text.decode(answer.tokens) for answer in answers]
    assert said[:2] == ["The capital of France is Paris.", "12 + 30 = 42."]
    for prompt_ids, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == oracle.generate(prompt_ids, len(answer.tokens))
        assert answer.end.finish_reason == "stop"  # type: ignore[union-attr]
