"""`microserve strategy` against a live router: seen, checked, changed, kept across a restart, rolled back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.cluster import FAKE, Cluster, daemon_environ

if TYPE_CHECKING:
    from pathlib import Path

MINE = """
from microserve.router.strategy import strategy

@strategy
async def mine(request, fleet, *, ratio: float = 0.5):
    '''Mine.'''
    async for chunk in fleet.pick().start_generate():
        yield chunk
"""


def strategy(cluster: Cluster, *more: str) -> subprocess.CompletedProcess[str]:
    action, *rest = more
    command = [sys.executable, "-P", "-m", "microserve.tools", "strategy", action, "--router", cluster.router, *rest]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=daemon_environ(), check=False)


def asked(cluster: Cluster, *more: str) -> Any:
    done = strategy(cluster, *more, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def test_an_operator_changes_what_composes_requests(tmp_path: Path) -> None:
    folder, state = tmp_path / "strategies", tmp_path / "state"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "broken.py").write_text("x = 1\nthis is no python\n")
    places = ("--strategy-folder", str(folder), "--state-folder", str(state))
    with Cluster(engines=1, engine_args=FAKE, router_args=places) as cluster:
        listed = strategy(cluster, "list").stdout
        assert "* data_parallel" in listed
        assert "  mine " in listed
        assert "ratio: float = 0.5" in listed
        assert "ratio: float = 0.2 (between 0 and 1)" in listed
        assert f"! {folder / 'broken.py'}:2: SyntaxError" in listed
        before = asked(cluster, "show")[0]["version"]

        checked = strategy(cluster, "check", "mine", "--set", "ratio=0.25")
        assert checked.returncode == 0
        assert checked.stdout.startswith("valid; nothing was changed.")
        assert asked(cluster, "show")[0]["version"] == before

        changed = asked(cluster, "set", "mine", "--set", "ratio=0.25")["active"]
        assert [(each["name"], each["settings"], each["share"]) for each in changed] == [("mine", {"ratio": 0.25}, 1.0)]
        shared = asked(cluster, "set", "data_parallel", "--share", "0.25")["active"]
        assert [(each["name"], each["share"]) for each in shared] == [("mine", 0.75), ("data_parallel", 0.25)]

        history = strategy(cluster, "history").stdout.splitlines()
        assert [line.split("(")[-1] for line in history[:2]] == [
            f"set {before} for 25%)",
            f"set {changed[0]['version']})",
        ]

        assert [each["name"] for each in asked(cluster, "rollback")["active"]] == ["mine"]
        assert json.loads((state / "strategies.json").read_text())["active"][0]["name"] == "mine"


def test_what_is_wrong_is_told_in_one_line_and_changes_nothing() -> None:
    with Cluster(engines=0, engine_args=FAKE) as cluster:
        for arguments, said in (
            (("set", "dataparallel"), "did you mean 'data_parallel'?"),
            (("set", "balanced", "--set", "ratio=much"), "'ratio' must be a float"),
            (("set", "balanced", "--set", "ratio=2"), "'ratio' must be between 0 and 1"),
            (("rollback",), "no earlier state"),
            (("rollback", "--to-before", "7"), "change 7"),
        ):
            done = strategy(cluster, *arguments)
            assert done.returncode == 1, arguments
            assert said in done.stderr, arguments
            assert len(done.stderr.splitlines()) == 1
        done = strategy(cluster, "set", "balanced", "--set", "ratio")
        assert done.returncode == 2
        assert "NAME=VALUE" in done.stderr
        done = strategy(cluster, "set", "balanced", "--share", "10")
        assert (done.returncode, "above 0 and at most 1" in done.stderr) == (2, True)
        assert [each["name"] for each in asked(cluster, "show")] == ["data_parallel"]


def test_without_a_router_the_command_says_so() -> None:
    with Cluster(engines=0, start_router=False) as cluster:
        done = strategy(cluster, "list")
        assert done.returncode == 1
        assert "no router answers" in done.stderr
