"""What the router counts, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.router_support import World, read
from tests.virtual_time import run_virtual

from microserve.router.metrics import RouterMetrics
from microserve.router.strategies.prefill_decode import prefill_decode
from microserve.runtime.errors import Busy, ModelNotFound, TransferFailed
from microserve.runtime.series import FAST, Series


def test_a_series_counts_by_upper_bound() -> None:
    series = Series((1.0, 2.0))
    for value in (0.5, 1.0, 1.2, 1.9, 7.0):
        series.observe(value)
    assert series.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert series.total == 11.6


def test_mean_and_percentiles_of_a_series() -> None:
    series = Series((1.0, 1.25, 2.5))
    assert (series.mean(), series.percentile(0.5)) == (None, None)
    for value in (0.5, 1.2, 1.2, 2.4):
        series.observe(value)
    assert series.mean() == 5.3 / 4
    # Within a bucket, values are taken to lie at equal distances: (1, 1.25], and the last quarter of (1.25, 2.5].
    low = 1.25 * 2**0.75
    quarters = [series.percentile(share) for share in (0.125, 0.25, 0.5, 0.75, 0.875, 1.0)]
    assert quarters == pytest.approx([0.5, 1.0, 1.125, 1.25, (low + 2.5) / 2, 2.5])
    series.observe(9.0)
    assert series.percentile(0.99) == 2.5


@given(st.lists(st.floats(FAST[0], FAST[-1], exclude_min=True), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_is_a_quarter_off_at_most(values: list[float], share: float) -> None:
    series = Series(FAST)
    for value in values:
        series.observe(value)
    exact = sorted(values)[math.ceil(share * len(values)) - 1]
    found = series.percentile(share)
    assert found is not None
    assert exact / 1.2501 <= found <= exact * 1.2501


def test_figures_by_version() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generations = [world.generate(request_id=name) for name in ("one", "two", "three")]
            await world.settle()
            await asyncio.sleep(0.2)
            await engine.tokens(7, call=0)
            await asyncio.sleep(0.1)
            await engine.finish(8, 9, call=0)
            await engine.fail(Busy("full"), call=1)
            generations[2].cancel()
            await world.settle()
            [figures] = (await world.core.strategies()).figures
            assert (figures.model, figures.version) == ("m", generations[0].strategy_version)
            assert (figures.requests, figures.errors, figures.output_tokens) == (3, 1, 3)
            assert figures.ttft_mean == pytest.approx(0.2)
            assert figures.jct_mean == pytest.approx(0.3)
            assert figures.tpot_mean == pytest.approx(0.05)
            assert figures.ttft_p50 == pytest.approx(0.2, rel=0.25)
            assert figures.jct_p50 == pytest.approx(0.3, rel=0.25)

    run_virtual(main())


def test_versions_of_the_past_are_counted_together_and_those_in_use_are_not() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            first = world.generate(request_id="stays")
            await world.settle()
            await engine.tokens(7, call=0)
            for turn in range(1, 41):
                await world.core.versions.set("prefill_decode", {"min_remote": turn})
                generation = world.generate(request_id=f"q{turn}")
                await world.settle()
                generation.cancel()
                await world.settle()
            await asyncio.sleep(0.3)
            await engine.finish(8, call=0)
            await world.settle()
            figures = {each.version: each for each in (await world.core.strategies()).figures}
            assert len(figures) <= 18
            assert figures[first.strategy_version].requests == 1
            assert figures[first.strategy_version].output_tokens == 2
            assert sum(each.requests for each in figures.values()) == 41
            assert figures["other"].requests >= 24
            labels = {"model": "m", "strategy": first.strategy_version}
            assert world.registry.get_sample_value("microserve_router_itl_seconds_count", labels) == 1

    run_virtual(main())


def test_times_tokens_and_outcomes_of_a_request() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate([1, 2, 3, 4])
            await world.settle()
            for pause in (0.3, 0.04, 0.06):
                await asyncio.sleep(pause)
                await engine.tokens(7)
            await asyncio.sleep(0.1)
            await engine.finish(8)
            await read(generation)
            labels = {"model": "m", "strategy": generation.strategy_version}
            assert world.metric("ttft_seconds_sum", **labels) == pytest.approx(0.3)
            assert world.metric("ttft_seconds_bucket", **labels, le="0.25") == 0
            assert world.metric("ttft_seconds_bucket", **labels, le="0.5") == 1
            assert world.metric("itl_seconds_count", **labels) == 3
            assert world.metric("itl_seconds_sum", **labels) == pytest.approx(0.2)
            assert world.metric("itl_seconds_bucket", **labels, le="0.05") == 1
            assert world.metric("tpot_seconds_sum", **labels) == pytest.approx(0.2 / 3)
            assert world.metric("jct_seconds_sum", **labels) == pytest.approx(0.5)
            assert world.metric("tokens_total", **labels, kind="prompt") == 4
            assert world.metric("tokens_total", **labels, kind="output") == 4
            assert world.metric("tokens_total", **labels, kind="cached") == 0
            assert world.metric("requests_total", **labels, outcome="ok") == 1

    run_virtual(main())


def test_failures_count_by_their_code_and_have_no_completion_time() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.tokens(1)
            await engine.fail(Busy("full"))
            with pytest.raises(Busy):
                await read(generation)
            labels = {"model": "m", "strategy": generation.strategy_version}
            assert world.metric("requests_total", **labels, outcome="busy") == 1
            assert world.metric("ttft_seconds_count", **labels) == 1
            assert world.metric("jct_seconds_count", **labels) == 0
            with pytest.raises(ModelNotFound):
                world.generate(model="made-up")
            assert world.metric("refused_total", reason="model_not_found") == 1
            assert "made-up" not in generate_latest(world.registry).decode()

    run_virtual(main())


def test_engines_and_bus_are_read_when_scraped() -> None:
    async def main() -> None:
        async with World() as world:
            await world.add("a")
            await world.add("b")
            generation = world.generate()
            await world.settle()
            world.core.fleet.silence("b")
            assert world.metric("engines", state="ready") == 1
            assert world.metric("engines", state="silent") == 1
            assert world.metric("engines", state="draining") == 0
            assert world.metric("engine_charged", engine="a") == 1
            assert (world.metric("active"), world.metric("queued")) == (1, 0)
            sent = world.metric("bus_total", event="sent")
            assert sent is not None
            assert sent > 0
            generation.cancel()

    run_virtual(main())


def test_shares_events_and_the_wait_for_a_place() -> None:
    async def main() -> None:
        async with World() as world:
            engine = await world.add("a")
            generation = world.generate()
            await world.settle()
            await engine.finish(8)
            await read(generation)
            labels = {"model": "m", "strategy": generation.strategy_version}
            assert world.metric("queue_seconds_count", **labels) == 1
            assert world.metric("strategy_share", model="*", strategy=generation.strategy_version) == 1
            await world.core.versions.set("prefill_decode", {"min_remote": 0}, share=0.25)
            shares = [
                world.metric("strategy_share", model="*", strategy=each.version)
                for each in world.core.versions.serving()
            ]
            assert shares == [0.75, 0.25]
            joined = world.metric("events_total", kind="joined")
            await world.add("b")
            assert (joined, world.metric("events_total", kind="joined")) == (1, 2)

    run_virtual(main())


def test_sub_requests_are_counted_by_verb_and_outcome() -> None:
    async def main() -> None:
        async with World(prefill_decode.configure({"min_remote": 0, "early_first": 0})) as world:
            d = await world.add("d", labels={"decode": "yes"})
            p = await world.add("p", labels={"prefill": "yes"})
            d.grant_always(matched=16)
            for broken in (False, True):
                generation = world.generate(list(range(50)))
                await world.settle()
                await asyncio.sleep(2.0)
                if broken:
                    await p.fail(TransferFailed("torn"))
                else:
                    p.report(p.calls[-1], reused=16)
                await d.finish(1)
                await read(generation)
            counted = {
                (verb, outcome): world.metric("sub_requests_total", verb=verb, outcome=outcome)
                for verb, outcome in (
                    ("prep_recv", "ok"),
                    ("remote_send", "ok"),
                    ("remote_send", "transfer_failed"),
                    ("start_generate", "ok"),
                )
            }
            assert list(counted.values()) == [2, 1, 1, 2]
            assert world.metric("sub_request_seconds_sum", verb="remote_send") == 4.0
            assert world.metric("sent_tokens_total", kind="reused") == 16
            assert world.metric("sent_tokens_total", kind="computed") == 17
            assert world.metric("sent_bytes_total") == 64

    run_virtual(main())


def test_the_text_is_what_prometheus_parses_and_registries_are_apart() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    metrics = RouterMetrics(first)
    RouterMetrics(second)
    metrics.refused("busy")
    families = {family.name: family for family in text_string_to_metric_families(generate_latest(first).decode())}
    assert [(sample.labels, sample.value) for sample in families["microserve_router_refused"].samples] == [
        ({"reason": "busy"}, 1.0)
    ]
    assert families["microserve_router_ttft_seconds"].type == "histogram"
    assert second.get_sample_value("microserve_router_refused_total", {"reason": "busy"}) is None
