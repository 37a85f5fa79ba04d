"""`microserve config`: what it says of files and where values come from."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from tests.test_http_keys import make_certificate

from microserve.router.look import look
from microserve.runtime.api_keys import new_api_key
from microserve.runtime.config import RouterConfig
from microserve.runtime.keys import new_identity
from microserve.runtime.look import Seen
from microserve.runtime.zmq_bus import new_key_pair
from microserve.tools.config import main


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_valid_files_are_told_with_their_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    router = write(tmp_path, "a.toml", "http_port = 9000\n")
    engine = write(tmp_path, "b.toml", 'model = "demo"\n[fake]\nvocab_size = 10\n')
    both = write(tmp_path, "c.toml", "[router]\nhttp_port = 1\n[engine]\npage_size = 8\n")
    empty = write(tmp_path, "engine-7.toml", "")
    assert main(["check", router, engine, both, empty]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{router}: valid (router)",
        f"{engine}: valid (engine)",
        f"{both}: valid (router+engine)",
        f"{empty}: valid (engine)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http_port = 'x'", "http_port: 'x' is not a whole number"),
        ("http_prot = 1\nhttp_host='a'", "did you mean http_port?"),
        ("http_port = ", "is not valid TOML"),
        ("", "say --kind"),
    ],
)
def test_what_is_wrong_is_told_and_the_exit_code_says_so(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", write(tmp_path, "x.toml", text)]) == 2
    assert said in capsys.readouterr().err


TLS = "tls_cert = 'cert.pem'\ntls_key = 'key.pem'"


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with keys, API keys and a certificate, where the commands run."""
    for name, role in (("router-0", "router"), ("engine-0", "engine"), ("me", "client")):
        new_identity(tmp_path, name, role, new_key_pair)
    new_api_key(tmp_path / "api_keys.toml", "ann", "serve")
    make_certificate(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "said", "kept"),
    [
        ("[router]\nbind = 'tcp://*:1'", "bind = 'tcp://*:1' can be reached", "key_file = 'router-0.key'"),
        ("[engine]\nevents_bind = 'tcp://*:1'", "events_bind = 'tcp://*:1' can be", "key_file = 'engine-0.key'"),
        ("[engine]\nmetrics_port = 1\nmetrics_host = '::'", "metrics_host = '::' can be reached", "insecure = true"),
        (f"[router]\nhttp_host = '::'\n{TLS}", "http_host = '::' can be reached", "api_keys_file = 'api_keys.toml'"),
        ("[router]\nhttp_host = '::'\napi_keys_file = 'api_keys.toml'", "http_host = '::' can be reached", TLS),
        ("[router]\nhttp_host = '::'", "needs api_keys_file, tls_cert and tls_key", "insecure = true"),
    ],
)
def test_what_a_daemon_would_not_open_to_other_machines_is_told(
    text: str, said: str, kept: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", write(there, "x.toml", text)]) == 2
    assert said in capsys.readouterr().err
    assert main(["check", write(there, "x.toml", f"{text}\n{kept}")]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[router]\nkey_file = 'none.key'", "cannot read key file none.key: No such file or directory"),
        ("[engine]\nkey_file = 'none.key'", "cannot read key file none.key: No such file or directory"),
        ("[engine]\nkey_file = 'open.key'", "open.key holds a secret, and others may read it (mode 0644)"),
        ("[router]\nkey_file = 'me.key'", "key_file is the key of client 'me', and cannot speak as router 'me'"),
        ("[router]\nkey_file = 'router-0.key'\nrouter_id = 'x'", "key of router 'router-0', and cannot speak as"),
        ("[engine]\nkey_file = 'engine-0.key'\nengine_id = 'x'", "key of engine 'engine-0', and cannot speak as"),
        ("[router]\napi_keys_file = 'none.toml'", "cannot read none.toml: No such file or directory"),
        ("[router]\ntls_cert = 'none.pem'\ntls_key = 'key.pem'", "tls_cert none.pem, tls_key key.pem: "),
        ("[router]\ntls_cert = 'cert.pem'\ntls_key = 'none.key'", "cannot read key file none.key"),
        ("[router]\ntls_cert = 'cert.pem'", "tls_key is not set"),
        ("[router]\nstrategy = 'nonesuch'", "no strategy 'nonesuch'; there are: balanced, "),
        ("[router]\nstrategy_settings = {x = 1}", "strategy_settings: strategy 'data_parallel' has no setting 'x'"),
        ("[router]\nstrategy_folder = 'none'", "strategy folder none is not a folder"),
    ],
)
def test_what_a_daemon_would_not_start_with_is_told(
    text: str, said: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(there, "open.key", (there / "engine-0.key").read_text())
    (there / "open.key").chmod(0o644)
    file = write(there, "x.toml", text)
    assert main(["check", file]) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith(f"{file}: ")
    assert said in shown.err


def test_everything_that_is_wrong_is_told_at_once(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "[router]\nkey_file = 'a'\napi_keys_file = 'b'\ntls_key = 'c'\nstrategy = 'd'\n[engine]\nkey_file = 'e'"
    assert main(["check", write(there, "x.toml", text), "--json"]) == 2
    [found] = json.loads(capsys.readouterr().out)
    assert found["warnings"] == []
    assert [each.split(":")[0] for each in found["error"].split("; ")[:5]] == [
        "cannot read key file a",
        "cannot read b",
        "tls_cert is not set",
        "no strategy 'd'",
        "there are",
    ]
    assert found["error"].endswith("cannot read key file e: No such file or directory")


def test_a_daemons_files_may_all_be_right(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"[router]\nkey_file = 'router-0.key'\nrouter_id = 'router-0'\napi_keys_file = 'api_keys.toml'\n{TLS}\n"
    file = write(there, "x.toml", f"{text}strategy = 'balanced'\nstrategy_settings = {{ratio = 0.3}}")
    assert main(["check", file]) == 0
    assert capsys.readouterr() == (f"{file}: valid (router)\n", "")


def test_what_this_user_may_not_read_is_a_warning(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon is another user, who may."""
    read = Path.read_text

    def closed(path: Path, **options: str) -> str:
        if path.suffix == ".key":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, **options)

    monkeypatch.setattr(Path, "read_text", closed)
    file = write(there, "x.toml", "[engine]\nkey_file = 'engine-0.key'")
    assert main(["check", file]) == 0
    why = "cannot read engine-0.key: Permission denied; what it says was not looked at"
    assert capsys.readouterr() == (f"{file}: valid (engine)\n", f"{file}: warning: {why}\n")
    assert main(["check", file, "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["error"], found["warnings"]) == ("", [why])


STRATEGY = """
print("{}")
from pathlib import Path
from microserve import strategy

Path("was_run").touch()

@strategy
async def mine(request, fleet):
    async for chunk in fleet.pick().start_generate():
        yield chunk
"""


def test_strategies_of_a_folder_are_looked_at_too(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "strategies").mkdir(mode=0o755)
    for name, text in (("mine.py", STRATEGY), ("broken.py", "1 / 0")):
        write(there / "strategies", name, text)
        (there / "strategies" / name).chmod(0o644)
    file = write(there, "x.toml", "[router]\nstrategy_folder = 'strategies'\nstrategy = 'mine'")
    assert main(["check", file]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{file}: valid (router)\n"
    # A router starts all the same, and tells of it in its log.
    broken = "strategies/broken.py:1: ZeroDivisionError: division by zero"
    assert shown.err == f"{file}: warning: {broken}\n"


def test_root_does_not_run_what_others_may_change(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    folder = there / "strategies"
    folder.mkdir(mode=0o755)
    write(folder, "mine.py", STRATEGY)
    (folder / "mine.py").chmod(0o666)
    seen = Seen()
    look(RouterConfig(strategy_folder=str(folder), strategy="nonesuch"), seen)
    assert seen.errors == []
    owner = folder if folder.stat().st_uid else folder / "mine.py"
    assert seen.warnings == [
        f"strategy_folder: root does not run {owner}, which others may change; strategies were not looked at"
    ]
    assert not (there / "was_run").exists()


def test_a_look_that_does_not_come_to_its_end_is_told(
    there: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(there, "python", "#!/bin/sh\nexit 7\n")
    (there / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(there / "python"))
    file = write(there, "x.toml", "[router]\nhttp_port = 1")
    assert main(["check", file]) == 2
    assert capsys.readouterr().err == f"{file}: strategies or certificate could not be looked at: exit code 7\n"


def test_a_file_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.toml"), "--json"]) == 2
    (result,) = json.loads(capsys.readouterr().out)
    assert result["error"].startswith("cannot read configuration")


def test_show_says_where_each_value_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICROSERVE_ENGINE_MAX_RUNNING", "7")
    file = write(tmp_path, "engine.toml", "max_running = 3\npage_size = 8\n[fake]\nvocab_size = 10\n")
    assert main(["show", "engine", file, "--changed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [
        {"key": "page_size", "value": 8, "origin": file},
        {"key": "max_running", "value": 7, "origin": "MICROSERVE_ENGINE_MAX_RUNNING"},
        {"key": "fake.vocab_size", "value": 10, "origin": file},
    ]


def test_show_for_people_has_a_line_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "router"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert lines["http_port"] == ["8000", "default"]
    assert lines["router_id"] == ["-", "default"]


def test_show_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "router", write(tmp_path, "r.toml", "nonsense = 1")]) == 2
    assert "unknown setting" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "engine.toml"
    file.write_text('model = "/nope"\n')
    assert main(["check", str(file)]) == 2
    assert f"{file}: no model '/nope': no such folder" in capsys.readouterr().err
    file.write_text('model = "/nope"\nexecutor = "fake"\n')
    assert main(["check", str(file)]) == 0, "who computes nothing needs none"


def test_keys_that_nobody_knows_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("http_prt = 8001\n")
    assert main(["check", str(file)]) == 2
    assert "a router's or an engine's (neither knows http_prt); say --kind" in capsys.readouterr().err
