"""The real scheduler, cache and torch executor, step by step, and `transformers` to compare them with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from microserve.engine.request import Request
from microserve.engine.scheduler import Limits, Scheduler
from microserve.engine.torch_executor import open_torch_executor
from microserve.kv.cache import KvCache
from microserve.runtime.clock import ManualClock
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.config import EngineConfig
from microserve.runtime.messages import Generated, SamplingParams, TokenLogprobs, Tokens

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ROUNDING = 1e-4
"""Two float32 programs that add in another order differ by less, in log probability, on these models."""


@dataclass
class Answer:
    """What one request was given."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    end: Generated | Exception | None = None


class Serving:
    def __init__(
        self,
        checkpoint: Path,
        *,
        pages: int = 256,
        prefill_chunk: int | None = None,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> None:
        config = EngineConfig(model=str(checkpoint), kv_pages=pages, executor="torch", device=device, dtype=dtype)
        self.executor = open_torch_executor(config)
        self.cache = KvCache(pages, config.page_size, clock=ManualClock())
        limits = Limits(32, 100, 100, self.executor.model.max_context, prefill_chunk)
        self.scheduler = Scheduler(self.cache, limits, eos_token_ids=self.executor.model.eos_token_ids)

    def run(self, prompts: Sequence[np.ndarray], count: int, **sampling: Any) -> list[Answer]:
        """Serves the prompts together until all have ended."""
        settings = SamplingParams(**{"temperature": 0.0, "max_tokens": count, "ignore_eos": True, **sampling})
        requests = [Request(prompt.astype(np.int32), settings) for prompt in prompts]
        answers = {request: Answer() for request in requests}
        for request in requests:
            self.scheduler.submit(request, 0.0)
        while (plan := self.scheduler.schedule(0.0)) is not None:
            self.executor.launch(plan)
            self.scheduler.complete(self.executor.collect(), 0.0)
            for output in self.scheduler.take_outputs():
                assert isinstance(output.request, Request)
                answer, body = answers[output.request], output.body
                if isinstance(body, Tokens):
                    answer.tokens.extend(unpack_tokens(body.ids).tolist())
                    answer.logprobs.extend(body.logprobs or [])
                else:
                    assert isinstance(body, Generated | Exception)
                    answer.end = body
        self.scheduler.check_integrity()
        pages = self.cache.statistics()
        assert pages.free + pages.cached == pages.total, "pages are left behind"
        return list(answers.values())


class Oracle:
    """The same checkpoint in `transformers`, float32 unless `dtype` says something else."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # it would leave a thread behind

        self.model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        self.model.eval()

    def logprobs(self, prompt: np.ndarray, output: Sequence[int]) -> torch.Tensor:
        """Teacher-forced log probabilities [len(output), vocab]."""
        ids = torch.tensor([[*prompt.tolist(), *output]])
        with torch.no_grad():
            logits = self.model(ids).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits.float(), dim=-1)

    def generate(self, prompt: np.ndarray, count: int) -> list[int]:
        ids = torch.tensor([prompt.tolist()])
        with torch.no_grad():
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    def check(self, prompt: np.ndarray, answer: Answer, count: int) -> None:
        """The answer is the oracle's own greedy one, or leaves it first where its two best are within rounding."""
        assert isinstance(answer.end, Generated), answer.end
        assert len(answer.tokens) == count
        expected = self.generate(prompt, count)
        reference = self.logprobs(prompt, answer.tokens)
        if answer.tokens != expected:
            first = next(i for i, (a, b) in enumerate(zip(answer.tokens, expected, strict=True)) if a != b)
            gap = float(reference[first].max() - reference[first, answer.tokens[first]])
            assert gap < ROUNDING, f"token {first} of {count} is {answer.tokens[first]}, not {expected[first]} ({gap})"
        for position, token in enumerate(answer.tokens):
            assert float(reference[position].max() - reference[position, token]) < ROUNDING
        for position, logprobs in enumerate(answer.logprobs):
            assert abs(logprobs.logprob - float(reference[position, answer.tokens[position]])) < ROUNDING
            top = reference[position].topk(len(logprobs.top_ids))
            for ours, theirs in zip(logprobs.top_logprobs, top.values.tolist(), strict=True):
                assert abs(ours - theirs) < ROUNDING
