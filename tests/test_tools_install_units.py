"""The systemd units: what is installed, that systemd understands it, and that doing it again changes nothing."""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cluster import FAKE, START_LIMIT, daemon_environ, free_ports

from microserve.runtime.config import EngineConfig, RouterConfig, load_config
from microserve.tools import install_units
from microserve.tools.config import main as check_config
from microserve.tools.install_units import UNITS, Places, Work, install, main, unit_text

ROUTER, ENGINE, TARGET = UNITS


def told(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [
        " ".join(line.split()) for line in re.split("\n(next|note|what runs)", capsys.readouterr().out)[0].splitlines()
    ]


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


def test_a_dry_run_for_the_system_says_all_that_would_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By anybody: nothing of it is done."""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setattr(install_units, "_user_exists", lambda: False)
    units, config = tmp_path / "units", tmp_path / "config"
    monkeypatch.setattr(Places, "of_system", lambda root: Places(units, config, "/etc/microserve", True))
    assert main(["--dry-run"]) == 0
    assert told(capsys) == [
        "would run useradd --system --user-group --home-dir /var/lib/microserve --shell /usr/sbin/nologin microserve",
        *(f"would write {units / name}" for name in UNITS),
        *(f"would write {config / name}" for name in ("router.toml", "engine-0.toml")),
        f"would run chgrp -R microserve {config}",
        f"would run install -d -m 700 {config / 'keys'}",
        f"would run chown -R microserve:microserve {config / 'keys'}",
        "would run systemctl daemon-reload",
    ]
    units.mkdir()
    (units / ROUTER).touch()
    assert main(["--dry-run", "--remove"]) == 0
    assert told(capsys)[:3] == [
        f"would run systemctl disable {' '.join(UNITS)}",
        f"would remove {units / ROUTER}",
        f"not there {units / ENGINE}",
    ]
    assert [path.name for path in tmp_path.rglob("*")] == ["units", ROUTER]


def test_remove_takes_units_and_leaves_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--root", str(tmp_path)])
    assert main(["--root", str(tmp_path), "--remove"]) == 0
    assert list((tmp_path / "etc/systemd/system").iterdir()) == []
    assert (tmp_path / "etc/microserve/router.toml").exists()
    capsys.readouterr()
    assert main(["--root", str(tmp_path), "--remove"]) == 0
    assert all(line.startswith("not there ") for line in told(capsys)[: len(UNITS)])


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "etc").write_text("a file")
    assert main(["--root", str(tmp_path)]) == 1
    assert str(tmp_path / "etc") in capsys.readouterr().err


def test_the_examples_are_valid_configurations(tmp_path: Path) -> None:
    main(["--root", str(tmp_path)])
    config = tmp_path / "etc/microserve"
    assert load_config(RouterConfig, file=config / "router.toml") == RouterConfig()
    assert load_config(EngineConfig, file=config / "engine-0.toml") == EngineConfig(engine_id="0")


@pytest.mark.parametrize("places", [Places.of_system(Path("/")), Places.of_user(Path("/home/somebody/.config"))])
def test_systemd_finds_nothing_wrong(places: Places, tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("no systemd-analyze here, so nobody understands units")
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
    for places in (Places.of_system(Path("/")), Places.of_user(Path("/home/somebody/.config"))):
        for name in UNITS:
            left = [word for word in unit_text(name, places).split() if word.startswith("@") and word.endswith("@")]
            assert left == []


def test_what_a_users_manager_may_not_do_is_left_out() -> None:
    text = unit_text(ENGINE, Places.of_user(Path("/home/somebody/.config")))
    assert "DeviceAllow" not in text
    assert "User=" not in text
    assert "Type=notify" in text
    assert "--config /home/somebody/.config/microserve/engine-%i.toml" in text


def test_a_command_that_fails_or_is_missing_is_told_and_is_not_the_end() -> None:
    said: list[str] = []
    work = Work(dry=False, say=said.append)
    work.run(["no-such-command-anywhere"])
    assert said[1].startswith("  no-such-command-anywhere is not there")
    assert not work.failed
    work.run(["false"])
    assert said[3].startswith("  it failed")
    assert work.failed


def manager(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `systemctl` that ends with this code, and nothing else that could be run."""
    folder.mkdir()
    (folder / "systemctl").write_text(f"#!/bin/sh\necho 'no bus' >&2\nexit {code}\n")
    (folder / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}")


@pytest.mark.parametrize("code", [0, 1])
def test_whether_the_manager_has_read_the_units_is_in_the_exit_code(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    manager(tmp_path / "bin", code, monkeypatch)
    assert main(["--user"]) == code
    shown = capsys.readouterr().out
    assert ("run     systemctl --user daemon-reload\n  it failed: no bus" in shown) == bool(code)
    assert "\nnext: edit" in shown
    assert main(["--user", "--remove"]) == code


def test_a_users_units_go_where_systemd_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, folder in ((f"{tmp_path}/settings", tmp_path / "settings"), ("settings", tmp_path / ".config")):
        monkeypatch.setenv("XDG_CONFIG_HOME", named)
        assert main(["--user", "--dry-run"]) == 0
        assert told(capsys)[:-1] == [
            *(f"would write {folder}/systemd/user/{name}" for name in UNITS),
            *(f"would write {folder}/microserve/{name}" for name in ("router.toml", "engine-0.toml")),
        ]
    assert list(tmp_path.iterdir()) == []


def test_what_an_image_needs_still_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(tmp_path)]) == 0
    note = capsys.readouterr().out.partition("\nnote: ")[2].partition("\n\n")[0]
    assert note.splitlines() == [
        "the units' user and their configuration's group are still to be made; in the image, as root:",
        "  useradd --system --user-group --home-dir /var/lib/microserve --shell /usr/sbin/nologin microserve",
        "  chgrp -R microserve /etc/microserve",
        "  install -d -m 700 /etc/microserve/keys",
        "  chown -R microserve:microserve /etc/microserve/keys",
    ]
    assert main(["--root", str(tmp_path), "--remove"]) == 0
    assert "useradd" not in capsys.readouterr().out


def test_who_reads_only_the_beginning_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `install-units | head -1`."""
    said: list[str] = []

    def say(text: str) -> None:
        if said:
            raise BrokenPipeError
        said.append(text)

    install(Places.of_system(tmp_path), Work(dry=False, say=say), make_user=False)
    assert len(said) == 1
    assert (tmp_path / "etc/microserve/engine-0.toml").exists()


def test_a_reader_that_has_left_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-P", "-m", "microserve.tools", "install-units", "--root", str(tmp_path)]
    with os.fdopen(write, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=False, env=daemon_environ())
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "etc/microserve/engine-0.toml").exists()


def test_the_system_needs_root(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main([]) == 1
    assert "needs root" in capsys.readouterr().err


def test_a_new_system_gets_a_user_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install_units, "_user_exists", lambda: False)
    said: list[str] = []
    install(Places.of_system(tmp_path), Work(dry=True, say=said.append), make_user=True)
    assert said[0].startswith("would run  useradd --system")


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_daemons_get_to_their_configuration_whatever_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        assert main(["--root", str(tmp_path)]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "etc/microserve").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("which", range(4))
def test_what_is_in_a_home_stays_visible(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment, interpreter and package may lie apart; each is needed to start."""
    parts = [Path("/opt/microserve")] * 4
    monkeypatch.setattr(install_units, "_loaded_from", lambda: tuple(parts))
    assert settings(ROUTER)["ProtectHome"] == "yes"
    parts[which] = Path("/home/ann/microserve")
    assert (settings(ROUTER)["ProtectHome"], settings(ENGINE)["ProtectHome"]) == ("read-only", "read-only")


def test_an_installation_that_the_daemons_cannot_reach_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for path, closed in ((Path("/usr/bin"), False), (home / "venv", True)):
        monkeypatch.setattr(install_units, "_loaded_from", lambda path=path: (path,))
        assert main(["--root", str(tmp_path / "root")]) == 0
        assert ("is closed to others, and the user microserve" in capsys.readouterr().out) == closed


def test_a_word_of_a_command_may_have_any_character(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", "/opt/my venv/100%/bin/python")
    places = Places.of_user(tmp_path / "a b")
    assert unit_text(ROUTER, places).count(r"ExecStart=/opt/my\x20venv/100%%/bin/python -P -m microserve.router") == 1
    assert rf"--config {tmp_path}/a\x20b/microserve/router.toml" in unit_text(ROUTER, places)


SYSTEM = Places.of_system(Path("/"))


@pytest.mark.parametrize("name", [ROUTER, ENGINE])
def test_what_runs_gains_no_rights_and_writes_nowhere(name: str) -> None:
    found = settings(name)
    assert (found["NoNewPrivileges"], found["ProtectSystem"]) == ("yes", "strict")


@pytest.mark.parametrize(("name", "most"), [(ROUTER, 1.3), (ENGINE, 1.9)])
def test_the_sandbox_is_as_tight_as_what_runs_in_it_allows(
    name: str, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here, so nobody scores units")
    monkeypatch.setattr(install_units, "_loaded_from", lambda: (Path("/opt/microserve"),))
    text = unit_text(name, SYSTEM)
    file = tmp_path / name.replace("@", "@0")
    file.write_text(text)
    done = subprocess.run(
        [analyze, "--no-pager", "security", "--offline=true", str(file)], capture_output=True, text=True, check=False
    )
    found = re.search(r"Overall exposure level for \S+: (\d+\.\d)", done.stdout)
    assert found is not None, done.stderr
    assert float(found[1]) <= most


def refusing(families: str) -> str:
    """A program that runs a module where sockets of other families are refused, as `RestrictAddressFamilies=` does."""
    allowed = [getattr(socket, name) for name in families.split()]
    call = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    load, equal, answer, allow, refuse = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000 | errno.EAFNOSUPPORT
    # seccomp(2): the number of the call, and for socket(2) its first argument.
    rules = [(load, 0, 0, 0), (equal, 1, 0, call), (answer, 0, 0, allow), (load, 0, 0, 16)]
    for family in allowed:
        rules += [(equal, 0, 1, family), (answer, 0, 0, allow)]
    rules.append((answer, 0, 0, refuse))
    code = b"".join(struct.pack("HBBI", *rule) for rule in rules)
    return f"""
import ctypes, runpy, struct, sys
libc, code = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer({code!r})
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", {len(rules)}, ctypes.addressof(code)))
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit("seccomp is not to be had")
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", [ROUTER, ENGINE])
def test_what_the_sandbox_refuses_keeps_no_daemon_from_serving(name: str) -> None:
    """ZeroMQ ends the process when it may not ask for network devices."""
    bus, http = free_ports(2)
    arguments = {
        ROUTER: ["microserve.router", "--bind", f"tcp://127.0.0.1:{bus}", "--http-port", str(http)],
        ENGINE: ["microserve.engine", "--routers", f"tcp://127.0.0.1:{bus}", *FAKE],
    }[name]
    with subprocess.Popen(
        [sys.executable, "-c", refusing(settings(name)["RestrictAddressFamilies"]), *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=daemon_environ(),
    ) as process:
        try:
            assert process.stderr is not None
            # To its end, if it ends.
            assert any(" ready " in line for line in process.stderr)
            process.terminate()
            assert process.wait(START_LIMIT) == 0
        finally:
            process.kill()


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
        # At an even pace every limit comes soon: a fault that passes must not end a service for good.
        limits = ("10min", "20") if backs_off else ("0", None)
        assert (found["StartLimitIntervalSec"], found.get("StartLimitBurst")) == limits


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
