"""Everything that needs a GPU, in one call: the tests marked `gpu`, then every benchmark of this machine's GPUs.

    python -m perf.gpu --out results            # all of it: some 20 min on one GPU, 2 min more on two
    python -m perf.gpu --only tests,engine

A step that fails or takes too long is told, and the next one begins. DIR gets the log of every step, the rows of every
benchmark in `rows.json`, and a summary in `summary.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perf.harness import number

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROOT = Path(__file__).resolve().parents[1]
_NIXL_TESTS = "tests/test_kv_transfer_nixl.py"
_EXECUTOR_TESTS = "tests/test_engine_cuda_executor.py"
_TESTS = (*sorted(str(path.relative_to(_ROOT)) for path in _ROOT.glob("tests/test_*cuda*.py")), _NIXL_TESTS)
"""Files with tests that are marked so. The others need packages that measuring does not."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command: what follows `python -m`. `limit` in seconds; `gpus` is how many it needs."""

    name: str
    command: tuple[str, ...]
    limit: float
    gpus: int = 1
    rows: bool = True
    """Whether it writes what it measured (`--json`)."""


_PLAIN = ("--executor", "torch", "--batches", "1,64", "--prompts", "2048", "--requests", "0")
_LARGE_STEPS = ("--flags", "--step-tokens 8192 --max-running 512")
_ADJUSTED = ("--repetition-penalty", "1.1", "--logprobs", "5", "--batches", "1,64", "--prompts", "", "--requests", "0")
_SERVED = ("--model", "llama-3.1-8b", "--engines", "1", "--executor", "cuda")
STEPS = (
    Step(
        "tests", ("pytest", "-q", "-m", "gpu", *(file for file in _TESTS if file != _EXECUTOR_TESTS)), 300, rows=False
    ),
    # Seven models, each beside `transformers` on the CPU.
    Step("executor_tests", ("pytest", "-q", "-m", "gpu", _EXECUTOR_TESTS), 900, rows=False),
    Step("roofline", ("perf.roofline",), 90),
    Step("engine", ("perf.engine", "--limits"), 300),
    Step("loading", ("perf.loading",), 180),
    Step("kernels", ("perf.kernels",), 150),
    Step("adjusted", ("perf.engine", *_ADJUSTED), 90),
    Step("plain", ("perf.engine", *_PLAIN, *_LARGE_STEPS), 150),
    Step("serving", ("perf.serving", *_SERVED, "--rates", "4,16", "--requests", "120", "--repeat", "1"), 180),
    Step("transfer", ("perf.transfer", "--device", "cuda:0", "--peer-device", "cuda:1", "--mib", "384"), 120, gpus=2),
    Step("disaggregation", ("perf.disaggregation",), 240, gpus=2),
    Step("first_token", ("perf.first_token", "--devices", "cuda:0,cuda:1"), 180, gpus=2),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a step ended: "ok", or what went wrong."""

    step: Step
    result: str
    seconds: float
    rows: Sequence[dict[str, Any]] = ()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("perf/out/gpu"), metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--only", help="steps, separated by commas (default: all that this machine has GPUs for)")
    parser.add_argument("--gpus", type=int, help="how many GPUs there are (default: asks torch)")
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only else [step.name for step in STEPS]
    if unknown := set(names) - {step.name for step in STEPS}:
        known = ", ".join(step.name for step in STEPS)
        parser.error(f"--only: there is no step {', '.join(sorted(unknown))}; there are {known}")
    gpus = options.gpus if options.gpus is not None else _gpus()
    chosen = [step for step in STEPS if step.name in names and step.gpus <= gpus]
    if options.dry_run:
        for step in chosen:
            print(f"{step.name:15} {step.limit:4.0f} s  python -m {' '.join(step.command)}")
        return 0
    if not chosen:
        print(f"perf.gpu: nothing to do: there are {gpus} GPUs", file=sys.stderr)
        return 1
    return run_steps(chosen, options.out)


def run_steps(steps: Sequence[Step], out: Path) -> int:
    """Runs them one after the other; 1 where one did not end well. Ctrl-C ends the step under way and the run."""
    out.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    try:
        for step in steps:
            print(f"== {step.name} (at most {step.limit:.0f} s)", file=sys.stderr, flush=True)
            outcomes.append(_run(step, out))
            print(f"   {outcomes[-1].result}, {outcomes[-1].seconds:.0f} s", file=sys.stderr, flush=True)
            # After every step: whoever is cut off keeps what there is.
            _write(outcomes, out)
    except KeyboardInterrupt:
        return 130
    return int(any(outcome.result != "ok" for outcome in outcomes))


def _run(step: Step, out: Path) -> Outcome:
    rows = out / f"{step.name}.rows"
    command = [sys.executable, "-m", *step.command, *(("--json", str(rows)) if step.rows else ())]
    began = time.monotonic()
    with (out / f"{step.name}.log").open("wb") as log:
        # A group of its own: engines that it started end with it.
        process = subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(step.limit)
            result = "ok" if code == 0 else f"failed ({code}); see {step.name}.log"
        except subprocess.TimeoutExpired:
            result = f"took longer than {step.limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        found = json.loads(rows.read_text())["rows"]
        rows.unlink()
    return Outcome(step, result, time.monotonic() - began, found)


def _write(outcomes: Sequence[Outcome], out: Path) -> None:
    everything = {outcome.step.name: outcome.rows for outcome in outcomes}
    (out / "rows.json").write_text(json.dumps(everything, indent=1) + "\n")
    lines = ["| step | result | seconds |", "|---|---|---:|"]
    lines += [f"| {each.step.name} | {each.result} | {each.seconds:.0f} |" for each in outcomes]
    lines += ["", "| figure | median | low–high | unit | held against | note |", "|---|---:|---:|---|---|---|"]
    for outcome in outcomes:
        for row in outcome.rows:
            spread = f"{number(row['low'])}–{number(row['high'])}"
            figures = f"{number(row['median'])} | {spread} | {row['unit']} | {row['limit']} | {row['note']}"
            lines.append(f"| {outcome.step.name}: {row['name']} | {figures} |")
    (out / "summary.md").write_text("\n".join(lines) + "\n")


def _gpus() -> int:
    # In another process: here, torch would keep memory of a GPU that is measured later.
    question = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", question], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
