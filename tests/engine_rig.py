"""A scheduler, a cache and a fake executor that checks every page, driven step by step in the test's own thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from microserve.engine.fake_executor import FakeExecutor, fake_tokens
from microserve.engine.plan import SequenceStart, Slice, StepPlan
from microserve.engine.request import Request
from microserve.engine.scheduler import Limits, Scheduler
from microserve.kv.cache import KvCache
from microserve.runtime.clock import ManualClock
from microserve.runtime.codec import unpack_tokens
from microserve.runtime.config import FakeConfig
from microserve.runtime.errors import MicroserveError
from microserve.runtime.messages import Generated, ModelInfo, SamplingParams, Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VOCABULARY = 50
EOS = VOCABULARY - 1
PAGE = 4

INSTANT = FakeConfig(prefill_us_per_token=0, decode_base_us=0, decode_us_per_sequence=0, vocab_size=VOCABULARY)


def model(max_context: int = 1000) -> ModelInfo:
    return ModelInfo(
        name="fake",
        revision="1",
        architecture="fake",
        vocab_size=VOCABULARY,
        max_context=max_context,
        eos_token_ids=(EOS,),
    )


def make_request(
    prompt: Sequence[int],
    *,
    prior_output: int = 0,
    admit_by: float | None = None,
    first_token_by: float | None = None,
    deadline: float | None = None,
    sub_id: str = "",
    **sampling: object,
) -> Request:
    return Request(
        np.array(prompt, dtype=np.int32),
        SamplingParams(**sampling),  # type: ignore[arg-type]
        prior_output=prior_output,
        admit_by=admit_by,
        first_token_by=first_token_by,
        deadline=deadline,
        sub_id=sub_id,
    )


class FlakyExecutor(FakeExecutor):
    """Can lose a step."""

    def drop_newest(self) -> None:
        self._launched.pop()


@dataclass
class Seen:
    """What the caller of a request has been told."""

    tokens: list[int] = field(default_factory=list)
    end: Generated | MicroserveError | None = None


class Rig:
    def __init__(
        self,
        *,
        pages: int = 64,
        depth: int = 1,
        max_running: int = 8,
        max_waiting: int = 100,
        step_tokens: int = 32,
        max_context: int = 1000,
        prefill_chunk: int | None = None,
        eos_after: int | None = None,
        check: bool = True,
    ) -> None:
        self.clock = ManualClock()
        self.eos_after = eos_after
        self.model = model(max_context)
        self.cache = KvCache(pages, PAGE, clock=self.clock)
        self.scheduler = Scheduler(
            self.cache,
            Limits(max_running, max_waiting, step_tokens, max_context, prefill_chunk),
            eos_token_ids=self.model.eos_token_ids,
        )
        config = FakeConfig(
            prefill_us_per_token=0,
            decode_base_us=0,
            decode_us_per_sequence=0,
            vocab_size=VOCABULARY,
            eos_after=eos_after,
        )
        self.executor = FlakyExecutor(
            config,
            self.model,
            page_size=PAGE,
            total_pages=pages,
            depth=depth,
            verify=True,
            clock=self.clock,
            sleep=self.clock.advance,
        )
        self.seen: dict[Request, Seen] = {}
        self.plans: list[StepPlan] = []
        self.launched: deque[int] = deque()
        self.check = check
        self.meanwhile: Callable[[], None] | None = None
        """What happens while a step is waited for."""

    def submit(self, request: Request) -> Request:
        self.scheduler.submit(request, self.clock())
        self.seen[request] = Seen()
        self.read()
        return request

    def abort(self, request: Request) -> bool:
        return self.scheduler.abort(request)

    @property
    def under_way(self) -> list[Slice]:
        """Slices of steps that are launched and not collected."""
        return [part for plan in self.plans[-3:] if plan.step in self.launched for part in plan.slices]

    def launch(self) -> StepPlan | None:
        plan = self.scheduler.schedule(self.clock())
        if plan is not None:
            under_way = {part.sequence for part in self.under_way}
            assert under_way.isdisjoint(plan.forgotten), "forgotten while a step that names it is under way"
            self.plans.append(plan)
            self.executor.launch(plan)
            self.launched.append(plan.step)
        self.read()
        return plan

    def collect(self) -> None:
        self.launched.popleft()
        self.scheduler.complete(self.executor.collect(), self.clock())
        self.read()

    def step(self) -> bool:
        """One round of the step loop. Whether it did anything."""
        plan = self.launch()
        if self.check:
            self.scheduler.check_integrity()
        if self.launched and (plan is None or len(self.launched) >= self.executor.depth):
            if self.meanwhile is not None:
                self.meanwhile()
                if self.check:
                    self.scheduler.check_integrity()
            self.collect()
            if self.check:
                self.scheduler.check_integrity()
            return True
        return plan is not None

    def run(self, most: int = 10_000) -> int:
        """Steps until nothing is left to do. How many it took."""
        for count in range(most):
            if not self.step():
                return count
        raise AssertionError(f"not done after {most} steps")

    def read(self) -> None:
        for output in self.scheduler.take_outputs():
            assert isinstance(output.request, Request)
            self.see(output.request, output.body, output.final)

    def see(self, request: Request, body: object, final: bool) -> None:
        """An output of a generation."""
        seen = self.seen[request]
        assert seen.end is None, "an output after the terminal one"
        assert final is not isinstance(body, Tokens)
        if isinstance(body, Tokens):
            # Said with the first tokens, and with them alone.
            assert (body.cached is None) is bool(seen.tokens)
            seen.tokens.extend(unpack_tokens(body.ids).tolist())
        else:
            assert isinstance(body, Generated | MicroserveError)
            seen.end = body

    def expected(self, request: Request, count: int) -> list[int]:
        """What the fake model answers, whatever the scheduler does."""
        prompt = request.history[: request.prompt_total]
        start = SequenceStart(0, prompt, request.prompt_length, request.sampling, 0, self.model.eos_token_ids)
        return fake_tokens(prompt, start, self.model, count=count, eos_after=self.eos_after)

    def generated(self, request: Request) -> Generated:
        end = self.seen[request].end
        assert isinstance(end, Generated), end
        return end

    def error(self, request: Request) -> MicroserveError:
        end = self.seen[request].end
        assert isinstance(end, MicroserveError), end
        return end

    def assert_empty(self) -> None:
        """Nothing is live, and every page is free or cached."""
        assert self.scheduler.idle
        self.scheduler.check_integrity()
        pages = self.cache.statistics()
        assert pages.owned == pages.leased == pages.quarantined == pages.locks == 0
        assert self.cache.available() == self.cache.total_pages
        assert pages.free + pages.cached == self.cache.total_pages
