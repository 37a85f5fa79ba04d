"""One call that runs what needs a GPU: it goes on after a step that fails, and leaves nothing running."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest
from perf.gpu import STEPS, Step, main, run_steps

ROOT = Path(__file__).parent.parent
GOOD = """
import json, sys
row = {"name": "copy", "median": 4.27, "low": 4.2, "high": 4.3, "unit": "TB/s", "limit": "", "note": "both ways"}
open(sys.argv[sys.argv.index("--json") + 1], "w").write(json.dumps({"rows": [row]}))
"""
SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def runs(pid: int) -> bool:
    """Whether it does anything: one that was killed is there until whoever inherits it looks."""
    try:
        status: str = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return False
    return status != "zombie"


def test_every_step_is_tried_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("good", GOOD), ("slow", SLOW), ("bad", "raise SystemExit(3)")):
        (tmp_path / f"step_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    steps = [
        Step("slow", ("step_slow",), 2.0, rows=False),
        Step("bad", ("step_bad",), 60.0),
        Step("good", ("step_good",), 60.0),
    ]
    out = tmp_path / "out"
    assert run_steps(steps, out) == 1
    rows = json.loads((out / "rows.json").read_text())
    assert (rows["slow"], rows["bad"], [row["median"] for row in rows["good"]]) == ([], [], [4.27])
    lines = (out / "summary.md").read_text().splitlines()
    assert [line.split(" | ")[1] for line in lines[2:5]] == ["took longer than 2 s", "failed (3); see bad.log", "ok"]
    assert lines[-1] == "| good: copy | 4.27 | 4.20–4.30 | TB/s |  | both ways |"
    assert sorted(os.listdir(out)) == ["bad.log", "good.log", "rows.json", "slow.log", "summary.md"]
    assert not runs(int((out / "slow.log").read_text()))
    assert run_steps(steps[2:], out) == 0


def test_steps_are_those_that_the_machine_has_gpus_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--gpus", "1"]) == 0
    alone = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert main(["--dry-run", "--gpus", "2"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [step.name for step in STEPS]
    assert alone == [
        "tests",
        "executor_tests",
        "roofline",
        "engine",
        "loading",
        "kernels",
        "adjusted",
        "plain",
        "serving",
    ]
    marked = [path for path in ROOT.glob("tests/test_*.py") if "mark." + "gpu" in path.read_text()]
    assert len(marked) == 6
    assert {f"tests/{path.name}" for path in marked} <= {*STEPS[0].command, *STEPS[1].command}
    assert main(["--gpus", "0"]) == 1
    with pytest.raises(SystemExit):
        main(["--only", "engines"])
    assert "there is no step engines; there are tests, executor_tests" in capsys.readouterr().err
