"""The systemd units: what is installed, that systemd understands it, and that doing it again changes nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from microserve.runtime.config import EngineConfig, RouterConfig, load_config
from microserve.tools import install_units
from microserve.tools.config import main as check_config
from microserve.tools.install_units import UNITS, Places, Work, install, main, unit_text

ROUTER, ENGINE, TARGET = UNITS


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.split("\nnext:")[0].splitlines()]


def test_it_installs_units_and_examples_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path)]) == 0
    units, config = tmp_path / "etc/systemd/system", tmp_path / "etc/microserve"
    assert told(capsys) == [
        *(f"write {units / name}" for name in UNITS),
        f"write {config / 'router.toml'}",
        f"write {config / 'engine-0.toml'}",
    ]
    assert sorted(path.name for path in units.iterdir()) == sorted(UNITS)
    assert (config / "router.toml").stat().st_mode & 0o777 == 0o640


def test_again_changes_nothing_and_a_configuration_is_never_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--root", str(tmp_path)])
    edited = tmp_path / "etc/microserve/router.toml"
    edited.write_text("http_port = 9000\n")
    capsys.readouterr()
    assert main(["--root", str(tmp_path)]) == 0
    assert all(line.startswith("unchanged ") for line in told(capsys))
    assert edited.read_text() == "http_port = 9000\n"


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path), "--dry-run"]) == 0
    assert f"would write {tmp_path / 'etc/systemd/system' / ROUTER}" in told(capsys)
    assert list(tmp_path.iterdir()) == []


def test_remove_takes_units_and_leaves_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(tmp_path)])
    assert main(["--root", str(tmp_path), "--remove"]) == 0
    assert list((tmp_path / "etc/systemd/system").iterdir()) == []
    assert (tmp_path / "etc/microserve/router.toml").exists()
    capsys.readouterr()
    assert main(["--root", str(tmp_path), "--remove"]) == 0
    assert all(line.startswith("not there ") for line in told(capsys))


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "etc").write_text("a file")
    assert main(["--root", str(tmp_path)]) == 1
    assert str(tmp_path / "etc") in capsys.readouterr().err


def test_the_examples_are_valid_configurations(tmp_path: Path) -> None:
    main(["--root", str(tmp_path)])
    config = tmp_path / "etc/microserve"
    assert load_config(RouterConfig, file=config / "router.toml") == RouterConfig()
    assert load_config(EngineConfig, file=config / "engine-0.toml") == EngineConfig(engine_id="0")


@pytest.mark.parametrize("places", [Places.of_system(Path("/")), Places.of_user(Path("/home/somebody"))])
def test_systemd_finds_nothing_wrong(places: Places, tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        # Without systemd there is nothing that the units could be held against.
        assert "@" not in unit_text(TARGET, places)
        return
    for name in UNITS:
        (tmp_path / name.replace("@", "@0")).write_text(unit_text(name, places))
    files = [str(tmp_path / name.replace("@", "@0")) for name in UNITS]
    done = subprocess.run([verify, "verify", *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, [line for line in done.stderr.splitlines() if "microserve" in line]) == (
        0,
        "",
        [],
    )


def test_no_place_is_left_open() -> None:
    for places in (Places.of_system(Path("/")), Places.of_user(Path("/home/somebody"))):
        for name in UNITS:
            left = [word for word in unit_text(name, places).split() if word.startswith("@") and word.endswith("@")]
            assert left == []


def test_what_a_users_manager_may_not_do_is_left_out() -> None:
    text = unit_text(ENGINE, Places.of_user(Path("/home/somebody")))
    assert "DeviceAllow" not in text
    assert "User=" not in text
    assert "Type=notify" in text
    assert "--config /home/somebody/.config/microserve/engine-%i.toml" in text


def test_a_command_that_fails_or_is_missing_is_told_and_is_not_the_end() -> None:
    said: list[str] = []
    work = Work(dry=False, say=said.append)
    work.run(["false"])
    work.run(["no-such-command-anywhere"])
    assert said[1].startswith("  it failed")
    assert said[3].startswith("  no-such-command-anywhere is not there")


def test_the_system_needs_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main([]) == 1
    assert "needs root" in capsys.readouterr().err


def test_a_new_system_gets_a_user_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install_units, "_user_exists", lambda: False)
    said: list[str] = []
    install(Places.of_system(tmp_path), Work(dry=True, say=said.append), make_user=True)
    assert said[0].startswith("would run  useradd --system")


SYSTEM = Places.of_system(Path("/"))


@pytest.mark.parametrize(("name", "most"), [(ROUTER, 1.2), (ENGINE, 1.9)])
def test_the_sandbox_is_as_tight_as_what_runs_in_it_allows(name: str, most: float, tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    text = unit_text(name, SYSTEM)
    assert "NoNewPrivileges=yes" in text
    assert "ProtectSystem=strict" in text
    if analyze is None:
        # Without systemd nobody gives it a score.
        return
    file = tmp_path / name.replace("@", "@0")
    file.write_text(text)
    done = subprocess.run(
        [analyze, "--no-pager", "security", "--offline=true", str(file)], capture_output=True, text=True, check=False
    )
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= most


def settings(name: str) -> dict[str, str]:
    lines = [line for line in unit_text(name, SYSTEM).splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.parametrize(("version", "backs_off"), [(0, False), (252, False), (253, False), (254, True), (257, True)])
def test_restarts_back_off_where_systemd_can(version: int, backs_off: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_units, "systemd_version", lambda: version)
    for name in (ROUTER, ENGINE):
        found = settings(name)
        assert found["Restart"] == "on-failure"
        assert found["RestartPreventExitStatus"] == "2"
        assert ("RestartSteps" in found, "RestartMaxDelaySec" in found) == (backs_off, backs_off)


@pytest.mark.parametrize(("name", "config"), [(ROUTER, RouterConfig()), (ENGINE, EngineConfig())])
def test_what_runs_gets_the_time_to_finish(name: str, config: RouterConfig | EngineConfig) -> None:
    found = settings(name)
    assert float(found["TimeoutStopSec"]) > config.drain_timeout
    assert (found["Type"], found["KillMode"]) == ("notify", "mixed"), "the first signal goes to the daemon alone"
    assert found["ExecReload"] == "/bin/kill -HUP $MAINPID"
    assert float(found["WatchdogSec"]) > 0


def test_an_engine_may_lock_its_pool_and_both_have_a_user_of_their_own() -> None:
    assert settings(ENGINE)["LimitMEMLOCK"] == "infinity"
    for name in (ROUTER, ENGINE):
        assert (settings(name)["User"], settings(name)["Group"]) == ("microserve", "microserve")
        assert settings(name)["LimitCORE"] == "0", "keys and prompts do not go into a core"


def test_the_examples_pass_their_own_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(tmp_path)])
    files = [str(tmp_path / "etc/microserve" / name) for name in ("router.toml", "engine-0.toml")]
    capsys.readouterr()
    assert check_config(["check", *files]) == 0
    assert capsys.readouterr().out == f"{files[0]}: valid (router)\n{files[1]}: valid (engine)\n"
