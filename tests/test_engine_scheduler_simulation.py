"""Random requests on a tiny pool: whatever is preempted, shared, aborted or expires, every caller sees the model's
tokens.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from tests.engine_rig import EOS, VOCABULARY, Rig, make_request

from microserve.runtime.errors import Busy, ContextLengthExceeded, DeadlineExceeded, InternalError
from microserve.runtime.messages import Generated

if TYPE_CHECKING:
    from microserve.engine.request import Request


def _random_request(rng: random.Random, prefixes: list[list[int]], now: float) -> Request:
    shared = rng.choice(prefixes)
    prompt = shared[: rng.randrange(len(shared) + 1)] + [
        rng.randrange(VOCABULARY) for _ in range(rng.choice((1, 2, 5, 9, 23)))
    ]
    return make_request(
        prompt,
        prior_output=rng.choice((0, 0, 0, min(3, len(prompt)))),
        max_tokens=rng.choice((1, 2, 4, 9, 20, 50)),
        ignore_eos=rng.random() < 0.3,
        min_tokens=rng.choice((0, 0, 1)),
        stop_token_ids=tuple(rng.sample(range(VOCABULARY), rng.choice((0, 0, 1, 4)))),
        deadline=now + rng.uniform(0, 200) if rng.random() < 0.1 else None,
        admit_by=now + rng.uniform(0, 50) if rng.random() < 0.1 else None,
        first_token_by=now + rng.uniform(0, 50) if rng.random() < 0.1 else None,
    )


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_every_request_gets_the_models_tokens(seed: int, depth: int) -> None:
    rng = random.Random(f"{seed} {depth}")
    rig = Rig(
        pages=rng.choice((12, 17, 30)),
        depth=depth,
        max_running=rng.choice((2, 5, 9)),
        max_waiting=15,
        step_tokens=rng.choice((10, 16, 40)),
        max_context=rng.choice((40, 60, 200)),
        prefill_chunk=rng.choice((None, 1, 7)),
        eos_after=rng.choice((None, 6)),
    )
    prefixes = [[rng.randrange(VOCABULARY) for _ in range(rng.choice((8, 16, 30)))] for _ in range(3)]
    refused = aborted = 0

    def others_ask(more: float) -> None:
        nonlocal refused, aborted
        while rng.random() < more:
            request = _random_request(rng, prefixes, rig.clock())
            try:
                rig.submit(request)
            except (Busy, ContextLengthExceeded):
                refused += 1
        if rng.random() < 0.06 and rig.seen:
            aborted += rig.abort(rng.choice(list(rig.seen)))

    rig.meanwhile = lambda: others_ask(0.1)
    for _ in range(250):
        others_ask(0.4)
        if rng.random() < 0.02 and rig.launched:
            _lose_newest_step(rig)
        if rng.random() < 0.01:
            _refuse_launch(rig)
        rig.step()
        rig.clock.advance(1.0)
    rig.meanwhile = None
    rig.run()

    rig.assert_empty()
    assert rig.executor.sequences <= rig.scheduler.limits.max_running + 2
    finished = 0
    for request, seen in rig.seen.items():
        assert request.final
        assert seen.tokens == rig.expected(request, len(seen.tokens))
        if isinstance(seen.end, Generated):
            finished += 1
            _check_end(rig, request, seen.end, len(seen.tokens))
        elif seen.end is not None:
            assert isinstance(seen.end, Busy | DeadlineExceeded | InternalError)
    assert finished > 20
    assert aborted or refused


def _lose_newest_step(rig: Rig) -> None:
    """The executor fails while it computes what was launched last."""
    step = rig.launched.pop()
    rig.executor.drop_newest()
    rig.scheduler.fail(step, InternalError("the device is on fire"))
    rig.read()
    rig.scheduler.check_integrity()


def _refuse_launch(rig: Rig) -> None:
    """The executor raises before it has taken anything of the plan."""
    plan = rig.scheduler.schedule(rig.clock())
    if plan is not None:
        rig.scheduler.fail(plan.step, InternalError("out of memory"))
    rig.read()
    rig.scheduler.check_integrity()


def _check_end(rig: Rig, request: Request, end: Generated, streamed: int) -> None:
    sampling = request.sampling
    prior = request.prompt_total - request.prompt_length
    stopped = end.finish_reason == "stop"
    assert end.usage.prompt_tokens == request.prompt_length
    assert end.usage.completion_tokens == prior + streamed + stopped
    assert end.usage.cached_tokens <= end.usage.prompt_tokens
    if stopped:
        stop = rig.expected(request, streamed + 1)[-1]
        assert end.stop_token == stop
        assert stop in sampling.stop_token_ids or (stop == EOS and not sampling.ignore_eos)
        assert prior + streamed >= sampling.min_tokens
    else:
        assert end.finish_reason == "length"
        total = min(request.prompt_length + sampling.max_tokens, rig.scheduler.max_context)
        assert request.prompt_total + streamed == max(total, request.prompt_total)
