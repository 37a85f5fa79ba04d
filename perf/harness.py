"""The common harness: warm-up, environment line, median and spread, a table on the terminal and JSON on request.

A subject is a module of this package with a `main()`:

    bench = Benchmark("bus", "RPC round trip against a bare echo")
    args = bench.arguments()                    # adds --json, --repeat, --warmup; subjects may add their own first
    sample = measure(function, warmup=args.warmup, repeat=args.repeat)          # seconds a call
    bench.row("round trip", sample, unit="µs", scale=1e6, limit="2x bare", note="…")
    bench.finish(args)

Figures from one run are compared in that run only: `interleave` alternates two or more candidates, so that a machine
whose speed drifts slows them alike, and `ratio` is taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Sample:
    """Repeated measurements of one figure, in the unit that the measurement had."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a sample needs at least one value")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def scaled(self, factor: float) -> Sample:
        """The same sample in another unit."""
        return Sample(tuple(value * factor for value in self.values))


def measure(function: Callable[[], object], *, warmup: int = 1, repeat: int = 5) -> Sample:
    """Wall seconds of each of `repeat` calls, after `warmup` calls that do not count."""
    return interleave({"": function}, warmup=warmup, repeat=repeat)[""]


def interleave(
    candidates: Mapping[str, Callable[[], object]], *, warmup: int = 1, repeat: int = 5
) -> dict[str, Sample]:
    """Wall seconds of each candidate, measured in turn (A B A B …)."""
    for _ in range(warmup):
        for function in candidates.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeat):
        for name, function in candidates.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return {name: Sample(tuple(values)) for name, values in seconds.items()}


def ratio(ours: Sample, theirs: Sample) -> Sample:
    """ours / theirs, pair by pair (both samples from one interleaved run)."""
    return Sample(tuple(a / b for a, b in zip(ours.values, theirs.values, strict=True)))


def environment() -> dict[str, str]:
    """The machine and the packages that a figure depends on."""
    packages = {}
    for name in ("torch", "nixl-cu13", "pyzmq", "msgspec", "uvloop", "transformers", "starlette", "uvicorn"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "python": platform.python_version(),
        **packages,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a figure, its spread, and what it is held against."""

    name: str
    median: float
    low: float
    high: float
    unit: str
    limit: str = ""
    note: str = ""


@dataclass
class Benchmark:
    """Collects rows and prints them; `subject` names the command, `description` says what is measured."""

    subject: str
    description: str
    rows: list[Row] = field(default_factory=list)

    def arguments(
        self,
        parser: argparse.ArgumentParser | None = None,
        *,
        repeat: int = 5,
        warmup: int = 1,
        argv: Sequence[str] | None = None,
    ) -> argparse.Namespace:
        """Parses the common flags, and the subject's own if it gives a parser."""
        parser = parser or argparse.ArgumentParser()
        parser.prog = f"python -m perf.{self.subject}"
        parser.description = self.description
        parser.add_argument("--repeat", type=int, default=repeat, help="counted runs (default: %(default)s)")
        parser.add_argument("--warmup", type=int, default=warmup, help="runs that do not count (default: %(default)s)")
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the environment and every row to FILE")
        return parser.parse_args(argv)

    def row(self, name: str, sample: Sample, *, unit: str, scale: float = 1.0, limit: str = "", note: str = "") -> Row:
        """Adds a figure. `scale` converts the sample to `unit`; `limit` says what it is held against."""
        shown = sample.scaled(scale)
        row = Row(name, shown.median, shown.low, shown.high, unit, limit, note)
        self.rows.append(row)
        print(f"  {row.name}: {number(row.median)} {unit}", file=sys.stderr, flush=True)
        return row

    def finish(self, args: argparse.Namespace, *, table: bool = True) -> None:
        """Prints the environment and the table as Markdown, and writes the JSON that `--json` asked for.

        Without `table`, the subject prints its own.
        """
        where = environment()
        print(f"\n## {self.subject}: {self.description}\n")
        print(" · ".join(f"{key} {value}" for key, value in where.items()))
        print(f"{args.repeat} runs after {args.warmup} warm-up\n")
        if table:
            print("| figure | median | low–high | unit | held against | note |")
            print("|---|---:|---:|---|---|---|")
            for row in self.rows:
                spread = f"{number(row.low)}–{number(row.high)}"
                print(f"| {row.name} | {number(row.median)} | {spread} | {row.unit} | {row.limit} | {row.note} |")
        if args.json is not None:
            payload = {"subject": self.subject, "environment": where, "rows": [asdict(row) for row in self.rows]}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(payload, indent=1) + "\n")


def number(value: float) -> str:
    """Three significant digits, without an exponent for the sizes that benchmarks have."""
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{abs(value):e}".split("e")[1]))
    return f"{value:,.{min(digits, 6)}f}"
