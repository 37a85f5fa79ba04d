"""The load generator: seeded workloads, and serving figures by their definitions."""

from __future__ import annotations

import pytest
from perf.load import Job, Outcome, fixed, sharegpt_like, summarize


def test_a_seed_gives_the_same_workload_and_another_seed_another() -> None:
    first = sharegpt_like(50, rate=5.0, seed=1, vocab=100, longest=64, longest_output=32)
    assert first == sharegpt_like(50, rate=5.0, seed=1, vocab=100, longest=64, longest_output=32)
    assert first != sharegpt_like(50, rate=5.0, seed=2, vocab=100, longest=64, longest_output=32)


def test_arrivals_start_at_zero_rise_and_have_the_asked_rate() -> None:
    jobs = fixed(2000, rate=10.0, seed=3, vocab=100, prompt_tokens=8, output_tokens=4)
    times = [job.at for job in jobs]
    assert times[0] == 0.0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(200.0, rel=0.1)


def test_lengths_and_ids_stay_within_their_limits() -> None:
    jobs = sharegpt_like(500, rate=0.0, seed=4, vocab=50, longest=64, longest_output=32)
    assert {job.at for job in jobs} == {0.0}
    assert all(4 <= len(job.prompt) <= 64 and 2 <= job.output_tokens <= 32 for job in jobs)
    assert all(3 <= token < 50 for job in jobs for token in job.prompt)


def test_the_figures_follow_their_definitions_and_failures_are_counted() -> None:
    jobs = [Job(0.0, (1,) * 10, 5), Job(1.0, (1,) * 20, 3), Job(2.0, (1,) * 30, 9)]
    outcomes = [
        Outcome(ttft=0.5, jct=2.5, output_tokens=5, gaps=(0.5, 0.5, 0.5, 0.5)),
        Outcome(ttft=1.0, jct=3.0, output_tokens=3, gaps=(1.0, 1.0)),
        Outcome(ttft=0.1, jct=0.2, output_tokens=1, gaps=(), error="HTTP 503"),
    ]
    summary = summarize(jobs, outcomes, slo_ttft=0.6, slo_tpot=0.6)
    assert (summary.completed, summary.failed, summary.duration) == (2, 1, 4.0)
    assert summary.metrics["TTFT"]["mean"] == pytest.approx(0.75)
    assert summary.metrics["TPOT"]["mean"] == pytest.approx((0.5 + 1.0) / 2)
    assert summary.metrics["ITL"]["mean"] == pytest.approx(4.0 / 6)
    assert summary.metrics["JCT"]["p50"] == pytest.approx(2.75)
    assert summary.output_rate == pytest.approx(8 / 4.0)
    assert summary.input_rate == pytest.approx(30 / 4.0)
    assert summary.goodput == pytest.approx(1 / 4.0)
