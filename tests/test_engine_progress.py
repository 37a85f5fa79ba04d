"""What a start-up says of itself, to whoever looks."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from microserve.engine import cuda_open
from microserve.engine import progress as progress_module
from microserve.engine.progress import PATIENCE, Progress
from microserve.runtime.clock import ManualClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """What bars are told: how many are done, and in all."""
    found: list[tuple[int, int | None]] = []

    @contextmanager
    def bar(what: str) -> Iterator[Callable[[int, int | None], None]]:
        yield lambda done, total: found.append((done, total))

    monkeypatch.setattr(progress_module, "_bar", bar)
    return found


def test_a_stage_is_told_with_how_far_it_is() -> None:
    progress = Progress(clock=ManualClock())
    assert progress.look() == "starting"
    with progress.stage("capturing graphs") as report:
        assert progress.look() == "capturing graphs"
        report(5, 20)
        assert progress.look() == "capturing graphs: 5/20"
    with progress.stage("loading weights") as report:
        assert progress.look() == "loading weights", "what was counted before is over"
        report(117, 291)
        assert progress.look() == "loading weights: 40%"


def test_what_does_not_move_is_given_up() -> None:
    clock = ManualClock()
    progress = Progress(clock=clock)
    with progress.stage("loading weights") as report:
        clock.advance(PATIENCE)
        assert progress.look() == "loading weights"
        clock.advance(1)
        assert progress.look() is None
        report(1, 2)
        assert progress.look() == "loading weights: 1/2"


def test_a_stage_may_take_longer_than_others() -> None:
    clock = ManualClock()
    progress = Progress(clock=clock)
    with progress.stage("compiling kernels", patience=1800):
        clock.advance(1700)
        assert progress.look() == "compiling kernels"
    clock.advance(PATIENCE + 1)
    assert progress.look() is None


def test_what_cannot_report_is_counted_from_outside() -> None:
    clock, built = ManualClock(), [3]
    progress = Progress(clock=clock)
    with progress.stage("compiling kernels", patience=10, probe=lambda: built[0]):
        assert progress.look() == "compiling kernels"
        clock.advance(10)
        built[0] = 4
        assert progress.look() == "compiling kernels: 4 so far"
        clock.advance(10)
        assert progress.look() == "compiling kernels: 4 so far", "it has moved"
        clock.advance(1)
        assert progress.look() is None


def test_a_bar_is_drawn_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(bars=True)
    with progress.stage("loading weights") as report:
        report(1, 2)
        assert progress.look() == "loading weights: 1/2"
    assert capsys.readouterr().out == ""


def test_what_is_counted_from_outside_is_drawn_and_may_rename_its_stage(
    drawn: list[tuple[int, int | None]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    built = [0]
    progress = Progress(bars=True)
    with progress.stage("measuring", probe=lambda: built[0], probed="compiling"):
        assert progress.look() == "measuring"
        for built[0] in (1, 3):
            assert progress.look() == f"compiling: {built[0]} so far"
            progress.look()
    built[0] = 4
    assert progress.look() == "starting"
    assert drawn == [(1, None), (3, None)]
    assert [record.getMessage() for record in caplog.records] == ["compiling"]


def test_what_is_counted_from_outside_gives_way_to_what_the_work_tells(
    drawn: list[tuple[int, int | None]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    built = [0]
    progress = Progress(bars=True, clock=ManualClock())
    with progress.stage("capturing graphs", probe=lambda: built[0], probed="compiling") as report:
        built[0] = 2
        assert progress.look() == "compiling: 2 so far"
        report(1, 20)
        assert progress.look() == "capturing graphs: 1/20"
        built[0] = 3
        assert progress.look() == "compiling: 3 so far"
        report(2, 20)
        assert progress.look() == "capturing graphs: 2/20"
    assert drawn == [(2, None), (1, 20), (2, 20)], "a bar has one unit"
    assert [record.getMessage() for record in caplog.records] == ["compiling"]


def test_a_count_that_fails_or_comes_too_late_changes_nothing() -> None:
    progress = Progress(clock=ManualClock())

    def gone() -> int:
        raise FileNotFoundError("a folder of the cache")

    with progress.stage("measuring", probe=gone, probed="compiling"):
        assert progress.look() == "measuring"
    stages = ExitStack()

    def late() -> int:
        # Whoever works goes on to the next stage while somebody counts.
        if started:
            stages.close()
            stages.enter_context(progress.stage("capturing"))
        return len(started)

    started: list[int] = []
    stages.enter_context(progress.stage("measuring", probe=late, probed="compiling"))
    started.append(1)
    assert progress.look() == "capturing"
    stages.close()


def test_kernels_that_must_be_compiled_first_are_announced_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    built, packaged, triton = tmp_path / "cached_ops", tmp_path / "aot", tmp_path / "triton"
    library = ModuleType("flashinfer.jit")
    env = SimpleNamespace(FLASHINFER_JIT_DIR=built, FLASHINFER_AOT_DIR=packaged)
    monkeypatch.setattr(library, "env", env, raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.jit", library)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(triton))
    progress = Progress(clock=ManualClock())
    told = "compiling kernels, which the first start does"
    with cuda_open.first_step(progress):
        assert progress.look() == "measuring the worst step"
        (built / "norm").mkdir(parents=True)
        (built / "norm" / "norm.so").touch()
        assert progress.look() == f"{told}: 1 so far"
    assert [record.getMessage() for record in caplog.records] == [
        "kernels are not compiled yet: the first start takes minutes",
        told,
    ]
    # Those that are there are nobody's work; one that a start before had no use for is, and Triton's are.
    with cuda_open.first_step(progress):
        assert progress.look() == "measuring the worst step"
        (triton / "abc").mkdir(parents=True)
        (triton / "abc" / "kernel.cubin").touch()
        assert progress.look() == f"{told}: 1 so far"
    assert [record.getMessage() for record in caplog.records][2:] == [told]
    with cuda_open.compiling_stage(progress, "capturing graphs") as report:
        report(1, 2)
        (triton / "def").mkdir()
        (triton / "def" / "kernel.cubin").touch()
        assert progress.look() == f"{told}: 1 so far"
        report(2, 2)
        assert progress.look() == "capturing graphs: 2/2"
