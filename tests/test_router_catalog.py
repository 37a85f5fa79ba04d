"""Where strategies are found, and what their files can do to the router: nothing."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import threading
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING

import psutil
import pytest

from microserve.router.strategies.catalog import BUILT_IN, Catalog, Sources, StrategyFolder, load_catalog
from microserve.router.strategies.data_parallel import data_parallel
from microserve.router.strategies.files import Problem, load_file, run_file
from microserve.router.strategies.trial import try_files
from microserve.runtime.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

GOOD = '''
from microserve import strategy

@strategy
async def mine(request, fleet, *, ratio: float = 0.2):
    """One line.

    More.
    """
    async for chunk in fleet.pick().start_generate():
        yield chunk
'''


def test_the_built_in_strategies_are_there() -> None:
    catalog = load_catalog(entry_points=())
    assert catalog.problems == ()
    assert catalog.get("data_parallel") is data_parallel
    assert set(catalog.strategies) == {each.name for each in BUILT_IN}


def test_an_unknown_strategy_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no strategy 'data_paralel'; did you mean 'data_parallel'"):
        load_catalog(entry_points=()).get("data_paralel")


def test_a_folder_of_files_is_loaded_and_broken_ones_are_told_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "_private.py").write_text("raise RuntimeError")
    (tmp_path / "syntax.py").write_text("x = 1\ny = = 2\n")
    (tmp_path / "raises.py").write_text("import os\n\n\ndef f():\n    raise KeyError('k')\n\n\nf()\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(4)\n")
    (tmp_path / "empty.py").write_text("from microserve.router.strategies.data_parallel import data_parallel\n")
    (tmp_path / "wrong.py").write_text("from microserve import strategy\n@strategy\ndef f(request, fleet):\n    pass\n")
    catalog = load_catalog(tmp_path, entry_points=())
    assert set(catalog.strategies) == {each.name for each in BUILT_IN} | {"mine"}
    assert catalog.get("mine").summary == "One line."
    assert catalog.get("mine").source == GOOD
    told = {problem.source.rsplit("/", 1)[-1]: (problem.line, problem.message) for problem in catalog.problems}
    assert told == {
        "syntax.py": (2, "SyntaxError: invalid syntax"),
        "raises.py": (5, "KeyError: 'k'"),
        "leaves.py": (2, "it calls exit(4)"),
        "empty.py": (0, "it defines no strategy (an async generator function under @strategy)"),
        "wrong.py": (
            2,
            "f is not a strategy: it must be an async generator function (async def, with yield)",
        ),
    }
    with pytest.raises(ConfigError, match=r"^no strategy 'raises' \(.*raises\.py:5: KeyError.*\); there are: "):
        catalog.get("raises")


def test_a_strategy_that_replaces_another_is_told(tmp_path: Path) -> None:
    for file in ("first.py", "second.py"):
        (tmp_path / file).write_text(GOOD)
    (tmp_path / "third.py").write_text(GOOD.replace("def mine", "def balanced"))
    catalog = load_catalog(tmp_path, entry_points=())
    assert catalog.sources["mine"] == f"{tmp_path}/second.py"
    assert catalog.sources["balanced"] == f"{tmp_path}/third.py"
    assert [str(problem) for problem in catalog.problems] == [
        f"{tmp_path}/first.py: 'mine' is replaced by the one of {tmp_path}/second.py",
        f"built in: 'balanced' is replaced by the one of {tmp_path}/third.py",
    ]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        load_catalog(tmp_path / "nowhere", entry_points=())


def test_entry_points_are_loaded_and_broken_ones_are_told() -> None:
    group = "microserve.strategies"
    catalog = load_catalog(
        entry_points=[
            EntryPoint("dp", "microserve.router.strategies.data_parallel:data_parallel", group),
            EntryPoint("gone", "microserve.no_such_module:x", group),
            EntryPoint("odd", "microserve.router.strategy:Chunk", group),
        ],
        built_in=(),
    )
    assert set(catalog.strategies) == {"data_parallel"}
    assert [str(problem) for problem in catalog.problems] == [
        "entry point gone = microserve.no_such_module:x: ModuleNotFoundError: No module named "
        "'microserve.no_such_module'",
        "entry point odd = microserve.router.strategy:Chunk: it is not a strategy (an async generator function under "
        "@strategy)",
    ]


# --- one file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["KeyboardInterrupt", "GeneratorExit", "asyncio.CancelledError", "BaseException"])
def test_a_file_may_raise_anything(tmp_path: Path, name: str) -> None:
    problem = run_file(tmp_path / "odd.py", f"import asyncio\n\nraise {name}('x')\n")
    assert isinstance(problem, Problem)
    assert (problem.line, problem.message) == (3, f"{name.rpartition('.')[2]}: x")


def test_a_changed_file_is_another_version(tmp_path: Path) -> None:
    before, after = (run_file(tmp_path / "mine.py", text) for text in (GOOD, GOOD + "\nHELPER = 1\n"))
    assert isinstance(before, list)
    assert isinstance(after, list)
    assert before[0].configure().version != after[0].configure().version
    assert before[0].function is not after[0].function


def test_a_file_that_ends_elsewhere_and_not_in_the_router_is_told_with_its_line(tmp_path: Path) -> None:
    release = threading.Event()
    sys.modules["release_of_a_test"] = release  # type: ignore[assignment]
    try:
        problem = load_file(tmp_path / "stuck.py", "import release_of_a_test\nrelease_of_a_test.wait()\n", limit=0.2)
    finally:
        # The thread that was left behind must not outlive the test.
        release.set()
        del sys.modules["release_of_a_test"]
    assert problem == Problem(f"{tmp_path}/stuck.py", 2, "it does not finish within 0.2 s")


# --- files in a process of their own ---------------------------------------------------------------------------------

ENDLESS = "x = 1\nwhile True:\n    pass\n"


def test_a_file_ends_its_own_process_and_no_other(tmp_path: Path) -> None:
    texts = {
        "good": GOOD,
        "loud": GOOD + "print('x' * 1_000_000)\n",
        "raises": "\nraise KeyError('k')\n",
        "crashes": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
        "leaves": "import os\nos._exit(3)\n",
    }
    told = try_files([(tmp_path / f"{name}.py", text) for name, text in texts.items()])
    assert [str(each) if each else None for each in told] == [
        None,
        None,
        f"{tmp_path}/raises.py:2: KeyError: 'k'",
        f"{tmp_path}/crashes.py: it ends its process (signal SIGSEGV)",
        f"{tmp_path}/leaves.py: it ends its process (exit status 3)",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ENDLESS, 2),
        ("import time\n\n\ndef wait():\n    time.sleep(1000)\n\n\nwait()\n", 5),
        # In C, with the interpreter's lock.
        ("import re\n\nre.match('(a+)+b', 'a' * 60)\n", 3),
        ("import threading, time\nthreading.Thread(target=lambda: time.sleep(1000)).start()\ntime.sleep(1000)\n", 3),
    ],
)
def test_a_file_that_does_not_end_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "öde.py"
    (problem,) = try_files([(path, text)], limit=0.3)
    assert problem is not None
    assert problem.message == "it does not finish within 0.3 s"
    # A loop of two lines may stand at either.
    assert problem.line in ((2, 3) if text == ENDLESS else (line,))


def test_what_a_file_starts_ends_with_its_trial(tmp_path: Path) -> None:
    held = tmp_path / "held"
    os.mkfifo(held)
    text = f"import subprocess\nsubprocess.Popen(['sleep', '1000'], stdout=open({str(held)!r}, 'w'))\n"
    with open(os.open(held, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as reader:
        assert try_files([(tmp_path / "mine.py", GOOD + text)]) == [None]
        os.set_blocking(reader.fileno(), True)
        assert reader.read() == b"", "it comes when the last one that could write has ended"


# --- a folder --------------------------------------------------------------------------------------------------------


def test_files_of_a_folder_are_run_when_they_change_and_not_when_somebody_looks(tmp_path: Path) -> None:
    count, path = tmp_path / "count", tmp_path / "mine.py"
    note = f"import os\nwith open({str(count)!r}, 'a') as file:\n    file.write(f'{{os.getpid()}} ')\n"
    path.write_text(GOOD + note)
    folder = StrategyFolder(tmp_path)
    for _ in range(3):
        catalog = load_catalog(folder, entry_points=())
        assert "mine" in catalog.strategies
    tried, loaded = count.read_text().split()
    assert loaded == str(os.getpid()) != tried
    path.write_text(GOOD + note + "MORE = 1\n")
    load_catalog(folder, entry_points=())
    assert len(count.read_text().split()) == 4
    path.unlink()
    assert "mine" not in load_catalog(folder, entry_points=()).strategies


def test_what_fails_elsewhere_is_not_run_here(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "bad.py").write_text(
        f"import os\nopen({str(ran)!r}, 'a').write(f'{{os.getpid()}} ')\nraise ValueError\n"
    )
    ((_, problem),) = StrategyFolder(tmp_path).load()
    assert isinstance(problem, Problem)
    assert (problem.line, problem.message) == (3, "ValueError: ")
    assert str(os.getpid()) not in ran.read_text().split()
    assert len(ran.read_text().split()) == 1


def test_without_a_process_of_their_own_files_are_run_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine.py").write_text(GOOD)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "mine" in load_catalog(tmp_path, entry_points=()).strategies
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "mine" in load_catalog(tmp_path, entry_points=()).strategies
    assert [record.__dict__["fields"]["error"].args[0] for record in caplog.records] == [
        "it did not begin within 5 s",
        "/nowhere/python: No such file or directory",
    ]


def test_slow_files_do_not_keep_whoever_waits_for_the_list(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(GOOD.replace("mine", name))
    clock = itertools.count()
    folder = StrategyFolder(tmp_path, clock=lambda: float(next(clock)))

    def found() -> dict[str, str]:
        return {path.stem: str(each) if isinstance(each, Problem) else "" for path, each in folder.load(patience=2.5)}

    late = f"{tmp_path}/c.py: not read yet: others took 2.5 s; look again"
    assert found() == {"a": "", "b": "", "c": late}
    assert found() == {"a": "", "b": "", "c": ""}


def test_the_event_loop_turns_while_files_take_long(tmp_path: Path) -> None:
    """One never ends; one takes until the loop has turned a hundred times, in the trial and in the router."""
    (tmp_path / "endless.py").write_text(ENDLESS)
    beat = tmp_path / "beat"
    beat.write_text("0")
    slow = f"import time\nfrom pathlib import Path\nbeat = Path({str(beat)!r})\nlast = int(beat.read_text() or 0)\n"
    slow += "while int(beat.read_text() or 0) < last + 100:\n    time.sleep(0.001)\n"
    (tmp_path / "slow.py").write_text(GOOD.replace("mine", "slow") + slow)

    async def main() -> None:
        sources = Sources(tmp_path, entry_points=())
        reading = asyncio.create_task(sources.read())
        other = asyncio.create_task(sources.read())
        for turn in itertools.count():
            beat.with_suffix(".new").write_text(str(turn))
            beat.with_suffix(".new").replace(beat)
            if reading.done():
                break
            await asyncio.sleep(0.001)
        assert turn > 200
        catalog = reading.result()
        assert "slow" in catalog.strategies
        (problem,) = catalog.problems
        assert problem.source == f"{tmp_path}/endless.py"
        assert problem.line in (2, 3)
        assert problem.message == "it does not finish within 2 s"
        assert (await other).problems == catalog.problems

    before = set(threading.enumerate())
    asyncio.run(main())
    assert set(threading.enumerate()) == before
    assert not psutil.Process().children(recursive=True)


def test_who_comes_while_files_are_read_waits_for_a_look_of_its_own(tmp_path: Path) -> None:
    looks: list[float] = []
    inside, release = threading.Event(), threading.Event()

    class Slow(Sources):
        def _load(self, patience: float) -> Catalog:
            looks.append(patience)
            inside.set()
            assert release.wait(10)
            return super()._load(patience)

    async def main() -> None:
        sources = Slow(tmp_path, entry_points=())
        first = asyncio.create_task(sources.read())
        await asyncio.to_thread(inside.wait)
        second = asyncio.create_task(sources.read())
        first.cancel()  # whoever asked has gone; its thread has not
        await asyncio.wait([first])
        (tmp_path / "mine.py").write_text(GOOD)
        assert len(looks) == 1
        release.set()
        assert "mine" in (await second).strategies
        assert len(looks) == 2

    asyncio.run(main())
