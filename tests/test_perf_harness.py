"""The benchmark harness: order of measurement, ratios pair by pair, and what it writes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from perf.harness import Benchmark, Sample, interleave, ratio

if TYPE_CHECKING:
    from pathlib import Path


def test_interleave_alternates_and_does_not_count_the_warm_up() -> None:
    order: list[str] = []
    samples = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, warmup=1, repeat=2)
    assert order == ["a", "b"] * 3
    assert [len(sample.values) for sample in samples.values()] == [2, 2]


def test_ratio_is_taken_pair_by_pair() -> None:
    assert ratio(Sample((2.0, 9.0)), Sample((1.0, 3.0))).values == (2.0, 3.0)


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        Sample(())


def test_finish_prints_a_table_and_writes_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Benchmark("subject", "what it measures")
    args = bench.arguments(argv=["--json", str(tmp_path / "out" / "rows.json"), "--repeat", "3"])
    bench.row("call", Sample((1e-3, 3e-3, 2e-3)), unit="ms", scale=1e3, limit="at most 5")
    bench.finish(args)
    assert "| call | 2.00 | 1.00–3.00 | ms | at most 5 |  |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert written["subject"] == "subject"
    assert [(row["name"], row["median"], row["unit"]) for row in written["rows"]] == [("call", 2.0, "ms")]
    assert "python" in written["environment"]
